"""Which web pages' scripts may read answers."""

from __future__ import annotations

import asyncio

import pytest

from gaie_codec.asgi.cors import ANY, allow_origins

PAGE = b"https://page.example"
PREFLIGHT = [(b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization, content-type")]


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 405, "headers": [(b"x-request-id", b"r")]})
    await send({"type": "http.response.body", "body": b"from the app", "more_body": False})


def ask(origins, method="POST", headers=()):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/v1/models", "headers": list(headers)}
    asyncio.run(allow_origins(app, origins)(scope, None, send))
    start, body = sent
    return start["status"], dict(start["headers"]), body["body"]


@pytest.mark.parametrize(("origins", "told", "vary"), [([ANY], b"*", None), ([PAGE.decode()], PAGE, b"Origin")])
def test_an_allowed_page(origins, told, vary):
    status, headers, body = ask(origins, headers=[(b"origin", PAGE)])
    assert (status, body, headers[b"x-request-id"]) == (405, b"from the app", b"r"), "what the app answers, errors too"
    assert (headers[b"access-control-allow-origin"], headers.get(b"vary")) == (told, vary)
    assert b"x-gaie-codec-dropped" in headers[b"access-control-expose-headers"]

    status, headers, body = ask(origins, "OPTIONS", [(b"origin", PAGE), *PREFLIGHT])
    assert (status, body, headers[b"access-control-allow-origin"]) == (200, b"", told)
    assert b"POST" in headers[b"access-control-allow-methods"]
    assert headers[b"access-control-allow-headers"] == b"authorization, content-type"
    assert b"access-control-allow-credentials" not in headers


@pytest.mark.parametrize(
    ("origins", "method", "headers"),
    [
        ([ANY], "POST", ()),
        ([ANY], "OPTIONS", PREFLIGHT),
        (["https://other.example"], "POST", [(b"origin", PAGE)]),
        (["https://other.example"], "OPTIONS", [(b"origin", PAGE), *PREFLIGHT]),
    ],
)
def test_nothing_is_said_to_others(origins, method, headers):
    assert ask(origins, method, headers) == (405, {b"x-request-id": b"r"}, b"from the app")


def test_an_options_that_is_no_preflight_is_the_apps():
    status, headers, _ = ask([ANY], "OPTIONS", [(b"origin", PAGE)])
    assert (status, headers[b"access-control-allow-origin"]) == (405, b"*")


def test_the_lifespan_goes_through():
    seen = []

    async def lifespan(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(allow_origins(lifespan, [ANY])({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
