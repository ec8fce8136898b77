"""An ASGI 3 application, without a framework: HTTP requests -> `Transcoder` -> calls to one model server -> ASGI messages.

What belongs to the host is here and nothing else: ids, clocks, deadlines, logs, and that no call outlives its request. The call and a
watch for `http.disconnect` run side by side; whichever ends first ends the other. Spec: asgi.readthedocs.io, HTTP & WebSocket 2.3.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .. import (
    BodyChunk,
    CancelCall,
    Code,
    CodecError,
    EndOfBody,
    RequestError,
    RequestTooLargeError,
    ResponseHead,
    UnsupportedEndpointError,
    UpstreamStatusError,
    encode_answer_headers,
    encode_error_response,
    encode_json_response,
)
from .. import __version__ as _own_version
from .._sse import CONTENT_TYPE
from ..telemetry import RequestMeter
from ..upstream import check_health

if TYPE_CHECKING:
    from .. import Call, Output, Response, Transcoder
    from ..telemetry.metrics import Metrics
    from ..telemetry.tracing import Tracing
    from ..upstream import Upstream, UpstreamCall

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH_PATH: Final = "/health"
PING_PATH: Final = "/ping"  # SageMaker's name for it
LOAD_PATH: Final = "/load"
_HOST_PATHS: Final = {HEALTH_PATH: "GET, HEAD", PING_PATH: "GET, HEAD, POST", LOAD_PATH: "GET, HEAD"}
# A longer body is decoded in a thread: tokenizing takes 0.4 ms per KiB, in which no other stream would get its tokens.
_MAX_INLINE_BYTES: Final = 32 * 1024
# Between two pieces. Shorter than the grace that SIGTERM gives, so that a client which never sends its body does not use it up.
_BODY_TIMEOUT_S: Final = 25

_log = logging.getLogger("gaie_codec.asgi")


def create_app(
    upstream: Upstream,
    transcoder: Transcoder,
    *,
    request_timeout_s: float | None = 600.0,
    health_timeout_s: float = 2.0,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
) -> ASGIApp:
    """The application: the transcoder's endpoints and local answers, /health, /ping and /load. `upstream` stays the caller's to close.

    `request_timeout_s` is the deadline of a whole answer, None for none; a health check has its own. `metrics` and `tracing` are told of
    every request (`gaie_codec.telemetry`).
    """
    return _App(upstream, transcoder, request_timeout_s, health_timeout_s, metrics, tracing)


class _ClientGone(Exception):
    """Nobody is there to answer."""


class _Reply:
    """Copies the core's outputs out as ASGI messages."""

    def __init__(self, send: Send, request_id: str, meter: RequestMeter, *, path: str, is_head: bool) -> None:
        self._send = send
        self.meter = meter
        self.path = path
        self._awaits_first = False  # of a stream's body
        self._is_head = is_head
        self.request_id = request_id
        self.dropped: tuple[str, ...] = ()
        self.has_started = False

    async def send(self, outputs: Iterable[Output]) -> None:
        try:
            for out in outputs:
                if isinstance(out, BodyChunk):
                    if self._awaits_first:
                        self._awaits_first = False
                        self.meter.ttft_s = self.meter.elapsed_s()
                    if not self._is_head:
                        self.meter.client_bytes_sent += len(out.data)
                        await self._send({"type": "http.response.body", "body": out.data, "more_body": True})
                elif isinstance(out, ResponseHead):
                    self.has_started = True
                    self.meter.http_status = out.status
                    self._awaits_first = ("content-type", CONTENT_TYPE) in out.headers
                    await self._send({"type": "http.response.start", "status": out.status, "headers": self._headers(out)})
                elif isinstance(out, EndOfBody):
                    await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as error:  # what ASGI 2.4 servers raise once the client has left; older ones say nothing
            raise _ClientGone from error

    def _headers(self, head: ResponseHead) -> list[tuple[bytes, bytes]]:
        headers = (*head.headers, *encode_answer_headers(self.request_id, self.dropped))
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


