"""HOST:PORT -> a socket that has the port. It does not listen yet, so that nobody waits in its queue while the shim starts."""

from __future__ import annotations

import re
import socket
from typing import Final

from .. import UsageError

_LISTEN: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]*)):(\d{1,5})")


def bind(listen: str) -> socket.socket:
    """The socket of a TCP port, 0 for any free one; an IPv6 address goes in brackets. Raises UsageError, naming `listen`."""
    match = _LISTEN.fullmatch(listen)
    if match is None or int(match[3]) > 65535:
        raise UsageError(f"listen {listen}: not of the form HOST:PORT (an IPv6 address goes in brackets)")
    # asyncio sets TCP_NODELAY only where it sees the protocol's number; without it an answer waits 40 ms for the client's ACK.
    listener = socket.socket(socket.AF_INET6 if match[1] else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((match[1] or match[2], int(match[3])))
    except OSError as error:
        listener.close()
        raise UsageError(f"listen {listen}: {error.strerror or error}") from error
    return listener
