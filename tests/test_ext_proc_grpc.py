"""The ext_proc processor: gRPC clients, and what is passed through to servers that speak HTTP."""

from __future__ import annotations

import json

import pytest

from ext_proc_stream import (
    GENERATE,
    GRPC,
    GRPC_HEAD,
    HI,
    OK,
    SERVER,
    TOKENIZER,
    FakeServer,
    Stream,
    answer_frames,
    body_message,
    chat,
    gateway,
    grpc_request,
    headers_message,
)
from gaie_codec import Code, InferenceRequest, Observer, Transcoder, Usage, adapters, encode_frame, snapshots
from gaie_codec.adapters import DIALECTS
from gaie_codec.ext_proc.gateway import Declared

# grpc-in-grpc-out


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_grpc_call_of_the_servers_dialect_goes_through_untouched_and_is_understood(dialect: str):
    path, request = grpc_request(dialect, stream=True)
    stream = Stream(gateway(FakeServer(dialect=dialect))).ask([request[:4], request[4:]], path=path, content_type=GRPC)
    assert stream.request.body == request
    assert set(stream.request.headers) == {"x-gateway-destination-endpoint"}
    assert not stream.request.removed
    assert stream.processor.plan.inference.prompt_token_ids == [1, 2, 3]
    pieces = answer_frames("Hi there", dialect, prompt_tokens=3)
    answer = b"".join(pieces)
    head = (*GRPC_HEAD, ("x-initial", "1"))
    trailers = (("grpc-status", "0"), ("x-late-bin", "AA=="))
    stream.answer([answer[:9], answer[9:]], headers=head, trailers=trailers)
    assert stream.response.headers == {}
    assert stream.response.body == answer
    assert stream.response.trailers == {}
    assert not stream.response.removed | stream.response.removed_trailers
    assert stream.processor.error is None
    assert stream.processor.usage == Usage(prompt_tokens=3, completion_tokens=len(HI))
    assert stream.processor.frames_received == len(pieces)


def test_grpc_errors_have_a_grpc_status_and_plain_words():
    path, request = grpc_request()
    stream = Stream().ask(request[:-1], path=path, content_type=GRPC)
    assert stream.immediate.grpc_status.status == Code.INVALID_ARGUMENT
    assert stream.immediate.body.startswith(b"the request body")
    stream = Stream(gateway()).ask(request, path=path, content_type=GRPC)
    assert stream.immediate.grpc_status.status == Code.UNAVAILABLE


def test_a_call_that_does_not_generate_goes_through_as_it_comes():
    stream = Stream()
    path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    head = [(":method", "POST"), (":path", path), ("content-type", GRPC), ("te", "trailers"), ("x-gateway-inference-objective", "o")]
    answers = stream.send(headers_message("request_headers", head))
    assert [answer.WhichOneof("response") for answer in answers] == ["request_headers"]
    assert stream.request.removed == {"x-gateway-inference-objective"}
    stream.send(headers_message("response_headers", GRPC_HEAD))
    stream.send(body_message("request_body", b"abc"))
    stream.send(body_message("response_body", b"def"))
    stream.send(body_message("request_body", b"ghi", end=True))
    stream.send(headers_message("response_trailers", OK))
    assert stream.request.body == b"abcghi"
    assert stream.request.ended
    assert stream.response.body == b"def"


@pytest.mark.parametrize("method", ["Generate", "HealthCheck", "Abort"])
def test_a_grpc_call_is_for_servers_of_its_dialect_where_there_are_such(method: str):
    servers = (FakeServer("10.0.0.1:1", "sglang.scheduler"), FakeServer("10.0.0.2:2", "vllm.engine"))
    _, request = grpc_request()
    stream = Stream(gateway(*servers)).ask(request, path=f"/vllm.grpc.engine.VllmEngine/{method}", content_type=GRPC)
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.2:2"
    assert stream.processor.mode == "grpc-in-grpc-out"


