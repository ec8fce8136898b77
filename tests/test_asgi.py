"""The ASGI shim: what the core cannot know. Ids, limits while reading, clients that leave, calls that must not outlive them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from gaie_codec import (
    Code,
    Limits,
    Transcoder,
    UsageError,
    __version__,
)
from gaie_codec.asgi.app import create_app
from gaie_codec.asgi.server import run_serve
from scripted import ADAPTER, IDS, MODEL, SERVICE, STREAM, TOKENIZER, WHOLE, ScriptedUpstream, model_server

CHAT = "/v1/chat/completions"


def chat(**fields):
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


class Client:
    """Drives the application as an ASGI server would. `leave` is the client's disconnect."""

    def __init__(self, upstream, *, limits=None, unsupported="reject", flavor="vllm", on_send=None, **options):
        transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=MODEL, limits=limits, unsupported=unsupported, flavor=flavor)
        self.app = create_app(upstream, transcoder, **options)
        self.on_send = on_send
        self.sent = []
        self.received = 0
        self.leave = asyncio.Event()

    async def request(self, method, path, *parts, headers=()):
        todo = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]]
        todo.append({"type": "http.request", "body": parts[-1] if parts else b"", "more_body": False})

        async def receive():
            self.received += 1
            if todo:
                return todo.pop(0)
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if self.on_send is not None:
                await self.on_send(message)
            self.sent.append(message)

        pairs = [(name.encode(), value.encode()) for name, value in headers]
        scope = {"type": "http", "method": method, "path": path, "headers": pairs}
        before = asyncio.all_tasks()
        try:
            await self.app(scope, receive, send)
        finally:
            assert asyncio.all_tasks() <= before, "a task outlived its request"

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self):
        assert self.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def error(self):
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)["error"]


def ask(upstream, method, path, *parts, headers=(), **options):
    async def main():
        client = Client(upstream, **options)
        await client.request(method, path, *parts, headers=headers)
        return client

    return asyncio.run(main())


# Answers


def test_unary_answer_with_ids_clock_and_deadline():
    upstream = ScriptedUpstream(*WHOLE)
    client = ask(upstream, "POST", CHAT, chat(), headers=[("traceparent", "00-1-2-01")], request_timeout_s=7.0)
    answer = json.loads(client.body)
    assert client.status == 200
    assert answer["choices"][0]["message"]["content"] == "Hello world"
    assert answer["created"] > 1_600_000_000
    assert client.headers["x-request-id"] == answer["id"]
    assert "x-gaie-codec-dropped" not in client.headers
    [(path, message, metadata, timeout_s)] = upstream.asked
    assert (path, metadata, timeout_s) == (f"/{SERVICE}/Generate", (("traceparent", "00-1-2-01"),), 7.0)
    assert ADAPTER.request_type.FromString(message).request_id == answer["id"]


def test_stream_sends_each_token_by_itself():
    client = ask(ScriptedUpstream(*STREAM), "POST", CHAT, chat(stream=True))
    assert client.headers["content-type"].startswith("text/event-stream")
    assert len(client.sent) > len(IDS) + 2
    assert client.body.endswith(b"data: [DONE]\n\n")


def test_two_requests_have_two_ids():
    first, second = (ask(ScriptedUpstream(*WHOLE), "POST", CHAT, chat()) for _ in range(2))
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_the_clients_own_request_id_comes_back():
    upstream = ScriptedUpstream(*WHOLE)
    assert ask(upstream, "POST", CHAT, chat(), headers=[("x-request-id", "mine")]).headers["x-request-id"] == "mine"
    assert ask(upstream, "GET", "/nowhere", headers=[("x-request-id", "mine")]).headers["x-request-id"] == "mine"


def test_a_request_id_cannot_break_out_of_its_header():
    client = ask(ScriptedUpstream(*WHOLE), "POST", CHAT, chat(request_id="a\r\nset-cookie: b" + "c" * 1000))
    assert client.headers["x-request-id"].startswith("chatcmpl-a%0D%0Aset-cookie:%20b")
    assert len(client.headers["x-request-id"]) < 1000


