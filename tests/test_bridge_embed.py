"""gRPC that embeds, in one dialect in and in another out."""

from __future__ import annotations

import itertools

import pytest

from ext_proc_stream import GRPC, FakeServer, Stream, gateway
from gaie_codec import (
    BodyChunk,
    Bridge,
    Code,
    EmbeddingEvent,
    InferenceRequest,
    MalformedRequestError,
    ResponseHead,
    Trailers,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    encode_frame,
)

EMBEDDING = ("vllm.engine", "sglang.scheduler", "sglang.runtime")
PAIRS = list(itertools.product(EMBEDDING, EMBEDDING))
OK = [("grpc-status", "0")]


def asked(bridge, **fields):
    embed = bridge.inbound.embed
    request = InferenceRequest(request_id="r", prompt_token_ids=[5, 6, 7], **fields)
    return embed.path, encode_frame(embed.encode_request(request).SerializeToString()), request


def vector(adapter, event):
    return encode_frame(adapter.embed.encode_response(event).SerializeToString())


@pytest.mark.parametrize(("inbound", "outbound"), PAIRS)
def test_a_prompt_is_embedded_by_another_server(inbound, outbound):
    bridge = Bridge(inbound, outbound)
    path, frame, request = asked(bridge)
    call = bridge.request(path, [("traceparent", "00-1-2-01")], frame)
    assert call.inference.prompt_token_ids == request.prompt_token_ids
    (upstream,) = call.calls
    assert upstream.path == bridge.outbound.embed.path
    sent = bridge.outbound.embed.decode_request(bridge.outbound.snapshot.method_at(upstream.path).request.FromString(upstream.message))
    assert (sent.prompt_token_ids, sent.request_id) == ([5, 6, 7], "r")
    assert (dict(upstream.metadata) | sent.trace_headers)["traceparent"] == "00-1-2-01"
    response = call.response()
    outputs = [*response.receive_headers([("content-type", "application/grpc")])]
    event = EmbeddingEvent(values=[0.5, -1.0], dimensions=2, prompt_tokens=3)
    outputs += response.receive_data(vector(bridge.outbound, event))
    outputs += response.receive_trailers(OK)
    head, body, trailers, _ = outputs
    assert isinstance(head, ResponseHead)
    assert isinstance(body, BodyChunk)
    assert trailers == Trailers((("grpc-status", "0"),))
    message = bridge.inbound.snapshot.method_at(path).response.FromString(body.data[5:])
    (told,) = bridge.inbound.embed.decode_response(message)
    assert (told.values, told.prompt_tokens) == ([0.5, -1.0], 3)
    assert response.usage.prompt_tokens == 3


def test_a_fault_is_a_status():
    bridge = Bridge("vllm.engine", "sglang.scheduler")
    path, frame, _ = asked(bridge)
    call = bridge.request(path, [], frame)
    for end in ("status", "eof"):
        response = call.response()
        response.receive_headers([("content-type", "application/grpc")])
        outputs = response.receive_status(Code.UNAVAILABLE, "gone") if end == "status" else response.receive_eof()
        assert dict(outputs[1].headers)["grpc-status"] == ("14" if end == "status" else str(int(Code.INTERNAL)))


def test_what_cannot_go_is_refused():
    bridge = Bridge("vllm.engine", "sglang.api")
    path, frame, _ = asked(bridge)
    with pytest.raises(UnsupportedEndpointError, match="no method that embeds"):
        bridge.request(path, [], frame)
    bridge = Bridge("sglang.scheduler", "vllm.engine")
    path, frame, _ = asked(bridge, data_parallel_rank=2)
    with pytest.raises(UnsupportedFieldError):
        bridge.request(path, [], frame)
    message = bridge.inbound.snapshot.method_at(path).request(is_cross_encoder=True)
    message.sampling_params.n = 1  # which the server passes over
    with pytest.raises(UnsupportedFieldError, match="is_cross_encoder"):
        bridge.request(path, [], encode_frame(message.SerializeToString()))
    allowed = Bridge("sglang.scheduler", "vllm.engine", unsupported="drop")
    assert allowed.request(path, [], encode_frame(message.SerializeToString())).dropped == ("is_cross_encoder",)
    with pytest.raises(MalformedRequestError):
        bridge.request(path, [], encode_frame(b"\xff"))


def test_behind_envoy():
    server = FakeServer(dialect="sglang.scheduler")
    bridge = Bridge("vllm.engine", "sglang.scheduler")
    path, frame, _ = asked(bridge)
    stream = Stream(gateway(server)).ask(frame, path=path, content_type=GRPC)
    assert stream.processor.mode == "grpc-bridged"
    assert stream.request.headers[":path"] == bridge.outbound.embed.path
    stream.answer([vector(bridge.outbound, EmbeddingEvent(values=[1.0], prompt_tokens=3))])
    message = bridge.inbound.snapshot.method_at(path).response.FromString(stream.response.body[5:])
    assert (list(message.embedding), message.prompt_tokens) == ([1.0], 3)
    assert stream.processor.usage.prompt_tokens == 3
