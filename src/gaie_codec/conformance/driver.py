"""An EPP, by its address -> the transcript of all that was played to it, for `rules.check`."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, Literal

import msgspec

from .. import UsageError, adapters, snapshots
from ..ext_proc.messages import PROCESS_PATH
from ..probe._connection import check_http2
from . import scripts
from ._protocol_rules import EXT_PROC, LIVENESS, READINESS, UNKNOWN
from .addresses import normal, split
from .exchange import Exchange
from .scripts import Script
from .transcript import HealthAnswer, Line, StreamEnd, Transcript

try:
    import grpc
    import grpc.aio
    from grpc_health.v1 import health_pb2
except ModuleNotFoundError as error:
    raise ImportError(
        "gaie_codec.conformance needs the packages grpcio and grpcio-health-checking: pip install gaie-codec[ext-proc]", name=error.name
    ) from error

from ._relay import relay
from ._stream import Stream

_TARGET: Final = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/?#@\s]+):(\d{1,5})")
_HEADER: Final = re.compile(r":?[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHECK_PATH: Final = "/grpc.health.v1.Health/Check"
_CHANNEL: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


MAX_HANGS: Final = 5
"""Streams that may hang. After them the EPP has been seen to answer nothing, and no more are played."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to drive, and how."""

    ext_proc: str
    """HOST:PORT of the service; an IPv6 address in brackets."""

    tls: bool = False
    """It speaks TLS there, with whatever certificate."""

    health: str = ""
    """HOST:PORT of grpc.health.v1, without TLS; empty for the same port."""

    endpoints: tuple[str, ...] = ()
    """IP:PORT of the pool; where none is named, those that are picked first."""

    model: str = "conformance"
    """The model that chat requests name."""

    dialect: str = "vllm.engine"
    """What the gRPC client speaks, and what is tried first for a gRPC model server."""

    snapshot: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    """More request headers, such as for an objective."""

    expects: Literal["endpoint", "no-endpoint", "shed"] = "endpoint"
    """How the pool is: ready, without a ready endpoint, or saturated."""

    timeout_s: float = 5.0
    """Of every single wait."""


async def drive(options: Options, *, observe: Callable[[Line], None] | None = None) -> Transcript:
    """Play all streams that go with the options. `observe` gets each line as it is written.

    Raises UsageError for options that say nothing, UpstreamStatusError and FramingError where nothing speaks gRPC.
    """
    _check(options)
    log = _Log(observe)
    adapter = adapters.get(snapshots.load(options.dialect, options.snapshot))
    async with _channel(options.ext_proc, options) as channel:
        open_stream = channel.stream_stream(PROCESS_PATH)

        hangs = 0

        async def play(script: Script, pause: Any = None) -> Exchange | None:
            nonlocal hangs
            if hangs >= MAX_HANGS:
                return None
            headers = tuple((name.lower(), value) for name, value in options.headers)
            stream = Stream(open_stream(), script, log, adapter=adapter, headers=headers, timeout_s=options.timeout_s)
            exchange = await stream.play(pause)
            hangs += exchange.hung
            return exchange

        missing = await _is_missing(open_stream(), options.timeout_s)
        if missing is not None:
            log.append(Line(stream="nothing at all", end=missing))
        elif options.expects != "endpoint":
            for script in (scripts.without_endpoint if options.expects == "no-endpoint" else scripts.shed)(options.model):
                await play(script)
        else:
            await _play_all(options, play, scripts.standard(options.model, adapter))
        if options.health:
            async with _channel(options.health, msgspec.structs.replace(options, tls=False)) as health:
                await _ask_health(health, log, options, is_certain=True)
        else:
            await _ask_health(channel, log, options, is_certain=False)
    return tuple(log)


class _Log(list[Line]):
    def __init__(self, observe: Callable[[Line], None] | None) -> None:
        super().__init__()
        self._observe = observe

    def append(self, line: Line) -> None:
        super().append(line)
        if self._observe is not None:
            self._observe(line)


def _check(options: Options) -> None:
    for name, target in (("ext-proc", options.ext_proc), ("health", options.health or "localhost:1")):
        match = _TARGET.fullmatch(target)
        if match is None or not 0 < int(match[2]) < 65536:
            raise UsageError(f"{name} {target}: not of the form HOST:PORT (an IPv6 address goes in brackets)")
    for endpoint in options.endpoints:
        if split(endpoint) is None:
            raise UsageError(f"endpoint {endpoint}: not of the form IP:PORT (an IPv6 address goes in brackets)")
    for name, _ in options.headers:
        if not _HEADER.fullmatch(name):
            raise UsageError(f"header {name!r} is no name of a header")


@contextlib.asynccontextmanager
async def _channel(target: str, options: Options) -> AsyncIterator[Any]:
    async with contextlib.AsyncExitStack() as stack:
        if options.tls:
            target = await stack.enter_async_context(relay(target, timeout_s=options.timeout_s))
        else:
            await check_http2(target, timeout_s=options.timeout_s, tls_hint="--tls is for that")
        yield await stack.enter_async_context(grpc.aio.insecure_channel(target, options=_CHANNEL))


async def _play_all(options: Options, play: Any, standard: Iterable[Script]) -> None:
    pool = [normal(endpoint) for endpoint in options.endpoints]
    for script in standard:
        exchange: Exchange | None = await play(script)
        if exchange is None:
            return
        if exchange.subset is None and not options.endpoints:
            pool += [endpoint for endpoint in exchange.picked if split(endpoint) is not None and endpoint not in pool]
    if not pool:
        return
    for script in scripts.subsets(options.model, pool):
        await play(script)
    first, second = scripts.beside(options.model, pool)
    await play(first, lambda: play(second))


async def _is_missing(call: Any, timeout_s: float) -> StreamEnd | None:
    """How a stream ends in which nothing is said, if that is because the service is not there.

    Asked by itself, because grpc.aio forgets the status of a stream that ends while something is being written.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await call.done_writing()
            status, details = await call.code(), await call.details()
    except TimeoutError:
        return None
    finally:
        call.cancel()
    if status is not grpc.StatusCode.UNIMPLEMENTED:
        return None
    return StreamEnd(by="epp", status=status.name, details=details or "")


async def _ask_health(channel: Any, log: _Log, options: Options, *, is_certain: bool) -> None:
    """Ask for every name. A port that was only a guess, and has no health service, says nothing."""
    check = channel.unary_unary(
        _CHECK_PATH,
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    for service in (LIVENESS, READINESS, EXT_PROC, UNKNOWN):
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=options.timeout_s)
            known = health_pb2.HealthCheckResponse.ServingStatus
            status = known.Name(answer.status) if answer.status in known.values() else str(answer.status)
        except grpc.aio.AioRpcError as error:
            status = error.code().name
            if not is_certain and status in ("UNIMPLEMENTED", "UNAVAILABLE"):
                return
        log.append(Line(health=HealthAnswer(service=service, status=status)))


def run(options: Options, *, observe: Callable[[Line], None] | None = None) -> Transcript:
    """`drive`, for those without an event loop."""
    return asyncio.run(drive(options, observe=observe))
