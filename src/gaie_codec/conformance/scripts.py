"""The streams that are played: each a request as Envoy sends it, and the kind of answer that a model server gives to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import msgspec

from .. import InferenceRequest, SamplingParams, encode_frame
from ..adapters.base import Adapter
from .addresses import split
from .transcript import Expectation

AnswerKind: TypeAlias = Literal["unary", "trailers", "stream", "odd_cuts", "large", "head_alone", "local_reply", "cut_short"]
"""unary: one whole body. trailers: likewise, with HTTP trailers. stream: a piece a message, paced. odd_cuts: the same, cut every few
bytes. large: 100 KB in one piece. head_alone: an error whose headers end the response. local_reply: what Envoy says where no server is
there. cut_short: the last message, and trailers, are missing."""

STRANGER: Final = "192.0.2.1:9"
"""An endpoint of no pool: the network is for documentation (RFC 5737)."""

_CHAT: Final = "/v1/chat/completions"
_LONG: Final = 100_000
_MEGABYTE: Final = 1_100_000
_CHUNK: Final = 65_536


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """One stream."""

    name: str
    expects: Expectation = "endpoint"
    path: str = _CHAT
    headers: tuple[tuple[str, str], ...] = ()
    """Besides those that every request has; one of the same name takes the place."""

    body: tuple[bytes, ...] = ()
    """Pieces; none for a request without a body."""

    ends_with: Literal["piece", "nothing", "twice", "trailers"] = "nothing"
    """Where end of stream comes: on the last piece (HTTP/2), after it with an empty one (HTTP/1.1), on that and once more, or with
    request trailers."""

    subset: list[str] | str | None = None
    answer: AnswerKind = "unary"
    answer_headers: tuple[tuple[str, str], ...] = ()
    reports_served: bool = True


def standard(model: str, adapter: Adapter) -> Iterator[Script]:
    """Everything that does not depend on the pool. `adapter` is the dialect of the gRPC client."""
    chat, streamed = _chat(model), _chat(model, stream=True)
    yield Script(name="chat", body=(chat,))
    yield Script(name="chat, streamed", body=(streamed,), answer="stream")
    yield Script(name="chat in many pieces", body=tuple(_cut(chat, 3)), ends_with="piece")
    # Limits on what a body or a prompt may be are the EPP's own business.
    yield Script(name="chat, 1 MB", expects="", body=_pieces(_padded(chat)), answer="large")
    yield Script(name="chat, long prompt", body=_pieces(_chat(model, "word " * (_LONG // 5))), expects="")
    yield Script(name="path with a query", path=f"{_CHAT}?from=conformance&n=1", body=(chat,))
    yield Script(name="request trailers", body=(chat,), ends_with="trailers")
    yield Script(name="end of stream twice", body=(chat,), ends_with="twice")
    yield Script(name="end of stream twice, 1 MB", expects="", body=_pieces(_padded(chat)), ends_with="twice")
    hops = (("transfer-encoding", "chunked"), ("trailer", "x-checksum"))
    yield Script(name="chunked transfer", body=(streamed,), headers=hops, answer="stream", answer_headers=hops)
    yield Script(name="events in odd cuts", body=(streamed,), answer="odd_cuts")
    yield Script(name="no model server", body=(chat,), answer="local_reply", reports_served=False)
    yield Script(name="headers that end the response", body=(chat,), answer="head_alone")
    yield Script(name="served endpoint not reported", body=(chat,), reports_served=False)
    yield Script(name="response trailers", body=(chat,), answer="trailers")
    # It may be routed, answered, or refused.
    yield Script(name="list of models", path="/v1/models", expects="")
    yield from _grpc(adapter)
    yield Script(name="chat, after a bad frame", body=(chat,))
    yield Script(name="empty subset", body=(chat,), subset=[], expects="503")
    yield Script(name="empty subset, no body", path="/v1/models", subset=[], expects="")
    yield Script(name="subset without an eligible endpoint", body=(chat,), subset=[STRANGER], expects="503")
    yield Script(name="subset as text, without an eligible endpoint", body=(chat,), subset=STRANGER, expects="")


def subsets(model: str, pool: Sequence[str]) -> Iterator[Script]:
    """Subsets of a pool of which at least one endpoint is known."""
    chat = _chat(model)
    for endpoint in pool:
        yield Script(name=f"subset of {endpoint}", body=(chat,), subset=[endpoint])
    yield Script(name="subset with a stranger", body=(chat,), subset=[STRANGER, pool[-1]])
    yield Script(name="subset as text", body=(chat,), subset=pool[-1], expects="")
    if len(pool) > 1:
        yield Script(name="subset of two", body=(chat,), subset=list(pool[-2:]))
    yield Script(name="subset with another port", body=(chat,), subset=[_other_port(pool[0], pool)], expects="")


def beside(model: str, pool: Sequence[str]) -> tuple[Script, Script]:
    """Two streams that are open at once, with different subsets where there are two endpoints."""
    chat = tuple(_cut(_chat(model), 20))
    first = Script(name="one of two at once", body=chat, subset=[pool[0]])
    return first, Script(name="the other of two at once", body=chat, subset=[pool[-1]])


def without_endpoint(model: str) -> Iterator[Script]:
    """For a pool that has none ready."""
    yield Script(name="chat", body=(_chat(model),), expects="503")
    yield Script(name="chat, streamed", body=(_chat(model, stream=True),), expects="503")
    yield Script(name="list of models", path="/v1/models", expects="503")
    yield Script(name="request without a body", path="/v1/conformance", expects="503")


def shed(model: str) -> Iterator[Script]:
    """For a pool that is saturated."""
    yield Script(name="chat", body=(_chat(model),), expects="429")
    yield Script(name="chat, streamed", body=(_chat(model, stream=True),), expects="429")


def _grpc(adapter: Adapter) -> Iterator[Script]:
    request = InferenceRequest(
        request_id="conformance", prompt_token_ids=[40, 41, 42], sampling=SamplingParams(temperature=0.0, max_tokens=16), stream=True
    )
    path = adapter.path_for(request)
    frame = encode_frame(adapter.encode_request(request).SerializeToString())
    headers = (
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-accept-encoding", "identity"),
        *adapter.encode_metadata(request),
    )
    bodies: tuple[tuple[str, AnswerKind, tuple[bytes, ...]], ...] = (
        ("gRPC", "stream", (frame,)),
        ("gRPC, frames in odd cuts", "odd_cuts", tuple(_cut(frame, 3))),
        ("gRPC, headers that end the response", "head_alone", (frame,)),
        ("gRPC, cut short", "cut_short", (frame,)),
        ("gRPC, a frame that says 4 GB", "head_alone", (b"\x00\xff\xff\xff\xff" + frame[5:],)),
    )
    for name, answer, body in bodies:
        # Whether an EPP takes gRPC, and this dialect, is its own business.
        yield Script(name=name, path=path, headers=headers, body=body, ends_with="piece", answer=answer, expects="")


def _chat(model: str, text: str = "Say hello.", *, stream: bool = False) -> bytes:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body)


def _padded(body: bytes) -> bytes:
    # White space: a long prompt would be refused by many a model.
    return body[:-1] + b" " * _MEGABYTE + b"}"


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _pieces(data: bytes) -> tuple[bytes, ...]:
    return tuple(_cut(data, _CHUNK))


def _other_port(endpoint: str, pool: Sequence[str]) -> str:
    host, _, port = endpoint.rpartition(":")
    taken = {parts[1] for parts in map(split, pool) if parts is not None}
    # High ports go down, low ones up, and none leaves the range.
    step = -1 if int(port) > 32768 else 1
    free = int(port)
    while free in taken:
        free += step
    return f"{host}:{free}"
