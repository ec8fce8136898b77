"""What docs/envoy.md says of Envoy, and our ext_proc server relies on: with each new Envoy it is to be seen again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import h2.connection
import h2.events
import httpx
import pytest
from harness import Envoy, ExtProcThread, GrpcThread, body, echo, headers, headers_of, immediate, kind, mutation, trailers

from gaie_codec.ext_proc.messages import ProcessingResponse

TO_GRPC = {":path": "/s/M", "content-type": "application/grpc", "te": "trailers"}
JSON = {"content-type": "application/json"}
FRAME = b"\0\0\0\0\x02hi"
StartEnvoy = Callable[..., Envoy]
StartExtProc = Callable[[Any], ExtProcThread]
StartModel = Callable[[Any], "ModelServer"]

CLIENTS = [pytest.param({"http2": False}, id="http1"), pytest.param({"http1": False, "http2": True}, id="http2")]


class ModelServer(GrpcThread):
    """A gRPC server with one streaming method; notes what its calls got, and when one was cancelled."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.requests: list[list[bytes]] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = threading.Event()

        async def handle(requests: Any, context: Any) -> None:
            self.metadata.append(dict(context.invocation_metadata()))
            self.requests.append([request async for request in requests])
            try:
                await answer(context)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        super().__init__({"s": {"M": grpc.stream_stream_rpc_method_handler(handle)}})


@pytest.fixture
def start_model(cleanup: contextlib.ExitStack) -> StartModel:
    def start(answer: Any) -> ModelServer:
        server = ModelServer(answer)
        cleanup.callback(server.stop)
        return server

    return start


async def stream_for_ever(context: Any) -> None:
    while True:
        await context.write(b"token")
        await asyncio.sleep(0.01)


async def fail_late(context: Any) -> None:
    await context.write(b"token")
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


async def fail_at_once(context: Any) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


async def fail_after_headers(context: Any) -> None:
    await context.send_initial_metadata((("x-initial", "1"),))
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


def transcode(on_response: Callable[[Any, Any], Any]) -> Any:
    """One frame to the model server; each message of the response is answered by `on_response(message, write)`."""

    async def process(read: Any, write: Any) -> None:
        while (message := await read()) is not None:
            what = kind(message)
            if what == "request_body" and message.request_body.end_of_stream:
                await write(headers("request", TO_GRPC, ("content-length",)))
                await write(body("request", FRAME, end=True))
            elif what.startswith("response"):
                await on_response(message, write)

    return process


def end_early(after: str) -> Any:
    """Three events, then the end, then what `after` says. `count` is of one stream: each has a function of its own."""

    async def process(read: Any, write: Any) -> None:
        count = 0
        while (message := await read()) is not None:
            what = kind(message)
            if what == "request_body" and message.request_body.end_of_stream:
                await write(headers("request", TO_GRPC, ("content-length",)))
                await write(body("request", FRAME, end=True))
            elif what == "response_body":
                count += 1
                if count == 1:
                    await write(headers("response", {"content-type": "text/event-stream"}))
                await write(body("response", b"data: %d\n\n" % count, end=count >= 3))
                if count == 3 and after == "return":
                    return
                if count == 3 and after == "trailers":
                    await write(trailers("response"))

    return process


