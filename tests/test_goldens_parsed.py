"""vLLM's own answers with its tool-call and reasoning parsers, against ours for the same token streams: as test_goldens.py.

`tests/golden/vllm_parsed.json` has a line for each case. The tokenizer is that of tests/golden/model with a few more tokens, those of the
formats: the cases were observed with both.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gaie_codec import BodyChunk, ModelInfo, ResponseHead, Transcoder, encode_frame
from gaie_codec.text.huggingface import HuggingFaceTokenizer
from test_goldens import GOLDEN, normalize

CASES = json.loads((GOLDEN / "vllm_parsed.json").read_text())
# Behind the last token of the model, in this order.
ADDED = (
    "[TOOL_CALLS] [ARGS] [CALL_ID] <|python_tag|> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜>"
    " <｜tool▁sep｜>"
).split()

# Case -> the heading in docs/differences.md that explains it. Of streams the folds are still compared.
PIECES = "Pieces of tool-call arguments"
DIFFERENCES = dict.fromkeys([name for name in CASES if re.match("llama3_json_t_.*_stream", name)], PIECES)
DIFFERENCES |= {
    "mistral_t_mistral": "Tool calls that are not quite in their format",
    "hermes_toolbad_stream": "A finish that nobody could foresee",
    "mistral_t_mistral_stream": "Tool calls that are not quite in their format",
}


def tokenizer() -> HuggingFaceTokenizer:
    files = {path.name: path.read_bytes() for path in (GOLDEN / "model").iterdir()}
    model = json.loads(files["tokenizer.json"])
    first = max(token["id"] for token in model["added_tokens"]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    model["added_tokens"] += [{"id": first + place, "content": content, **flags} for place, content in enumerate(ADDED)]
    return HuggingFaceTokenizer.from_files({**files, "tokenizer.json": json.dumps(model).encode()})


TOKENIZER = tokenizer()


def option(case: dict[str, Any], name: str) -> str:
    found = re.search(rf"--{name} (\S+)", case["oracle"])
    return found[1] if found else "none"


def transcode(case: dict[str, Any], *, stream: bool | None = None, cut: int | None = None) -> tuple[Any, int, str]:
    """Our call, HTTP status and body; the bytes of the responses at once, or `cut` at a time."""
    http, grpc = case["http"], case["grpc_vllm"][0]
    request = dict(http["request"])
    if stream is not None:
        request["stream"] = stream
        request.pop("stream_options", None)
    transcoder = Transcoder(
        "vllm.engine",
        tokenizer=TOKENIZER,
        model=ModelInfo(max_model_len=2048, served_model_name="test-model"),
        tool_call_parser=option(case, "tool-call-parser"),
        reasoning_parser=option(case, "reasoning-parser"),
    )
    call = transcoder.request(http["method"], http["path"], http["headers"], json.dumps(request).encode(), request_id="unused")
    response = call.response(created=1700000000)
    data = b"".join(encode_frame(base64.b64decode(message)) for message in grpc["responses_b64"])
    outputs = [*response.receive_headers([("content-type", "application/grpc")])]
    for start in range(0, len(data), cut or len(data)):
        outputs += response.receive_data(data[start : start + (cut or len(data))])
    outputs += response.receive_trailers([("grpc-status", "0")])
    assert isinstance(outputs[0], ResponseHead)
    return call, outputs[0].status, b"".join(out.data for out in outputs if isinstance(out, BodyChunk)).decode()


def settled(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a chunk without what carries nothing: empty content, empty arguments."""
    delta = {key: value for key, value in choice.get("delta", {}).items() if value != ""}
    calls = [call for call in delta.pop("tool_calls", ()) if "name" in call["function"] or call["function"].get("arguments")]
    return {**choice, "delta": {**delta, **({"tool_calls": calls} if calls else {})}}


def events(body: str) -> list[Any]:
    """The events of a stream without what carries nothing."""
    kept = []
    for text in body.split("\n\n")[:-1]:
        event = text if text == "data: [DONE]" else normalize(json.loads(text.removeprefix("data: ")))
        if isinstance(event, dict):
            event["choices"] = [settled(choice) for choice in event["choices"]]
            if any(choice == {"index": choice["index"], "delta": {}} for choice in event["choices"]) and "usage" not in event:
                continue
        kept.append(event)
    return kept


