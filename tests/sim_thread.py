"""A simulated model server in the background of a test."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from gaie_codec.sim import SimServer


class SimThread:
    """A SimServer in an event loop of its own."""

    def __init__(self, dialect: str = "vllm.engine", **options: Any) -> None:
        self.server = SimServer(dialect, **options)
        self._loop = asyncio.new_event_loop()
        # A daemon, so that a test which fails before `stop` does not keep pytest from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._run(self.server.start("127.0.0.1:0"))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def stop(self) -> None:
        self._run(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
