"""What a host has to send or do, as values: of an HTTP answer, and of a gRPC answer."""

from __future__ import annotations

import string
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from ._errors import Code, CodecError, UnsupportedEndpointError, UpstreamStatusError
from .anthropic import errors as anthropic_errors
from .openai.errors import encode_error

# Clients (the openai SDK too) retry 409 and whatever is 500 or more, if they are not told otherwise: when it may help, and when it cannot.
_RETRY: Final = MappingProxyType(
    {
        Code.UNAVAILABLE: (("retry-after", "1"),),
        Code.ALREADY_EXISTS: (("x-should-retry", "false"),),
        Code.DEADLINE_EXCEEDED: (("x-should-retry", "false"),),
        Code.UNIMPLEMENTED: (("x-should-retry", "false"),),
    }
)
# Unknown fields are named in the header, and there is no end to what a client can send.
_MAX_DROPPED_BYTES: Final = 2048
_MAX_REQUEST_ID_LENGTH: Final = 256
_UNRESERVED: Final = frozenset(f"{string.ascii_letters}{string.digits}_.-~".encode())
_VISIBLE: Final = _UNRESERVED.union(string.punctuation.encode())


class ResponseHead(msgspec.Struct, frozen=True):
    """The HTTP status and headers to send. It comes first, and once."""

    status: int
    headers: tuple[tuple[str, str], ...]


class BodyChunk(msgspec.Struct, frozen=True):
    """Bytes of the HTTP body to send."""

    data: bytes


class EndOfBody(msgspec.Struct, frozen=True):
    """The body is complete. Nothing follows; a host may cancel upstream calls that are still open."""


class CancelCall(msgspec.Struct, frozen=True):
    """One of several calls is not needed any longer, while others are. It may come before the ResponseHead."""

    call: int


Output: TypeAlias = ResponseHead | BodyChunk | EndOfBody | CancelCall


def encode_error_response(error: CodecError, path: str = "", *, flavor: str = "vllm") -> tuple[Output, ...]:
    """A whole HTTP answer that reports `error`, such as one that `Transcoder.request` raised. It is in OpenAI's form, as the
    transcoder's `flavor` has it, and in Anthropic's where `path`, that of the HTTP request, is one of theirs."""
    extra = (("allow", error.allow),) if isinstance(error, UnsupportedEndpointError) and error.allow else ()
    if isinstance(error, UpstreamStatusError):
        extra = _RETRY.get(error.code, ())
    body = anthropic_errors.encode_error(error) if anthropic_errors.is_path(path) else encode_error(error, flavor)
    return encode_json_response(body, status=error.http_status, headers=extra)


def encode_json_response(body: bytes, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> tuple[Output, ...]:
    """A whole HTTP answer with a JSON body."""
    return encode_whole_response(body, "application/json", status=status, headers=headers)


def encode_whole_response(
    body: bytes, content_type: str, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
) -> tuple[Output, ...]:
    """A whole HTTP answer with a body of this type."""
    head = (("content-type", content_type), ("content-length", str(len(body))), *headers)
    return ResponseHead(status, head), BodyChunk(body), EndOfBody()


def encode_answer_headers(request_id: str, dropped: tuple[str, ...] = ()) -> tuple[tuple[str, str], ...]:
    """Headers for every answer: which request it is of, and `x-gaie-codec-dropped` with the fields that had no effect.

    A body can name request and fields in any characters: what a header cannot hold is percent-encoded.
    """
    headers = [("x-request-id", _quoted(request_id[:_MAX_REQUEST_ID_LENGTH], _VISIBLE))]
    if dropped:
        names = (_quoted(name[:_MAX_DROPPED_BYTES], _UNRESERVED) for name in dropped[:_MAX_DROPPED_BYTES])
        listed = ", ".join(names)
        if len(listed) > _MAX_DROPPED_BYTES:
            listed = listed[:_MAX_DROPPED_BYTES].rpartition(", ")[0] + ", ..."
        headers.append(("x-gaie-codec-dropped", listed))
    return tuple(headers)


def _quoted(text: str, safe: frozenset[int]) -> str:
    return "".join(chr(byte) if byte in safe else f"%{byte:02X}" for byte in text.encode("utf-8", "replace"))
