"""The model servers of a shim: those that are configured, here or in a file, and those that another endpoint picker names.

    endpoints = await Endpoints.start([decode_endpoint("10.0.0.7:50051")], options=TranscoderOptions())
    candidates = [endpoint.candidate() for endpoint in endpoints.ready()]

Nobody waits for a model server: one that is down comes in when it answers. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, Final

import msgspec

from .. import UsageError
from ..upstream.transcoders import TranscoderOptions, Transcoders
from ._endpoint import Endpoint
from ._watching import Watcher
from .endpoint_specs import HTTP, EndpointSpec, check_dialect, decode_endpoint, read_endpoints, resolve, resolve_again
from .picking import NoEndpointError, decode_destinations

__all__ = ["Endpoint", "EndpointSpec", "Endpoints", "TranscoderOptions", "decode_endpoint"]

# Whoever chooses before us may name any address.
_MAX_ASSIGNED: Final = 1024

_log = logging.getLogger("gaie_codec.ext_proc")


class Endpoints:
    """All of them; `start` makes one, `close` ends it. What `ready` and `get` return may be kept for as long as a request takes."""

    def __init__(self, options: TranscoderOptions, default: EndpointSpec | None, check_interval_s: float, file_interval_s: float) -> None:
        limits = msgspec.structs.replace(options.limits, max_calls=1)  # Envoy has one upstream call for each request
        self._transcoders = Transcoders(msgspec.structs.replace(options, limits=limits))
        self._default = default
        self._watcher = Watcher(self._transcoders, check_interval_s)
        self._file_interval_s = file_interval_s
        self._endpoints: dict[str, Endpoint] = {}
        self._assigned: OrderedDict[str, Endpoint] = OrderedDict()
        self._listed: tuple[EndpointSpec, ...] = ()
        self._watches: dict[Endpoint, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        specs: Iterable[EndpointSpec] = (),
        *,
        path: str | os.PathLike[str] | None = None,
        options: TranscoderOptions | None = None,
        default_dialect: str | None = None,
        default_snapshot: str | None = None,
        check_interval_s: float = 5.0,
        file_interval_s: float = 1.0,
    ) -> Endpoints:
        """Begin to watch `specs` and those of the file at `path`, which is read again when it has changed; names are looked up again, too.

        `default_dialect` is for `for_address`. Returns without waiting for a model server; a tokenizer that is not the servers' own is
        loaded before. Raises UsageError with one line for what is wrong in what was given.
        """
        default = None
        if default_dialect is not None:
            check_dialect(default_dialect, default_snapshot)
            default = EndpointSpec(target="", dialect=default_dialect, snapshot=default_snapshot)
        made = cls(options if options is not None else TranscoderOptions(), default, check_interval_s, file_interval_s)
        fixed = tuple(specs)
        signature = _signature(path) if path is not None else None
        listed = (*fixed, *read_endpoints(path)) if path is not None else fixed
        found = await resolve(listed)
        made._listed = listed
        if any(spec.dialect != HTTP for spec in (*listed, *([default] if default is not None else ()))):
            await made._transcoders.load()
        made._replace(found)
        made._run(made._look_up_again(check_interval_s))
        if path is not None:
            made._run(made._follow(path, signature, fixed))
        return made

    async def close(self) -> None:
        """Stop watching."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __iter__(self) -> Iterator[Endpoint]:
        """The configured ones, then those that another picker named."""
        return iter((*self._endpoints.values(), *self._assigned.values()))

    def ready(self) -> list[Endpoint]:
        """The configured ones that may be given requests."""
        return [endpoint for endpoint in self._endpoints.values() if endpoint.is_ready]

    def get(self, address: str) -> Endpoint | None:
        """By IP:PORT in its one spelling (`decode_destinations`)."""
        return self._endpoints.get(address) or self._assigned.get(address)

    def for_address(self, address: str) -> Endpoint:
        """The one that another endpoint picker named, which is made with the default dialect if it is new.

        It is of use once it `is_known`: from the start where the dialect is not "auto" and the tokenizer not the server's own, and what the
        server tells of its model is taken in when it comes. Of a list of addresses it is the first. Raises MalformedDestinationError, and
        NoEndpointError where there is no default dialect.
        """
        endpoint = self._endpoints.get(address) or self._assigned.get(address)
        if endpoint is None:
            (address,) = decode_destinations(address)[:1]
            endpoint = self.get(address) or self._assign(address)
        if endpoint.is_assigned:
            self._assigned.move_to_end(endpoint.address)
        return endpoint

    def acquire(self, endpoint: Endpoint) -> None:
        """Count a request that is sent to it."""
        endpoint.in_flight += 1

    def release(self, endpoint: Endpoint) -> None:
        """Count its end. Raises UsageError for one that was not acquired."""
        if endpoint.in_flight < 1:
            raise UsageError(f"{endpoint.address} has no request in flight")
        endpoint.in_flight -= 1

    def set_load(self, address: str, *, waiting: int, running: int, kv_cache_usage: float) -> None:
        """Take in what a server told of its load; nothing where the address has gone meanwhile."""
        endpoint = self.get(address)
        if endpoint is not None:
            endpoint.waiting, endpoint.running, endpoint.kv_cache_usage = waiting, running, kv_cache_usage

    async def replace(self, specs: Iterable[EndpointSpec]) -> None:
        """Have these from now on. Those that are the same stay as they are; requests to those that go may end.

        Raises UsageError, and nothing has changed.
        """
        listed = tuple(specs)
        found = await resolve(listed)
        if any(spec.dialect != HTTP for spec in listed):
            await self._transcoders.load()
        self._listed = listed
        self._replace(found)

    def _replace(self, found: dict[str, EndpointSpec]) -> None:
        before = self._endpoints
        kept = {address: before[address] for address, spec in found.items() if address in before and before[address].spec == spec}
        self._endpoints = {address: kept.get(address) or Endpoint(address, spec) for address, spec in found.items()}
        for address, endpoint in self._endpoints.items():
            if address in self._assigned:  # named by another picker first
                self._watches.pop(self._assigned.pop(address)).cancel()
            if address not in kept:
                if address in before:
                    endpoint.inherit(before[address])
                self._watches[endpoint] = self._run(self._watcher.watch(endpoint))
        for address, endpoint in before.items():
            if address not in kept:
                endpoint.retire()
                self._watches.pop(endpoint).cancel()

    def _assign(self, address: str) -> Endpoint:
        if self._default is None:
            raise NoEndpointError(f"the model server {address} is not configured, and there is no default dialect")
        spec = msgspec.structs.replace(self._default, target=address)
        endpoint = self._assigned[address] = Endpoint(address, spec, is_assigned=True)
        self._watcher.assume(endpoint)
        self._watches[endpoint] = self._run(self._watcher.watch(endpoint))
        idle = (one for one in self._assigned.values() if not one.in_flight and one is not endpoint)
        if len(self._assigned) > _MAX_ASSIGNED and (oldest := next(idle, None)) is not None:
            del self._assigned[oldest.address]
            self._watches.pop(oldest).cancel()
        return endpoint

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _look_up_again(self, interval_s: float) -> None:
        complaints: list[str] = []
        while True:
            await asyncio.sleep(interval_s)
            listed = self._listed
            if not any(spec.is_name for spec in listed):
                continue
            before = {address: endpoint.spec for address, endpoint in self._endpoints.items()}
            found, faults = await resolve_again(listed, before)
            for fault in faults:
                if fault not in complaints:
                    _log.warning("%s; its addresses from before stay", fault)
            complaints = faults
            if listed is self._listed and found != before:
                _log.info("names lead to %d endpoints now", len(found))
                self._replace(found)

    async def _follow(self, path: str | os.PathLike[str], seen: Any, fixed: tuple[EndpointSpec, ...]) -> None:
        complaint = ""
        before = seen
        while True:
            await asyncio.sleep(self._file_interval_s)
            try:
                signature = await asyncio.to_thread(_signature, path)
                # Twice the same, so that nobody is still writing.
                is_settled, before = signature == before, signature
                if signature == seen or not is_settled:
                    continue
                specs = await asyncio.to_thread(read_endpoints, path)
                if await asyncio.to_thread(_signature, path) != signature:
                    continue  # written while it was read
                await self.replace((*fixed, *specs))
            except UsageError as error:
                if str(error) != complaint:
                    complaint = str(error)
                    _log.warning("%s; what was read before stays", complaint)
            else:
                seen, complaint = signature, ""
                level = logging.INFO if self._endpoints else logging.WARNING
                _log.log(level, "endpoints file %s: %d endpoints", path, len(self._endpoints))


def _signature(path: str | os.PathLike[str]) -> tuple[int, int, int, int]:
    """Changes with the content, also where that is a link to elsewhere, as in a volume of a ConfigMap."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UsageError(f"endpoints file {path}: {error.strerror or error}") from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
