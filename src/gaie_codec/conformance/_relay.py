"""A port that speaks TLS -> a loopback port that does not.

EPPs sign their own certificates, without a name in them, and grpcio cannot be told to take those. Nothing secret is sent here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

from .. import Code, UpstreamStatusError

_CHUNK: int = 65_536


@contextlib.asynccontextmanager
async def relay(target: str, *, timeout_s: float) -> AsyncIterator[str]:
    """The address of a port that leads to `target`. Raises UpstreamStatusError where nothing there speaks TLS with HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = target.rpartition(":")

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(timeout_s):
            return await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)

    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        task.add_done_callback(serving.discard)
        open_writers = [writer]
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                far_reader, far_writer = await connect()
                open_writers.append(far_writer)
                await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        finally:
            for one in open_writers:
                await _drop(one)

    try:
        _, first = await connect()
    except TimeoutError:
        raise UpstreamStatusError(Code.DEADLINE_EXCEEDED, f"{target}: no TLS connection in {timeout_s:g} s") from None
    except OSError as error:
        raise UpstreamStatusError(Code.UNAVAILABLE, f"{target}: {error.strerror or error}") from None
    protocol = first.get_extra_info("ssl_object").selected_alpn_protocol()
    await _drop(first)
    if protocol != "h2":
        raise UpstreamStatusError(Code.UNAVAILABLE, f"{target} speaks TLS, but does not offer h2 by ALPN, which gRPC needs")
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()  # gRPC has no half-closed connections


async def _drop(writer: asyncio.StreamWriter) -> None:
    writer.close()
    writer.transport.abort()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
