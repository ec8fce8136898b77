"""The ext_proc service over grpc.aio: a `Processor` for each stream, with the clocks, deadlines, logs and health that belong to a host.

Envoy applies no timeout of its own in FULL_DUPLEX_STREAMED, and takes a stream that ends early for a fault or, worse, for nothing: so each
stream has a deadline here, and ends only after Envoy did or after the last answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from .. import UsageError
from ..upstream.listen import bind
from ._wire import decode_headers
from .gateway import Gateway
from .messages import PROCESS_PATH, SERVICE, ProcessingRequest, ProcessingResponse
from .picking import DESTINATION
from .processor import Processor

try:
    import grpc
    import grpc.aio
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
except ModuleNotFoundError as error:
    raise ImportError(
        "gaie_codec.ext_proc.server needs the packages grpcio and grpcio-health-checking: pip install gaie-codec[ext-proc]", name=error.name
    ) from error

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"

# A longer body is decoded in a thread: tokenizing takes 0.4 ms per KiB, in which no other stream would get its tokens.
_MAX_INLINE_BYTES: Final = 32 * 1024
_LAST_WRITE_S: Final = 5.0
# How long a model server that was told to stop may take, and how long one that cannot be told: it may be about to end by itself.
_ABORT_S: Final = 2.0
_LAG_S: Final = 0.1
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING

_log = logging.getLogger("gaie_codec.ext_proc")


class StreamObserver(Protocol):
    """What a host learns of one stream. None of it may raise or wait."""

    def routed(self) -> None:
        """A model server was picked."""
        ...

    def closed(self, ttft_s: float | None, duration_s: float) -> None:
        """The stream is over. `ttft_s` is the time to the first byte of the answer's body, None if none went out."""
        ...


class Hooks:
    """What a host does besides answering. These do nothing."""

    def opened(self, processor: Processor) -> StreamObserver | None:
        """The request's headers are there, and nothing is decoded yet."""
        return None

    async def learn(self, destination: str) -> None:
        """Another endpoint picker has named this model server: time to find out what it is, for `Gateway.find`."""

    async def abort(self, processor: Processor) -> bool:
        """The client has its answer, and the model server goes on: end that by `processor.abort`, and say whether that was possible.
        Where it is not, or nothing comes of it, the answer is cut off."""
        return False