def test_how_a_call_that_is_not_read_ended_is_known():
    def ended(trailers: list[tuple[str, str]], **how: object) -> object:
        stream = Stream().ask(b"", path="/grpc.health.v1.Health/Check", content_type=GRPC)
        stream.answer(trailers=trailers, **how) if trailers else stream.answer(trailers=None, **how)
        return stream.processor.error and stream.processor.error.code

    assert ended([("grpc-status", "0")]) is None
    assert ended([("grpc-status", "12"), ("grpc-message", "no")]) is Code.UNIMPLEMENTED
    for odd in ("x" * 5000, "00099", "0160", "0" * 5000 + "x", "-1", "17"):
        assert ended([("grpc-status", odd)]) is Code.UNKNOWN
    assert ended([("grpc-status", "0" * 50)]) is None
    assert ended([("x", "1")]) is Code.UNKNOWN
    assert ended([("grpc-status", "5")], headers=[(":status", "503"), ("content-type", "text/plain")]) is Code.UNAVAILABLE
    assert ended([], headers=(*GRPC_HEAD, ("grpc-status", "14"))) is Code.UNAVAILABLE


def test_a_call_of_another_dialect_is_bridged():
    path, request = grpc_request("vllm.engine", stream=True)
    stream = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(request, path=path, content_type=GRPC)
    assert stream.processor.mode == "grpc-bridged"
    assert stream.request.headers[":path"].startswith("/sglang.grpc.scheduler.")
    stream.answer(answer_frames("Hi there", "sglang.scheduler", prompt_tokens=3))
    assert stream.response.headers["content-type"] == GRPC
    assert stream.response.trailers == {"grpc-status": "0"}
    response = SERVER.transcoder.adapter.response_type
    size = int.from_bytes(stream.response.body[1:5], "big")
    assert list(response.FromString(stream.response.body[5 : 5 + size]).chunk.token_ids) == HI[:1]
    assert stream.processor.usage == Usage(prompt_tokens=3, completion_tokens=len(HI))


def test_a_bridged_call_that_fails_has_the_servers_status():
    path, request = grpc_request("vllm.engine")
    stream = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(request, path=path, content_type=GRPC)
    stream.answer(trailers=[("grpc-status", "8"), ("grpc-message", "full")])
    assert stream.immediate.grpc_status.status == Code.RESOURCE_EXHAUSTED
    assert stream.immediate.body == b"full"


def test_grpc_does_not_get_to_a_server_that_speaks_http_nor_through_a_pool_without_http2():
    path, request = grpc_request()
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(request, path=path, content_type=GRPC)
    assert stream.immediate.grpc_status.status == Code.UNIMPLEMENTED
    stream = Stream(gateway(SERVER, declared=lambda: Declared(False, "appProtocol is http", False))).ask(
        request, path=path, content_type=GRPC
    )
    assert stream.immediate.grpc_status.status == Code.UNAVAILABLE
    assert b"appProtocol is http" in stream.immediate.body


@pytest.mark.parametrize(
    "kind", ["application/grpc-web", "application/grpc-web-text+proto", "application/connect+proto", "application/grpc+json"]
)
def test_relatives_of_grpc_are_not_spoken(kind: str):
    stream = Stream().ask(b"x", path=GENERATE, content_type=kind)
    assert stream.immediate.status.code == 415


# Passthrough


def test_a_server_that_speaks_http_gets_the_request_as_it_is():
    body = chat(model="m", stream=True, stream_options={"include_usage": True})
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(
        [body[:5], body[5:]], headers=[("authorization", "Bearer s"), ("connection", "x")]
    )
    assert stream.request.body == body
    assert stream.request.headers == {"x-gateway-destination-endpoint": "10.0.0.1:50051"}
    assert stream.request.removed == {"connection"}
    inference = stream.processor.plan.inference
    assert (inference.model, inference.stream) == ("m", True)
    assert "Hi" in inference.prompt_text


