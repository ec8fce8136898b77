"""Records of requests -> Prometheus metrics, one call at the start of a request and one at its end.

No label value is a client's text: paths, fields and errors are looked up in tables, model servers and dialects are told apart until there
are too many, and all else is "other". So the number of series is bounded, and the children of a metric are kept by their labels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Final

from .. import CodecError, UsageError, __version__
from ..openai import chat, completions
from .record import BUG, CANCELLED, MODES, PATHS, RequestRecord

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
except ModuleNotFoundError as error:
    raise ImportError(
        "gaie_codec.telemetry needs the package prometheus-client: pip install gaie-codec[metrics]", name=error.name
    ) from error

OTHER: Final = "other"
_MAX_DIALECTS: Final = 32
_MAX_UPSTREAMS: Final = 1000
_FIELDS: Final = frozenset().union(
    *(getattr(module, name) for module in (chat, completions) for name in ("READ", "REFUSED", "ADVISORY")),
    ("n", "x-data-parallel-rank"),
)
_MAX_PORT: Final = 65535

# From a cached prompt of a small model to a queue of minutes; from a token of a small model to one that waits for a prefill.
_TTFT_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_PER_TOKEN_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DURATION_BUCKETS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Started:
    """A request under way, as `Metrics.started` returns it."""

    __slots__ = ("has_ended",)

    def __init__(self) -> None:
        self.has_ended = False


class _Names:
    """Tells names apart until there are too many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        if name in self._known or not name:
            return name
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(name)
        return name


class Metrics:
    """The metrics of one process, in a registry of their own unless one is given. Threads may share it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry: Final = registry if registry is not None else CollectorRegistry()
        self._paths = set(PATHS)
        self._dialects = _Names(_MAX_DIALECTS)
        self._upstreams = _Names(_MAX_UPSTREAMS)
        self._lock = threading.Lock()

        def counter(name: str, text: str, *labels: str) -> Any:
            return _Children(Counter(f"gaie_codec_{name}", text, labels, registry=self.registry))

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Any:
            return _Children(Histogram(f"gaie_codec_{name}", text, labels, registry=self.registry, buckets=buckets))

        Info("gaie_codec_build", "The version of gaie-codec.", registry=self.registry).info({"version": __version__})
        of_request = ("mode", "dialect", "path")
        self._in_flight = Gauge("gaie_codec_requests_in_flight", "Requests being answered.", registry=self.registry)
        self._requests = counter("requests_total", "Requests that ended, by the status that the client was told.", *of_request, "status")
        self._errors = counter(
            "errors_total", "Requests that failed, by the class of the error and its gRPC code.", *of_request, "error_type", "code"
        )
        self._duration = histogram("request_duration_seconds", "From the request to the end of its answer.", _DURATION_BUCKETS, *of_request)
        self._ttft = histogram(
            "time_to_first_token_seconds", "From the request to the first of a streamed body.", _TTFT_BUCKETS, *of_request
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Of a stream's tokens after its first, on average.", _PER_TOKEN_BUCKETS, *of_request
        )
        self._prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts.", *of_request)
        self._cached_tokens = counter("cached_prompt_tokens_total", "Those of them that the model server had in its cache.", *of_request)
        self._completion_tokens = counter("completion_tokens_total", "Tokens generated.", *of_request)
        self._reasoning_tokens = counter("reasoning_tokens_total", "Those of them that were reasoning.", *of_request)
        self._frames = counter("frames_total", "gRPC messages sent to and received from model servers.", "mode", "dialect", "direction")
        self._bytes = counter(
            "bytes_total", "Bytes of bodies and messages, by who is on the other side.", "mode", "dialect", "peer", "direction"
        )
        self._dropped = counter("dropped_fields_total", "Request fields that were left out, as often as that.", "dialect", "field")
        self._upstream_requests = counter("upstream_requests_total", "Requests by model server and gRPC code.", "upstream", "code")

    def add_paths(self, paths: Iterable[str]) -> None:
        """Paths of the host's own that have a label of their own, such as gRPC paths of an adapter."""
        self._paths.update(paths)

    def started(self) -> Started:
        """A request has begun; give what this returns to `ended`."""
        self._in_flight.inc()
        return Started()

    def ended(self, started: Started, record: RequestRecord) -> None:
        """The request is over. A second call for the same one changes nothing."""
        with self._lock:
            if started.has_ended:
                return
            started.has_ended = True
            dialect = self._dialects.label(record.dialect)
            upstream = self._upstreams.label(record.upstream)
        self._in_flight.dec()
        mode = record.mode if record.mode in MODES else OTHER
        of_request = (mode, dialect, record.path if record.path in self._paths else OTHER)
        code = record.code.name
        self._requests.child(*of_request, str(record.http_status) if 100 <= record.http_status <= 599 else "none").inc()
        if record.error_type:
            self._errors.child(*of_request, _known_error(record), code).inc()
        if upstream:
            self._upstream_requests.child(upstream, code).inc()
        self._duration.child(*of_request).observe(record.duration_s)
        usage = record.usage
        if record.ttft_s is not None:
            self._ttft.child(*of_request).observe(record.ttft_s)
            if usage.completion_tokens > 1:
                per_token_s = max(record.duration_s - record.ttft_s, 0.0) / (usage.completion_tokens - 1)
                self._per_token.child(*of_request).observe(per_token_s)
        for metric, amount in (
            (self._prompt_tokens, usage.prompt_tokens),
            (self._cached_tokens, usage.cached_tokens),
            (self._completion_tokens, usage.completion_tokens),
            (self._reasoning_tokens, usage.reasoning_tokens),
        ):
            if amount > 0:
                metric.child(*of_request).inc(amount)
        self._frames.child(mode, dialect, "sent").inc(record.frames_sent)
        self._frames.child(mode, dialect, "received").inc(record.frames_received)
        for peer, direction, amount in (
            ("client", "received", record.client_bytes_received),
            ("client", "sent", record.client_bytes_sent),
            ("upstream", "sent", record.upstream_bytes_sent),
            ("upstream", "received", record.upstream_bytes_received),
        ):
            self._bytes.child(mode, dialect, peer, direction).inc(amount)
        known = [name for name in record.dropped if name in _FIELDS]
        for name in known:
            self._dropped.child(dialect, name).inc()
        if len(known) < len(record.dropped):
            self._dropped.child(dialect, OTHER).inc(len(record.dropped) - len(known))