@pytest.mark.parametrize("stream", [False, True])
def test_dropped_fields_are_named(stream):
    fields = {"stream": stream, "bad_words": ["x"], "strange\r\nä,": 1}
    client = ask(ScriptedUpstream(*(STREAM if stream else WHOLE)), "POST", CHAT, chat(**fields), unsupported="drop")
    assert client.headers["x-gaie-codec-dropped"] == "bad_words, strange%0D%0A%C3%A4%2C"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("use_beam_search", True, "use_beam_search"),
        ("vllm_xargs", {"a": 1}, "vllm_xargs"),
        ("thinking_token_budget", 5, "thinking_token_budget"),
        ("structured_outputs", {"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern"),
    ],
)
@pytest.mark.parametrize(("path", "asked"), [(CHAT, {}), ("/v1/completions", {"prompt": "x"})])
def test_what_no_server_can_do_is_refused_or_dropped_and_named(path, asked, field, value, named):
    body = json.dumps({**json.loads(chat(**{field: value})), **asked}).encode()
    refused = ask(ScriptedUpstream(*WHOLE), "POST", path, body)
    assert (refused.status, refused.error["param"], refused.error["type"]) == (400, named, "BadRequestError")
    dropped = ask(ScriptedUpstream(*WHOLE), "POST", path, body, unsupported="drop")
    assert dropped.status == 200
    assert named in dropped.headers["x-gaie-codec-dropped"].split(", ")


@pytest.mark.parametrize("unsupported", ["reject", "drop"])
def test_what_vllm_would_refuse_is_refused_whatever_the_choice(unsupported):
    for fields, param in (({"thinking_token_budget": -5}, "thinking_token_budget"), ({"chat_template": "{{ x }}"}, None)):
        client = ask(ScriptedUpstream(), "POST", CHAT, chat(**fields), unsupported=unsupported)
        assert (client.status, client.error["param"]) == (400, param)


def test_dropped_header_is_bounded():
    client = ask(ScriptedUpstream(*WHOLE), "POST", CHAT, chat(**{f"unknown_{number}": 1 for number in range(5000)}))
    dropped = client.headers["x-gaie-codec-dropped"]
    assert len(dropped) < 2100
    assert dropped.endswith(", ...")


def test_long_body_takes_a_thread():
    client = ask(ScriptedUpstream(*WHOLE), "POST", CHAT, chat(user="x" * 100_000))
    assert client.status == 200


# Errors before the call


def test_bad_json_is_400():
    client = ask(ScriptedUpstream(), "POST", CHAT, b"{")
    assert (client.status, client.error["code"]) == (400, 400)


def test_errors_are_in_the_flavor_of_answers():
    client = ask(ScriptedUpstream(), "POST", CHAT, b"{", flavor="sglang")
    assert json.loads(client.body).keys() == {"object", "message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("POST", "/v1/nothing", 404, None),
        ("GET", CHAT, 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("PUT", "/ping", 405, "GET, HEAD, POST"),
        ("POST", "/load", 405, "GET, HEAD"),
        ("POST", "/version", 405, "GET, HEAD"),
        ("GET", "/tokenize", 405, "POST"),
        ("GET", "/tokenizer_info", 404, None),
        ("GET", "/v1/models/nothing", 404, None),
    ],
)
def test_no_such_endpoint(method, path, status, allow):
    upstream = ScriptedUpstream()
    client = ask(upstream, method, path)
    assert (client.status, client.error["code"], client.headers.get("allow")) == (status, status, allow)
    assert client.error["message"].startswith("Method Not Allowed: ") == (status == 405)
    assert not upstream.asked