class _App:
    def __init__(
        self,
        upstream: Upstream,
        transcoder: Transcoder,
        request_timeout_s: float | None,
        health_timeout_s: float,
        metrics: Metrics | None,
        tracing: Tracing | None,
    ) -> None:
        self._upstream = upstream
        self._metrics = metrics
        self._tracing = tracing
        self._transcoder = transcoder
        self._request_timeout_s = request_timeout_s
        self._health_timeout_s = health_timeout_s
        self._started = int(time.time())
        self._running = 0  # requests that a model server is answering

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _run_lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"no {scope['type']} connections here, only HTTP")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get("x-request-id") or uuid.uuid4().hex
        method, path = scope["method"], scope["path"]
        meter = RequestMeter("http-in-grpc-out", method=method, path=path, headers=headers, metrics=self._metrics, tracing=self._tracing)
        meter.dialect = self._transcoder.adapter.dialect
        reply = _Reply(send, request_id, meter, path=path, is_head=method == "HEAD")
        try:
            await self._answer(method, path, meter.headers, receive, reply)
        except _ClientGone:
            meter.is_cancelled = True
            _log.info("request %r: the client has gone", reply.request_id)
        except asyncio.CancelledError:
            meter.is_cancelled = True
            raise
        except CodecError as error:
            meter.error = error
            _log.info("request %r: %d, %r", reply.request_id, error.http_status, str(error))
            await self._last_words(reply, error)
        except Exception as error:
            meter.error = error
            _log.exception("request %r: a bug of gaie-codec", reply.request_id)
            if reply.has_started:
                raise  # makes the server cut the connection, so that no client takes what it has for the whole answer
            await self._last_words(reply, CodecError("Internal server error"))
        finally:
            meter.end()

    async def _answer(self, method: str, path: str, headers: dict[str, str], receive: Receive, reply: _Reply) -> None:
        allow = _HOST_PATHS.get(path)
        if allow is not None:
            await self._answer_for_host(method, path, allow, reply)
        else:
            # Only a POST can have an endpoint with a body; for all else the transcoder knows the answer without it.
            body = await self._read_body(headers, receive) if method == "POST" else b""
            reply.meter.client_bytes_received = len(body)
            own_id = uuid.uuid4().hex
            if len(body) > _MAX_INLINE_BYTES:
                call = await asyncio.to_thread(self._decode, method, path, headers, body, own_id)
            else:
                call = self._decode(method, path, headers, body, own_id)
            if isinstance(call, tuple):
                await reply.send(call)
                return
            reply.dropped = reply.meter.dropped = call.dropped
            reply.meter.model = call.inference.model
            if "x-request-id" not in headers:
                reply.request_id = call.id
            self._running += 1
            try:
                await self._run(call, receive, reply)
            finally:
                self._running -= 1

    def _decode(self, method: str, path: str, headers: dict[str, str], body: bytes, own_id: str) -> Call | tuple[Output, ...]:
        """The call to make, or the answer where none is needed."""
        answer = self._transcoder.answer(method, path, headers, body, created=self._started, version=_own_version)
        return answer if answer is not None else self._transcoder.request(method, path, headers, body, request_id=own_id)

    async def _answer_for_host(self, method: str, path: str, allow: str, reply: _Reply) -> None:
        if method not in allow.split(", "):
            raise UnsupportedEndpointError(f"Method Not Allowed: {path} takes {allow.partition(',')[0]}", http_status=405, allow=allow)
        if path == LOAD_PATH:
            await reply.send(encode_json_response(b'{"server_load":%d}' % self._running))
        else:
            await self._check_health()
            await reply.send((ResponseHead(200, (("content-length", "0"),)), EndOfBody()))

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self._transcoder.limits.max_request_bytes
        announced = headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise RequestTooLargeError(f"the body of {announced[:20]} bytes is over the limit of {limit}")
        parts = []
        size = 0
        while True:
            message = await _receive_part(receive)
            if message["type"] == "http.disconnect":
                raise _ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise RequestTooLargeError(f"the body is over the limit of {limit} bytes")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _run(self, call: Call, receive: Receive, reply: _Reply) -> None:
        exchange = asyncio.create_task(self._exchange(call, reply))
        watch = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((exchange, watch), return_when=asyncio.FIRST_COMPLETED)
            if not exchange.done():
                raise _ClientGone
            exchange.result()
        finally:
            exchange.cancel()
            watch.cancel()
            await asyncio.gather(exchange, watch, return_exceptions=True)

    async def _exchange(self, call: Call, reply: _Reply) -> None:
        response = call.response(created=int(time.time()))
        meter = reply.meter
        meter.upstream = getattr(self._upstream, "target", "")  # a host may bring a connection of its own
        meter.frames_sent = len(call.calls)
        meter.upstream_bytes_sent = sum(len(one.message) for one in call.calls)
        upstreams = [
            self._upstream.stream(one.path, one.message, metadata=one.metadata, timeout_s=self._request_timeout_s) for one in call.calls
        ]
        try:
            if len(upstreams) == 1:
                await self._read(upstreams[0], response, reply)
            else:
                await _read_all(upstreams, response, reply)
        finally:
            for upstream in upstreams:
                upstream.cancel()
            meter.usage = response.usage
            if response.error is not None:
                meter.error = response.error
                level = logging.WARNING if response.error.http_status >= 500 else logging.INFO
                _log.log(level, "request %r: %d, %r", reply.request_id, response.error.http_status, str(response.error))

    async def _read(self, upstream: UpstreamCall, response: Response, reply: _Reply) -> None:
        meter = reply.meter
        await reply.send(response.receive_headers())
        while not response.ended and (message := await upstream.read()) is not None:
            meter.frames_received += 1
            meter.upstream_bytes_received += len(message)
            await reply.send(response.receive_message(message))
        if not response.ended:
            await reply.send(response.receive_status(*await upstream.status()))

    async def _last_words(self, reply: _Reply, error: CodecError) -> None:
        try:
            await reply.send(encode_error_response(error, reply.path, flavor=self._transcoder.flavor.name))
        except _ClientGone:
            _log.info("request %r: the client has gone", reply.request_id)

    async def _check_health(self) -> None:
        try:
            await check_health(self._upstream, self._transcoder.adapter, timeout_s=self._health_timeout_s)
        except CodecError as error:
            raise UpstreamStatusError(Code.UNAVAILABLE, f"health check: {error}") from error