class _Children:
    """A metric's children by their label values. Finding one in a dict takes a tenth of `labels` (0.1 instead of 1 us)."""

    __slots__ = ("_children", "_metric")

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._children: dict[tuple[str, ...], Any] = {}

    def child(self, *labels: str) -> Any:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._metric.labels(*labels)
        return child


class MetricsServer:
    """The port that metrics are scraped from."""

    def __init__(self, server: Any, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port: Final[int] = server.server_port

    def close(self) -> None:
        """Stop answering and give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(listen: str, registry: CollectorRegistry) -> MetricsServer:
    """Answer scrapes of the registry on HOST:PORT (0 takes a free port, an IPv6 address goes in brackets), in a thread.

    Raises UsageError, naming `metrics-listen`.
    """
    host, _, number = listen.rpartition(":")
    is_bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if is_bare_ipv6 or ":" not in listen or not (number.isascii() and number.isdecimal() and int(number) <= _MAX_PORT):
        raise UsageError(f"metrics-listen {listen}: not of the form HOST:PORT (an IPv6 address goes in brackets)")
    try:
        server, thread = start_http_server(int(number), host.strip("[]") or "0.0.0.0", registry)  # an empty host is any, as for `listen`
    except OSError as error:
        raise UsageError(f"metrics-listen {listen}: {error.strerror or error}") from error
    return MetricsServer(server, thread)


def _known_error(record: RequestRecord) -> str:
    kind = record.error_type
    return kind if kind in _ERRORS else OTHER


def _names_below(kind: type[CodecError]) -> set[str]:
    return {kind.__name__}.union(*map(_names_below, kind.__subclasses__()))


_ERRORS: Final = frozenset((*_names_below(CodecError), BUG, CANCELLED))
