"""Adversarial response streams: 106 cases of what a model server may send, and what a client has to get.

`tests/golden/grpc_to_sse.json` holds them: the messages as protojson with the status that follows, or the actions of a server at HTTP/2
level. `checks` are judged as they are; where there are none, `expected` was read and judged by hand, in JUDGED or in a test of its own.
What ends otherwise here than written there is in DIFFERENCES and in docs/differences.md.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format

from gaie_codec import BodyChunk, Code, EndOfBody, Limits, ModelInfo, ResponseHead, Transcoder, encode_frame
from gaie_codec.tokenizer_sources import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, Any] = {case["id"]: case for case in json.loads((GOLDEN / "grpc_to_sse.json").read_text())}
DIALECTS = {"vllm": "vllm.engine", "sglang": "sglang.scheduler"}
TOKENIZER = load_tokenizer(str(GOLDEN / "model"))
MEBIBYTE = 1024 * 1024

# The gRPC project's PROTOCOL-HTTP2.md, "Errors": what a host's HTTP/2 stack, or its gRPC library, makes of a RST_STREAM.
RESETS = {0: Code.INTERNAL, 2: Code.INTERNAL, 3: Code.INTERNAL, 7: Code.UNAVAILABLE, 8: Code.CANCELLED}

# Actions below the core -> what a host makes of them. GOAWAY with a last stream before ours is a REFUSED_STREAM; a graceful one, and
# 1xx headers, do not concern the stream.
BELOW_THE_CORE = {
    "close": "receive_status(UNAVAILABLE), or receive_eof where the host's library tells no more than that",
    "goaway": "receive_status(UNAVAILABLE) unless the stream goes on",
    "hang": "receive_status(DEADLINE_EXCEEDED) at the host's own deadline",
    "rst": "receive_status of the code in RESETS",
}

# Cases of the group `client` are about hosts; where each is tested.
HOSTS = {
    "client_disconnect_mid": "tests/test_asgi.py, tests/test_e2e.py; behind Envoy tests/envoy",
    "client_disconnect_before_first_token": "tests/test_asgi.py",
    "client_half_close": "the HTTP server's (uvicorn, Envoy)",
    "client_pipelined_requests": "the HTTP server's (uvicorn, Envoy)",
    "keepalive_comment": "optional, and not done: Envoy and uvicorn keep connections alive",
    "first_byte_latency": "test_nothing_goes_out_before_the_first_message",
}

# Case -> the heading in docs/differences.md that explains why the outcome is another one.
DIFFERENCES = {
    "empty_stream_ok": "A broken answer of the model server is 502",
    "frame_trailers_only_ok": "A broken answer of the model server is 502",
    "frame_compressed_gzip_bad": "A broken answer of the model server is 502",
    "frame_compressed_bomb": "A broken answer of the model server is 502",
    "frame_len_4gib": "A broken answer of the model server is 502",
    "frame_garbage_payload": "A broken answer of the model server is 502",
    "frame_truncated_message": "A broken answer of the model server is 502",
}

# How a framing case ends where its `expected` is no formula: delivered whole, by an HTTP error, or by an error event.
JUDGED: dict[str, tuple[str, int]] = {
    "frame_compressed_gzip_ok": ("whole", 200),
    "frame_compressed_gzip_bad": ("http", 502),
    "frame_compressed_bomb": ("http", 502),
    "frame_len_4gib": ("http", 502),
    "frame_len_5mb": ("http", 502),  # whole: see test_a_message_of_five_mebibytes
    "frame_truncated_message": ("event", 502),
    "frame_trailing_garbage_prefix": ("event", 502),
    "frame_zero_length_message": ("whole", 200),
    "frame_garbage_payload": ("event", 502),
    "frame_unknown_fields": ("whole", 200),
    "frame_both_oneofs": ("whole", 200),
    "frame_unpacked_token_ids": ("whole", 200),
    "frame_trailers_only_ok": ("http", 502),
    "frame_status_after_complete_internal": ("whole", 200),
    "frame_trailers_status_twice": ("whole", 200),
    "frame_grpc_message_raw_bytes": ("event", 400),
    "frame_http_200_html": ("http", 502),
    "frame_http_200_json_ct_with_status": ("http", 502),
    "frame_http_200_no_ct": ("whole", 200),
    "frame_goaway_refused": ("http", 503),
    "frame_goaway_then_finish": ("whole", 200),
    "frame_trailer_big_16k": ("event", 500),
    "frame_headers_1xx": ("whole", 200),
    "frame_messages_then_no_complete_ok": ("event", 502),
}


class Outcome(msgspec.Struct):
    """What a client got of one answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    usage: Any

    @property
    def events(self) -> list[Any]:
        """Those of a stream that are JSON."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == ""
        return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]

    @property
    def is_done(self) -> bool:
        return self.body.endswith(b"data: [DONE]\n\n")

    @property
    def error(self) -> Any:
        if not self.body.startswith(b"data: "):
            return json.loads(self.body).get("error")
        return self.events[-1].get("error") if self.events else None

    def choices(self, index: int = 0) -> list[Any]:
        return [choice for event in self.events for choice in event.get("choices", ()) if choice["index"] == index]

    def content(self, index: int = 0) -> str:
        return "".join(choice["delta"].get("content") or "" for choice in self.choices(index))

    def finish(self, index: int = 0) -> Any:
        (last,) = [choice for choice in self.choices(index) if choice["finish_reason"] is not None]
        return last

    def joined(self, name: str, index: int = 0) -> str:
        return "".join(choice["delta"].get(name) or "" for choice in self.choices(index))


def whole(value: Any) -> Any:
    """With runs written out."""
    if isinstance(value, dict):
        if value.keys() == {"repeat", "times"}:
            run = [value["repeat"]] * value["times"]
            return "".join(run) if isinstance(value["repeat"], str) else run
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def ask(dialect: str, request: Any, path: str = "/v1/chat/completions", **options: Any) -> Any:
    model = ModelInfo(max_model_len=200_000, served_model_name="test-model", eos_token_ids=(2,))
    parsers = {"tool_call_parser": "none", "reasoning_parser": "none"}
    transcoder = Transcoder(dialect, tokenizer=TOKENIZER, model=model, **(parsers | options))
    return transcoder.request("POST", path, {}, json.dumps(request).encode(), request_id="r")


def outcome(outputs: list[Any], response: Any) -> Outcome:
    head, *chunks, end = outputs
    assert isinstance(head, ResponseHead)
    assert isinstance(end, EndOfBody)
    assert all(isinstance(chunk, BodyChunk) for chunk in chunks)
    return Outcome(head.status, dict(head.headers), b"".join(chunk.data for chunk in chunks), response.usage)


def answer(case: dict[str, Any], request: Any = None, **options: Any) -> Outcome:
    """Ours, for the messages and the status of a case."""
    if case["group"] in ("tools", "reasoning"):
        options = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"} | options
    call = ask(DIALECTS[case["backend"]], request if request is not None else case["request"], **options)
    response = call.response(created=1)
    outputs = [*response.receive_headers({"content-type": "application/grpc"})]
    for message in whole(case["grpc"]["messages"]):
        outputs += response.receive_data(encode_frame(encoded(call, message)))
    status = case["grpc"]["status"]
    outputs += response.receive_trailers([("grpc-status", str(int(Code[status["code"]]))), ("grpc-message", status["details"])])
    return outcome(outputs, response)


def encoded(call: Any, message: Any) -> bytes:
    method = call.transcoder.adapter.snapshot.method_at(call.calls[0].path)
    return json_format.ParseDict(message, method.response()).SerializeToString()


# A case of two choices whose messages are those of one: test_each_choice_has_a_parser_of_its_own.
HALVES = {"tools_n2"}
SPECIFIED = sorted(name for name, case in CASES.items() if "grpc" in case and name not in HALVES)


@pytest.mark.parametrize("name", SPECIFIED)
def test_checks(name: str) -> None:
    case = CASES[name]
    ours = answer(case)
    checks = dict(case["checks"])
    if name in DIFFERENCES:
        assert checks.pop("http_status") == 500
        assert ours.status == 502
    http_status = checks.pop("http_status", ours.status)
    assert ours.status == http_status
    if "http_status" in case["checks"]:
        assert ours.headers["content-type"] == "application/json"
        assert ours.error["code"] == ours.status
    if checks.pop("error", False):
        assert ours.error is not None
        assert not ours.is_done
        assert not [choice for choice in ours.choices() if choice["finish_reason"] is not None] or name == "n2_missing_second_complete"
    elif ours.status == 200 and case["request"]["stream"]:
        assert ours.is_done
        assert ours.finish()
    if "content" in checks:
        assert ours.content() == checks.pop("content")
    if "content_chunks" in checks:
        assert len([choice for choice in ours.choices() if choice["delta"].get("content")]) == checks.pop("content_chunks")
    if "finish_reason" in checks:
        assert ours.finish()["finish_reason"] == checks.pop("finish_reason")
    if "stop_reason" in checks:
        assert ours.finish()["stop_reason"] == checks.pop("stop_reason")
    if "completion_tokens" in checks:
        assert ours.usage.completion_tokens == checks.pop("completion_tokens")
    if "usage" in checks:
        usage = ours.events[-1]["usage"]
        assert {key: usage[key] for key in checks["usage"]} == checks.pop("usage")
    if "logprob_value" in checks:
        assert ours.choices()[1]["logprobs"]["content"][0]["logprob"] == checks.pop("logprob_value")
    if "forbid" in checks:
        assert checks.pop("forbid") not in ours.body.decode()
    assert not checks, "a kind of check that nothing here judges"


@pytest.mark.parametrize("name", [name for name in SPECIFIED if CASES[name]["group"] in ("content", "lifecycle", "stop", "counts")])
def test_a_body_says_the_same(name: str) -> None:
    """Law 4 for these."""
    case = CASES[name]
    streamed = answer(case)
    request = {key: value for key, value in case["request"].items() if key != "stream_options"}
    unary = answer(case, {**request, "stream": False})
    if streamed.status != 200 or streamed.error is not None:
        assert unary.status == json.loads(unary.body)["error"]["code"]
        assert unary.error == streamed.error
        return
    (choice,) = json.loads(unary.body)["choices"]
    assert choice["message"]["content"] == streamed.content()
    assert (choice["finish_reason"], choice["stop_reason"]) == tuple(streamed.finish()[key] for key in ("finish_reason", "stop_reason"))
    assert unary.usage == streamed.usage


# What `expected` says beyond the checks.


def test_one_chunk_per_token_and_the_finish_alone() -> None:
    ours = answer(CASES["hello_one_token_per_chunk"])
    assert [choice["delta"] for choice in ours.choices()] == [
        {"role": "assistant", "content": ""},
        *({"content": text} for text in ("H", "el", "lo", ",", " wor", "ld", "!")),
        {"content": ""},
    ]


def test_a_burst_is_one_chunk_with_its_finish() -> None:
    ours = answer(CASES["hello_one_burst"])
    _, only = ours.choices()
    assert (only["delta"], only["finish_reason"]) == ({"content": "Hello, world!"}, "stop")


def test_a_split_character_comes_whole() -> None:
    assert [choice["delta"].get("content") for choice in answer(CASES["emoji_split_across_bursts"]).choices()] == ["", "👋!", ""]


def test_an_incomplete_tail_is_dropped() -> None:
    assert answer(CASES["utf8_cut_at_length"]).content() == "ok "


def test_control_characters_are_escaped() -> None:
    body = answer(CASES["nul_and_controls"]).body
    assert b'"content":"\\u0000"' in body
    assert b'"content":"\\u001b"' in body


def test_empty_messages_make_no_events() -> None:
    assert [choice["delta"] for choice in answer(CASES["empty_chunk"]).choices()] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello, world!"},
        {"content": ""},
    ]


def test_a_long_message_is_one_chunk() -> None:
    ours = answer(CASES["long_single_chunk_100k_tokens"])
    assert ours.usage.completion_tokens == 100_000
    assert [len(choice["delta"]["content"]) > 0 for choice in ours.choices()] == [False, True, False]


def test_reasoning_tokens_of_the_server_are_told() -> None:
    usage = answer(CASES["reasoning_tokens_usage"]).events[-1]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2}
    ours = answer(CASES["reasoning_tokens_usage"])
    assert ours.finish()["stop_reason"] is None


def test_logprobs_are_aligned_by_token() -> None:
    ours = answer(CASES["logprobs_shorter_than_tokens"])
    entries = [entry for choice in ours.choices() for entry in (choice["logprobs"] or {}).get("content", ())]
    assert [(entry["token"], entry["logprob"]) for entry in entries] == [("H", pytest.approx(-0.1)), ("lo", pytest.approx(-0.2))]


def test_log_probabilities_of_the_prompt_have_no_rank() -> None:
    body = json.loads(answer(CASES["prompt_logprobs_no_rank"]).body)
    first, second, *rest = body["prompt_logprobs"]
    assert {first, *rest} == {None}, "the server told of two tokens only"
    assert second == {"2169": {"logprob": -1.5, "rank": None, "decoded_token": "user"}}


def test_arguments_with_split_characters_are_json() -> None:
    ours = answer(CASES["tool_arguments_emoji_split"])
    pieces = [piece for choice in ours.choices() for piece in choice["delta"].get("tool_calls", ())]
    arguments = json.loads("".join(piece["function"].get("arguments", "") for piece in pieces))
    assert list(arguments) == ["city"]
    assert arguments["city"].endswith("🇨🇭")
    assert ours.finish()["finish_reason"] == "tool_calls"


def test_each_choice_has_a_parser_of_its_own() -> None:
    case = CASES["tools_n2"]
    both = [{kind: {**part, "index": index}} for message in case["grpc"]["messages"] for kind, part in message.items() for index in (0, 1)]
    ours = answer({**case, "grpc": {**case["grpc"], "messages": both}}, {**case["request"], "temperature": 1})
    ids = set()
    for index in (0, 1):
        pieces = [piece for choice in ours.choices(index) for piece in choice["delta"].get("tool_calls", ())]
        ids |= {piece["id"] for piece in pieces if "id" in piece}
        assert [piece["function"]["name"] for piece in pieces if "id" in piece] == ["get_weather"]
        assert json.loads("".join(piece["function"].get("arguments", "") for piece in pieces)) == {}
        assert ours.finish(index)["finish_reason"] == "tool_calls"
    assert len(ids) == 2
    assert ours.is_done


def test_hidden_reasoning_is_dropped() -> None:
    ours = answer(CASES["think_hidden"])
    assert (ours.joined("reasoning"), ours.content()) == ("", "\n\nThe answer is 42.")


def test_reasoning_without_a_start_tag() -> None:
    ours = answer(CASES["think_starts_inside"])
    assert (ours.joined("reasoning"), ours.content()) == ("Let me think.\n", "\n\nThe answer is 42.")


def test_two_prompts_are_two_calls_that_interleave() -> None:
    case = CASES["two_prompts_two_rpcs"]
    request = {"model": "test-model", "prompt": ["a", "b"], "stream": True}
    call = ask("vllm.engine", request, "/v1/completions")
    assert len(call.calls) == 2
    response = call.response(created=1)
    outputs = []
    for number in (0, 1):
        outputs += response.receive_headers({}, call=number)
    for message in case["grpc"]["messages"]:
        for number in (1, 0):
            outputs += response.receive_message(encoded(call, message), call=number)
    for number in (0, 1):
        outputs += response.receive_trailers({"grpc-status": "0"}, call=number)
    ours = outcome(outputs, response)
    for index in (0, 1):
        assert "".join(choice["text"] for choice in ours.choices(index)) == "Hello, world!"
        assert ours.finish(index)["finish_reason"] == "stop"


def test_one_finish_of_two_is_no_end() -> None:
    ours = answer(CASES["n2_missing_second_complete"])
    assert ours.finish(0)["finish_reason"] == "length"
    assert ours.error["code"] == 502


def test_what_a_client_may_retry_is_said() -> None:
    assert answer(CASES["error_unavailable_first_retry"]).headers["retry-after"] == "1"
    assert answer(CASES["error_first_UNIMPLEMENTED"]).headers["x-should-retry"] == "false"
    assert answer(CASES["error_first_ALREADY_EXISTS"]).headers["x-should-retry"] == "false"
    assert not {"retry-after", "x-should-retry"} & answer(CASES["error_first_INTERNAL"]).headers.keys()


def test_the_servers_words_are_for_errors_of_the_client() -> None:
    for name in (name for name in SPECIFIED if name.startswith("error_first_")):
        ours = answer(CASES[name])
        assert (ours.error["message"] == "worker says no") == (400 <= ours.status < 499), name


def test_nothing_goes_out_before_the_first_message() -> None:
    call = ask("vllm.engine", CASES["hello_one_burst"]["request"])
    response = call.response(created=1)
    assert response.receive_headers({}) == ()
    head, role = response.receive_message(encoded(call, {"chunk": {"token_ids": [42]}}))
    assert isinstance(head, ResponseHead)
    assert role.data.startswith(b'data: {"id":"chatcmpl-r"')


# Framing: the server's actions, as a host that speaks HTTP/2 would hand them on.

FRAMING = sorted(name for name, case in CASES.items() if case["group"] == "framing")


def frame_bytes(name: str, text: str) -> bytes:
    """The bytes of a DATA action; those that were too long to be kept are made anew."""
    if not text.startswith("<"):
        return bytes.fromhex(text)
    if name == "frame_compressed_bomb":
        packer = zlib.compressobj(9, wbits=31)
        packed = packer.compress(bytes(6 * MEBIBYTE)) + packer.flush()
        return b"\x01" + len(packed).to_bytes(4, "big") + packed
    assert name == "frame_len_5mb"
    # A legal message: its unknown field 100 has five mebibytes of nothing.
    payload = bytes.fromhex("0a070a012a10031801") + b"\xa2\x06" + b"\x80\x80\xc0\x02" + bytes(5 * MEBIBYTE)
    return encode_frame(payload)


def act(name: str, actions: list[Any], response: Any, split: int = 1 << 30) -> list[Any]:
    """What the response gives for a server's actions, DATA in pieces of `split` bytes."""
    outputs: list[Any] = []
    is_refused = len(actions) == 1
    for action, *rest in actions:
        if action in ("headers", "headers_end", "info"):
            fields = dict(rest[0])
            status = int(fields.pop(":status"))
            outputs += response.receive_headers(fields, status=status)
            if action == "headers_end":
                outputs += response.receive_trailers({})
        elif action == "data":
            data = frame_bytes(name, rest[0])
            for start in range(0, max(len(data), 1), split):
                outputs += response.receive_data(data[start : start + split])
            if rest[1]:
                outputs += response.receive_eof()
        elif action in ("trailers", "trailers_raw"):
            outputs += response.receive_trailers([(key, value) for key, value in rest[0]])
        elif action == "rst":
            outputs += response.receive_status(RESETS[rest[0]], "reset")
        elif action == "close":
            outputs += response.receive_status(Code.UNAVAILABLE, "closed")
        elif action == "hang":
            outputs += response.receive_status(Code.DEADLINE_EXCEEDED, "the deadline")
        else:
            assert action == "goaway"
            if is_refused:
                outputs += response.receive_status(Code.UNAVAILABLE, "refused")
    return outputs


