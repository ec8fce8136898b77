"""GetLoads of model servers -> the metric names of GAIE's model-server protocol (proposal 003), which gRPC-only servers do not offer.

One `LoadsScraper` asks one model server again and again; `LoadsCollector` keeps what each of them told last. What is too old is not
exposed: a picker must not take a dead server's last word for its load. What a server does not tell is left out, not made up: names of LoRA
adapters, and all but the size of the cache by vLLM's own front end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from google.protobuf.message import DecodeError

from .. import Capacity, Code, CodecError, Loads, MalformedMessageError, UpstreamStatusError

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ImportError(
        "gaie_codec.telemetry needs the package prometheus-client: pip install gaie-codec[metrics]", name=error.name
    ) from error

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ..adapters.base import Adapter

_log = logging.getLogger("gaie_codec.telemetry")


class _Names(msgspec.Struct, frozen=True):
    """What one family of servers calls its metrics."""

    waiting: str
    running: str
    usage: str
    cache: str
    block_size: str
    num_blocks: str


_NAMES: Final = MappingProxyType(
    {
        "vllm": _Names(
            "vllm:num_requests_waiting",
            "vllm:num_requests_running",
            "vllm:kv_cache_usage_perc",
            "vllm:cache_config_info",
            "block_size",
            "num_gpu_blocks",
        ),
        "sglang": _Names(
            "sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage", "sglang:cache_config_info", "page_size", "num_pages"
        ),
    }
)
_LABELS: Final = ("model_name", "endpoint")


class _Told(msgspec.Struct, frozen=True):
    at_s: float
    dialect: str
    model: str
    loads: Loads | None
    capacity: Capacity | None


class LoadsCollector(Collector):
    """The last loads of every endpoint, as a Prometheus collector: `registry.register(collector)`.

    What was told more than `stale_s` seconds ago is left out. `clock` counts seconds.
    """

    def __init__(self, *, stale_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_s = stale_s
        self._clock = clock
        self._told: dict[str, _Told] = {}
        self._failures: dict[str, int] = {}

    def update(self, endpoint: str, dialect: str, model: str, loads: Loads | None, capacity: Capacity | None = None) -> None:
        """What the endpoint tells now; None for what it does not tell. Servers of other families than vLLM and SGLang have no names."""
        self._told[endpoint] = _Told(self._clock(), dialect, model, loads, capacity)

    def fail(self, endpoint: str) -> None:
        """The endpoint did not tell. What it told before stays until it is too old."""
        self._failures[endpoint] = self._failures.get(endpoint, 0) + 1

    def forget(self, endpoint: str) -> None:
        """The endpoint is gone."""
        self._told.pop(endpoint, None)
        self._failures.pop(endpoint, None)

    def latest(self, endpoint: str) -> Loads | None:
        """The endpoint's loads, for a picker; None if it told none, or too long ago."""
        told = self._told.get(endpoint)
        return told.loads if told is not None and self._is_fresh(told) else None

    def _is_fresh(self, told: _Told) -> bool:
        return self._clock() - told.at_s <= self._stale_s

    def describe(self) -> Iterator[Metric]:
        """The names, so that a registry sees a second collector of them."""
        for names in _NAMES.values():
            yield from _families(names)
        yield _failures()

    def collect(self) -> Iterator[Metric]:
        """Families that have a sample, and the count of failures."""
        fresh = [(endpoint, told) for endpoint, told in self._told.copy().items() if self._is_fresh(told)]
        for family, names in _NAMES.items():
            waiting, running, usage, cache = families = _families(names)
            for endpoint, told in fresh:
                if told.dialect.partition(".")[0] != family:
                    continue
                labels = (told.model, endpoint)
                if told.loads is not None and told.loads.ranks:
                    waiting.add_metric(labels, told.loads.waiting)
                    running.add_metric(labels, told.loads.running)
                    usage.add_metric(labels, told.loads.kv_cache_usage)
                size = _cache_size(told)
                if size is not None:
                    cache.add_metric((*labels, *map(str, size)), 1)
            yield from (one for one in families if one.samples)
        failures = _failures()
        for endpoint, count in self._failures.copy().items():
            failures.add_metric((endpoint,), count)
        yield failures


