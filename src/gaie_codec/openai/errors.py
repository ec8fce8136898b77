"""OpenAI error bodies, in the shape that vLLM gives them, `{"error": {"message", "type", "param", "code"}}`, or SGLang, which is flat."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

import msgspec

from .. import _sse
from .._errors import CodecError

# In a stream SGLang names the HTTP status instead of the kind of error.
_STATUS_NAMES: Final = MappingProxyType(
    {
        400: "BAD_REQUEST",
        401: "UNAUTHORIZED",
        403: "FORBIDDEN",
        404: "NOT_FOUND",
        409: "CONFLICT",
        429: "TOO_MANY_REQUESTS",
        500: "INTERNAL_SERVER_ERROR",
        501: "NOT_IMPLEMENTED",
        502: "BAD_GATEWAY",
        503: "SERVICE_UNAVAILABLE",
        504: "GATEWAY_TIMEOUT",
    }
)


def encode_error(error: CodecError, flavor: str = "vllm") -> bytes:
    """The JSON body. `code` is the HTTP status in both flavors."""
    told = _told(error)
    return msgspec.json.encode({"error": told} if flavor == "vllm" else {"object": "error", **told})


def encode_error_event(error: CodecError, flavor: str = "vllm") -> bytes:
    """Likewise as an event in a stream, where the body is not flat in any flavor."""
    told = _told(error)
    if flavor != "vllm":
        told = {"object": "error", **told, "type": _STATUS_NAMES.get(error.http_status, error.error_type)}
    return _sse.encode_event(msgspec.json.encode({"error": told}))


def _told(error: CodecError) -> dict[str, Any]:
    return {
        # A host's gRPC library, or a chat template, may put lone surrogates into a text.
        "message": error.message.encode("utf-8", "replace").decode(),
        "type": error.error_type,
        "param": error.param and error.param.encode("utf-8", "replace").decode(),
        "code": error.http_status,
    }
