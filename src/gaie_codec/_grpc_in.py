"""A gRPC request of a client -> InferenceRequest: what observing a call and bridging to another server begin with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from ._errors import MalformedRequestError, UnsupportedEndpointError, UpstreamError
from ._events import InferenceRequest
from ._framing import FrameDecoder
from ._metadata import FORWARDED
from .openai.sampling import MAX_N
from .snapshots import is_repeated

if TYPE_CHECKING:
    from .adapters.base import Adapter, EmbedCoder

RANK = "x-data-parallel-rank"


def decode_rank(text: str) -> int:
    """The value of x-data-parallel-rank. Raises MalformedRequestError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**31):
        raise MalformedRequestError(f"{RANK} is no rank", param=RANK)
    return int(text)


def only_message(body: bytes | Iterable[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The one message in a request body, whole or in pieces. Raises MalformedRequestError."""
    decoder = FrameDecoder(max_message_bytes=max_bytes, encoding=headers.get("grpc-encoding", "identity"))
    messages: list[bytes] = []
    try:
        for piece in (body,) if isinstance(body, bytes) else body:
            messages += decoder.receive_data(piece)
        decoder.receive_eof()
    except UpstreamError as error:  # the same faults, here of a client
        raise MalformedRequestError(f"the request body: {error.message}", param="body") from None
    if len(messages) != 1:
        raise MalformedRequestError(f"the request body has {len(messages)} messages instead of one", param="body")
    return messages[0]


def parse_request(adapter: Adapter, path: str, message: bytes) -> Any:
    """The message of a call to `path`. Raises UnsupportedEndpointError for a path that does not generate, MalformedRequestError."""
    bodies = adapter.passthrough.paths.values() if adapter.passthrough is not None else ()
    if path not in adapter.generate_paths and path not in bodies:
        raise UnsupportedEndpointError(f"{path[:100]} does not generate; what does is {', '.join((*adapter.generate_paths, *bodies))}")
    return parse_message(adapter, path, message)


def parse_message(adapter: Adapter, path: str, message: bytes) -> Any:
    """The request message of a method of the adapter's. Raises MalformedRequestError."""
    request_type: Any = adapter.snapshot.method_at(path).request
    try:
        return request_type.FromString(message)
    except DecodeError:
        raise MalformedRequestError(f"{len(message)} bytes that are no {request_type.DESCRIPTOR.full_name}", param="body") from None


def decode_request(adapter: Adapter, path: str, message: Any, headers: Mapping[str, str]) -> InferenceRequest:
    """What the message and its metadata ask for. Raises MalformedRequestError for metadata that the server would refuse."""
    try:
        request = adapter.decode_request(message)
    except UpstreamError as error:  # the same faults, here of a client
        raise MalformedRequestError(error.message, param="body") from None
    if not 1 <= request.sampling.n <= MAX_N:
        raise MalformedRequestError(f"n must be from 1 to {MAX_N}, got {request.sampling.n}.", param="n")
    told: dict[str, Any] = {}
    trace = _trace_of(headers)
    if trace:
        told["trace_headers"] = {**trace, **request.trace_headers}
    if headers.get(RANK) and "data_parallel_rank" in adapter.emulates:
        told["data_parallel_rank"] = decode_rank(headers[RANK])
    if "stream" in adapter.emulates:
        told["stream"] = path == adapter.generate_path
    return msgspec.structs.replace(request, **told) if told else request


def decode_embed_request(embed: EmbedCoder, message: Any, headers: Mapping[str, str]) -> InferenceRequest:
    """What a message of `embed.path` and its metadata ask for."""
    request = embed.decode_request(message)
    return msgspec.structs.replace(request, trace_headers={**_trace_of(headers), **request.trace_headers})


def _trace_of(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in FORWARDED if headers.get(name)}


def unread(coder: Adapter | EmbedCoder, message: Any) -> list[str]:
    """Wire fields that are set and that its `decode_request` does not read: what would be lost on the way to another server."""
    return _unread(message, "", {*coder.sends.values(), *coder.also_reads})


def _unread(message: Any, prefix: str, known: set[str]) -> list[str]:
    unknown: Any = UnknownFieldSet(message)
    found = [f"{prefix}field {field.field_number}" for field in unknown]  # of a client that is newer than the snapshot: a number for a name
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if path in known:
            continue
        inside = f"{path}."
        if field.message_type is not None and any(one.startswith(inside) for one in known):
            parts = value if is_repeated(field) else (value,)
            found += dict.fromkeys(name for part in parts for name in _unread(part, inside, known))
        else:
            found.append(path)
    return found
