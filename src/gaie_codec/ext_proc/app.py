"""`gaie-codec ext-proc`, and what it is made of for who embeds it: live endpoints, a picker, a pool, metrics -> an ext_proc server.

    def shortest_queue(request, candidates):
        return sorted(candidates, key=lambda one: one.waiting + one.in_flight)

    asyncio.run(run_ext_proc(listen="0.0.0.0:9002", endpoints=["10.0.0.7:50051"], picker=shortest_queue))

Order of things: read what is configured, take the port, give the model servers a moment to be asked, say that it is ready in one line.
SIGTERM and SIGINT turn readiness off, then end the streams within bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from .. import CodecError, UsageError, adapters, snapshots
from ..inferencepool import Override, WatchedPool, transcodes
from ..openai import models
from ..telemetry.loads import LoadsCollector
from ..telemetry.metrics import Metrics, serve_metrics
from ..telemetry.tracing import Tracing
from ._accounting import Accounting, EndpointsCollector, watch_loads
from ._headers import check_forwardable
from .endpoints import Endpoint, Endpoints, EndpointSpec, TranscoderOptions, decode_endpoint
from .gateway import Declared, Gateway
from .picking import Picker
from .processor import Processor
from .server import ExtProcServer, Hooks, StreamObserver

# Long enough for model servers that are there to be asked; without one the data plane is told by 503.
_SETTLE_S: Final = 3.0
_SETTLE_STEP_S: Final = 0.05
_LEARN_S: Final = 10.0
_TOLD_S: Final = 2.0
_ABORT_S: Final = 2.0
_STARTED: Final = int(time.time())

_log = logging.getLogger("gaie_codec.ext_proc")


async def run_ext_proc(
    *,
    listen: str = "127.0.0.1:9002",
    endpoints: Iterable[str | EndpointSpec] = (),
    endpoints_file: str | os.PathLike[str] | None = None,
    picker: Picker | None,
    dialect: str | None = None,
    snapshot: str | None = None,
    options: TranscoderOptions | None = None,
    pool: str | os.PathLike[str] | None = None,
    pool_name: str | None = None,
    override: Override = "auto",
    serves_models: bool = False,
    fallbacks: int = 0,
    forward_headers: Iterable[str] = (),
    request_timeout_s: float | None = 600.0,
    body_timeout_s: float = 25.0,
    check_interval_s: float = 5.0,
    loads_interval_s: float = 1.0,
    drain_delay_s: float = 0.0,
    shutdown_timeout_s: float = 30.0,
    metrics_listen: str | None = None,
    tls: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Prints `ready ext_proc=HOST:PORT`, and ` metrics=HOST:PORT` where `metrics_listen` is given, to
    stdout once it accepts streams; port 0 takes a free one.

    `endpoints` and the lines of `endpoints_file` are `HOST:PORT[,dialect=D][,snapshot=S][,model=NAME]`. `picker` None only transcodes,
    behind another endpoint picker; `dialect` and `snapshot` are then those of model servers that are not listed. `pool` is an InferencePool
    manifest (`pool_name` chooses among several), `override` is above it. `tls` are the files of a private key and its certificate chain.
    `drain_delay_s` is how long streams are still accepted after a signal, while readiness is off already. Raises UsageError with one line
    that says what is in the way.
    """
    specs = [decode_endpoint(one) if isinstance(one, str) else one for one in endpoints]
    if not specs and endpoints_file is None and (picker is not None or dialect is None):
        raise UsageError("no endpoint is given; one behind another endpoint picker needs at least a dialect")
    if picker is not None and (dialect is not None or snapshot is not None):
        raise UsageError("dialect and snapshot are for use without a picker; endpoints have their own")
    if snapshot is not None and dialect is None:
        raise UsageError("a snapshot is one of a dialect, and none is given")
    if pool_name is not None and pool is None:
        raise UsageError("a pool's name is given, and no pool")
    if override == "transcode" and specs and endpoints_file is None and all(spec.dialect == "http" for spec in specs):
        raise UsageError("transcoding is forced, and no endpoint speaks gRPC: there is nothing to transcode to")
    watched = WatchedPool(pool, name=pool_name) if pool is not None else None
    keys = _read_keys(*tls) if tls is not None else None
    forwarded = frozenset(map(check_forwardable, forward_headers))
    metrics = Metrics()
    collector = LoadsCollector(stale_s=max(5.0, 3 * loads_interval_s))
    metrics.registry.register(collector)
    for name in adapters.DIALECTS:
        adapter = adapters.get(snapshots.load(name))
        metrics.add_paths((*adapter.generate_paths, *((adapter.embed.path,) if adapter.embed is not None else ())))
    async with contextlib.AsyncExitStack() as stack:
        live = await Endpoints.start(
            specs,
            path=endpoints_file,
            options=options,
            default_dialect=dialect if picker is None else None,
            default_snapshot=snapshot if picker is None else None,
            check_interval_s=check_interval_s,
        )
        stack.push_async_callback(live.close)
        metrics.registry.register(EndpointsCollector(live))
        declared = _declared(live, watched, override, speaks_by_default=dialect is not None and dialect != "http")
        gateway = Gateway(
            servers=live.ready,
            find=lambda address: endpoint if (endpoint := live.for_address(address)).is_known else None,
            picker=picker,
            declared=declared,
            models=(lambda: _models(live)) if serves_models else None,
            fallbacks=fallbacks,
            forwarded=forwarded,
            timeout_s=request_timeout_s,
            flavor=(options or TranscoderOptions()).flavor,
            limits=(options or TranscoderOptions()).limits,
        )
        server = ExtProcServer(
            gateway,
            hooks=_Hooks(live, metrics, Tracing()),
            request_timeout_s=request_timeout_s,
            body_timeout_s=body_timeout_s,
        )
        also = ""
        if metrics_listen is not None:
            scraped = serve_metrics(metrics_listen, metrics.registry)
            stack.push_async_callback(asyncio.to_thread, scraped.close)
            also = f" metrics={metrics_listen.rpartition(':')[0]}:{scraped.port}"
        port = await server.start(listen, tls=keys)
        stack.push_async_callback(server.stop, shutdown_timeout_s)
        asking = asyncio.create_task(watch_loads(live, collector, loads_interval_s))
        stack.callback(asking.cancel)
        with _signals() as stopping:
            await _settle(live, stopping)
            if not stopping.is_set():
                await server.set_ready()
                sys.stdout.write(f"ready ext_proc={listen.rpartition(':')[0] or '0.0.0.0'}:{port}{also}\n")
                sys.stdout.flush()
            await stopping.wait()
            await server.drain()
            _log.info("draining")
            with contextlib.suppress(TimeoutError):  # a second signal ends the wait
                stopping.clear()
                await asyncio.wait_for(stopping.wait(), drain_delay_s)


