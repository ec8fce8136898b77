"""What the shim counts: requests in flight and how each went, and what its endpoints are and tell of their load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .. import Code, CodecError, UpstreamStatusError
from .._framing import HEADER_BYTES
from ..telemetry import RequestMeter
from ..telemetry.loads import LoadsScraper
from ..telemetry.tracing import TRACE_HEADERS
from ._modes import Mode
from ._plans import generates
from .endpoints import Endpoint, Endpoints

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ..telemetry.loads import LoadsCollector
    from ..telemetry.metrics import Metrics
    from ..telemetry.tracing import Tracing
    from .processor import Processor


_WITH_FRAMES: Final = frozenset((Mode.TRANSCODE, Mode.OBSERVE, Mode.BRIDGE))

_log = logging.getLogger("gaie_codec.ext_proc")


class Accounting:
    """Of one stream."""

    def __init__(self, processor: Processor, endpoints: Endpoints, metrics: Metrics | None, tracing: Tracing | None) -> None:
        self._processor = processor
        self._endpoints = endpoints
        self._endpoint: Endpoint | None = None
        path = processor.path
        route = path if generates(path) else None  # a gRPC path that is known may name its span
        self._meter = RequestMeter(
            "refused", method=processor.method, path=path, route=route, headers=processor.headers, metrics=metrics, tracing=tracing
        )
        told, asked = self._meter.headers, processor.headers
        processor.trace_headers = {name: told[name] for name in TRACE_HEADERS if name in told and told[name] != asked.get(name)}

    def routed(self) -> None:
        """The endpoint has one request more."""
        server = self._processor.server
        if isinstance(server, Endpoint):
            self._endpoint = server
            self._endpoints.acquire(server)

    def closed(self, ttft_s: float | None, duration_s: float) -> None:
        """The endpoint has one less, and the record is made."""
        processor, meter, endpoint = self._processor, self._meter, self._endpoint
        error = processor.error
        if endpoint is not None:
            self._endpoints.release(endpoint)
            if isinstance(error, UpstreamStatusError) and error.code is Code.UNAVAILABLE:
                endpoint.check_now()
            meter.dialect, meter.upstream = endpoint.dialect, endpoint.address
        plan = processor.plan
        meter.mode = processor.mode or meter.mode
        meter.upstream = processor.served or meter.upstream
        if plan is not None:
            meter.model, meter.dropped = plan.inference.model, plan.dropped
            meter.frames_sent = int(plan.mode in _WITH_FRAMES and plan.generates)
            sent = len(plan.body) if plan.body is not None else processor.request_bytes
            meter.upstream_bytes_sent = max(0, sent - HEADER_BYTES * meter.frames_sent)
        meter.error = error
        meter.is_cancelled = not processor.is_answer_complete
        meter.http_status = processor.status
        meter.ttft_s = ttft_s if plan is not None and plan.inference.stream else None
        meter.usage = processor.usage
        meter.frames_received = processor.frames_received
        meter.upstream_bytes_received = max(0, processor.bytes_received - HEADER_BYTES * meter.frames_received)
        meter.client_bytes_received = processor.request_bytes
        meter.client_bytes_sent = processor.bytes_sent
        meter.end()


async def watch_loads(endpoints: Endpoints, collector: LoadsCollector, interval_s: float) -> None:
    """Ask every endpoint for its load, for pickers and for scrapes, until cancelled. None waits for another."""
    asking: dict[Endpoint, asyncio.Task[None]] = {}
    try:
        while True:
            present = {*endpoints}
            for endpoint in asking.keys() - present:
                asking.pop(endpoint).cancel()
                if endpoints.get(endpoint.address) is None:
                    collector.forget(endpoint.address)
            for endpoint in present - asking.keys():
                asking[endpoint] = asyncio.create_task(_watch_load(endpoint, endpoints, collector, interval_s))
            await asyncio.sleep(interval_s)
    finally:
        for task in asking.values():
            task.cancel()


async def _watch_load(endpoint: Endpoint, endpoints: Endpoints, collector: LoadsCollector, interval_s: float) -> None:
    scraper = None
    while True:
        upstream, adapter, model = endpoint.upstream, endpoint.adapter, next(iter(endpoint.model.names), "")
        if endpoint.is_ready and upstream is not None and adapter is not None:
            if scraper is None or not scraper.is_for(upstream, adapter, model):
                scraper = LoadsScraper(upstream, adapter, collector, endpoint=endpoint.address, model=model)
            try:
                loads = await scraper.scrape() if scraper.has_questions else None
            except CodecError:  # whoever watches the endpoint says what is wrong with it; what it told last stays until it is not ready
                loads = None
            except Exception:
                _log.exception("the load of %s: a bug of gaie-codec", endpoint.address)
                loads = None
            if loads is not None:
                endpoints.set_load(endpoint.address, waiting=loads.waiting, running=loads.running, kv_cache_usage=loads.kv_cache_usage)
        await asyncio.sleep(interval_s)


class EndpointsCollector(Collector):
    """What a shim knows of its endpoints at the moment of a scrape, as Prometheus metrics."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    def describe(self) -> Iterator[Metric]:
        """The names."""
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        """A sample for each endpoint."""
        ready, in_flight = families = _families()
        for endpoint in tuple(self._endpoints):
            ready.add_metric((endpoint.address, endpoint.dialect), float(endpoint.is_ready))
            in_flight.add_metric((endpoint.address, endpoint.dialect), endpoint.in_flight)
        yield from families


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
    labels = ("endpoint", "dialect")
    return (
        GaugeMetricFamily("gaie_codec_endpoint_ready", "Whether requests are given to the model server.", labels=labels),
        GaugeMetricFamily("gaie_codec_endpoint_requests_in_flight", "Requests that it has from here.", labels=labels),
    )