def test_a_pool_without_http2_passes_json_through_to_any_server():
    stream = Stream(gateway(SERVER, declared=lambda: Declared(False, "appProtocol is http", False))).ask(chat())
    assert stream.processor.mode == "passthrough"
    assert stream.processor.plan.reason == "appProtocol is http"
    assert stream.request.body == chat()


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_the_usage_of_an_answer_that_passes_by_is_read_however_it_is_cut(cut: int):
    events = [{"choices": [], "usage": None}, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}]
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\r\n\r\n" for event in events) + b"data: [DONE]\n\n"
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(chat(stream=True))
    head = [(":status", "200"), ("content-type", "text/event-stream; charset=utf-8")]
    stream.answer([data[place : place + cut] for place in range(0, len(data), cut)], headers=head, trailers=None)
    assert stream.response.body == data
    assert stream.response.ended
    assert stream.processor.usage == Usage(prompt_tokens=7, completion_tokens=5)


def test_json_that_passes_by_is_counted_and_what_is_none_is_not():
    head = [(":status", "200"), ("content-type", "application/json")]
    odd = [b"{", b"[]", b"\xff", b'{"x":' + b"[" * 100_000]
    odd += [b'{"usage":{"prompt_tokens":%b}}' % count for count in (b"-1", b"9" * 400, b"1.5", b'"1"')]
    for body, tokens in ((b'{"usage": {"prompt_tokens": 3, "completion_tokens": null}}', 3), *((one, 0) for one in odd)):
        stream = Stream(gateway(FakeServer(dialect="http"))).ask(chat()).answer([body[:1], body[1:]], headers=head, trailers=None)
        assert stream.response.body == body
        assert stream.processor.usage.prompt_tokens == tokens


def test_a_request_without_a_body_is_passed_on_by_its_headers():
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(path="/v1/models", method="GET", content_type="")
    assert stream.request.headers == {"x-gateway-destination-endpoint": "10.0.0.1:50051"}
    assert stream.request.body == b""


def test_json_that_nobody_could_read_is_for_the_model_server_to_judge():
    for body in (b"{not json", b'{"x":' + b"[" * 100_000):
        assert Stream(gateway(FakeServer(dialect="http"))).ask(body).request.body == body
    odd = chat(model="m", stream=True, cache_salt=None)
    inference = Stream(gateway(FakeServer(dialect="http"))).ask(odd).processor.plan.inference
    assert (inference.model, inference.stream, inference.cache_salt) == ("m", True, "")


def test_the_picker_sees_the_prompt_of_a_chat_that_is_passed_through_as_its_json():
    stream = Stream(gateway(FakeServer(dialect="sglang.runtime"))).ask(chat())
    assert stream.processor.plan.inference.prompt_text == '[{"role": "user", "content": "Hi"}]'


def test_a_call_of_an_older_snapshot_is_read_too():
    old = adapters.get(snapshots.load("vllm.inference", "0.25.1"))
    path = old.generate_path
    assert path.startswith("/vllm.Generate/")
    request = encode_frame(old.encode_request(InferenceRequest(request_id="c", prompt_token_ids=[1, 2], stream=True)).SerializeToString())
    server = FakeServer(dialect="vllm.inference")
    server.transcoder, server.observer = Transcoder(old, tokenizer=TOKENIZER), Observer(old)
    behind = gateway(picker=None, find=lambda _: server)
    given = [("x-gateway-destination-endpoint", "10.0.0.1:50051")]
    stream = Stream(behind).ask(request, path=path, content_type=GRPC, headers=given)
    assert stream.processor.plan.inference.prompt_token_ids == [1, 2]
    assert stream.request.body == request
    bridged = Stream(gateway(SERVER)).ask(request, path=path, content_type=GRPC)
    assert bridged.processor.mode == "grpc-bridged"