class _Hooks(Hooks):
    """What there is to do with live endpoints."""

    def __init__(self, live: Endpoints, metrics: Metrics, tracing: Tracing) -> None:
        self._live = live
        self._metrics = metrics
        self._tracing = tracing

    def opened(self, processor: Processor) -> StreamObserver:
        return Accounting(processor, self._live, self._metrics, self._tracing)

    async def learn(self, destination: str) -> None:
        with contextlib.suppress(CodecError):  # what is wrong with it is said when the request is routed
            await self._live.for_address(destination).wait_until_known(_LEARN_S, told_within_s=_TOLD_S)

    async def abort(self, processor: Processor) -> bool:
        server, abort = self._live.get(processor.served) or processor.server, processor.abort
        if not isinstance(server, Endpoint) or server.upstream is None or abort is None:
            return False
        path, message = abort
        try:
            await server.upstream.unary(path, message, timeout_s=_ABORT_S)
        except CodecError:
            return False
        return True


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """Set by SIGTERM and SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield stopping
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _read_keys(key: str | os.PathLike[str], certificate: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """Raises UsageError for a key and a certificate that are none, or not of each other: grpcio only says that it cannot listen."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or "not in PEM"
        raise UsageError(f"certificate {certificate} and key {key}: {reason}") from error
    return Path(key).read_bytes(), Path(certificate).read_bytes()


async def _settle(live: Endpoints, stopping: asyncio.Event) -> None:
    give_up = time.monotonic() + _SETTLE_S
    while any(not endpoint.is_ready for endpoint in live) and time.monotonic() < give_up and not stopping.is_set():
        await asyncio.sleep(_SETTLE_STEP_S)


def _declared(live: Endpoints, watched: WatchedPool | None, override: Override, *, speaks_by_default: bool) -> Callable[[], Declared]:
    last_reason = ""

    def declared() -> Declared:
        nonlocal last_reason
        pool = watched.current() if watched is not None else None
        # An override was held against the endpoints at the start, and these may be others by now.
        speaks_grpc = speaks_by_default or override == "transcode" or any(endpoint.spec.dialect != "http" for endpoint in live)
        carries_grpc = pool is None or pool.app_protocol != "http" or override == "transcode"
        does, reason = transcodes(pool, speaks_grpc=speaks_grpc, override=override)
        if reason != last_reason:
            last_reason = reason
            # To pass JSON on to a server that speaks gRPC is seldom what is meant.
            _log.log(logging.WARNING if speaks_grpc and not does else logging.INFO, "%s", reason)
        return Declared(does, reason if watched is not None or override != "auto" or not does else "", carries_grpc)

    return declared


def _models(live: Endpoints) -> bytes:
    entries = []
    for endpoint in live.ready():
        model = endpoint.model
        adapters = endpoint.transcoder.lora_models if endpoint.transcoder is not None else ()
        owner = endpoint.dialect.partition(".")[0] if endpoint.transcoder is not None else models.OWNER
        entries += models.model_entries(
            model.names, created=_STARTED, max_model_len=model.max_model_len, adapters=adapters, root=model.model_path, owned_by=owner
        )
    return models.encode_models(entries)