def _families(names: _Names) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    return (
        GaugeMetricFamily(names.waiting, "Requests in the model server's queues.", labels=_LABELS),
        GaugeMetricFamily(names.running, "Requests that the model server is answering.", labels=_LABELS),
        GaugeMetricFamily(names.usage, "The share of the model server's KV cache in use, 0 to 1.", labels=_LABELS),
        GaugeMetricFamily(names.cache, "The size of its KV cache, by rank.", labels=(*_LABELS, names.block_size, names.num_blocks)),
    )


def _failures() -> CounterMetricFamily:
    return CounterMetricFamily("gaie_codec_loads_failures", "Times that a model server did not tell its loads.", labels=("endpoint",))


def _cache_size(told: _Told) -> tuple[int, int] | None:
    """Tokens of a block, and blocks: of smg's vLLM servicer as many as hold the tokens that a rank tells. None where not both are known."""
    if told.capacity is None or not told.capacity.block_size:
        return None
    blocks = told.capacity.num_blocks
    if not blocks and told.loads is not None and told.loads.ranks:
        blocks = told.loads.ranks[0].total_tokens // told.capacity.block_size
    return (told.capacity.block_size, blocks) if blocks else None


class Asks(Protocol):
    """What asks a model server: a `gaie_codec.upstream.Upstream`, or the host's own. Raises CodecError."""

    async def unary(self, path: str, message: bytes, *, timeout_s: float) -> bytes: ...


class LoadsScraper:
    """Asks one model server for its loads, and tells the collector.

    `endpoint` is its label, such as the address that a picker knows it by. Its size is asked for once, and again after each failure: it may
    have been started anew.
    """

    def __init__(
        self,
        upstream: Asks,
        adapter: Adapter,
        collector: LoadsCollector,
        *,
        endpoint: str,
        model: str = "",
        interval_s: float = 1.0,
        timeout_s: float = 2.0,
    ) -> None:
        self._upstream = upstream
        self._adapter = adapter
        self._collector = collector
        self._endpoint = endpoint
        self._model = model
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._capacity: Capacity | None = None
        self._asks_capacity = adapter.capacity_path is not None
        self._has_failed = False

    @property
    def has_questions(self) -> bool:
        """Whether this dialect and snapshot tells anything."""
        return self._adapter.loads_path is not None or self._adapter.capacity_path is not None

    def is_for(self, upstream: Asks, adapter: Adapter, model: str) -> bool:
        """Whether it asks this server in this dialect and snapshot, for this model."""
        return self._upstream is upstream and self._adapter is adapter and self._model == model

    async def run(self) -> None:
        """Ask until cancelled; returns at once where there is nothing to ask."""
        while self.has_questions:
            try:
                await self.scrape()
            except CodecError as error:
                if not self._has_failed:
                    _log.warning("no loads from %s: %s", self._endpoint, error)
                self._has_failed = True
            else:
                self._has_failed = False
            await asyncio.sleep(self._interval_s)

    async def scrape(self) -> Loads | None:
        """Ask once. None from a server that tells only its size. Raises CodecError, after having told the collector of the failure."""
        adapter = self._adapter
        try:
            if self._asks_capacity and adapter.capacity_path is not None and adapter.decode_capacity is not None:
                self._capacity = await self._ask_capacity(adapter.capacity_path, adapter.decode_capacity)
            loads = None
            if adapter.loads_path is not None and adapter.decode_loads is not None:
                loads = adapter.decode_loads(await self._ask(adapter.loads_path, adapter.loads_request))
        except CodecError:
            self._asks_capacity = adapter.capacity_path is not None
            self._collector.fail(self._endpoint)
            raise
        # A server that tells nothing but its size has to show that it is still there.
        self._asks_capacity = loads is None
        self._collector.update(self._endpoint, adapter.dialect, self._model, loads, self._capacity)
        return loads

    async def _ask_capacity(self, path: str, decode: Callable[[Any], Capacity]) -> Capacity | None:
        try:
            return decode(await self._ask(path, b""))
        except UpstreamStatusError as error:
            if error.code is not Code.UNIMPLEMENTED:
                raise
            return None

    async def _ask(self, path: str, message: bytes) -> Any:
        response = self._adapter.snapshot.method_at(path).response
        answer = await self._upstream.unary(path, message, timeout_s=self._timeout_s)
        try:
            return response.FromString(answer)
        except DecodeError:
            raise MalformedMessageError(f"{path}: {len(answer)} bytes that are no {response.DESCRIPTOR.full_name}") from None