def test_too_large_by_content_length_is_not_read():
    client = ask(ScriptedUpstream(), "POST", CHAT, chat(), headers=[("content-length", "1" * 30)])
    assert (client.status, client.error["type"], client.received) == (413, "RequestTooLargeError", 0)


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr("gaie_codec.asgi.app._BODY_TIMEOUT_S", 0.01)
    sent = []

    async def main():
        transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=MODEL)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await create_app(ScriptedUpstream(), transcoder)(scope, asyncio.Event().wait, send)

    asyncio.run(main())
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["type"] == "RequestTimeoutError"


def test_too_large_stops_reading():
    client = ask(ScriptedUpstream(), "POST", CHAT, *[b"x" * 10] * 9, limits=Limits(max_request_bytes=25))
    assert (client.status, client.error["code"], client.received) == (413, 413, 3)


# Errors of the call


def test_status_before_the_first_message_is_plain_json():
    upstream = ScriptedUpstream((Code.DEADLINE_EXCEEDED, "slow"))
    client = ask(upstream, "POST", CHAT, chat(stream=True))
    assert (client.status, client.error["type"]) == (504, "GatewayTimeoutError")


def test_status_in_the_stream_is_an_event_without_done():
    client = ask(ScriptedUpstream(STREAM[0], (Code.UNAVAILABLE, "gone")), "POST", CHAT, chat(stream=True))
    assert client.status == 200
    assert b'"code":503' in client.body
    assert b"[DONE]" not in client.body


def test_a_broken_answer_cancels_the_call():
    upstream = ScriptedUpstream(b"\xff\xff", None)
    client = ask(upstream, "POST", CHAT, chat())
    assert (client.status, upstream.calls[0].is_cancelled) == (502, True)


def test_a_bug_is_500_with_a_traceback(caplog):
    upstream = ScriptedUpstream(ZeroDivisionError("a bug"))
    client = ask(upstream, "POST", CHAT, chat())
    assert (client.status, client.error["message"]) == (500, "Internal server error")
    assert upstream.calls[0].is_cancelled
    assert "ZeroDivisionError" in caplog.text


def test_a_bug_in_one_of_several_calls_is_not_waited_for():
    async def main():
        client = Client(ScriptedUpstream(OSError("broken")))
        async with asyncio.timeout(5):
            await client.request("POST", "/v1/embeddings", json.dumps({"model": "tiny", "input": ["a", "b"]}).encode())
        return client

    assert asyncio.run(main()).status == 500


def test_a_bug_in_the_stream_cuts_the_connection():
    upstream = ScriptedUpstream(STREAM[0], ZeroDivisionError("a bug"))

    async def main():
        client = Client(upstream)
        with pytest.raises(ZeroDivisionError):
            await client.request("POST", CHAT, chat(stream=True))
        assert client.sent[-1]["more_body"]

    asyncio.run(main())
    assert upstream.calls[0].is_cancelled


# Clients that leave


async def run_and_leave(client, upstream, *parts):
    """Start a request and leave once its call waits for the model server."""
    async with asyncio.TaskGroup() as group:
        group.create_task(client.request("POST", CHAT, *parts))
        while not upstream.calls:
            await asyncio.sleep(0.001)
        await upstream.calls[0].waiting.wait()
        assert not upstream.calls[0].is_cancelled
        client.leave.set()


@pytest.mark.parametrize("script", [[None], [STREAM[0], None]], ids=["before the first message", "after it"])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_cancels_the_call(script, stream):
    upstream = ScriptedUpstream(*script)

    async def main():
        client = Client(upstream)
        async with asyncio.timeout(5):
            await run_and_leave(client, upstream, chat(stream=stream))
        return client

    client = asyncio.run(main())
    assert upstream.calls[0].is_cancelled
    assert len(client.sent) == (2 if stream and len(script) == 2 else 0)


