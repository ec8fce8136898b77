"""What a host has to send or do, as values: of an HTTP answer, and of a gRPC answer."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ._errors import CodecError, UnsupportedEndpointError
from .openai.errors import encode_error


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


def encode_error_response(error: CodecError) -> tuple[Output, ...]:
    """A whole HTTP answer that reports `error` in OpenAI's form, such as one that `Transcoder.request` raised."""
    extra = (("allow", error.allow),) if isinstance(error, UnsupportedEndpointError) and error.allow else ()
    return encode_json_response(encode_error(error), status=error.http_status, headers=extra)


def encode_json_response(body: bytes, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> tuple[Output, ...]:
    """A whole HTTP answer with a JSON body."""
    head = (("content-type", "application/json"), ("content-length", str(len(body))), *headers)
    return ResponseHead(status, head), BodyChunk(body), EndOfBody()
