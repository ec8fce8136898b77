"""One model server over grpc.aio, in raw bytes: the core encodes and decodes the messages, grpcio only moves them.

Every method is called as unary-stream. On the wire a unary call is one whose stream has a single message, so this needs no second path.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any, Final

from .. import Code, Limits, MalformedMessageError, UpstreamStatusError, UsageError, __version__

try:
    import grpc
    import grpc.aio
except ModuleNotFoundError as error:
    raise ImportError("gaie_codec.upstream needs the package grpcio: pip install gaie-codec[grpc]", name=error.name) from error

_TARGET: Final = re.compile(r"(?:grpc://)?(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/?#@\s]+):(\d{1,5})/?")
_OPTIONS: Final = (
    # A long answer with top_logprobs is one message of more than grpcio's 4 MiB. `Limits.max_message_bytes` has the say (502); from twice
    # its default on, which only a compression bomb reaches, grpcio stops inflating and reports RESOURCE_EXHAUSTED.
    ("grpc.max_receive_message_length", 2 * Limits().max_message_bytes),
    ("grpc.max_send_message_length", -1),
    # A dead peer is noticed by pings, sent only while calls are open. Not more often than every 5 minutes: grpcio's servers hang up on
    # those who do, by their default settings, and a long prefill is silent (measured: pings every 30 s end a silent call after 240 s).
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # grpcio's backoff grows to two minutes, for which every request would fail after a model server's restart.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    # Else a grpc-message of 17 KB comes out as RESOURCE_EXHAUSTED.
    ("grpc.max_metadata_size", 256 * 1024),
    ("grpc.absolute_max_metadata_size", 512 * 1024),
    ("grpc.primary_user_agent", f"gaie-codec/{__version__}"),
)


def parse_target(target: str) -> str:
    """`grpc://HOST:PORT` or `HOST:PORT`, an IPv6 address in brackets, as the HOST:PORT that grpcio takes. Raises UsageError."""
    scheme, separator, _ = target.partition("://")
    if separator and scheme != "grpc":
        raise UsageError(f"upstream {target}: the scheme is {scheme}; only grpc:// is supported, without TLS")
    match = _TARGET.fullmatch(target)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(f"upstream {target}: not of the form grpc://HOST:PORT (an IPv6 address goes in brackets)")
    return f"{match[1]}:{match[2]}"


class UpstreamCall:
    """One open call. Whoever opened it must `cancel` it in the end; after the last message that does nothing."""

    __slots__ = ("_call",)

    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> bytes | None:
        """The next message; None when there are no more, and `status` tells why."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return None  # not the reader was cancelled but the call, as by `Upstream.close`
        return None if message is grpc.aio.EOF else message

    async def status(self) -> tuple[Code, str]:
        """How the call ended, and the server's words for it."""
        code = await self._call.code()
        return Code(code.value[0]), await self._call.details() or ""

    def cancel(self) -> None:
        """Tell the server to stop."""
        self._call.cancel()


class Upstream:
    """A connection to one model server, which reconnects by itself. Create it inside the event loop, and `close` it."""

    def __init__(self, target: str) -> None:
        """`target` as for `parse_target`. Raises UsageError; whether a server is there shows only with the first call."""
        self.target = parse_target(target)
        self._channel = grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        self._methods: dict[str, Any] = {}

    def stream(
        self, path: str, message: bytes, *, metadata: Iterable[tuple[str, str]] = (), timeout_s: float | None = None
    ) -> UpstreamCall:
        """Start a call with one request message."""
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = self._channel.unary_stream(path, request_serializer=None, response_deserializer=None)
        try:
            return UpstreamCall(method(message, metadata=tuple(metadata), timeout=timeout_s))
        except grpc.aio.UsageError as error:  # closed meanwhile
            raise UpstreamStatusError(Code.UNAVAILABLE, f"{self.target}: {error}") from error

    async def unary(self, path: str, message: bytes, *, timeout_s: float) -> bytes:
        """The one message of a unary method. Raises UpstreamStatusError, and MalformedMessageError for an OK without a message."""
        call = self.stream(path, message, timeout_s=timeout_s)
        try:
            answer = await call.read()
            if answer is not None:
                return answer
            code, details = await call.status()
        finally:
            call.cancel()
        if code is Code.OK:
            raise MalformedMessageError(f"{path} was answered without a message")
        raise UpstreamStatusError(code, details)

    async def close(self) -> None:
        """Cancel what is open and disconnect."""
        await self._channel.close()
