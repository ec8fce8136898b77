"""vLLM's own answers, observed on vLLM 0.33.0 with a scripted engine, against ours for the same token streams.

`tests/golden/vllm/*.json` hold the HTTP request, vLLM's exact body, the gRPC request expected and the gRPC responses that stand for the
engine's steps. Equal means equal JSON, chunk for chunk, after fixing what differs by nature (id, created, fingerprint), without vLLM's
always-null extras and without chunks that carry nothing. Every other difference is in DIFFERENCES and in docs/differences.md.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from gaie_codec import BodyChunk, Code, EndOfBody, ModelInfo, ResponseHead, Transcoder, encode_frame
from gaie_codec.tokenizer_sources import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES = {path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "vllm").glob("*.json"))}

# Case -> the heading in docs/differences.md that explains it.
DIFFERENCES = {
    "chat_error_first_stream": "An error before the first token is an HTTP error",
    "chat_error_mid_stream": "No [DONE] after an error",
    "comp_error_mid_stream": "No [DONE] after an error",
    **dict.fromkeys(("comp_logprobs", "comp_logprobs_emoji", "token_id_logprobs_comp"), "The likeliest besides the token itself"),
    **dict.fromkeys(
        ("chat_prompt_logprobs", "comp_prompt_logprobs", "comp_echo_logprobs", "comp_echo_logprobs_stream", "comp_echo_max0_logprobs"),
        "Log probabilities of the prompt",
    ),
}

TOKENIZER = load_tokenizer(str(GOLDEN / "model"))


def parsers_of(case: dict[str, Any]) -> dict[str, Any]:
    """The parsers that vLLM was started with."""
    flags = dict(zip(case["oracle"].split(), case["oracle"].split()[1:], strict=False))
    return {
        "tool_call_parser": flags.get("--tool-call-parser", "none"),
        "reasoning_parser": flags.get("--reasoning-parser", "none"),
    }


def transcode(
    case: dict[str, Any], stop_holdback: Any = "window", *, stream: bool | None = None, parsers: dict[str, Any] | None = None
) -> tuple[Any, int, str]:
    """Our call, HTTP status and body for a case."""
    http, grpc = case["http"], case["grpc_vllm"]
    request = http["request"] if stream is None else {**http["request"], "stream": stream}
    transcoder = Transcoder(
        "vllm.engine",
        tokenizer=TOKENIZER,
        model=ModelInfo(max_model_len=2048, served_model_name="test-model"),
        stop_holdback=stop_holdback,
        prompt_tokens_details="--enable-prompt-tokens-details" in case["oracle"],
        return_tokens_as_token_ids="--return-tokens-as-token-ids" in case["oracle"],
        **(parsers_of(case) if parsers is None else parsers),
    )
    call = transcoder.request(http["method"], http["path"], http["headers"], json.dumps(request).encode(), request_id="unused")
    response = call.response(created=1700000000)
    outputs: list[Any] = []
    for place, one in enumerate(grpc):
        outputs += response.receive_headers([("content-type", "application/grpc")], call=place)
        outputs += response.receive_data(b"".join(encode_frame(base64.b64decode(message)) for message in one["responses_b64"]), call=place)
        status = [("grpc-status", str(int(Code[one["status"]["code"]]))), ("grpc-message", one["status"]["details"])]
        outputs += response.receive_trailers(status, call=place)
    head, *chunks, end = outputs
    assert isinstance(head, ResponseHead)
    assert isinstance(end, EndOfBody)
    assert all(isinstance(chunk, BodyChunk) for chunk in chunks)
    return call, head.status, b"".join(chunk.data for chunk in chunks).decode()


def normalize(value: Any) -> Any:
    """Without what differs by nature, and without nulls: vLLM writes every key that it has."""
    if isinstance(value, dict):
        return {
            key: normalize(item) for key, item in value.items() if item is not None and key not in ("id", "created", "system_fingerprint")
        }
    return [normalize(item) for item in value] if isinstance(value, list) else value


def events(body: str) -> list[Any]:
    """The events of a stream, normalized, without chunks that carry nothing."""
    assert body.endswith("\n\n")
    decoded = [
        event if event == "data: [DONE]" else normalize(json.loads(event.removeprefix("data: "))) for event in body.split("\n\n")[:-1]
    ]
    nothing = ({"content": ""}, "")
    return [
        event
        for event in decoded
        if not (
            isinstance(event, dict)
            and all(len(choice) == 2 and choice.get("delta", choice.get("text")) in nothing for choice in event.get("choices") or [{}])
        )
    ]


def parsed(body: str) -> Any:
    return events(body) if body.startswith("data: ") else normalize(json.loads(body))


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case["oracle"] == "vllm 0.33.0 plain"))
def test_formats_that_the_template_shows_change_no_plain_answer(name: str) -> None:
    plain, guessed = (transcode(CASES[name], parsers=parsers) for parsers in (None, {}))
    assert [one.message for one in guessed[0].calls] == [one.message for one in plain[0].calls]
    assert guessed[1:] == plain[1:]


@pytest.mark.parametrize("name", sorted(CASES.keys() - DIFFERENCES.keys()))
def test_equal_to_vllm(name: str) -> None:
    case = CASES[name]
    call, status, body = transcode(case)
    assert [one.message for one in call.calls] == [base64.b64decode(one["request_b64"]) for one in case["grpc_vllm"]]
    assert status == case["http"]["status"]
    ours, theirs = parsed(body), parsed(case["http"]["body"])
    if len(call.calls) > 1:  # they interleave as they like
        ours, theirs = (sorted(events[:-2], key=index_of) + events[-2:] for events in (ours, theirs))
    assert ours == theirs


def index_of(event: Any) -> int:
    return int(event["choices"][0]["index"])


@pytest.mark.parametrize("name", sorted(name for name in CASES if "_stop_str" in name or "unmatched" in name))
def test_default_holdback_differs_in_chunk_boundaries_only(name: str) -> None:
    def content(body: str) -> str:
        return "".join(c["delta"].get("content", "") for event in events(body)[:-1] for c in event["choices"])

    _, _, ours = transcode(CASES[name], "prefix")
    theirs = CASES[name]["http"]["body"]
    assert content(ours) == content(theirs)
    assert events(ours)[-2:] == events(theirs)[-2:] or "logprobs" in name or "unmatched" in name or "usage" not in theirs


def test_error_before_the_first_token_is_an_http_error() -> None:
    case = CASES["chat_error_first_stream"]
    _, status, body = transcode(case)
    assert status == 500
    assert [normalize(json.loads(body))] == [event for event in events(case["http"]["body"]) if "error" in event]


@pytest.mark.parametrize("name", ["chat_error_mid_stream", "comp_error_mid_stream"])
def test_error_amid_the_stream_is_vllms_without_done(name: str) -> None:
    case = CASES[name]
    _, status, body = transcode(case)
    assert status == 200
    assert [*events(body), "data: [DONE]"] == events(case["http"]["body"])


def test_differences_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    for heading in DIFFERENCES.values():
        assert f"## {heading}\n" in text


@pytest.mark.parametrize(
    "name", sorted(name for name in CASES if name.endswith("_stream") and name.startswith("chat") and name not in DIFFERENCES)
)
def test_streamed_and_unary_answers_agree(name: str) -> None:
    case = CASES[name]
    streamed = events(transcode(case)[2])
    options = {key: value for key, value in case["http"]["request"].items() if key != "stream_options"}
    plain = {**case, "http": {**case["http"], "request": options}}
    unary = normalize(json.loads(transcode(plain, stream=False)[2]))
    chunks = [choice for event in streamed[:-1] for choice in event["choices"]]
    assert "".join(c["delta"].get("content", "") for c in chunks) == unary["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in chunks if "finish_reason" in c] == [unary["choices"][0]["finish_reason"]]
    folded = [entry for c in chunks for entry in c.get("logprobs", {}).get("content", [])]
    assert folded == unary["choices"][0].get("logprobs", {}).get("content", [])