class ExtProcServer:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor`, and grpc.health.v1 beside it.

    `request_timeout_s` is the deadline of a whole answer, None for none; `body_timeout_s` that between two pieces of a request. Health
    knows the services "", "liveness", "readiness" and ext_proc's own; all but liveness are NOT_SERVING until `set_ready`, and again once
    `drain` was called.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        hooks: Hooks | None = None,
        request_timeout_s: float | None = 600.0,
        body_timeout_s: float = 25.0,
    ) -> None:
        self._gateway = gateway
        self._hooks = hooks if hooks is not None else Hooks()
        self._request_timeout_s = request_timeout_s
        self._body_timeout_s = body_timeout_s
        self._server: Any = None
        self._health = _Health()
        self._is_draining = False

    async def start(self, listen: str, *, tls: tuple[bytes, bytes] | None = None) -> int:
        """Listen on HOST:PORT, port 0 for any free one; returns the port. `tls` is a private key and its certificate chain, in PEM.

        Raises UsageError if it cannot listen there.
        """
        # grpcio takes a port modulo 65536, and says of one that is taken only that it failed.
        bind(listen).close()
        if listen.startswith(":"):  # any address, which grpcio wants to be told
            listen = f"0.0.0.0{listen}"
        # Envoy's bodies come in pieces of at most 1 MiB, but whole in mode BUFFERED.
        limit = self._gateway.limits.max_request_bytes + 1024 * 1024
        options = (("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0))
        server = grpc.aio.server(options=options)
        handler = grpc.stream_stream_rpc_method_handler(
            self._process, request_deserializer=_decode, response_serializer=ProcessingResponse.SerializeToString
        )
        method = PROCESS_PATH.rpartition("/")[2]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {method: handler}),))
        await self._set_health(_NOT_SERVING, "", READINESS, SERVICE)
        await self._set_health(_SERVING, LIVENESS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            port = server.add_insecure_port(listen) if tls is None else server.add_secure_port(listen, grpc.ssl_server_credentials([tls]))
        except RuntimeError as error:
            await server.stop(None)
            how = "" if tls is None else " with this key and certificate in PEM"
            raise UsageError(f"listen {listen}{how}: {str(error).partition(';')[0]}") from error
        await server.start()
        self._server = server
        return int(port)

    async def set_ready(self, is_ready: bool = True) -> None:
        """Whether Envoy should send streams."""
        if not self._is_draining:
            await self._set_health(_SERVING if is_ready else _NOT_SERVING, "", READINESS, SERVICE)

    async def drain(self) -> None:
        """Readiness goes off, so that whoever balances sends new streams elsewhere. Streams are still accepted; liveness stays on."""
        self._is_draining = True
        await self._set_health(_NOT_SERVING, "", READINESS, SERVICE)

    async def stop(self, grace_s: float = 30.0) -> None:
        """Accept no more streams, let those there are end within `grace_s`, then cancel the rest."""
        await self.drain()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)

    async def _set_health(self, status: Any, *services: str) -> None:
        for service in services:
            await self._health.set(service, status)
            self._health.known.add(service)

    async def _process(self, _: Any, context: Any) -> None:
        stream = _Stream(self._gateway, context, self._hooks, self._request_timeout_s, self._body_timeout_s)
        try:
            await stream.run()
        finally:
            stream.close()


def _decode(data: bytes) -> Any:
    """The message, or the error: one that was raised here would come out of `read` without its kind."""
    try:
        return ProcessingRequest.FromString(data)
    except DecodeError as error:
        return error


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # it ships no types
    """To a Check for a service that nobody knows the Endpoint Picker Protocol wants a status, and grpcio's servicer gives an error."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    async def Check(self, request: Any, context: Any) -> Any:  # gRPC's name
        if request.service not in self.known:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        return await super().Check(request, context)


class _Stream:
    """One stream: reads, lets the processor answer, writes."""

    def __init__(
        self,
        gateway: Gateway,
        context: Any,
        hooks: Hooks,
        request_timeout_s: float | None,
        body_timeout_s: float,
    ) -> None:
        self._processor = Processor(
            gateway, own_id=uuid.uuid4().hex, created=int(time.time()), defers_over=_MAX_INLINE_BYTES, on_headers=self._open
        )
        self._context = context
        self._hooks = hooks
        self._learns = gateway.picker is None
        self._observer: StreamObserver | None = None
        self._aborting: asyncio.Task[bool] | None = None
        self._request_timeout_s = request_timeout_s
        self._body_timeout_s = body_timeout_s
        self._started_s = time.monotonic()
        self._ttft_s: float | None = None
        task = asyncio.current_task()
        assert task is not None, "a stream belongs to the task that serves it"
        self._task = task
        self._timer: asyncio.TimerHandle | None = None
        self._is_waiting = self._is_late = self._gave_up = False
        self._latecomer: asyncio.Task[None] | None = None

    def _open(self, processor: Processor) -> None:
        self._observer = self._hooks.opened(processor)

    async def run(self) -> None:
        """Until Envoy ends it, or the last answer is given."""
        processor = self._processor
        self._set_deadline(self._body_timeout_s)
        try:
            await self._exchange()
        except grpc.aio.BaseError:  # the call is over, as after Envoy's end when the server is being stopped
            return
        except asyncio.CancelledError:
            if not self._task.cancelling():  # somebody's picker raised it
                await self._send(processor.fail())
                return
            if not self._gave_up or self._task.uncancel():
                raise
            # A write that Envoy did not take. To grpcio a handler that is cancelled has not ended its call, whose end waits for the write.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the last answer was not taken")
        except UsageError as error:  # most likely of the picker
            _log.error("request %r: %s", processor.request_id, error)
            await self._send(processor.fail())
        except Exception:
            _log.exception("stream of request %r: a bug of gaie-codec, or of the picker", processor.request_id)
            await self._send(processor.fail())

    async def _exchange(self) -> None:
        processor = self._processor
        is_routed = False
        while not processor.is_over:
            message = await self._wait(self._context.read)
            if processor.is_over or message is grpc.aio.EOF:
                return
            if isinstance(message, DecodeError):
                _log.warning("a stream of what is no ProcessingRequest")
                await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no ProcessingRequest")
            if self._learns and message.HasField("request_headers"):
                await self._wait(partial(self._learn, message.request_headers.headers))
                if processor.is_over:
                    return
            answers = processor.receive(message)
            was_deferred = processor.deferred
            if was_deferred:
                self._set_deadline(self._request_timeout_s)
                prepared = await self._wait(lambda: asyncio.to_thread(processor.prepare))
                if processor.is_over:
                    return
                answers = processor.resume(prepared)
            if not is_routed:
                is_routed = processor.plan is not None
                if is_routed and self._observer is not None:
                    self._observer.routed()
                if not was_deferred:
                    self._set_deadline(self._request_timeout_s if is_routed else self._body_timeout_s)
            await self._send(answers)
            if self._is_late and not processor.is_over:
                await self._send(processor.too_late())

    async def _learn(self, headers: Any) -> None:
        destination = dict(decode_headers(headers)).get(DESTINATION)
        if destination is not None:
            await self._hooks.learn(destination)

    async def _wait(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """What the work gives. Meanwhile it may become too late, of which Envoy is told at once; None if that was the last word."""
        self._is_waiting = True
        try:
            found = await work()
        except asyncio.CancelledError:
            if not self._processor.is_over or self._gave_up or self._task.uncancel():
                raise
            return None
        finally:
            self._is_waiting = False
        latecomer, self._latecomer = self._latecomer, None
        if latecomer is not None:
            await latecomer
        return found

    async def _send(self, answers: Iterable[Any]) -> None:
        for answer in answers:
            await self._context.write(answer)
        processor = self._processor
        if processor.goes_on and self._aborting is None:
            self._aborting = asyncio.create_task(self._hooks.abort(processor))
            self._aborting.add_done_callback(self._aborted)
            if processor.may_cut:
                self._set_deadline(_ABORT_S)
        if self._ttft_s is None and processor.has_started:
            self._ttft_s = time.monotonic() - self._started_s

    def _aborted(self, aborting: asyncio.Task[bool]) -> None:
        told = not aborting.cancelled() and aborting.exception() is None and aborting.result()
        if not told and self._processor.goes_on and self._processor.may_cut:
            self._set_deadline(_LAG_S)

    def _set_deadline(self, after_s: float | None) -> None:
        """One timer for the whole stream: a timeout around each read would cost more than the read."""
        self._is_late = False
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if after_s is None else self._task.get_loop().call_later(after_s, self._expire)

    def _expire(self) -> None:
        self._is_late = True
        # Neither a read nor a write is cancelled while the stream may go on: a message would be lost, or no other could follow.
        if self._is_waiting:
            self._latecomer = asyncio.create_task(self._be_late())
        self._timer = self._task.get_loop().call_later(_LAST_WRITE_S, self._give_up)

    async def _be_late(self) -> None:
        await self._send(self._processor.too_late())
        if self._processor.is_over and self._is_waiting:
            self._task.cancel()  # it waits for what does not matter any more

    def _give_up(self) -> None:
        self._gave_up = True
        self._task.cancel()

    def close(self) -> None:
        """However it ended: Envoy is done, the client has left, or it was us."""
        self._set_deadline(None)
        for task in (self._aborting, self._latecomer):
            if task is not None:
                task.cancel()
        processor = self._processor
        duration_s = time.monotonic() - self._started_s
        if self._observer is not None:
            self._observer.closed(self._ttft_s, duration_s)
        _log_request(processor, self._ttft_s, duration_s)


def _log_request(processor: Processor, ttft_s: float | None, duration_s: float) -> None:
    """One line for each request: what it was, which way it went and why, who answered, and how it ended."""
    error, plan, usage = processor.error, processor.plan, processor.usage
    failed = max(processor.status, error.http_status if error is not None else 0) >= 500
    level = logging.WARNING if failed else logging.INFO
    if not _log.isEnabledFor(level):
        return
    where = processor.served or (processor.server.address if processor.server is not None else "nowhere")
    _log.log(
        level,
        "request %r: %s %r, %s (%s) to %s: %s, %d + %d tokens, first after %s s, %.3f s in all%s",
        processor.request_id,
        processor.method,
        processor.path[:200],
        processor.mode or "refused",
        plan.reason if plan is not None else "not routed",
        where,
        processor.status if processor.is_answer_complete else "the client has gone",
        usage.prompt_tokens,
        usage.completion_tokens,
        "-" if ttft_s is None else f"{ttft_s:.3f}",
        duration_s,
        f": {str(error)!r}" if error is not None else "",
    )