def folded(body: str) -> list[dict[str, Any]]:
    """What a client makes of a stream, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events(body)[:-1]:
        for chunk in event["choices"]:
            choice = choices.setdefault(chunk["index"], {"content": "", "reasoning": "", "calls": {}, "logprobs": []})
            delta = chunk["delta"]
            choice["content"] += delta.get("content", "")
            choice["reasoning"] += delta.get("reasoning", "")
            choice["logprobs"] += chunk.get("logprobs", {}).get("content", [])
            choice |= {key: chunk[key] for key in ("finish_reason", "stop_reason") if key in chunk}
            for piece in delta.get("tool_calls", ()):
                call = choice["calls"].setdefault(piece["index"], {"name": "", "arguments": ""})
                for key in call:
                    call[key] += piece["function"].get(key, "")
    return [choices[index] for index in sorted(choices)]


def folded_body(body: str) -> list[dict[str, Any]]:
    """Likewise of a whole body."""
    return [
        {
            "content": choice["message"].get("content", ""),
            "reasoning": choice["message"].get("reasoning", ""),
            "calls": {index: call["function"] for index, call in enumerate(choice["message"].get("tool_calls", ()))},
            "logprobs": choice.get("logprobs", {}).get("content", []),
        }
        | {key: choice[key] for key in ("finish_reason", "stop_reason") if key in choice}
        for choice in normalize(json.loads(body))["choices"]
    ]


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_request_is_vllms(name: str) -> None:
    call, _, _ = transcode(CASES[name])
    assert call.message == base64.b64decode(CASES[name]["grpc_vllm"][0]["request_b64"])


@pytest.mark.parametrize("name", sorted(CASES.keys() - DIFFERENCES.keys()))
def test_equal_to_vllm(name: str) -> None:
    case = CASES[name]
    _, status, body = transcode(case)
    theirs = case["http"]["body"]
    assert status == case["http"]["status"]
    if theirs.startswith("data: "):
        assert events(body) == events(theirs)
    else:
        assert normalize(json.loads(body)) == normalize(json.loads(theirs))


@pytest.mark.parametrize("name", sorted(name for name in DIFFERENCES if not name.startswith("mistral")))
def test_what_a_client_makes_of_the_pieces_is_equal(name: str) -> None:
    assert folded(transcode(CASES[name])[2]) == folded(CASES[name]["http"]["body"])


def test_a_call_that_is_not_quite_in_its_format() -> None:
    for name in ("mistral_t_mistral", "mistral_t_mistral_stream"):
        body = transcode(CASES[name])[2]
        (choice,) = (folded if name.endswith("_stream") else folded_body)(body)
        assert [(call["name"], json.loads(call["arguments"])) for call in choice["calls"].values()] == [
            ("get_weather", {"city": "Paris"}),
            ("get_time", {"tz": "UTC"}),
        ]


@pytest.mark.parametrize("name", sorted(CASES))
def test_streamed_and_unary_answers_agree(name: str) -> None:
    case = CASES[name]
    ours, whole = folded(transcode(case, stream=True)[2]), folded_body(transcode(case, stream=False)[2])
    if name.startswith("hermes_toolbad"):
        # A stream cannot take back the pieces of a call that is cut off; a body has them as content.
        assert [choice.pop("calls") for choice in ours] == [{0: {"name": "get_weather", "arguments": '{"city": "Par'}}]
        assert [choice.pop("calls") for choice in whole] == [{}]
        assert [choice.pop("content") for choice in whole] == ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par']
        assert [choice.pop("content") for choice in ours] == [""]
    assert ours == whole


@pytest.mark.parametrize("name", sorted(CASES))
def test_any_cut_of_the_bytes_gives_the_same_answer(name: str) -> None:
    assert transcode(CASES[name], cut=3)[2] == transcode(CASES[name])[2]


def test_differences_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    for heading in DIFFERENCES.values():
        assert f"## {heading}\n" in text
