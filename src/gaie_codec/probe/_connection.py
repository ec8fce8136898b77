"""A port -> nothing, if HTTP/2 is spoken there, or the error that says what is there instead.

gRPC libraries say UNAVAILABLE for all of it, in the words of whichever layer failed. So this looks at the first bytes itself: a peer
that speaks HTTP/2 answers the client's preface with a SETTINGS frame (RFC 9113, 3.4).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from typing import Any, Final

from .. import Code, FramingError, UpstreamStatusError

_FRAME_HEADER: Final = 9
_SETTINGS: Final = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS
_OPTIONS: Final = b"OPTIONS * HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"
_TLS_RECORDS: Final = (b"\x15\x03", b"\x16\x03")  # alert, handshake

# A peer may be slow to answer; what is left is for asking a silent one in other ways.
_PREFACE_SHARE: Final = 0.7


async def check_http2(target: str, *, timeout_s: float, tls_hint: str = "only gRPC without TLS is supported") -> None:
    """Return if HOST:PORT speaks HTTP/2.

    Raises UpstreamStatusError where nothing does, UNAVAILABLE at once and DEADLINE_EXCEEDED after a wait, and FramingError where
    something else speaks.
    """
    give_up = asyncio.get_running_loop().time() + timeout_s
    host, _, port = target.rpartition(":")
    try:
        async with asyncio.timeout(timeout_s * _PREFACE_SHARE):
            addresses = await _resolve(host.strip("[]"), int(port))
            address = await _connect_to_any(addresses)
    except TimeoutError:
        raise UpstreamStatusError(Code.DEADLINE_EXCEEDED, f"{target}: no connection in {timeout_s * _PREFACE_SHARE:.3g} s") from None
    except socket.gaierror as error:
        raise UpstreamStatusError(Code.UNAVAILABLE, f"{target}: the host name cannot be resolved: {error.strerror}") from None
    except ConnectionRefusedError:
        raise UpstreamStatusError(Code.UNAVAILABLE, f"{target}: connection refused, nothing listens there") from None
    except OSError as error:
        raise UpstreamStatusError(Code.UNAVAILABLE, f"{target}: {error.strerror or error}") from None

    started = asyncio.get_running_loop().time()
    first = await _first_bytes(address, _PREFACE, timeout_s=(give_up - started) * _PREFACE_SHARE)
    if _is_settings(first):
        return
    # Some answer the preface in ways that tell little: nginx speaks HTTP/1 of a TLS port, others only hang up.
    left_s = give_up - asyncio.get_running_loop().time()
    answers = await asyncio.gather(*(_first_bytes(address, sent, timeout_s=left_s * 0.9) for sent in (_client_hello(), _OPTIONS)))
    if (answers[0] or b"").startswith(_TLS_RECORDS) or (first or b"").startswith(_TLS_RECORDS):
        raise FramingError(f"{target} speaks TLS; {tls_hint}")
    if any((answer or b"").startswith(b"HTTP/") for answer in (first, answers[1])):
        raise FramingError(f"{target} speaks HTTP/1, not gRPC; model servers have gRPC on a port of its own")
    if first is None:
        waited_s = asyncio.get_running_loop().time() - started
        raise UpstreamStatusError(Code.DEADLINE_EXCEEDED, f"{target} accepts connections, but says nothing ({waited_s:.3g} s)")
    if not first:
        raise UpstreamStatusError(Code.UNAVAILABLE, f"{target} accepts connections and closes them without a word")
    raise FramingError(f"{target} answers, but neither in HTTP/2, which is what gRPC uses, nor in HTTP/1 or TLS")


async def _resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    # Not in the loop's executor: asyncio.run waits for that, and a name server that does not answer takes longer than any deadline.
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[tuple[Any, ...]]] = loop.create_future()

    def settle(addresses: list[tuple[Any, ...]], error: Exception | None) -> None:
        if found.done():
            return
        if error is None:
            found.set_result(addresses)
        else:
            found.set_exception(error)

    def work() -> None:
        addresses: list[tuple[Any, ...]] = []
        failure: Exception | None = None
        try:
            addresses = list(dict.fromkeys(entry[4] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            failure = error
        except UnicodeError:  # what the idna codec raises for an empty or overlong label
            failure = socket.gaierror(socket.EAI_NONAME, "not a host name")
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, addresses, failure)

    threading.Thread(target=work, name="gaie-codec-resolver", daemon=True).start()
    return await found


async def _connect_to_any(addresses: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The first address that takes a connection. Raises the last one's OSError."""
    failure: OSError = OSError("no address")
    for address in addresses:
        try:
            _, writer = await asyncio.open_connection(address[0], address[1])
        except OSError as error:
            failure = error
        else:
            writer.transport.abort()
            return address
    raise failure


async def _first_bytes(address: tuple[Any, ...], sent: bytes, *, timeout_s: float) -> bytes | None:
    """What comes back: at most a frame header, less if the peer hangs up before, None if it stays silent."""
    received = b""
    writer = None
    try:
        async with asyncio.timeout(max(0.0, timeout_s)):
            reader, writer = await asyncio.open_connection(address[0], address[1])
            writer.write(sent)
            while len(received) < _FRAME_HEADER and (more := await reader.read(_FRAME_HEADER - len(received))):
                received += more
    except TimeoutError:
        return received or None
    except OSError:
        pass  # a reset is a way to hang up
    finally:
        if writer is not None:
            writer.transport.abort()
    return received


def _is_settings(first: bytes | None) -> bool:
    # Length a multiple of one setting, type 4, stream 0; an ACK of ours would not be the first frame.
    return (
        first is not None
        and len(first) == _FRAME_HEADER
        and first[3:5] == b"\x04\x00"
        and first[5:] == bytes(4)
        and int.from_bytes(first[:3]) % 6 == 0
    )


def _client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()
