"""gRPC metadata and trailers: what of a response's headers says how the call went.

Spec: the gRPC project's PROTOCOL-HTTP2.md, sections "Responses" and "Status-Message".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

from ._errors import Code, MalformedMessageError, UpstreamError, UpstreamStatusError, UsageError, code_from_http, code_from_text

Headers: TypeAlias = Iterable[tuple[str, str]]

# Trace context is all that the servicers read of a call's metadata.
FORWARDED: Final = ("traceparent", "tracestate")
_PERCENT: Final = re.compile(rb"%([0-9A-Fa-f]{2})")


def as_mapping(headers: Headers | Mapping[str, str]) -> dict[str, str]:
    """Names in lower case. Of a name that comes twice the last value counts, as with grpcio. Raises UsageError for what is no text."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    fields = {name.lower(): value for name, value in pairs}
    for name, value in fields.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise UsageError(f"headers are pairs of str, not ({name!r}, {value!r}); decode bytes as latin-1")
    return fields


def is_metadata_value(value: str) -> bool:
    """Whether gRPC can carry it: printable ASCII, and not empty."""
    return value.isascii() and value.isprintable() and value != ""


def decode_grpc_message(value: str) -> str:
    """A percent-encoded `grpc-message`. Never fails: what is not percent-encoded, or not UTF-8, stays readable."""
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that do not stand for bytes
        raw = value.encode("utf-8", "replace")
    return _PERCENT.sub(lambda match: bytes((int(match[1], 16),)), raw).decode("utf-8", "replace")


def encode_grpc_message(value: str) -> str:
    """The inverse: printable ASCII but `%` stays, other bytes are percent-encoded."""
    return "".join(chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in value.encode("utf-8", "replace"))


def decode_status(trailers: Mapping[str, str]) -> UpstreamStatusError | None:
    """The error that `grpc-status` tells of; None for OK. A missing status is UNKNOWN."""
    code = code_from_text(trailers.get("grpc-status", ""))
    if code is Code.OK:
        return None
    detail = decode_grpc_message(trailers.get("grpc-message", ""))
    if not detail and code is Code.UNKNOWN:
        status = trailers.get("grpc-status")
        detail = "no grpc-status in the trailers" if status is None else f"grpc-status {status[:20]!r}"
    return UpstreamStatusError(code, detail)


def check_headers(status: int, headers: Mapping[str, str]) -> UpstreamError | UpstreamStatusError | None:
    """What is wrong with response headers that carry no grpc-status: an answer from something that does not speak gRPC."""
    if status != 200:
        return UpstreamStatusError(code_from_http(status), f"HTTP status {status} without a grpc-status")
    content_type = headers.get("content-type", "application/grpc")
    if not content_type.startswith("application/grpc"):
        return MalformedMessageError("the answer is not gRPC", detail=f"content-type {content_type[:100]!r}")
    return None
