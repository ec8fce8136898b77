"""Which way a request goes, by the client's content type, the model server and the pool: docs/ext-proc.md has the table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from .. import RequestError

_GRPC: Final = "application/grpc"


class Mode(StrEnum):
    """What is done with a request, in the words of the Gateway API Inference Extension."""

    TRANSCODE = "http-in-grpc-out"
    OBSERVE = "grpc-in-grpc-out"
    BRIDGE = "grpc-bridged"
    """grpc-in-grpc-out to a model server of another dialect."""
    PASS = "passthrough"
    LOCAL = "local"
    """Answered here."""


def is_grpc(content_type: str) -> bool:
    """Whether the client speaks gRPC. Raises RequestError (415) for its relatives, which nobody here speaks."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in (_GRPC, f"{_GRPC}+proto"):
        return True
    if kind.startswith((_GRPC, "application/connect+")):
        error = RequestError(f"content-type {kind[:60]} is not spoken here; there is application/json, and {_GRPC}", param="content-type")
        error.http_status, error.error_type = 415, "UnsupportedMediaTypeError"
        raise error
    return False