async def _read_all(upstreams: Sequence[UpstreamCall], response: Response, reply: _Reply) -> None:
    """Read several calls side by side. What comes is taken in one place, so that outputs leave in the order in which they were made."""
    arrived: asyncio.Queue[tuple[int, bytes | Exception | None]] = asyncio.Queue(len(upstreams))

    async def pump(number: int) -> None:
        try:
            while (message := await upstreams[number].read()) is not None:
                await arrived.put((number, message))
        except Exception as error:  # a bug, which is told where the answer is made and not waited for
            await arrived.put((number, error))
        else:
            await arrived.put((number, None))

    pumps = [asyncio.create_task(pump(number)) for number in range(len(upstreams))]
    stopped: set[int] = set()
    try:
        for number in range(len(upstreams)):
            await reply.send(response.receive_headers(call=number))
        while not response.ended:
            number, message = await arrived.get()
            if number in stopped:
                continue
            if isinstance(message, Exception):
                raise message
            if message is not None:
                reply.meter.frames_received += 1
                reply.meter.upstream_bytes_received += len(message)
                outputs = response.receive_message(message, call=number)
            else:
                outputs = response.receive_status(*await upstreams[number].status(), call=number)
            for out in outputs:
                if isinstance(out, CancelCall):
                    stopped.add(out.call)
                    upstreams[out.call].cancel()
            await reply.send(outputs)
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _receive_part(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await receive()
    except TimeoutError:
        late = RequestError(f"no more of the body came for {_BODY_TIMEOUT_S} s")
        late.http_status, late.error_type = 408, "RequestTimeoutError"
        raise late from None


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _run_lifespan(receive: Receive, send: Send) -> None:
    """Nothing to do at either end: the connection is the caller's."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
