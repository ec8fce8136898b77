"""Requests that are hard to get right, observed on vLLM 0.33.0's own HTTP server: our status, error and gRPC calls against the expected.

`tests/golden/http_cases.json` holds the request, vLLM's status and error body, and the sampling parameters expected on the wires of
`vllm.engine` (`vllm`) and `sglang.scheduler` (`sglang`), both without what has its usual value. vLLM's messages repeat the offending value
as `input`, which ours never do; the file has the first 600 characters of each. Where the wire cannot say what vLLM can, `lacks_*` and
`override` have the field. Every other difference is in DIFFERENCES and in docs/differences.md.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from gaie_codec import Call, Limits, ModelInfo, RequestError, Transcoder
from gaie_codec.openai.errors import encode_error
from gaie_codec.tokenizer_sources import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in json.loads((GOLDEN / "http_cases.json").read_text())}
TOKENIZER = load_tokenizer(str(GOLDEN / "model"))
MODEL = ModelInfo(max_model_len=2048, served_model_name="test-model", vocab_size=TOKENIZER.vocab_size, is_multimodal=False)

# What a case has where it says nothing else.
_USUAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "n": 1,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}
USUAL = {
    "vllm": {
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "n": 1,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
    },
    "sglang": {
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "n": 1,
        "top_k": -1,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
    },
}
NO_PARSERS = {"tool_call_parser": "none", "reasoning_parser": "none"}
# Fields whose zero says something.
OPTIONAL = {"vllm": ("temperature", "logprobs", "prompt_logprobs", "seed"), "sglang": ()}
DIALECTS = {"vllm": "vllm.engine", "sglang": "sglang.scheduler"}
CUT = 590  # characters: the golden file has no more of a message

# Heading in docs/differences.md -> the cases whose error has other words, or whose outcome is another one, by what it says there.
DIFFERENCES: dict[str, tuple[str, ...]] = {
    "Error bodies": (
        # FastAPI's `{"detail": ...}`: vLLM's sentence is at the beginning of our message
        *("json_invalid_utf8", "json_huge_int_5000_digits", "json_deep_nesting_1000", "hdr_gzip_body", "method_get"),
        # what is wrong with messages is said of the message that it is, not of each kind of message in turn
        *("content_null_user", "content_int", "content_part_string", "content_image_url_string", "assistant_tool_calls_no_function"),
        # vLLM's accident
        "messages_null",
        # it names an option of vLLM's
        "tools_auto_no_parser",
        # vLLM repeats the client's text
        *("logit_bias_nonint", "so_unknown_key", "so_and_rf"),
    ),
}
DIFFERENT = [name for names in DIFFERENCES.values() for name in names]
# What a wire has no field for, besides what a case itself says: `param` of the refusal.
LACKS = {
    "vllm": {"seed_9223372036854775807": "seed", "seed_-9223372036854775808": "seed"},
    "sglang": {
        "allowed_token_ids_ok": "allowed_token_ids",
        "cache_salt_ok": "cache_salt",
        "kv_transfer_params_ok": "kv_transfer_params",
    },
}
# Clamped to what an int32 holds, which cuts off nothing either.
CLAMPED = {("top_k_2147483648", "sglang"): {"top_k": 2**31 - 1}}

_INPUT = re.compile(r", 'input': (?:'[^']*'|\"[^\"]*\")(?=, 'ctx'|\}|$)")


def body_of(case: dict[str, Any]) -> bytes:
    return zlib.decompress(base64.b64decode(case["zlib"])) if "zlib" in case else case["body"].encode()


def send(case: dict[str, Any], dialect: str, **options: Any) -> Call:
    parsers = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"} if case.get("parsers") else NO_PARSERS
    transcoder = Transcoder(dialect, tokenizer=TOKENIZER, model=MODEL, limits=Limits(max_calls=1024), **parsers, **options)
    headers = {"content-type": "application/json", **case.get("headers", {})}
    return transcoder.request(case.get("method", "POST"), case["path"], list(headers.items()), body_of(case), request_id="host")


def answer(case: dict[str, Any], dialect: str) -> tuple[int, dict[str, Any] | None, Call | None]:
    """Status, error and call."""
    try:
        return 200, None, (call := send(case, dialect)) and call
    except RequestError as error:
        return error.http_status, json.loads(encode_error(error))["error"], None


def expected_error(case: dict[str, Any]) -> dict[str, Any]:
    """vLLM's error without what it repeats of the request, its message as far as the file has it."""
    error = dict(case["error"])
    message = error["message"]
    is_cut = len(message) >= CUT and not message.endswith("}")
    lines = message.split("\n")
    error["message"] = "\n".join(_INPUT.sub("", line) for line in (lines[:-1] if is_cut else lines))
    return error | ({"is_cut": True} if is_cut else {})


def is_equal_error(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    theirs = dict(theirs)
    if theirs.pop("is_cut", False):
        ours = {**ours, "message": ours["message"][: len(theirs["message"])]}
    return ours == theirs


def said(message: Any) -> dict[str, Any]:
    """The fields that say something."""
    found = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if not field.has_presence and not value:
            continue
        if hasattr(value, "items"):
            value = dict(value)
        elif not isinstance(value, str) and hasattr(value, "__len__"):
            value = list(value)
        found[field.name] = value
    return found


def rounded(params: dict[str, Any]) -> dict[str, Any]:
    """With the numbers of a 32-bit float."""
    return {key: struct.pack("f", value) if isinstance(value, float) else value for key, value in params.items()}


def expected_params(case: dict[str, Any], wire: str) -> dict[str, Any]:
    """As `said` has it."""
    params = USUAL[wire] | case[wire] | CLAMPED.get((case["id"], wire), {})
    if wire == "sglang":
        params.pop("stop", None)  # matched by the gateway
    if "logit_bias" in params:
        params["logit_bias"] = {int(key) if wire == "vllm" else key: value for key, value in params["logit_bias"].items()}
    return {key: value for key, value in params.items() if value or key in OPTIONAL[wire]}


def is_not_expressible(case: dict[str, Any], wire: str) -> str:
    """The field that the wire lacks, "" for none."""
    lacks = case.get(f"lacks_{wire}", ())
    return str(lacks[0]) if lacks else LACKS[wire].get(case["id"], "")


@pytest.mark.parametrize("wire", DIALECTS)
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(DIFFERENT)))
def test_outcome(name: str, wire: str) -> None:
    case = CASES[name]
    status, error, call = answer(case, DIALECTS[wire])
    lacking = is_not_expressible(case, wire)
    if lacking:
        assert (status, error and error["param"]) == (400, lacking)
        return
    assert status == case["status"], error
    if error is not None:
        assert is_equal_error(error, expected_error(case)), (error, expected_error(case))
        return
    assert call is not None
    assert len(call.calls) == case["calls"]
    if wire in case:
        message = call.transcoder.adapter.request_type.FromString(call.calls[0].message)
        assert rounded(said(message.sampling_params)) == rounded(expected_params(case, wire))
        for field, value in case.get(f"{wire}_request", {}).items():
            assert getattr(message, field) == value


@pytest.mark.parametrize("name", DIFFERENT)
def test_errors_in_other_words(name: str) -> None:
    case = CASES[name]
    status, error, _ = answer(case, "vllm.engine")
    assert error is not None
    assert status == error["code"] == case["status"]
    if "detail" in case["error"]:
        assert error["message"].startswith(case["error"]["detail"])
    else:
        assert not is_equal_error(error, expected_error(case)), "no difference any more"


def test_differences_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    for heading in DIFFERENCES:
        assert f"## {heading}\n" in text
