"""Invariant tested: the ext_proc processor raises nothing, whatever a data plane sends, and answers in an order that Envoy takes.

The input is a stream of ProcessingRequests, each behind two bytes of length. Cuts are those of the bodies in it.

    python fuzz/fuzz_ext_proc.py --seconds 60 --seed 1
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from harness import ACCEPTED, Cut, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from ext_proc_stream import (
    CHAT,
    FULL_DUPLEX,
    GRPC,
    GRPC_HEAD,
    OK,
    FakeServer,
    Stream,
    answer_frames,
    body_message,
    chat,
    gateway,
    headers_message,
)
from gaie_codec import InferenceRequest, SamplingParams, adapters, encode_frame, snapshots
from gaie_codec.ext_proc.messages import ProcessingMode, ProcessingRequest

SERVERS = [FakeServer(f"10.0.0.{place}:1", dialect) for place, dialect in enumerate((*adapters.DIALECTS, "http"))]
GATEWAYS = [gateway(server, models=lambda: b"{}") for server in SERVERS] + [gateway(*SERVERS), gateway()]


def _grpc_call(dialect: str) -> tuple[str, bytes]:
    adapter = adapters.get(snapshots.load(dialect))
    request = InferenceRequest(request_id="c", prompt_token_ids=[1, 2], stream=True, sampling=SamplingParams(max_tokens=5))
    return adapter.path_for(request), encode_frame(adapter.encode_request(request).SerializeToString())


def _stream(path: str, content_type: str, body: bytes, answer: list[bytes], mode: int = FULL_DUPLEX, *, trailers: Any = OK) -> bytes:
    head = [(":method", "POST"), (":path", path), ("content-type", content_type), ("te", "trailers"), ("x-request-id", "r")]
    messages = [headers_message("request_headers", head), body_message("request_body", body, end=True)]
    messages[0].protocol_config.request_body_mode = messages[0].protocol_config.response_body_mode = mode
    messages[0].metadata_context.filter_metadata["envoy.lb.subset_hint"].update({"x-gateway-destination-endpoint-subset": ["10.0.0.0:1"]})
    messages += [headers_message("response_headers", GRPC_HEAD), *(body_message("response_body", piece) for piece in answer)]
    messages.append(headers_message("response_trailers", trailers))
    return b"".join(len(data).to_bytes(2, "big") + data for data in (message.SerializeToString() for message in messages))


CORPUS = [
    _stream(CHAT, "application/json", chat(stream=stream, max_tokens=9), answer_frames("Hi there", dialect), mode)
    for dialect in adapters.DIALECTS
    for stream in (False, True)
    for mode in (FULL_DUPLEX, ProcessingMode.BUFFERED)
]
CORPUS += [
    _stream(*_call[:1], GRPC, _call[1], answer_frames("Hi", dialect)) for dialect in adapters.DIALECTS for _call in (_grpc_call(dialect),)
]
CORPUS.append(_stream(CHAT, "application/json", chat(), [], trailers=[("grpc-status", "8"), ("grpc-message", "x%20y")]))


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """What becomes of the stream before each kind of model server."""
    outcomes = [_played(place, data, cut) for place in range(len(GATEWAYS))]
    return (ACCEPTED if any(outcome[0] == ACCEPTED for outcome in outcomes) else str(outcomes[0][0]), *outcomes)


def _played(place: int, data: bytes, cut: Cut) -> tuple[object, ...]:
    stream = Stream(GATEWAYS[place], mode=None)
    for message in _messages(data, cut):
        if message.HasField("protocol_config"):
            stream.modes = (message.protocol_config.request_body_mode, message.protocol_config.response_body_mode)
        stream.send(message)
    processor, immediate = stream.processor, stream.immediate
    error = processor.error
    answered = (immediate.status.code, immediate.body) if immediate is not None else (stream.response.headers, stream.response.body)
    return ACCEPTED if error is None else type(error).__name__, str(error), processor.usage, stream.request.body, answered


def _messages(data: bytes, cut: Cut) -> Iterator[Any]:
    """As far as they can be read."""
    offset = 0
    while offset + 2 <= len(data):
        size = int.from_bytes(data[offset : offset + 2], "big")
        try:
            message = ProcessingRequest.FromString(data[offset + 2 : offset + 2 + size])
        except DecodeError:
            return
        offset += 2 + size
        kind = message.WhichOneof("request")
        # Pieces of a body that comes whole, in mode BUFFERED, would be several bodies.
        if kind in ("request_body", "response_body") and getattr(message, kind).body and _is_streamed(data):
            *pieces, last = cut(getattr(message, kind).body)
            for piece in pieces:
                yield body_message(kind, piece)
            getattr(message, kind).body = last
        yield message


def _is_streamed(data: bytes) -> bool:
    first = ProcessingRequest.FromString(data[2 : 2 + int.from_bytes(data[:2], "big")])
    return (
        not first.HasField("protocol_config")
        or first.protocol_config.request_body_mode == FULL_DUPLEX == first.protocol_config.response_body_mode
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
