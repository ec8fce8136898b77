"""One model server of a shim, as it is now: what it speaks, its transcoder, whether it is well, how many requests it has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

from .. import ModelInfo
from .endpoint_specs import AUTO, HTTP, EndpointSpec
from .picking import Candidate, NoEndpointError

if TYPE_CHECKING:
    from .. import Observer, Transcoder
    from ..adapters.base import Adapter
    from ..text import Tokenizer
    from ..upstream import Upstream

_log = logging.getLogger("gaie_codec.ext_proc")


class Endpoint:
    """One model server. What it is changes when it comes back as another one, but a `Transcoder` never does: requests keep theirs."""

    def __init__(self, address: str, spec: EndpointSpec, *, is_assigned: bool = False) -> None:
        self.address: Final = address
        """IP:PORT, an IPv6 address in brackets."""
        self.spec: Final = spec
        self.is_assigned: Final = is_assigned
        """Named by another endpoint picker instead of configured here; then `is_ready` is no condition."""
        self.is_ready = False
        self.reason = "it has not answered yet"
        """Why it is not ready, for people."""
        self.adapter: Adapter | None = None
        """What it speaks; None for http, and until that is known."""
        self.transcoder: Transcoder | None = None
        """For OpenAI HTTP; the same object for servers that are alike. None for http, and until the server's model is known."""
        self.observer: Observer | None = None
        """For its own gRPC; None together with `transcoder`."""
        self.upstream: Upstream | None = None
        """The connection by which it is watched, for more questions; None for http, and once it is gone."""
        self.in_flight = 0
        self.waiting = 0
        self.running = 0
        self.kv_cache_usage = 0.0
        self._known = asyncio.Event()
        self._told = asyncio.Event()
        self._made_s = time.monotonic()
        self._checks_now = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Endpoint {self.address} {self.dialect} {'ready' if self.is_ready else f'not ready: {self.reason}'}>"

    @property
    def dialect(self) -> str:
        """What it speaks, or "http"; "auto" until that is known."""
        return self.adapter.dialect if self.adapter is not None else self.spec.dialect

    @property
    def snapshot(self) -> str:
        """Empty where there is none, and until it is known."""
        return self.adapter.snapshot.name if self.adapter is not None else ""

    @property
    def model(self) -> ModelInfo:
        """What is known of its model, from itself and from its tokenizer."""
        return self.transcoder.model if self.transcoder is not None else ModelInfo(served_model_name=self.spec.model)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of its model; None where none is needed, and until it is loaded."""
        return self.transcoder.tokenizer if self.transcoder is not None else None

    @property
    def is_known(self) -> bool:
        """Whether requests for it can be encoded: it speaks HTTP, or has a transcoder."""
        return self.spec.dialect == HTTP or self.transcoder is not None

    def candidate(self) -> Candidate:
        """It, as a picker sees it now."""
        return Candidate(
            address=self.address,
            dialect=self.dialect,
            snapshot=self.snapshot,
            model=next(iter(self.model.names), ""),
            in_flight=self.in_flight,
            waiting=self.waiting,
            running=self.running,
            kv_cache_usage=self.kv_cache_usage,
        )

    async def wait_until_known(self, timeout_s: float, *, told_within_s: float = 0.0) -> None:
        """Return when requests for it can be encoded, which is at once but for the first ones. Raises NoEndpointError with the reason.

        `told_within_s` is how long after it was made to wait for what the server itself tells, such as its context length, beyond that.
        """
        if self.spec.dialect == HTTP:
            return
        left_s = self._made_s + told_within_s - time.monotonic()
        if left_s > 0 and not self._told.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._told.wait()
        if self.is_known:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._known.wait()
        except TimeoutError:
            raise NoEndpointError(f"the model server {self.address} is not known: {self.reason}") from None

    def learn(self, transcoder: Transcoder, observer: Observer, *, is_told: bool = True) -> None:
        """Take what was found out, or with `is_told` False taken for granted."""
        self.adapter, self.transcoder, self.observer = transcoder.adapter, transcoder, observer
        self._known.set()
        if is_told:
            self._told.set()

    def inherit(self, other: Endpoint) -> None:
        """Go on as `other`, which had this address with other settings, until it is known what holds now."""
        if other.is_ready and self.spec.dialect in (AUTO, other.dialect):
            self.adapter, self.transcoder, self.observer = other.adapter, other.transcoder, other.observer
            self.is_ready, self.reason = True, ""
            self._known.set()
            self._told.set()

    def rise(self) -> None:
        """It is well."""
        if not self.is_ready:
            self.is_ready, self.reason = True, ""
            told = (self.dialect, self.snapshot, ", ".join(self.model.names))
            _log.info("endpoint %s is ready: %s", self.address, " ".join(filter(None, told)))

    def retire(self) -> None:
        """It was taken out of the configuration; what is in flight may end."""
        self.is_ready, self.reason = False, "it was taken out of the configuration"
        _log.info("endpoint %s is gone, with %d requests in flight", self.address, self.in_flight)

    def fall(self, reason: str) -> None:
        """It is not to be given requests. What it told of its load is no longer so."""
        if self.reason != reason:
            _log.warning("endpoint %s is not ready: %s", self.address, reason)
        self.is_ready, self.reason = False, reason
        self.waiting, self.running, self.kv_cache_usage = 0, 0, 0.0

    def check_now(self) -> None:
        """Have it checked at once, for whoever saw it fail."""
        self._checks_now.set()

    async def rest(self, seconds: float) -> None:
        """Wait until the next check."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._checks_now.wait()
        self._checks_now.clear()
