"""A model server -> what it is, as soon as it answers, and from then on whether it is well.

It is asked anew after every failure, for it may come back as another one, and about its model now and then: LoRA adapters come and go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import msgspec

from .. import CodecError, Observer, UsageError, adapters, snapshots
from ..upstream import Upstream, check_health
from ..upstream.discovery import await_model_info, detect_adapter
from .endpoint_specs import AUTO, HTTP
from .picking import NoEndpointError

if TYPE_CHECKING:
    from .. import ModelInfo
    from ..adapters.base import Adapter
    from ..upstream.transcoders import Transcoders
    from ._endpoint import Endpoint

_ASK_TIMEOUT_S: Final = 5.0
_HEALTH_TIMEOUT_S: Final = 2.0
# One failure may be a full queue or a lost packet.
_MAX_FAILURES: Final = 2
_RETRY_S: Final = 1.0
_CHECKS_PER_QUESTION: Final = 12

_log = logging.getLogger("gaie_codec.ext_proc")


class Watcher:
    """Watches the model servers of one shim. What it finds out goes into the `Endpoint`."""

    def __init__(self, transcoders: Transcoders, check_interval_s: float) -> None:
        self._transcoders = transcoders
        self._check_interval_s = check_interval_s
        self._observers: dict[tuple[str, str], Observer] = {}

    async def watch(self, endpoint: Endpoint) -> None:
        """Until cancelled."""
        if endpoint.spec.dialect == HTTP:
            await self._check_for_ever(endpoint, lambda: _check_http(endpoint), lambda: _check_http(endpoint))
        else:
            await self._watch_grpc(endpoint)

    def assume(self, endpoint: Endpoint) -> None:
        """Take for granted what need not be asked, so that requests can be encoded at once."""
        if endpoint.spec.dialect not in (AUTO, HTTP):
            adapter = adapters.get(snapshots.load(endpoint.spec.dialect, endpoint.spec.snapshot))
            transcoder = self._transcoders.make_unasked(adapter)
            if transcoder is not None:
                endpoint.learn(transcoder, self._observer(adapter), is_told=False)

    def _observer(self, adapter: Adapter) -> Observer:
        key = (adapter.dialect, adapter.snapshot.name)
        if key not in self._observers:
            self._observers[key] = Observer(adapter, limits=self._transcoders.options.limits)
        return self._observers[key]

    async def _watch_grpc(self, endpoint: Endpoint) -> None:
        endpoint.upstream = upstream = Upstream(endpoint.address)
        told: tuple[Adapter, ModelInfo] | None = None
        checks = 0

        async def ask() -> None:
            nonlocal told, checks
            checks = 0
            if endpoint.spec.dialect == AUTO:
                adapter = await detect_adapter(upstream, endpoint.spec.snapshot, _ASK_TIMEOUT_S)
            else:
                adapter = adapters.get(snapshots.load(endpoint.spec.dialect, endpoint.spec.snapshot))
            told = adapter, await self._ask_model(endpoint, upstream, adapter)
            await self._take(endpoint, upstream, *told)
            await check_health(upstream, adapter, timeout_s=_HEALTH_TIMEOUT_S)

        async def check() -> None:
            nonlocal told, checks
            assert told is not None
            adapter, _ = told
            await check_health(upstream, adapter, timeout_s=_HEALTH_TIMEOUT_S)
            checks += 1
            if checks == _CHECKS_PER_QUESTION:
                checks = 0
                asked = adapter, await self._ask_model(endpoint, upstream, adapter)
                if asked[1] != told[1]:
                    await self._take(endpoint, upstream, *asked)
                    told = asked

        try:
            await self._check_for_ever(endpoint, ask, check)
        finally:
            endpoint.upstream = None
            await upstream.close()

    async def _ask_model(self, endpoint: Endpoint, upstream: Upstream, adapter: Adapter) -> ModelInfo:
        is_optional = not self._transcoders.asks_for_tokenizers
        model = await await_model_info(upstream, adapter, _ASK_TIMEOUT_S, is_optional=is_optional)
        wanted = endpoint.spec.model
        if not model.serves(wanted):
            raise UsageError(f"it serves {', '.join(model.names)}, not {wanted}")
        return model if model.names or not wanted else msgspec.structs.replace(model, served_model_name=wanted)

    async def _take(self, endpoint: Endpoint, upstream: Upstream, adapter: Adapter, model: ModelInfo) -> None:
        endpoint.learn(await self._transcoders.make(upstream, adapter, model), self._observer(adapter))

    async def _check_for_ever(self, endpoint: Endpoint, ask: Callable[[], Awaitable[None]], check: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        is_asked = False  # one that goes on as another of its address is ready before it was asked
        while True:
            try:
                if endpoint.is_ready and is_asked:
                    await check()  # which tells sooner than `ask` that nobody is there
                if failures or not endpoint.is_ready or not is_asked:
                    await ask()
                    is_asked = True
            except (CodecError, UsageError) as error:
                failures += 1
                reason = " ".join(str(error).split()).removeprefix(f"upstream {endpoint.address}: ")
            except Exception:
                _log.exception("endpoint %s: a bug of gaie-codec", endpoint.address)
                failures += 1
                reason = "a bug of gaie-codec"
            else:
                failures = 0
                endpoint.rise()
            if failures >= _MAX_FAILURES or (failures and not endpoint.is_ready):
                endpoint.fall(reason)
            # What does not get better is asked less and less often.
            retry_s = _RETRY_S * 2 ** min(max(0, failures - _MAX_FAILURES), 8)
            await endpoint.rest(min(self._check_interval_s, retry_s) if failures else self._check_interval_s)


async def _check_http(endpoint: Endpoint) -> None:
    host, _, port = endpoint.address.rpartition(":")
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        raise NoEndpointError("no connection in time") from None
    except OSError as error:
        raise NoEndpointError(f"no connection: {error.strerror or error}") from error
    writer.transport.abort()
