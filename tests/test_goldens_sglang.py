"""SGLang's own answers, observed on SGLang 0.5.23 with a scripted TokenizerManager, against ours in its flavor for the same tokens.

`tests/golden/sglang/*.json` hold the HTTP request, SGLang's exact body, the request to its scheduler and the responses that stand for the
engine's steps. Bodies are equal as JSON with all their nulls, after fixing id, created and ids of tool calls. Where tools are parsed
SGLang writes more nulls than elsewhere, which are left out on both sides, and texts are compared joined: there the cuts are the script's.
Every other difference is in DIFFERENCES and in docs/differences.md.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gaie_codec import BodyChunk, Code, ModelInfo, RequestError, ResponseHead, Transcoder, encode_error_response, encode_frame
from gaie_codec.tokenizer_sources import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "sglang").glob("*.json"))}
TOKENIZER = load_tokenizer(str(GOLDEN / "model"))

# Case -> the heading in docs/differences.md that explains it.
SECTION = "Answers in SGLang's flavor"
DIFFERENCES = {
    "chat_error_first_stream": "An error before the first token is an HTTP error",
    "chat_error_mid_stream": "No [DONE] after an error",
    "chat_return_token_ids_stream": SECTION,
    "err_rf_strict_str": SECTION,
    "err_stop_40": SECTION,
}
ANSWERED = sorted(name for name, case in CASES.items() if "grpc_sglang" in case and name not in DIFFERENCES)
REFUSED = sorted(name for name, case in CASES.items() if case["http"]["status"] != 200 and name not in DIFFERENCES)


def transcoder_of(case: dict[str, Any]) -> Transcoder:
    flags = dict(zip(case["server"].split(), case["server"].split()[1:], strict=False))
    return Transcoder(
        "sglang.scheduler",
        tokenizer=TOKENIZER,
        model=ModelInfo(max_model_len=2048, served_model_name="test-model", eos_token_ids=(2,)),
        flavor="sglang",
        tool_call_parser=flags.get("--tool-call-parser", "none"),
        reasoning_parser=flags.get("--reasoning-parser", "none"),
    )


def transcode(case: dict[str, Any]) -> tuple[Any, int, str]:
    """Our call, HTTP status and body for a case."""
    http = case["http"]
    transcoder = transcoder_of(case)
    body = http["request"] if isinstance(http["request"], str) else json.dumps(http["request"])
    try:
        call = transcoder.request(http["method"], http["path"], http["headers"], body.encode(), request_id="golden")
    except RequestError as error:
        head, chunk, _ = encode_error_response(error, flavor=transcoder.flavor.name)
        assert isinstance(head, ResponseHead)
        assert isinstance(chunk, BodyChunk)
        return None, head.status, chunk.data.decode()
    (grpc,) = case["grpc_sglang"]
    response = call.response(created=1700000000)
    outputs = [*response.receive_headers([("content-type", "application/grpc")])]
    for message in grpc["responses_b64"]:
        outputs += response.receive_data(encode_frame(base64.b64decode(message)))
    outputs += response.receive_trailers(
        [("grpc-status", str(int(Code[grpc["status"]["code"]]))), ("grpc-message", grpc["status"]["details"])]
    )
    head, *chunks, _ = outputs
    assert isinstance(head, ResponseHead)
    return call, head.status, b"".join(chunk.data for chunk in chunks if isinstance(chunk, BodyChunk)).decode()


def parsed(body: str) -> Any:
    """Events, or the one body, with ids of tool calls made alike."""
    body = re.sub(r'"call_[0-9a-f]{24}"', '"call_"', body)
    if not body.startswith("data: "):
        return json.loads(body)
    return [event if event == "data: [DONE]" else json.loads(event.removeprefix("data: ")) for event in body.split("\n\n")[:-1]]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def joined(events: list[Any]) -> list[Any]:
    """The chunks of a stream, without nulls, those that say the same kind of thing as one."""
    whole: list[Any] = []
    for event in without_nulls(events):
        last = _said(whole[-1]) if whole else None
        said = _said(event)
        if last is None or said is None or last.keys() != said.keys() or not said or "role" in last or "id" in said:
            whole.append(event)
            continue
        for key, text in said.items():
            if key == "tool_calls":
                last[key][0]["function"]["arguments"] += text[0]["function"]["arguments"]
            else:
                last[key] += text
    return whole


def _said(event: Any) -> Any:
    choices = event.get("choices") if isinstance(event, dict) else None
    if not choices or "finish_reason" in choices[0]:
        return None
    delta = choices[0]["delta"]
    return {**delta, "id": 1} if "id" in delta.get("tool_calls", [{}])[0] else delta


# What SGLang tells as content of the line before the end tag of a call.
LEAK = {"content": "\n"}


def comparable(case: dict[str, Any], body: str) -> Any:
    told = parsed(body)
    if "tools" in case["http"]["request"]:
        told = [event for event in joined(told) if _said(event) != LEAK] if isinstance(told, list) else without_nulls(told)
    if "--reasoning-parser" in case["server"]:  # the script counted no reasoning tokens, and nothing counts them in SGLang's HTTP layer
        for event in told if isinstance(told, list) else [told]:
            if isinstance(event, dict) and event.get("usage"):
                del event["usage"]["reasoning_tokens"]
    return told


@pytest.mark.parametrize("name", ANSWERED)
def test_equal_to_sglang(name: str) -> None:
    case = CASES[name]
    _, status, body = transcode(case)
    assert status == case["http"]["status"]
    assert comparable(case, body) == comparable(case, case["http"]["body"])


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_sglangs_form_and_our_words(name: str) -> None:
    case = CASES[name]
    _, status, body = transcode(case)
    ours, theirs = json.loads(body), json.loads(case["http"]["body"])
    assert status == case["http"]["status"]
    assert [*ours] == [*theirs]
    assert [ours[key] for key in ("object", "type", "code")] == [theirs[key] for key in ("object", "type", "code")]


@pytest.mark.parametrize("name", ANSWERED)
def test_equal_requests(name: str) -> None:
    """Apart from what forces a call, which is a newer form of the same tag, and from what nobody reads: the scheduler has no text."""
    call, _, _ = transcode(CASES[name])
    kind = call.transcoder.adapter.request_type
    ours, theirs = kind.FromString(call.message), kind.FromString(base64.b64decode(CASES[name]["grpc_sglang"][0]["request_b64"]))
    for message in (ours, theirs):
        if "--reasoning-parser" in CASES[name]["server"]:
            message.sampling_params.ClearField("skip_special_tokens")
        if message.sampling_params.structural_tag:
            message.sampling_params.structural_tag = "tag"
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", ANSWERED)
def test_streamed_and_unary_answers_agree(name: str) -> None:
    case = CASES[name]
    plain = {key: value for key, value in case["http"]["request"].items() if key != "stream_options"}
    _, _, streamed = transcode({**case, "http": {**case["http"], "request": {**plain, "stream": True}}})
    _, _, unary = transcode({**case, "http": {**case["http"], "request": {**plain, "stream": False}}})
    (whole,) = parsed(unary)["choices"]
    chunks = [choice for event in parsed(streamed)[:-1] for choice in event["choices"]]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [whole["finish_reason"]]
    if "message" not in whole:
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        return
    for key in ("content", "reasoning_content"):
        assert "".join(chunk["delta"].get(key) or "" for chunk in chunks) == (whole["message"][key] or "")
    pieces = [piece for chunk in chunks for piece in chunk["delta"].get("tool_calls") or ()]
    calls = whole["message"].get("tool_calls", [])
    assert [piece["function"]["name"] for piece in pieces if piece["id"]] == [one["function"]["name"] for one in calls]
    for one in calls:
        arguments = (piece["function"]["arguments"] for piece in pieces if piece["index"] == one["index"])
        assert "".join(arguments) == one["function"]["arguments"]


def test_an_error_before_the_first_token_is_flat() -> None:
    _, status, body = transcode(CASES["chat_error_first_stream"])
    assert (status, json.loads(body)) == (
        500,
        {"object": "error", "message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500},
    )


def test_an_error_amid_the_stream_is_sglangs_without_done_and_the_servers_words() -> None:
    case = CASES["chat_error_mid_stream"]
    ours, theirs = parsed(transcode(case)[2]), parsed(case["http"]["body"])
    theirs[-2]["error"]["message"] = "Internal server error"
    assert [*ours, "data: [DONE]"] == theirs


def test_no_more_stop_strings_than_sglangs_own_limit() -> None:
    assert transcode(CASES["err_stop_40"])[1] == 400


def test_streamed_token_ids_are_answered() -> None:
    case = {**CASES["chat_return_token_ids_stream"], "grpc_sglang": CASES["chat_hello_stream"]["grpc_sglang"]}
    _, status, body = transcode(case)
    first, *chunks = parsed(body)[:-1]
    assert status == 200
    assert first["prompt_token_ids"]
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]] == [42, 1581, 368, 14, 4187, 543, 3, 2]


def test_differences_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    for heading in DIFFERENCES.values():
        assert f"## {heading}\n" in text