def framed(name: str, split: int = 1 << 30, **options: Any) -> Outcome:
    # gRPC libraries' own limit, under which the cases were observed.
    limits = Limits(max_message_bytes=4 * MEBIBYTE)
    call = ask("vllm.engine", {"model": "test-model", "messages": [{"role": "user", "content": "hi"}], "stream": True}, limits=limits)
    response = call.response(created=1)
    return outcome(act(name, whole(CASES[name]["server_actions"]), response, **options), response)


def verdict(name: str) -> tuple[str, int]:
    """How the case has to end."""
    if name in JUDGED:
        return JUDGED[name]
    expected = CASES[name]["expected"]
    if expected == "OK: messages delivered, then normal end":
        return "whole", 200
    code, _, rest = expected.partition(": ")
    status = {Code.INTERNAL: 500, Code.UNKNOWN: 500, Code.UNAVAILABLE: 503, Code.CANCELLED: 499, Code.DEADLINE_EXCEEDED: 504} | {
        Code.INVALID_ARGUMENT: 400,
        Code.UNAUTHENTICATED: 401,
        Code.PERMISSION_DENIED: 403,
    }
    ways = {"HTTP error from the status mapping": "http", "messages delivered, then SSE error event": "event"}
    return ways[rest], status[Code[code]]


