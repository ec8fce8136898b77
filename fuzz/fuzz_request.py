"""Invariant tested: a request body is refused with a CodecError that has a JSON answer, or accepted, and then it can be answered.

A body is not cut on its way in, so instead of the body the answer to it is cut, and must not depend on that.

    python fuzz/fuzz_request.py --seconds 60 --seed 1
"""

from __future__ import annotations

import json
import sys

from harness import ACCEPTED, Cut, run

from gaie_codec import BodyChunk, CodecError, FinishEvent, Transcoder, encode_error_response, encode_frame
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
TRANSCODERS = [
    Transcoder("vllm.engine", tokenizer=TOKENIZER),
    Transcoder("vllm.engine", tokenizer=TOKENIZER, snapshot="intree-0.14.0", unsupported="drop"),
]
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
CORPUS = [
    json.dumps({"messages": [USER], **fields}).encode()
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
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "\u00e9"}]}]}, ensure_ascii=False).encode("utf-16"),
]


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """What becomes of a body with the newest snapshot, and then of the same with the oldest."""
    new, old = (_answer(transcoder, data, cut) for transcoder in TRANSCODERS)
    return (*new, *old)


def _answer(transcoder: Transcoder, data: bytes, cut: Cut) -> tuple[object, ...]:
    try:
        call = transcoder.request("POST", "/v1/chat/completions", (), data, request_id="r")
    except CodecError as error:
        head, chunk, _ = encode_error_response(error)
        outcome = type(error).__name__, error.param
    else:
        events = [FinishEvent(index=index, token_ids=[42, 1536, 81]) for index in range(min(call.inference.sampling.n, 100))]
        body = b"".join(encode_frame(transcoder.adapter.encode_response(event).SerializeToString()) for event in events)
        response = call.response(created=1)
        outputs = [*response.receive_headers()]
        for piece in cut(body):
            outputs += response.receive_data(piece)
        outputs += response.receive_trailers({"grpc-status": "0"})
        assert response.ended
        return ACCEPTED, b"".join(output.data for output in outputs if isinstance(output, BodyChunk))
    assert 400 <= head.status < 500
    json.loads(chunk.data)
    return outcome


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
