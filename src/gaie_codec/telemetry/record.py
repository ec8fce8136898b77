"""How one request went: a plain record for metrics and trace, and the meter that makes it while the shim answers.

A shim makes a `RequestMeter`, tells it what it learns by setting attributes, adds up messages and bytes, and calls `end` once. Without
metrics and tracing the meter only adds numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from .. import Code, CodecError, Usage
from .._local import PATHS as LOCAL_PATHS
from ..anthropic import ENDPOINTS as ANTHROPIC_ENDPOINTS
from ..openai import ENDPOINTS, passthrough

if TYPE_CHECKING:
    from .metrics import Metrics
    from .tracing import Tracing

MODES: Final = ("http-in-grpc-out", "grpc-in-grpc-out", "grpc-bridged", "passthrough", "local", "refused")
"""What can become of a request. Bridged is a gRPC call that goes to a server of another dialect; local is answered by the shim."""

PATHS: Final = frozenset((*ENDPOINTS, *ANTHROPIC_ENDPOINTS, *passthrough.PATHS, *LOCAL_PATHS, "/health", "/ping", "/load"))
"""Paths that are known, and no text that a client made up."""

CANCELLED: Final = "cancelled"
"""The `error_type` of a request whose client has gone."""

BUG: Final = "bug"
"""The `error_type` of an exception that is none of `CodecError`."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How one request went. Times are in seconds since its start; directions are seen from here.

    Of `path`, `model` and `dropped` any text may be a client's. `upstream` is the model server's address, empty where none was asked.
    """

    mode: str
    method: str = "POST"
    path: str = ""
    dialect: str = ""
    upstream: str = ""
    model: str = ""
    http_status: int = 0
    """What the client was told; 0 where that was nothing any more."""
    error: Exception | None = None
    is_cancelled: bool = False
    """The client has gone before the end."""
    duration_s: float = 0.0
    ttft_s: float | None = None
    """Until the first of a stream's body left; None where nothing was streamed."""
    usage: Usage = Usage()
    frames_sent: int = 0
    """gRPC messages to the model server."""
    frames_received: int = 0
    upstream_bytes_sent: int = 0
    """Of these messages, without frames and headers."""
    upstream_bytes_received: int = 0
    client_bytes_received: int = 0
    """Of bodies."""
    client_bytes_sent: int = 0
    dropped: tuple[str, ...] = ()
    """Fields of the request that were left out (`Call.dropped`)."""

    @property
    def error_type(self) -> str:
        """The class of the error, "cancelled" or "bug"; empty for a request that went well."""
        if self.error is not None:
            return type(self.error).__name__ if isinstance(self.error, CodecError) else BUG
        return CANCELLED if self.is_cancelled else ""

    @property
    def code(self) -> Code:
        """The gRPC code of how it ended."""
        if isinstance(self.error, CodecError):
            return self.error.code
        if self.error is not None:
            return Code.INTERNAL
        return Code.CANCELLED if self.is_cancelled else Code.OK


class RequestMeter:
    """Runs along with one request. Its attributes are those of `RequestRecord`, to be set and added to until `end`."""

    __slots__ = (
        "_metrics",
        "_span",
        "_started",
        "_started_s",
        "client_bytes_received",
        "client_bytes_sent",
        "dialect",
        "dropped",
        "error",
        "frames_received",
        "frames_sent",
        "has_ended",
        "headers",
        "http_status",
        "is_cancelled",
        "method",
        "mode",
        "model",
        "path",
        "ttft_s",
        "upstream",
        "upstream_bytes_received",
        "upstream_bytes_sent",
        "usage",
    )

    def __init__(
        self,
        mode: str,
        *,
        method: str = "POST",
        path: str = "",
        route: str | None = None,
        headers: Mapping[str, str] | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`headers` are the client's, names in lower case; afterwards `headers` has them with the trace context of the span.

        `route` is what the span is named by: None for the path, if it is one of `PATHS`.
        """
        self._started_s = time.perf_counter()
        self._metrics = metrics
        self._started = metrics.started() if metrics is not None else None
        given = dict(headers or {})
        if route is None:
            route = path if path in PATHS else ""
        self._span = tracing.start(method, route, given) if tracing is not None else None
        self.headers = given if self._span is None else self._span.replace_in(given)
        self.mode = mode
        self.method = method
        self.path = path
        self.dialect = self.upstream = self.model = ""
        self.http_status = 0
        self.error: Exception | None = None
        self.is_cancelled = self.has_ended = False
        self.ttft_s: float | None = None
        self.usage = Usage()
        self.frames_sent = self.frames_received = 0
        self.upstream_bytes_sent = self.upstream_bytes_received = 0
        self.client_bytes_sent = self.client_bytes_received = 0
        self.dropped: tuple[str, ...] = ()

    def elapsed_s(self) -> float:
        """Since the start of the request."""
        return time.perf_counter() - self._started_s

    def end(self) -> RequestRecord:
        """The request is over: tell metrics and trace. Only the first call does."""
        record = RequestRecord(
            mode=self.mode,
            method=self.method,
            path=self.path,
            dialect=self.dialect,
            upstream=self.upstream,
            model=self.model,
            http_status=self.http_status,
            error=self.error,
            is_cancelled=self.is_cancelled,
            duration_s=self.elapsed_s(),
            ttft_s=self.ttft_s,
            usage=self.usage,
            frames_sent=self.frames_sent,
            frames_received=self.frames_received,
            upstream_bytes_sent=self.upstream_bytes_sent,
            upstream_bytes_received=self.upstream_bytes_received,
            client_bytes_received=self.client_bytes_received,
            client_bytes_sent=self.client_bytes_sent,
            dropped=self.dropped,
        )
        if not self.has_ended:
            self.has_ended = True
            if self._metrics is not None and self._started is not None:
                self._metrics.ended(self._started, record)
            if self._span is not None:
                self._span.end(record)
        return record