@pytest.mark.parametrize("split", [1 << 30, 1])
@pytest.mark.parametrize("name", FRAMING)
def test_framing(name: str, split: int) -> None:
    if split == 1 and name in ("frame_len_5mb", "frame_compressed_bomb"):
        split = 100_003
    ours = framed(name, split=split)
    way, code = verdict(name)
    assert ours.status == (code if way == "http" else 200)
    if way == "whole":
        assert ours.is_done
        assert ours.error is None
        assert ours.finish()["finish_reason"] == "stop"
        return
    assert ours.error["code"] == code
    assert not ours.is_done
    if way == "event":
        assert ours.content().startswith("H")
    else:
        assert ours.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", [name for name in FRAMING if CASES[name]["server_actions"][-1][0] in ("rst", "close", "hang")])
def test_an_end_of_which_nothing_is_known(name: str) -> None:
    """For hosts that are not told why a stream has ended."""
    call = ask("vllm.engine", {"messages": [{"role": "user", "content": "hi"}], "stream": True})
    response = call.response(created=1)
    outputs = act(name, CASES[name]["server_actions"][:-1], response)
    ours = outcome([*outputs, *response.receive_eof()], response)
    assert ours.error["code"] == 502


def test_a_message_of_five_mebibytes() -> None:
    """Within the default limit, as the case asks for; over one of 4 MiB it ends the answer."""
    call = ask("vllm.engine", {"messages": [{"role": "user", "content": "hi"}], "stream": True})
    response = call.response(created=1)
    act("frame_len_5mb", CASES["frame_len_5mb"]["server_actions"][:2], response)
    assert response.error is None


def test_grpc_message_in_raw_bytes_is_readable() -> None:
    assert framed("frame_grpc_message_raw_bytes").error["message"] == "cafÃ©"


def test_every_case_is_judged() -> None:
    assert {case["group"] for case in CASES.values()} == {
        *("content", "lifecycle", "counts", "stop", "n", "logprobs", "tools", "reasoning", "error", "client", "framing")
    }
    assert {name for name, case in CASES.items() if case["group"] == "client"} == HOSTS.keys()
    actions = {action[0] for name in FRAMING for action in CASES[name]["server_actions"]}
    assert actions == {"headers", "headers_end", "info", "data", "trailers", "trailers_raw", *BELOW_THE_CORE}
    formula = re.compile(
        r"OK: messages delivered, then normal end|[A-Z_]+: (HTTP error from the status mapping|messages delivered, then SSE)"
    )
    assert {name for name in FRAMING if not formula.match(CASES[name]["expected"])} == JUDGED.keys()


def test_differences_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    for heading in DIFFERENCES.values():
        assert f"## {heading}\n" in text