@pytest.mark.parametrize("versions", CLIENTS)
@pytest.mark.parametrize("after", ["more bodies", "return", "trailers"])
def test_an_answer_may_end_before_the_model_server_does(
    after: str, versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    model, ext_proc = start_model(stream_for_ever), start_ext_proc(end_early(after))
    envoy = start_envoy(ext_proc=ext_proc.address, upstream=model.address, access_log=True)
    with httpx.Client(timeout=20, **versions) as client:
        for number in (1, 2):
            answer = client.post(f"{envoy.url}/v1/x", content=b"{}")
            assert answer.content == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"
            assert model.cancelled.wait(5)
            model.cancelled.clear()
            line = envoy.access_log(lines=number)[-1]
            assert (line["status"], line["flags"], line["details"]) == (200, "-", "via_upstream")
    assert envoy.stats("downstream_cx_total")["http.http.downstream_cx_total"] == 1, "the connection is used again"
    assert not any(envoy.stats("ext_proc.*(spurious|failed|error)").values())
    assert "[error]" not in envoy.log()


def test_another_picker_in_front_sees_an_early_end_as_an_end(
    start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    model, behind, ours = start_model(stream_for_ever), start_ext_proc(echo), start_ext_proc(end_early("more bodies"))
    envoy = start_envoy(ext_proc=ours.address, behind=behind.address, upstream=model.address)
    assert httpx.post(f"{envoy.url}/v1/x", content=b"{}").status_code == 200
    assert [message.response_body.end_of_stream for message in behind.seen[0] if kind(message) == "response_body"][-1]


@pytest.mark.parametrize("versions", CLIENTS)
def test_an_immediate_200_ends_a_held_response(
    versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    async def answer(message: Any, write: Any) -> None:
        if kind(message) == "response_body":
            await write(immediate(200, b'{"ok":1}', JSON))

    model = start_model(stream_for_ever)
    envoy = start_envoy(ext_proc=start_ext_proc(transcode(answer)).address, upstream=model.address)
    with httpx.Client(timeout=20, **versions) as client:
        got = client.post(f"{envoy.url}/v1/x", content=b"{}")
    assert (got.status_code, got.headers["content-length"], got.json()) == (200, "8", {"ok": 1})
    assert model.cancelled.wait(5)


def test_a_get_may_be_answered_at_once(start_envoy: StartEnvoy, start_ext_proc: StartExtProc):
    async def answer(read: Any, write: Any) -> None:
        assert (await read()).request_headers.end_of_stream
        await write(immediate(200, b'{"data":[]}', JSON))
        await read()

    ext_proc = start_ext_proc(answer)
    envoy = start_envoy(ext_proc=ext_proc.address)
    got = httpx.get(f"{envoy.url}/v1/models")
    assert (got.status_code, got.json(), got.headers["content-type"]) == (200, {"data": []}, "application/json")
    assert ext_proc.errors == []


@pytest.mark.parametrize("versions", CLIENTS)
def test_the_head_of_a_response_may_wait_for_its_trailers(
    versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    async def answer(message: Any, write: Any) -> None:
        if kind(message) == "response_trailers":
            assert headers_of(message)["grpc-status"] == "8"
            await write(headers("response", {":status": "429", **JSON}))
            await write(body("response", b'{"a":', end=False))
            await write(body("response", b"1}", end=False))
            await write(trailers("response", {}, ("grpc-status", "grpc-message")))

    ext_proc = start_ext_proc(transcode(answer))
    envoy = start_envoy(ext_proc=ext_proc.address, upstream=start_model(fail_late).address)
    with httpx.Client(timeout=20, **versions) as client:
        got = client.post(f"{envoy.url}/v1/x", content=b"{}")
    assert (got.status_code, got.json(), ext_proc.errors) == (429, {"a": 1}, [])


def call(envoy: Envoy, *messages: bytes, metadata: Any = ()) -> Any:
    with grpc.insecure_channel(envoy.authority) as channel:
        under_way = channel.stream_stream("/s/M")(iter(messages), timeout=20, metadata=metadata)
        try:
            content = list(under_way)
        except grpc.RpcError:
            content = []
        return under_way.code(), under_way.details(), content, dict(under_way.initial_metadata()), dict(under_way.trailing_metadata())


@pytest.mark.parametrize("when", ["request_headers", "request_body", "response_body"])
@pytest.mark.parametrize(
    ("status", "number", "code"),
    [
        (400, 3, grpc.StatusCode.INVALID_ARGUMENT),
        (429, 8, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (503, 14, grpc.StatusCode.UNAVAILABLE),
        (429, None, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_an_immediate_response_to_a_grpc_client_has_its_code_and_its_body_as_message(
    status: int, number: int | None, code: Any, when: str, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    async def refuse(read: Any, write: Any) -> None:
        while (message := await read()) is not None:
            if kind(message) == when:
                await write(immediate(status, "zu groß\n100 %".encode(), {"x-more": "1"}, grpc=number, details="for the log"))
            elif kind(message) == "request_headers":
                await write(headers("request"))
            elif kind(message) == "request_body":
                await write(body("request", message.request_body.body, end=message.request_body.end_of_stream))

    envoy = start_envoy(ext_proc=start_ext_proc(refuse).address, upstream=start_model(stream_for_ever).address)
    got = call(envoy, b"x")
    assert got[:3] == (code, "zu groß\n100 %", [])
    assert got[4]["x-more"] == "1"


def test_grpc_passes_through_unharmed(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel):
    large = os.urandom(300_000)

    async def answer(context: Any) -> None:
        await context.send_initial_metadata((("x-initial", "i"), ("i-bin", b"\0\xff")))
        for content in (b"a", b"", large):
            await context.write(content)
        context.set_trailing_metadata((("x-last", "l"), ("l-bin", b"\xff\0")))

    model = start_model(answer)
    envoy = start_envoy(ext_proc=start_ext_proc(echo).address, upstream=model.address)
    code, _, content, initial, last = call(envoy, b"", large, metadata=(("x-mine", "m"), ("m-bin", b"\1\xfe")))
    assert (code, content) == (grpc.StatusCode.OK, [b"a", b"", large])
    assert (initial["x-initial"], initial["i-bin"], last["x-last"], last["l-bin"]) == ("i", b"\0\xff", "l", b"\xff\0")
    assert model.requests == [[b"", large]]
    assert (model.metadata[0]["x-mine"], model.metadata[0]["m-bin"]) == ("m", b"\1\xfe")


def test_a_request_may_end_with_its_trailers(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel):
    async def answer(context: Any) -> None:
        await context.write(b"token")

    async def process(read: Any, write: Any) -> None:
        while (message := await read()) is not None:
            what = kind(message)
            if what == "request_body":
                assert not message.request_body.end_of_stream
            elif what == "request_trailers":
                await write(headers("request", TO_GRPC, ("content-length",)))
                await write(body("request", FRAME, end=False))
                await write(trailers("request", {}, tuple(headers_of(message))))
            elif what == "response_headers":
                await write(headers("response"))
            elif what == "response_body":
                await write(body("response", message.response_body.body, end=message.response_body.end_of_stream))
            elif what == "response_trailers":
                await write(trailers("response"))

    model, ext_proc = start_model(answer), start_ext_proc(process)
    envoy = start_envoy(ext_proc=ext_proc.address, upstream=model.address)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    connection.send_headers(1, [(":method", "POST"), (":path", "/v1/x"), (":scheme", "http"), (":authority", "here")])
    connection.send_data(1, b"{}")
    connection.send_headers(1, [("x-checksum", "1")], end_stream=True)
    events: list[Any] = []
    with socket.create_connection(("127.0.0.1", envoy.port), timeout=20) as stream:
        stream.sendall(connection.data_to_send())
        while not any(isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)) for event in events):
            events += connection.receive_data(stream.recv(65536))
            stream.sendall(connection.data_to_send())
    assert isinstance(events[-1], h2.events.StreamEnded)
    assert b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived)) == b"\0\0\0\0\x05token"
    assert (model.requests, ext_proc.errors) == ([[b"hi"]], [])


@pytest.mark.parametrize("times", [1, 2])
def test_a_destination_that_a_client_names_is_overwritten(
    times: int, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    """In an Envoy that does not remove it first, as the generator's does."""
    name = "x-gateway-destination-endpoint"

    async def answer(context: Any) -> None:
        await context.write(b"token")

    async def process(read: Any, write: Any) -> None:
        while (message := await read()) is not None:
            direction, _, part = kind(message).partition("_")
            if part == "headers":
                await write(headers(direction, {name: chosen.address} if direction == "request" else {}))
            elif part == "body":
                content = getattr(message, f"{direction}_body")
                await write(body(direction, content.body, end=content.end_of_stream))
            else:
                await write(trailers(direction))

    def keep(settings: Any) -> None:
        manager = settings["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        del manager["early_header_mutation_extensions"]

    chosen, other, ext_proc = start_model(answer), start_model(answer), start_ext_proc(process)
    envoy = start_envoy(ext_proc=ext_proc.address, change=keep)
    assert call(envoy, b"x", metadata=((name, other.address),) * times)[2] == [b"token"]
    assert headers_of(ext_proc.seen[0][0])[name] == other.address
    assert (len(chosen.requests), len(other.requests)) == (1, 0)


def buffered(*, length: str = "removed", at_trailers: Any = None, at_end: Any = None) -> Any:
    """HTTP in, gRPC out with whole bodies. `at_trailers` and `at_end` answer the response's trailers, and headers that are all of it."""

    async def process(read: Any, write: Any) -> None:
        while (message := await read()) is not None:
            what = kind(message)
            response = ProcessingResponse()
            getattr(response, what).SetInParent()
            if what == "request_body":
                part = response.request_body.response
                more = {"content-length": str(len(FRAME))} if length == "set" else {}
                mutation(part.header_mutation, TO_GRPC | more, ("content-length",) if length == "removed" else ())
                part.body_mutation.body = FRAME
            elif what == "response_headers" and message.response_headers.end_of_stream:
                response = at_end or response
            elif what == "response_body":
                part = response.response_body.response
                part.body_mutation.body = b'{"a":1}'
                mutation(part.header_mutation, {":status": "201", "content-length": "7", **JSON})
            elif what == "response_trailers":
                mutation(response.response_trailers.header_mutation, {}, ("grpc-status", "grpc-message"))
                await asyncio.sleep(0.1)  # were the body's answer released before this one, it would be by now
                response = at_trailers or response
            await write(response)

    return process


@pytest.mark.parametrize("versions", CLIENTS)
@pytest.mark.parametrize("length", ["removed", "set", "left"])
def test_buffered_the_bodys_reply_changes_everything(
    length: str, versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    async def answer(context: Any) -> None:
        for _ in range(3):
            await context.write(b"token")

    model, ext_proc = start_model(answer), start_ext_proc(buffered(length=length))
    envoy = start_envoy(ext_proc=ext_proc.address, upstream=model.address, body_mode="buffered", access_log=True)
    with httpx.Client(timeout=20, **versions) as client:
        got = client.post(f"{envoy.url}/v1/x", content=b"{}")
    if length == "left":
        assert got.status_code == 503
        assert envoy.access_log()[0]["details"] == "mismatch_between_content_length_and_the_length_of_the_mutated_body"
        return
    assert (got.status_code, got.json(), got.headers["content-length"]) == (201, {"a": 1}, "7")
    assert (got.headers["content-type"], model.requests) == ("application/json", [[b"hi"]])
    phases = [kind(message) for message in ext_proc.seen[0]][:5]
    assert phases == ["request_headers", "request_body", "response_headers", "response_body", "response_trailers"]
    assert ext_proc.seen[0][3].response_body.body == b"\0\0\0\0\x05token" * 3
    assert not ext_proc.seen[0][3].response_body.end_of_stream, "the trailers end it"


@pytest.mark.parametrize("versions", CLIENTS)
@pytest.mark.parametrize("fail", [fail_late, fail_after_headers, fail_at_once])
def test_buffered_an_error_in_the_trailers_is_not_too_late(
    fail: Any, versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel
):
    error = immediate(429, b'{"error":1}', JSON)
    ext_proc = start_ext_proc(buffered(at_trailers=error, at_end=error))
    envoy = start_envoy(ext_proc=ext_proc.address, upstream=start_model(fail).address, body_mode="buffered")
    with httpx.Client(timeout=20, **versions) as client:
        got = client.post(f"{envoy.url}/v1/x", content=b"{}")
    assert (got.status_code, got.json()) == (429, {"error": 1})


def test_a_client_that_goes_away_ends_everything(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, start_model: StartModel):
    model, ext_proc = start_model(stream_for_ever), start_ext_proc(echo)
    envoy = start_envoy(ext_proc=ext_proc.address, upstream=model.address)
    with grpc.insecure_channel(envoy.authority) as channel:
        under_way = channel.stream_stream("/s/M")(iter((b"x",)), timeout=20)
        next(iter(under_way))
        under_way.cancel()
    assert model.cancelled.wait(5)
    deadline = time.monotonic() + 5
    while kind(ext_proc.seen[0][-1]) not in ("eof", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
