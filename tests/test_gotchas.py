"""What other endpoint pickers and proxies got wrong, one test for each: G1 to G20 of the notes that docs/ext-proc.md sums up.

G3, two filters one after the other, takes a real Envoy: tests/envoy/test_g3.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ext_proc_stream import (
    CHAT,
    GRPC,
    GRPC_HEAD,
    OK,
    SERVER,
    FakeServer,
    Stream,
    answer_frames,
    body_message,
    chat,
    gateway,
    grpc_request,
    headers_message,
)
from gaie_codec import Code, Usage
from gaie_codec.ext_proc.messages import PROCESS_PATH, SERVICE
from gaie_codec.ext_proc.server import ExtProcServer
from gaie_codec.openai import chat as chat_endpoint
from gaie_codec.openai import fields

HEAD = [(":method", "POST"), (":path", CHAT), ("content-type", "application/json")]
HINT = "x-gateway-destination-endpoint-subset"


def picked(hint: object, *addresses: str) -> str | int:
    stream = Stream(gateway(*map(FakeServer, addresses))).ask(chat(), metadata={"envoy.lb.subset_hint": {HINT: hint}})
    return stream.immediate.status.code if stream.immediate is not None else stream.request.headers["x-gateway-destination-endpoint"]


def test_g1_a_request_that_ends_with_trailers_is_routed():
    stream = Stream()
    stream.send(headers_message("request_headers", HEAD))
    stream.send(body_message("request_body", chat()))
    answers = stream.send(headers_message("request_trailers", [("x-checksum", "1")]))
    assert [answer.WhichOneof("response") for answer in answers] == ["request_headers", "request_body", "request_trailers"]
    assert not stream.request.ended, "the trailers end it"


def test_g2_an_end_of_the_body_that_comes_twice_is_passed_over():
    stream = Stream().ask(chat())
    assert stream.send(body_message("request_body", end=True)) == []
    stream.answer(answer_frames("Hi"))
    assert stream.response.headers[":status"] == "200"
    unread = Stream()
    unread.send(headers_message("request_headers", [(":method", "POST"), (":path", "/a.B/C"), ("content-type", GRPC)]))
    unread.send(body_message("request_body", b"x", end=True))
    assert unread.send(body_message("request_body", end=True)) == []


def test_g4_no_mode_is_overridden():
    # `Stream` fails for an answer that does.
    assert len(Stream().ask(chat(stream=True)).answer(answer_frames("Hi there")).answers) > 4


@pytest.mark.parametrize("dialect", ["vllm.engine", "http"])
def test_g5_transfer_encoding_is_never_set_and_always_removed(dialect: str):
    stream = Stream(gateway(FakeServer(dialect=dialect))).ask(chat(), headers=[("transfer-encoding", "chunked")])
    assert "transfer-encoding" in stream.request.removed
    stream.answer(answer_frames("Hi"))
    assert "transfer-encoding" not in stream.response.headers


def test_g6_the_status_is_read_where_envoy_has_it():
    stream = Stream().ask(chat()).answer([b"no"], headers=[(":status", "503"), ("status", "200")], trailers=None)
    assert stream.processor.error.code is Code.UNAVAILABLE
    passed = Stream(gateway(FakeServer(dialect="http"))).ask(chat()).answer([b"no"], headers=[(":status", "503")], trailers=None)
    assert passed.processor.status == 503


@pytest.mark.parametrize("stream_it", [False, True])
def test_g7_an_answer_of_trailers_only_completes(stream_it: bool):
    head = (*GRPC_HEAD, ("grpc-status", "3"), ("grpc-message", "too%20long"))
    stream = Stream().ask(chat(stream=stream_it)).answer(headers=head, trailers=None)
    assert stream.immediate.status.code == 400
    assert json.loads(stream.immediate.body)["error"]["message"] == "too long"
    assert stream.processor.is_answer_complete
    path, request = grpc_request()
    observed = Stream().ask(request, path=path, content_type=GRPC).answer(headers=head, trailers=None)
    assert observed.response.headers == {}
    assert observed.processor.is_answer_complete
    assert observed.processor.error.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("cut", [1, 3, 50])
def test_g8_usage_is_counted_and_done_is_sent_however_the_answer_is_cut(cut: int):
    data = b"".join(answer_frames("Hi there"))
    pieces = [data[place : place + cut] for place in range(0, len(data), cut)]
    stream = Stream().ask(chat(stream=True)).answer(pieces)
    assert stream.processor.usage == Usage(prompt_tokens=10, completion_tokens=3)
    assert stream.response.body.endswith(b"data: [DONE]\n\n")
    path, request = grpc_request(stream=True)
    assert Stream().ask(request, path=path, content_type=GRPC).answer(pieces).processor.usage.completion_tokens == 3


def test_g9_a_path_is_known_with_its_query():
    stream = Stream().ask(chat(), path=f"{CHAT}?api-version=1")
    assert stream.request.headers[":path"] == "/vllm.grpc.engine.VllmEngine/Generate"


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x80000000, 0xFFFFFFFA])
def test_g10_a_length_near_the_limit_of_32_bits_is_an_error_and_no_crash(length: int):
    frame = b"\0" + length.to_bytes(4, "big") + b"x"
    stream = Stream().ask(chat()).answer([frame])
    assert stream.immediate.status.code == 502
    path, _ = grpc_request()
    asked = Stream().ask(frame, path=path, content_type=GRPC)
    assert asked.immediate.grpc_status.status == Code.INVALID_ARGUMENT


def test_g11_the_hop_by_hop_header_is_trailer_and_te_stays_for_grpc():
    stream = Stream().ask(chat(), headers=[("trailer", "x"), ("trailers", "x"), ("te", "gzip")])
    assert {"trailer", "trailers"} <= stream.request.removed
    assert stream.request.headers["te"] == "trailers"
    path, request = grpc_request()
    observed = Stream().ask(request, path=path, content_type=GRPC, headers=[("te", "trailers"), ("connection", "te")])
    assert observed.request.removed == {"connection"}


def test_g12_a_body_is_decoded_once_and_never_made_anew(monkeypatch: pytest.MonkeyPatch):
    decoded = []
    decode = fields.decode_json_object

    def count(body: bytes) -> dict[str, Any]:
        decoded.append(len(body))
        return decode(body)

    monkeypatch.setattr(chat_endpoint, "decode_json_object", count)
    body = chat(messages=[{"role": "user", "content": "long " * 20_000}])
    Stream().ask([body[:50_000], body[50_000:]])
    assert decoded == [len(body)]
    odd = b'{"messages" : [ ] , "x":1e400}'
    assert Stream(gateway(FakeServer(dialect="http"))).ask(odd).request.body == odd


def test_g13_bodies_are_streamed_responses_and_no_endpoint_is_an_immediate_response():
    # `Stream` fails for a body answer without streamed_response.
    stream = Stream().ask(chat())
    assert stream.request.body
    assert not any(name.startswith("x-echo") for name in stream.request.headers)
    assert Stream(gateway()).ask(chat()).immediate.status.code == 503


def test_g14_grpc_goes_out_by_post_with_te_trailers():
    stream = Stream().ask(chat())
    assert stream.request.headers["te"] == "trailers"
    assert ":method" not in {*stream.request.headers, *stream.request.removed}, "it is POST already"
    # What has another method is answered here.
    assert Stream().ask(method="GET", content_type="").immediate.status.code == 405


def test_g15_a_subset_is_matched_with_its_port():
    assert picked(["10.0.0.1:8001"], "10.0.0.1:8000", "10.0.0.1:8001") == "10.0.0.1:8001"
    assert picked(["10.0.0.1:9"], "10.0.0.1:8000") == 503


@pytest.mark.parametrize("hint", ["[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", "::1"])
def test_g16_a_subset_may_have_ipv6_addresses(hint: str):
    assert picked([hint], "10.0.0.1:8000", "[::1]:8000") == "[::1]:8000"
    stream = Stream(gateway(FakeServer("[::1]:8000", "http"))).ask(path="/v1/models", method="GET", content_type="")
    assert stream.request.headers["x-gateway-destination-endpoint"] == "[::1]:8000"


def test_g17_a_subset_may_be_one_string():
    assert picked("10.0.0.2:2,10.0.0.3:3", "10.0.0.1:1", "10.0.0.3:3") == "10.0.0.3:3"
    assert picked("", "10.0.0.1:1") == 503
    assert picked([], "10.0.0.1:1") == 503
    assert picked(7, "10.0.0.1:1") == 503


def test_g18_the_answer_to_a_request_without_a_body_is_not_read_as_a_completion():
    listed = b'{"object":"list","data":[],"usage":null}'
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(path="/v1/models", method="GET", content_type="")
    stream.answer([listed], headers=[(":status", "200"), ("content-type", "application/json")], trailers=None)
    assert stream.response.body == listed
    assert stream.processor.error is None


def test_g19_health_knows_its_services_and_liveness_does_not_drain():
    async def check() -> dict[str, object]:
        server = ExtProcServer(gateway(SERVER))
        port = await server.start("127.0.0.1:0")
        told = {}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def ask(moment: str) -> None:
                for name in ("", "liveness", "readiness", SERVICE, "other"):
                    status = (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
                    told[moment, name] = health_pb2.HealthCheckResponse.ServingStatus.Name(status)

            await ask("starting")
            await server.set_ready()
            await ask("ready")
            await server.drain()
            await server.set_ready()
            await ask("draining")
        await server.stop(0)
        return told

    told = asyncio.run(check())
    for moment in ("starting", "ready", "draining"):
        assert told[moment, "liveness"] == "SERVING"
        assert told[moment, "other"] == "SERVICE_UNKNOWN"
        for name in ("", "readiness", SERVICE):
            assert told[moment, name] == ("SERVING" if moment == "ready" else "NOT_SERVING")
    assert PROCESS_PATH.startswith(f"/{SERVICE}/")


def test_g20_trailers_are_not_read_as_a_message(caplog: pytest.LogCaptureFixture):
    path, request = grpc_request(stream=True)
    with caplog.at_level(logging.DEBUG):
        stream = Stream().ask(request, path=path, content_type=GRPC).answer(answer_frames("Hi"), trailers=OK)
    assert stream.processor.error is None
    assert not caplog.records
