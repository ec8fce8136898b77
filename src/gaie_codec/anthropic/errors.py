"""Anthropic error bodies, as vLLM gives them on these paths: `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec

from .._errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH: Final = "/v1/messages"

# Clients choose by these words. What has none of its own is the server's fault or the request's, by its status.
_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
)


def is_path(path: str) -> bool:
    """Whether answers on this path, known or not, are in Anthropic's form."""
    route = path.partition("?")[0]
    return route == PATH or route.startswith(f"{PATH}/")


def encode_error(error: CodecError) -> bytes:
    """The JSON body, the same alone in an HTTP answer and as an event in a stream."""
    status = error.http_status
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    # A host's gRPC library, or a chat template, may put lone surrogates into a text.
    message = error.message.encode("utf-8", "replace").decode()
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})
