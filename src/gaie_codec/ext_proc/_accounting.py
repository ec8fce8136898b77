"""What the shim keeps of each stream: requests in flight, a record for metrics and trace. And what endpoints tell of their load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .. import Code, CodecError, Loads, UpstreamStatusError
from ..telemetry import RequestMeter
from ..telemetry.loads import LoadsScraper
from ..telemetry.tracing import TRACE_HEADERS
from .endpoints import Endpoint, Endpoints

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ..telemetry.loads import LoadsCollector
    from ..telemetry.metrics import Metrics
    from ..telemetry.tracing import Tracing
    from .processor import Processor


class Accounting:
    """Of one stream."""

    def __init__(self, processor: Processor, endpoints: Endpoints, metrics: Metrics | None, tracing: Tracing | None) -> None:
        self._processor = processor
        self._endpoints = endpoints
        self._endpoint: Endpoint | None = None
        self._meter = RequestMeter(
            "refused", method=processor.method, path=processor.path, headers=processor.headers, metrics=metrics, tracing=tracing
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
            meter.frames_sent = 1
            meter.upstream_bytes_sent = len(plan.body) if plan.body is not None else processor.request_bytes
        meter.error = error
        meter.is_cancelled = not processor.is_answer_complete
        meter.http_status = processor.status
        meter.ttft_s = ttft_s if plan is not None and plan.inference.stream else None
        meter.usage = processor.usage
        meter.frames_received = processor.frames_received
        meter.upstream_bytes_received = processor.bytes_received
        meter.client_bytes_received = processor.request_bytes
        meter.client_bytes_sent = processor.bytes_sent
        meter.end()


async def watch_loads(endpoints: Endpoints, collector: LoadsCollector, interval_s: float) -> None:
    """Ask every endpoint that is ready for its load, for pickers and for scrapes, until cancelled."""
    scrapers: dict[Endpoint, LoadsScraper] = {}
    while True:
        present = {*endpoints}
        for endpoint in scrapers.keys() - present:
            del scrapers[endpoint]
            if endpoints.get(endpoint.address) is None:
                collector.forget(endpoint.address)
        await asyncio.gather(*(_ask(endpoint, endpoints, scrapers, collector) for endpoint in present if endpoint.is_ready))
        await asyncio.sleep(interval_s)


async def _ask(endpoint: Endpoint, endpoints: Endpoints, scrapers: dict[Endpoint, LoadsScraper], collector: LoadsCollector) -> None:
    upstream, adapter = endpoint.upstream, endpoint.adapter
    if upstream is None or adapter is None:
        return
    scraper = scrapers.get(endpoint)
    if scraper is None or not scraper.is_for(upstream, adapter):
        model = next(iter(endpoint.model.names), "")
        scraper = scrapers[endpoint] = LoadsScraper(upstream, adapter, collector, endpoint=endpoint.address, model=model)
    if not scraper.has_questions:
        return
    with contextlib.suppress(CodecError):  # whoever watches the endpoint says what is wrong with it
        await scraper.scrape()
    loads = collector.latest(endpoint.address) or Loads()  # a number that is too old is none
    endpoints.set_load(endpoint.address, waiting=loads.waiting, running=loads.running, kv_cache_usage=loads.kv_cache_usage)


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
