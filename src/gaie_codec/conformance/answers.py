"""What a model server says to the request that an EPP lets go on: HTTP in OpenAI's JSON and events, or gRPC in the dialect of its path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError

from .. import BodyEvent, CodecError, FinishEvent, FrameDecoder, TokensEvent, adapters, encode_frame, snapshots
from .._conventions import Teller
from .._events import Event
from ..adapters import DIALECTS
from ..adapters.base import Adapter
from .exchange import Exchange
from .scripts import AnswerKind

Pairs = tuple[tuple[str, str], ...]

# Printable letters in the usual vocabularies, byte-level and SentencePiece: no token is half a character.
_TOKENS: Final = (64, 65, 66, 67, 68)
_LARGE_TOKENS: Final = 100_000
_ODD: Final = 7
_ID: Final = "chatcmpl-conformance"
_USAGE: Final = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A response: headers, body in pieces, and trailers. Without a body the headers end it; without trailers the body does."""

    headers: Pairs
    body: tuple[bytes, ...] = ()
    trailers: Pairs | None = None


def answer(kind: AnswerKind, exchange: Exchange, adapter: Adapter) -> Answer:
    """The answer of that kind to what goes on of the request. `adapter` is the one to try first where gRPC does."""
    if kind == "local_reply":
        text = b"no healthy upstream"
        return Answer(headers=_headers(503, "text/plain", ("content-length", str(len(text)))), body=(text,))
    if exchange.is_grpc_out:
        return _grpc(kind, exchange, adapter)
    return _http(kind, exchange)


def _http(kind: AnswerKind, exchange: Exchange) -> Answer:
    if kind == "head_alone":
        return Answer(headers=_headers(503, "text/plain"))
    if exchange.request.is_bodyless:
        models = {"object": "list", "data": [{"id": "conformance", "object": "model", "created": 1, "owned_by": "conformance"}]}
        return Answer(headers=_headers(200, "application/json"), body=(msgspec.json.encode(models),))
    if kind in ("stream", "odd_cuts"):
        events = tuple(b"data: " + data + b"\n\n" for data in _chunks())
        body = events if kind == "stream" else _cut(b"".join(events))
        return Answer(headers=_headers(200, "text/event-stream"), body=body)
    body = (_completion("x" * _LARGE_TOKENS if kind == "large" else "ABCDE"),)
    return Answer(headers=_headers(200, "application/json"), body=body, trailers=(("x-checksum", "1"),) if kind == "trailers" else None)


def _grpc(kind: AnswerKind, exchange: Exchange, adapter: Adapter) -> Answer:
    headers = _headers(200, "application/grpc")
    if kind == "head_alone":
        return Answer(headers=(*headers, ("grpc-status", "14"), ("grpc-message", "the engine is not there")))
    frames = _frames(exchange, adapter, _LARGE_TOKENS if kind == "large" else 0)
    if frames is None:
        return Answer(headers=(*headers, ("grpc-status", "12"), ("grpc-message", "unknown method, or a request that cannot be read")))
    if kind == "cut_short":
        return Answer(headers=headers, body=tuple(frames[:-1]) or (frames[0][:-1],))
    body: Sequence[bytes] = frames
    if kind in ("odd_cuts", "large"):
        body = _cut(b"".join(frames)) if kind == "odd_cuts" else (b"".join(frames),)
    return Answer(headers=headers, body=tuple(body), trailers=(("grpc-status", "0"),))


def _frames(exchange: Exchange, first: Adapter, large: int) -> list[bytes] | None:
    """None for a path or a request that no known model server takes."""
    request = exchange.request
    path = request.changed.get(":path", "").partition("?")[0]
    newest = (adapters.get(snapshots.load(dialect)) for dialect in DIALECTS)
    for adapter in (first, *newest):
        bodies = adapter.passthrough.paths.values() if adapter.passthrough is not None else ()
        if path not in (*adapter.generate_paths, *bodies):
            continue
        try:
            (payload,) = FrameDecoder(encoding=request.changed.get("grpc-encoding", "identity")).receive_data(request.body_out)
            message: Any = adapter.snapshot.method_at(path).request.FromString(payload)
            told = _passed(adapter, path, message, large) if path in bodies else _told(adapter, message, large)
            return [encode_frame(part.SerializeToString()) for part in told]
        except (CodecError, DecodeError, ValueError):
            return None
    return None


def _passed(adapter: Adapter, path: str, message: Any, large: int) -> Iterator[Any]:
    """The messages of a server that takes OpenAI JSON as it is."""
    assert adapter.passthrough is not None
    encode = adapter.passthrough.encode_response
    body, _ = adapter.passthrough.decode_request(message)
    if not msgspec.json.decode(body).get("stream"):
        yield encode(BodyEvent(data=_completion("x" * large or "ABCDE"), http_status=200, is_last=True), path)
        return
    for data in list(_chunks())[:-1]:
        yield encode(BodyEvent(data=data), path)
    yield encode(BodyEvent(data=b"", is_last=True), path)


def _told(adapter: Adapter, message: Any, large: int) -> Iterator[Any]:
    request = adapter.decode_request(message)
    sends_text = adapter.sends_text or (request.prompt_text is not None and adapter.answers_text_with_text)
    teller = Teller(adapter.convention, request, sends_text=sends_text)
    prompt_tokens = len(request.prompt_token_ids) or 1
    tokens = [[_TOKENS[0]] * large] if large else [[token] for token in _TOKENS]
    events: list[Event] = []
    for index in range(max(request.sampling.n, 1)):
        for ids in tokens:
            text = "".join(map(chr, ids)) if sends_text else None
            events += teller.gain(TokensEvent(index=index, token_ids=ids, text=text, prompt_tokens=prompt_tokens))
        events += teller.finish(FinishEvent(index=index, finish_reason="stop", prompt_tokens=prompt_tokens))
    return map(adapter.encode_response, events)


def _headers(status: int, content_type: str, *more: tuple[str, str]) -> Pairs:
    return (":status", str(status)), ("content-type", content_type), *more


def _completion(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return msgspec.json.encode(
        {"id": _ID, "object": "chat.completion", "created": 1, "model": "conformance", "choices": [choice], "usage": _USAGE}
    )


def _chunks() -> Iterator[bytes]:
    """The data of the events of a streamed chat completion."""
    head = {"id": _ID, "object": "chat.completion.chunk", "created": 1, "model": "conformance"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": chr(token)} for token in _TOKENS)]
    for delta in deltas:
        yield msgspec.json.encode({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield msgspec.json.encode({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    yield msgspec.json.encode({**head, "choices": [], "usage": _USAGE})
    yield b"[DONE]"


def _cut(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[start : start + _ODD] for start in range(0, len(data), _ODD))
