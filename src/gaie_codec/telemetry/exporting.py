"""All that `--metrics-listen` stands for, for any shim: metrics, the loads of model servers beside them, and the port for both."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Final

from .. import UsageError
from .loads import LoadsCollector, LoadsScraper
from .metrics import Metrics, MetricsServer, serve_metrics

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from .loads import Asks


class Exporter:
    """An async context manager: it listens from its entry to its exit, and asks every model server that `scrape` was called for.

    `metrics` and `loads` are there from the start. Entering raises UsageError where the port cannot be had.
    """

    def __init__(self, listen: str, *, interval_s: float = 1.0, stale_s: float = 5.0) -> None:
        """Loads are asked for every `interval_s` seconds, and not shown when they are older than `stale_s`."""
        self.metrics: Final = Metrics()
        self.loads: Final = LoadsCollector(stale_s=stale_s)
        self.metrics.registry.register(self.loads)
        self._listen = listen
        self._interval_s = interval_s
        self._server: MetricsServer | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Exporter:
        self._server = serve_metrics(self._listen, self.metrics.registry)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.close)

    @property
    def address(self) -> str:
        """HOST:PORT, with the port that was taken."""
        if self._server is None:
            raise UsageError("the exporter is not entered")
        return f"{self._listen.rpartition(':')[0]}:{self._server.port}"

    def scrape(self, upstream: Asks, adapter: Adapter, *, endpoint: str, model: str = "") -> None:
        """Ask this model server from now on, instead of the one that had the endpoint before; needs a running event loop."""
        self.forget(endpoint)
        scraper = LoadsScraper(upstream, adapter, self.loads, endpoint=endpoint, model=model, interval_s=self._interval_s)
        self._tasks[endpoint] = asyncio.create_task(scraper.run())

    def forget(self, endpoint: str) -> None:
        """The model server is gone: ask no more, and show nothing of it."""
        task = self._tasks.pop(endpoint, None)
        if task is not None:
            task.cancel()
        self.loads.forget(endpoint)
