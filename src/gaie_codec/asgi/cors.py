"""Scripts of web pages as clients: an ASGI application -> one that lets pages of some origins read its answers.

Fetch standard, §3.2 (fetch.spec.whatwg.org/#http-cors-protocol): a preflight is answered here, and every answer to an allowed origin says
so. Credentials are never allowed; an API key in the headers is none in this sense.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .app import ASGIApp, Message, Receive, Send

ANY: Final = "*"
_METHODS: Final = b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
_EXPOSED: Final = b"x-request-id, x-gaie-codec-dropped, retry-after, x-should-retry"
_MAX_AGE_S: Final = b"600"


def allow_origins(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """`origins` are as browsers send them, `https://host:port`, or `ANY`."""

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin: bytes = headers.get(b"origin", b"")
        if not origin or (ANY not in origins and origin.decode("latin-1") not in origins):
            await app(scope, receive, send)
            return
        allowed = [(b"access-control-allow-origin", b"*")]
        if ANY not in origins:
            allowed = [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            asked = headers.get(b"access-control-request-headers")
            allowed += [(b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _MAX_AGE_S)]
            allowed += [(b"access-control-allow-headers", asked)] if asked else []
            await send({"type": "http.response.start", "status": 200, "headers": [*allowed, (b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        allowed.append((b"access-control-expose-headers", _EXPOSED))

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *allowed]}
            await send(message)

        await app(scope, receive, send_allowed)

    return answer
