"""What a client of Envoy sees when the model server fails in ways of its own: statuses, resets, silence, slowness."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from harness import Envoy, GrpcThread
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from stack import ExtProc, Proxy, Stack, arguments, envoy_of, events_of, ext_proc_of, stack_of, wait_until

from test_e2e import RAISED, ask, connect, encode, stream_text

STATUSES = {"INVALID_ARGUMENT": 400, "RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503}
CHAT = "v1/chat/completions"
FOREVER = 3_600_000


class Scripted(GrpcThread):
    """A vLLM server whose Generate does what `answer(context)` does."""

    def __init__(self) -> None:
        self.answer: Callable[[Any], Any] = whole
        self.calls = 0
        self.cancelled = threading.Event()
        handler = grpc.unary_stream_rpc_method_handler(self._generate, response_serializer=pb.GenerateResponse.SerializeToString)
        super().__init__({"vllm.grpc.engine.VllmEngine": {"Generate": handler}})

    async def _generate(self, _: bytes, context: Any) -> None:
        self.calls += 1
        try:
            await self.answer(context)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def chunk(text: str) -> Any:
    return pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=encode(text)))


async def whole(context: Any) -> None:
    await context.write(chunk("Hi"))
    await context.write(pb.GenerateResponse(complete=pb.GenerateComplete(finish_reason="stop")))


def failing(code: str, *, after: str) -> Callable[[Any], Any]:
    async def answer(context: Any) -> None:
        if after != "nothing":
            await context.send_initial_metadata((("x-initial", "1"),))
        if after == "a message":
            await context.write(chunk("Hi"))
        await context.abort(grpc.StatusCode[code], "the server says no", (("x-more", "1"),))

    return answer


def silent(*, after: str) -> Callable[[Any], Any]:
    async def answer(context: Any) -> None:
        if after != "nothing":
            await context.send_initial_metadata((("x-initial", "1"),))
        if after == "a message":
            await context.write(chunk("Hi"))
        await asyncio.Event().wait()

    return answer


class Behind:
    """A scripted server whose connections can be cut, behind ext-proc, behind Envoy."""

    def __init__(self, server: Scripted, proxy: Proxy, ext_proc: ExtProc, envoy: Envoy) -> None:
        self.server, self.proxy, self.ext_proc, self.envoy = server, proxy, ext_proc, envoy

    def messages_sent(self) -> int:
        """By Envoy to ext-proc."""
        return sum(value for name, value in self.envoy.stats("ext_proc").items() if name.endswith("stream_msgs_sent"))


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    directory = tmp_path_factory.mktemp("scripted")
    with ExitStack() as stack:
        server = Scripted()
        stack.callback(server.stop)
        proxy = Proxy(server.port)
        stack.callback(proxy.stop)
        ext_proc = stack.enter_context(ext_proc_of(directory, *arguments(f"127.0.0.1:{proxy.port},dialect=vllm.engine")))
        envoy = stack.enter_context(envoy_of(directory, ext_proc.address, access_log=True))
        yield Behind(server, proxy, ext_proc, envoy)


@pytest.fixture(scope="module")
def client(scripted: Behind) -> Iterator[openai.OpenAI]:
    with connect(scripted.envoy.url) as made:
        yield made


@pytest.mark.parametrize("code", STATUSES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", ["nothing", "headers"])
def test_a_status_before_any_message_is_told_with_headers_and_without(
    scripted: Behind, client: openai.OpenAI, code: str, stream: bool, after: str
):
    scripted.server.answer = failing(code, after=after)
    with pytest.raises(RAISED[STATUSES[code]]) as caught:
        client.chat.completions.create(model="", messages=ask(), stream=stream)
    error = caught.value.response.json()["error"]
    assert (caught.value.status_code, error["code"]) == (STATUSES[code], STATUSES[code])
    assert ("the server says no" in error["message"]) == (code != "UNAVAILABLE")
    headers = caught.value.response.headers
    assert headers["content-type"] == "application/json"
    assert not {"grpc-status", "grpc-message", "x-more"} & headers.keys()


@pytest.mark.parametrize("code", STATUSES)
def test_a_status_after_a_message_spoils_a_stream_and_replaces_a_whole_answer(scripted: Behind, client: openai.OpenAI, code: str):
    scripted.server.answer = failing(code, after="a message")
    with pytest.raises(RAISED[STATUSES[code]]):
        client.chat.completions.create(model="", messages=ask())
    answer = httpx.post(f"{scripted.envoy.url}/{CHAT}", json={"messages": ask(), "stream": True})
    assert answer.status_code == 200
    events = [json.loads(event) for event in events_of(answer.text)]
    assert [event["error"]["code"] for event in events if "error" in event] == [STATUSES[code]]
    assert "error" in events[-1]


def test_a_good_answer_passes_this_way_too(scripted: Behind, client: openai.OpenAI):
    scripted.server.answer = whole
    assert client.chat.completions.create(model="", messages=ask()).choices[0].message.content == "Hi"
    assert stream_text(client, messages=ask())[0] == "Hi"


@pytest.mark.parametrize(
    ("after", "stream"), [("nothing", False), ("nothing", True), ("headers", False), ("headers", True), ("a message", False)]
)
def test_a_reset_before_the_answer_has_begun_is_a_503(scripted: Behind, after: str, stream: bool):
    scripted.server.answer = silent(after=after)
    calls, sent = scripted.server.calls, scripted.messages_sent()
    got: list[httpx.Response] = []

    def post() -> None:
        got.append(httpx.post(f"{scripted.envoy.url}/{CHAT}", json={"messages": ask(), "stream": stream}, timeout=20))

    thread = threading.Thread(target=post)
    thread.start()
    wait_until(lambda: scripted.server.calls == calls + 1)
    # Of the request: headers, body, and its empty end where Envoy sends one. Of the answer: headers, body.
    expected = {"nothing": 2, "headers": 4, "a message": 5}[after]
    wait_until(lambda: scripted.messages_sent() >= sent + expected)
    scripted.proxy.cut()
    thread.join(20)
    assert got, "the client waits for ever"
    assert got[0].status_code == 503
    assert got[0].headers["content-type"] == "application/json"
    error = got[0].json()["error"]
    assert (error["code"], error["type"], error["param"]) == (503, "Service Unavailable", None)


def test_a_reset_amid_the_stream_is_a_broken_body(scripted: Behind):
    scripted.server.answer = silent(after="a message")
    seen = b""
    body = {"messages": ask(), "stream": True}
    with httpx.stream("POST", f"{scripted.envoy.url}/{CHAT}", json=body, timeout=20) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012
            for data in answer.iter_raw():
                seen += data
                scripted.proxy.cut()
    assert b'"content":"Hi"' in seen
    assert b"[DONE]" not in seen


def test_a_slow_first_token_is_waited_for(tmp_path: Path):
    with stack_of(tmp_path) as stack, connect(stack.url) as client:
        text, _ = stream_text(client, messages=ask({"text": "at last", "first_delay_ms": 3000}))
        assert text == "at last"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("impatient"), "--request-timeout", "1") as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_within_the_deadline_is_a_504(impatient: Stack, stream: bool):
    before = len(impatient.sim.server.aborted)
    body = {"messages": ask({"first_delay_ms": FOREVER}), "stream": stream}
    answer = httpx.post(f"{impatient.url}/{CHAT}", json=body, timeout=20)
    assert answer.status_code == 504
    assert answer.headers["content-type"] == "application/json"
    assert (answer.json()["error"]["code"], answer.json()["error"]["type"]) == (504, "GatewayTimeoutError")
    wait_until(lambda: len(impatient.sim.server.aborted) == before + 1)


def test_a_deadline_amid_the_stream_is_an_event_and_the_end(impatient: Stack):
    body = {"messages": ask({"text": "word " * 400, "delay_ms": 50}), "stream": True}
    answer = httpx.post(f"{impatient.url}/{CHAT}", json=body, timeout=20)
    assert answer.status_code == 200
    *events, last = (json.loads(event) for event in events_of(answer.text))
    assert last["error"]["code"] == 504
    assert len(events) > 5
    wait_until(lambda: not impatient.sim.server.running)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_server_that_is_down_is_a_503(tmp_path: Path, stream: bool):
    with ExitStack() as stack:
        server = Scripted()
        stack.callback(server.stop)
        proxy = Proxy(server.port)
        stack.callback(proxy.stop)
        one = f"127.0.0.1:{proxy.port},dialect=vllm.engine"
        ext_proc = stack.enter_context(ext_proc_of(tmp_path, *arguments(one), "--check-interval", "100"))
        client = stack.enter_context(connect(stack.enter_context(envoy_of(tmp_path, ext_proc.address)).url))
        stream_text(client, messages=ask())
        proxy.stop()
        reasons = []
        while "rejected-no-endpoints" not in reasons:  # connections are refused, until a check has seen it too
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model="", messages=ask(), stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.response.json()["error"]["type"] == "Service Unavailable"
            reasons.append(caught.value.response.headers.get("x-llm-d-request-dropped-reason"))
        assert reasons[0] is None
