"""Messages behind Envoy: answers, token counts, and errors in Anthropic's form whoever finds them."""

from __future__ import annotations

import json

import pytest

from ext_proc_stream import ANSWER, BUFFERED, EVENTS, FakeServer, Stream, frames, gateway
from gaie_codec.ext_proc._reading import HttpReading

MESSAGES = "/v1/messages"


def ask(*servers, path=MESSAGES, mode=None, **fields) -> Stream:
    body = json.dumps({"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
    return Stream(gateway(*servers or (FakeServer(),)), **({} if mode is None else {"mode": mode})).ask(body, path=path)


def error(stream: Stream) -> tuple[int, str]:
    told = json.loads(stream.immediate.body)
    assert (told["type"], told["error"].keys()) == ("error", {"type", "message"})
    return stream.immediate.status.code, told["error"]["type"]


def test_a_message() -> None:
    stream = ask().answer([ANSWER])
    body = json.loads(stream.response.body)
    assert body["content"] == [{"type": "text", "text": "Hi there"}]
    assert body["id"] == "msg_own"
    stream = ask(stream=True).answer([ANSWER])
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.response.body.startswith(b"event: message_start\n")
    assert stream.response.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


def test_tokens_are_counted_here() -> None:
    stream = ask(path=f"{MESSAGES}/count_tokens")
    assert json.loads(stream.immediate.body)["input_tokens"] > 3
    assert stream.processor.mode == "local"


@pytest.mark.parametrize("mode", [None, BUFFERED])
def test_errors(mode) -> None:
    assert error(ask(mode=mode, max_tokens=0)) == (400, "invalid_request_error")
    assert error(ask(mode=mode, model="other")) == (404, "not_found_error")
    assert error(ask(mode=mode, path=f"{MESSAGES}/batches")) == (404, "not_found_error")
    assert error(ask(mode=mode, path=f"{MESSAGES}/count_tokens", messages=5)) == (400, "invalid_request_error")
    for stream in (False, True):
        assert error(ask(mode=mode, stream=stream).answer([], trailers=[("grpc-status", "8")])) == (429, "rate_limit_error")


@pytest.mark.parametrize("dialect", ["vllm.engine", "http"])
def test_a_deadline(dialect) -> None:
    stream = ask(FakeServer(dialect=dialect))
    stream.take(stream.processor.too_late())
    assert error(stream) == (504, "api_error")


def test_no_server_to_ask() -> None:
    stream = Stream(gateway(picker=lambda *_: ())).ask(b"{}", path=MESSAGES)
    assert error(stream) == (503, "overloaded_error")


def test_an_error_amid_the_stream() -> None:
    stream = ask(stream=True).answer([frames(EVENTS[:1])], trailers=[("grpc-status", "13")])
    assert stream.response.body.endswith(
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"Internal server error"}}\n\n'
    )


JSON = (("content-type", "application/json"),)
EVENT_STREAM = (("content-type", "text/event-stream"),)
TOLD = b'{"usage":{"input_tokens":7,"output_tokens":4,"cache_read_input_tokens":3}}'
RESPONSE = b'{"usage":{"input_tokens":10,"output_tokens":4,"input_tokens_details":{"cached_tokens":3}}}'


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (JSON, TOLD),
        (EVENT_STREAM, b"event: message_delta\ndata: " + TOLD + b"\n\n"),
        (JSON, RESPONSE),
        (EVENT_STREAM, b'event: response.completed\ndata: {"response":' + RESPONSE + b"}\n\n"),
    ],
)
def test_what_passes_by_is_counted(headers, body) -> None:
    reading = HttpReading()
    reading.receive_headers(headers, status=200)
    reading.receive_data(body)
    reading.receive_eof()
    assert (reading.usage.prompt_tokens, reading.usage.completion_tokens, reading.usage.cached_tokens) == (10, 4, 3)
