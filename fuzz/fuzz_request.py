"""Invariant tested: a request body is refused with a CodecError that has a JSON answer, or accepted, and then it can be answered.

A body is not cut on its way in, so instead of the body the answer to it is cut, and must not depend on that.

    python fuzz/fuzz_request.py --seconds 60 --seed 1
"""

from __future__ import annotations

import json
import sys

from dialects import TOKENIZER, answer, frames, transcoders
from harness import ACCEPTED, Cut, run

from gaie_codec import BodyChunk, CodecError, Transcoder, encode_error_response

TRANSCODERS = [*transcoders().values(), Transcoder("vllm.engine", snapshot="intree-0.14.0", tokenizer=TOKENIZER, unsupported="drop")]
HELLO = TOKENIZER.encode("Hello", add_special_tokens=False)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
CORPUS = [
    json.dumps({"messages": [USER], "prompt": ["a", [5, 6]], **fields}).encode()
    for fields in (
        {},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "model": "m"},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "n": 2, "max_tokens": 5, "min_tokens": 1},
        {"frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.1, "max_completion_tokens": 5, "priority": 0},
        {"stop": ["a", "b"], "stop_token_ids": [5], "logit_bias": {"5": 1.5}, "ignore_eos": True},
        {"bad_words": ["x"], "allowed_token_ids": [5]},
        {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "user": "u", "unknown": 1, "request_id": "r"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": [1, {"b": None}]}}}},
        {"structured_outputs": {"choice": ["a", "b"]}, "kv_transfer_params": {"a": [1]}, "cache_salt": "s"},
        {"tools": [TOOL], "tool_choice": "none", "documents": [{}], "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low"},
        {"truncate_prompt_tokens": 3, "truncation_side": "right", "add_generation_prompt": False, "continue_final_message": True},
    )
] + [
    json.dumps({"messages": [CALLED]}).encode(),
    json.dumps(
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            ],
            "instructions": "i",
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "reasoning": {"effort": "low"},
            "truncation": "auto",
            "metadata": {"a": "b"},
            "stream": True,
        }
    ).encode(),
    json.dumps(
        {
            "model": "m",
            "max_tokens": 2000,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]}]},
            ],
            "system": [{"type": "text", "text": "s"}],
            "tools": [{"name": "f", "input_schema": {}}],
            "tool_choice": {"type": "none"},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
            "stop_sequences": ["x"],
            "top_k": 5,
            "stream": True,
        }
    ).encode(),
    json.dumps({"input": "Hi", "tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": "none"}).encode(),
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "\u00e9"}]}]}, ensure_ascii=False).encode("utf-16"),
]


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """What becomes of a body at each endpoint of one dialect, which its bytes choose."""
    transcoder = TRANSCODERS[sum(data) % len(TRANSCODERS)]
    answers = [_answer(transcoder, path, data, cut) for path in PATHS]
    outcomes = [answer[0] for answer in answers]
    return (ACCEPTED if ACCEPTED in outcomes else outcomes[0], *answers)


def _answer(transcoder: Transcoder, path: str, data: bytes, cut: Cut) -> tuple[object, ...]:
    try:
        call = transcoder.request("POST", path, (), data, request_id="r")
    except CodecError as error:
        head, chunk, _ = encode_error_response(error, path)
        outcome = type(error).__name__, error.param
    else:
        if sum(one.choices for one in call.calls) > 100:
            return ("too much to answer",)
        response = call.response(created=1)
        outputs = []
        for place, one in enumerate(call.calls):
            body = frames(transcoder, one.path, answer(transcoder, one, HELLO))
            outputs += [*response.receive_headers(call=place)]
            for piece in cut(body):
                outputs += response.receive_data(piece, call=place)
            outputs += response.receive_trailers({"grpc-status": "0"}, call=place)
        assert response.ended
        assert response.error is None or call.is_passthrough, response.error
        return ACCEPTED, b"".join(output.data for output in outputs if isinstance(output, BodyChunk))
    assert 400 <= head.status < 500
    json.loads(chunk.data)
    return outcome


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
