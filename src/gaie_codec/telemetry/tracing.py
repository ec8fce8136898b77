"""Trace context of a client -> a server span for each request -> the context that goes on to the model server.

Only the API of OpenTelemetry is used: the application configures the SDK. Without the package, or without an SDK, no span is made and the
client's own context goes on unchanged, as the core forwards it. Specs: W3C Trace Context; OpenTelemetry's semantic conventions for HTTP
servers and for generative AI.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .. import __version__

try:
    from opentelemetry import trace
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "opentelemetry":
        raise
    IS_AVAILABLE = False
else:
    IS_AVAILABLE = True

if TYPE_CHECKING:
    from .record import RequestRecord

TRACE_HEADERS: Final = ("traceparent", "tracestate")
_OPERATIONS: Final = MappingProxyType(
    {
        "/v1/chat/completions": "chat",
        "/v1/completions": "text_completion",
        "/v1/embeddings": "embeddings",
        "/v1/responses": "chat",
        "/v1/messages": "chat",
    }
)
_METHODS: Final = frozenset("GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH".split())
_SERVER_ERROR: Final = 500


class SpanHandle:
    """The span of one request, or none. `headers` is the trace context for the model server: names in lower case."""

    __slots__ = ("_span", "headers")

    def __init__(self, headers: dict[str, str], span: Any = None) -> None:
        self.headers = headers
        self._span = span

    def replace_in(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The request's headers with this context instead of the client's."""
        return {name: value for name, value in headers.items() if name not in TRACE_HEADERS} | self.headers

    def end(self, record: RequestRecord) -> None:
        """The request is over: say how it went. A second call does nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        if span.is_recording():
            span.set_attributes(_attributes(record))
            if record.http_status >= _SERVER_ERROR or (record.error is not None and not 0 < record.http_status < _SERVER_ERROR):
                span.set_status(StatusCode.ERROR, record.error_type)
        span.end()


class Tracing:
    """Makes spans with a tracer of `tracer_provider`, by default the global one. Threads may share it."""

    def __init__(self, tracer_provider: Any = None) -> None:
        self._tracer: Any = None
        self._takes_global = tracer_provider is None
        if IS_AVAILABLE:
            self._tracer = trace.get_tracer("gaie_codec", __version__, tracer_provider)
            self._propagator = TraceContextTextMapPropagator()

    def start(self, method: str, route: str, headers: Mapping[str, str]) -> SpanHandle:
        """Begin the span of a request, below the client's. `headers` have their names in lower case; `route` is a path that is known, for
        the span bears its name: what a client made up is no route, and empty here."""
        told = {name: headers[name] for name in TRACE_HEADERS if name in headers}
        # No package, or no SDK so far: not asking the API's own tracer saves 15 us.
        if self._tracer is None or (self._takes_global and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)):
            return SpanHandle(told)
        parent = self._propagator.extract(told)
        is_known = method in _METHODS
        attributes = {"http.request.method": method if is_known else "_OTHER"}
        if route:
            attributes["http.route"] = route
        span = self._tracer.start_span(
            f"{method if is_known else 'HTTP'} {route}".rstrip(), context=parent, kind=SpanKind.SERVER, attributes=attributes
        )
        context = span.get_span_context()
        # A provider that makes no spans gives the client's back, or one that says nothing.
        if not context.is_valid or context.span_id == trace.get_current_span(parent).get_span_context().span_id:
            return SpanHandle(told)
        injected: dict[str, str] = {}
        self._propagator.inject(injected, trace.set_span_in_context(span, parent))
        return SpanHandle(injected, span)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    told: dict[str, Any] = {
        "http.response.status_code": record.http_status,
        "error.type": record.error_type,
        "gen_ai.operation.name": _OPERATIONS.get(record.path, ""),
        "gen_ai.provider.name": record.dialect.partition(".")[0],
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": record.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.usage.cached_tokens,
        "gaie_codec.mode": record.mode,
        "gaie_codec.upstream": record.upstream,
        "gaie_codec.dialect": record.dialect,
        "gaie_codec.time_to_first_token_s": record.ttft_s,
    }
    return {name: value for name, value in told.items() if value}