def test_disconnect_while_the_body_is_read():
    upstream = ScriptedUpstream()

    async def main():
        client = Client(upstream)

        async def receive():
            return {"type": "http.disconnect"}

        await client.app({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, None)

    asyncio.run(main())
    assert not upstream.calls


def test_a_failed_send_cancels_the_call():
    upstream = ScriptedUpstream(STREAM[0], None)

    async def fail(message):
        raise OSError("gone")

    ask(upstream, "POST", CHAT, chat(stream=True), on_send=fail)
    assert upstream.calls[0].is_cancelled


def test_a_client_that_leaves_while_send_waits():
    upstream = ScriptedUpstream(*STREAM)

    async def main():
        async def stall(message):
            client.leave.set()
            await asyncio.Event().wait()

        client = Client(upstream, on_send=stall)
        async with asyncio.timeout(5):
            await client.request("POST", CHAT, chat(stream=True))

    asyncio.run(main())
    assert upstream.calls[0].is_cancelled


def test_cancelling_the_application_cancels_the_call():
    upstream = ScriptedUpstream(None)

    async def main():
        task = asyncio.create_task(Client(upstream).request("POST", CHAT, chat()))
        while not upstream.calls:
            await asyncio.sleep(0.001)
        await upstream.calls[0].waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert upstream.calls[0].is_cancelled


# Other endpoints


def test_models():
    client = ask(ScriptedUpstream(), "GET", "/v1/models")
    [model] = json.loads(client.body)["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 4096)


def test_local_answers_ask_nobody():
    upstream = ScriptedUpstream()
    assert json.loads(ask(upstream, "GET", "/v1/models/tiny").body)["id"] == "tiny"
    assert json.loads(ask(upstream, "GET", "/version").body) == {"version": __version__}
    tokens = json.loads(ask(upstream, "POST", "/tokenize", b'{"prompt": "hi"}').body)["tokens"]
    assert tokens == TOKENIZER.encode("hi", add_special_tokens=True)
    text = json.dumps({"prompt": "word " * 20_000}).encode()
    long = ask(upstream, "POST", "/tokenize", text)  # in a thread
    assert json.loads(long.body)["count"] > 20_000
    back = ask(upstream, "POST", "/detokenize", json.dumps({"tokens": tokens}).encode())
    assert (json.loads(back.body), back.headers["content-type"]) == ({"prompt": "hi"}, "application/json")
    assert not upstream.asked


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_ping_is_health_by_another_name(method):
    client = ask(ScriptedUpstream(b"\x08\x01"), method, "/ping")
    assert (client.status, client.body) == (200, b"")
    assert ask(ScriptedUpstream((Code.UNAVAILABLE, "down")), method, "/ping").status == 503


@pytest.mark.parametrize("name", ["health", "load", "tokenizer_info"])
def test_service_endpoints_are_vllms(name):
    golden = json.loads((Path(__file__).parent / "golden" / "vllm-http-only" / f"{name}.json").read_text())
    method, path = golden["path"].split()
    client = ask(ScriptedUpstream(b"\x08\x01"), method, path)
    assert client.status == golden["status"]
    if client.status == 200:
        assert client.body.decode() == (golden["body"] or "")
    else:  # in OpenAI's form, with vLLM's words first: docs/differences.md, Error bodies
        assert client.error["message"].startswith(json.loads(golden["body"])["detail"])


def test_load_is_what_a_model_server_is_answering():
    loads = []

    async def main():
        async def look(_):
            other = Client(ScriptedUpstream())
            other.app = client.app
            await other.request("GET", "/load")
            loads.append(json.loads(other.body))

        client = Client(ScriptedUpstream(*WHOLE), on_send=None)
        await look(None)
        sent = client.sent
        done = False

        async def once(message):
            nonlocal done
            if not done:
                done = True
                await look(message)

        client.on_send = once
        await client.request("POST", CHAT, chat())
        assert sent
        client.on_send = None
        await look(None)

    asyncio.run(main())
    assert loads == [{"server_load": 0}, {"server_load": 1}, {"server_load": 0}]


def test_a_server_without_any_health_method_is_well_as_far_as_one_knows():
    upstream = ScriptedUpstream((Code.UNIMPLEMENTED, ""))
    assert ask(upstream, "GET", "/health").status == 200
    assert [path for path, *_ in upstream.asked] == [f"/{SERVICE}/HealthCheck", "/grpc.health.v1.Health/Check"]


def test_head_has_the_headers_of_get_and_no_body():
    client = ask(ScriptedUpstream(), "HEAD", "/v1/models")
    assert (client.status, client.body) == (200, b"")
    assert int(client.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("script", "status"),
    [([b"\x08\x01"], 200), ([b"\x08\x00"], 503), ([(Code.UNAVAILABLE, "down")], 503), ([b"\xff"], 503)],
    ids=["healthy", "not healthy", "down", "no message"],
)
def test_health(script, status):
    upstream = ScriptedUpstream(*script)
    client = ask(upstream, "GET", "/health", health_timeout_s=1.5)
    assert client.status == status
    assert upstream.asked == [(f"/{SERVICE}/HealthCheck", b"", (), 1.5)]
    assert upstream.calls[0].is_cancelled
    if status == 503:
        assert client.error["type"] == "Service Unavailable"


def test_lifespan_and_foreign_scopes():
    async def main():
        app = Client(ScriptedUpstream()).app
        kinds = ["lifespan.startup", "lifespan.shutdown"]
        sent = []

        async def receive():
            return {"type": kinds.pop(0)}

        async def send(message):
            sent.append(message["type"])

        await app({"type": "lifespan"}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        with pytest.raises(ValueError, match="websocket"):
            await app({"type": "websocket"}, receive, send)

    asyncio.run(main())


# The server


def serve(target, **options):
    return run_serve(upstream=target, dialect="vllm.engine", listen="127.0.0.1:0", **options)


async def wait_until_ready(capsys):
    out = ""
    while "\n" not in out:
        await asyncio.sleep(0.01)
        out += capsys.readouterr().out
    return int(re.fullmatch(r"ready http=127\.0\.0\.1:(\d+)\n", out)[1])


async def http(port, body):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
    return reader, writer


def test_serve_until_sigterm(capsys):
    async def main():
        async with model_server() as (handler, target), asyncio.timeout(30):
            server = asyncio.create_task(serve(target))
            port = await wait_until_ready(capsys)

            reader, writer = await http(port, chat(stream=True, stop=["forever"]))
            assert b"200 OK" in await reader.readline()
            writer.close()
            await writer.wait_closed()
            await handler.cancelled.wait()

            reader, writer = await http(port, chat(stream=True))
            await reader.readuntil(b"[DONE]")
            os.kill(os.getpid(), signal.SIGTERM)
            assert b"0\r\n\r\n" in await reader.read()
            writer.close()
            await writer.wait_closed()
            await server

    asyncio.run(main())


@pytest.mark.parametrize("asked", [True, False])
def test_an_access_log_is_a_line_for_each_request(asked, capsys, caplog):
    async def main():
        async with model_server() as (_, target), asyncio.timeout(30):
            server = asyncio.create_task(serve(target, access_log=asked))
            reader, writer = await http(await wait_until_ready(capsys), chat())
            await reader.readline()
            writer.close()
            await writer.wait_closed()
            os.kill(os.getpid(), signal.SIGTERM)
            await server

    asyncio.run(main())
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert [line.partition(" - ")[2] for line in lines] == [f'"POST {CHAT} HTTP/1.1" 200'] * asked


def test_serve_says_in_one_line_what_is_in_the_way():
    async def main():
        with pytest.raises(UsageError, match=r"no answer in 0\.2 s: UNAVAILABLE"):
            await serve("127.0.0.1:1", connect_timeout_s=0.2)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(UsageError, match="Address already in use"):
                await run_serve(upstream="x:1", dialect="vllm.engine", listen=listen)
        with pytest.raises(UsageError, match="not of the form HOST:PORT"):
            await run_serve(upstream="x:1", dialect="vllm.engine", listen="8000")
        async with model_server(has_tokenizer=False) as (_, target):
            with pytest.raises(UsageError, match=r"no tokenizer from the model server: UNIMPLEMENTED.*; name another source"):
                await serve(target)

    asyncio.run(main())
