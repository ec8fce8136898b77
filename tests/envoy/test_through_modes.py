"""Envoy's other ways to hand over bodies: whole (BUFFERED), which works, and those which are refused by name."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h2.connection
import h2.events
import httpx
import openai
import pytest
from harness import Envoy
from stack import ExtProc, Stack, arguments, envoy_of, events_of, ext_proc_of, make_sim, stack_of, wait_until
from test_through_failures import STATUSES, Scripted, failing
from test_through_grpc import call, encoded

from test_e2e import RAISED, Target, ask, connect, stream_text

CHAT = "/v1/chat/completions"
FOREVER = 3_600_000
VERSIONS = [pytest.param({"http2": False}, id="http1"), pytest.param({"http1": False, "http2": True}, id="http2")]


@pytest.fixture(scope="module", params=["vllm.engine", "sglang.scheduler"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack"), dialect=request.param, body_mode="buffered") as made:
        yield made


@pytest.fixture(params=VERSIONS)
def http(request: pytest.FixtureRequest, stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=20, **request.param) as made:
        yield made


def test_a_whole_answer(http: httpx.Client):
    answer = http.post(CHAT, json={"messages": ask({"text": "one two"})}, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "one two")
    assert (answer.headers["content-type"], answer.headers["x-request-id"]) == ("application/json", "mine")


def test_a_stream_comes_as_one_whole(http: httpx.Client):
    answer = http.post(CHAT, json={"messages": ask({"text": "one two", "delay_ms": 10}), "stream": True})
    events = events_of(answer.text)
    assert (answer.status_code, events[-1]) == (200, "[DONE]")
    assert answer.headers["content-type"].startswith("text/event-stream")
    texts = [choice["delta"].get("content") or "" for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert "".join(texts) == "one two"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"])
def test_an_error_has_its_status(stack: Stack, http: httpx.Client, code: str, stream: bool):
    status = Target(stack.sim.server.adapter.dialect, stack.sim.server.adapter.snapshot.name).status(code)
    script = {"error": {"code": code, "message": "the server says no", "after": 0}}
    answer = http.post(CHAT, json={"messages": ask(script), "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


def test_an_error_after_a_message_of_a_stream_has_its_status_too(http: httpx.Client):
    script = {"text": "one two three", "error": {"code": "INTERNAL", "message": "boom", "after": 2}}
    answer = http.post(CHAT, json={"messages": ask(script), "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, 500), "nothing had left yet"


def test_a_stop_string_of_ours(stack: Stack):
    with connect(stack.url) as client:
        for _ in range(2):
            messages = ask({"text": "one two STOP three"})
            assert stream_text(client, messages=messages, stop="STOP")[0] == "one two "
            assert client.chat.completions.create(model="", messages=messages, stop="STOP").choices[0].message.content == "one two "


def test_what_is_wrong_with_a_request_is_named(stack: Stack):
    with connect(stack.url) as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="", messages=ask(), temperature=-1)
    assert refused.value.param == "temperature"


def test_a_long_body(http: httpx.Client):
    answer = http.post(CHAT, json={"messages": ask({"text": "one"}), "user": "x" * 6_000_000})
    assert answer.json()["choices"][0]["message"]["content"] == "one"


def test_a_deadline_is_a_504(tmp_path: Path):
    with stack_of(tmp_path, "--request-timeout", "0.5", body_mode="buffered") as stack:
        for stream in (False, True):
            for script in ({"first_delay_ms": FOREVER}, {"text": "word " * 400, "delay_ms": 20}):
                answer = httpx.post(f"{stack.url}{CHAT}", json={"messages": ask(script), "stream": stream}, timeout=20)
                assert (answer.status_code, answer.json()["error"]["code"]) == (504, 504)
                wait_until(lambda: not stack.sim.server.running)


def test_a_get_is_refused_in_json(http: httpx.Client):
    answer = http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


@pytest.mark.parametrize("stream", [True, False])
def test_a_grpc_call_of_its_own_dialect_is_the_same(stack: Stack, stream: bool):
    path, request = encoded(stack.sim.server.adapter.dialect, "g", script={"text": "one two"}, stream=stream)
    direct, through = (call(one, path, request) for one in (f"127.0.0.1:{stack.sim.port}", stack.envoy.authority))
    assert (direct.code, direct.messages, direct.details) == (through.code, through.messages, through.details)
    assert direct.code == "OK"


def test_a_grpc_call_of_another_dialect_is_refused_by_the_mode_s_name(stack: Stack):
    inbound = "vllm.engine" if stack.sim.server.adapter.dialect != "vllm.engine" else "sglang.scheduler"
    seen = call(stack.envoy.authority, *encoded(inbound, "g"))
    assert seen.code != "OK"
    assert "FULL_DUPLEX_STREAMED" in seen.details


def test_trailers_end_a_request(stack: Stack):
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    connection.send_headers(1, [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "here")])
    connection.send_data(1, json.dumps({"messages": ask({"text": "one two"})}).encode())
    connection.send_headers(1, [("x-checksum", "1")], end_stream=True)
    events: list[Any] = []
    with socket.create_connection(("127.0.0.1", stack.envoy.port), timeout=5) as stream:
        stream.sendall(connection.data_to_send())
        while not any(isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)) for event in events):
            events += connection.receive_data(stream.recv(65536))
            stream.sendall(connection.data_to_send())
    body = b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived))
    assert json.loads(body)["choices"][0]["message"]["content"] == "one two"


class TestAScriptedServer:
    @pytest.fixture(scope="class")
    @classmethod
    def scripted(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scripted, Envoy]]:
        directory = tmp_path_factory.mktemp("scripted")
        with ExitStack() as stack:
            server = Scripted()
            stack.callback(server.stop)
            ext_proc = stack.enter_context(ext_proc_of(directory, *arguments(f"{server.address},dialect=vllm.engine")))
            yield server, stack.enter_context(envoy_of(directory, ext_proc.address, body_mode="buffered"))

    @pytest.mark.parametrize("code", STATUSES)
    @pytest.mark.parametrize("after", ["nothing", "headers", "a message"])
    def test_a_status_is_never_too_late_for_a_whole_answer(self, scripted: tuple[Scripted, Envoy], code: str, after: str):
        server, envoy = scripted
        server.answer = failing(code, after=after)
        with connect(envoy.url) as client, pytest.raises(RAISED[STATUSES[code]]) as caught:
            client.chat.completions.create(model="", messages=ask())
        assert caught.value.status_code == STATUSES[code]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExtProc]:
    sim = make_sim()
    try:
        with ext_proc_of(tmp_path_factory.mktemp("plain"), *arguments(f"127.0.0.1:{sim.port},dialect=vllm.engine")) as made:
            yield made
    finally:
        sim.stop()


@pytest.mark.parametrize(
    ("direction", "mode"), [("request", "STREAMED"), ("response", "STREAMED"), ("request", "NONE"), ("response", "BUFFERED_PARTIAL")]
)
def test_another_mode_is_refused_by_its_name(plain: ExtProc, direction: str, mode: str, tmp_path: Path):
    def change(settings: Any) -> None:
        manager = settings["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        (config,) = (one["typed_config"] for one in manager["http_filters"] if "ext_proc" in one["name"])
        config["processing_mode"][f"{direction}_body_mode"] = mode

    with envoy_of(tmp_path, plain.address, change=change) as envoy:
        answer = httpx.post(f"{envoy.url}{CHAT}", json={"messages": ask()}, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, 500)
        assert f"{direction}_body_mode is {mode}" in answer.json()["error"]["message"]
        assert answer.headers["content-type"] == "application/json"
        seen = call(envoy.authority, *encoded("vllm.engine", "g"), timeout_s=10)
        assert seen.code in ("INTERNAL", "UNKNOWN")
        assert f"{direction}_body_mode is {mode}" in seen.details
