"""Who goes away amid a request: the client, or the ext_proc server by a kill or in good order."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stack import Stack, note, send, stack_of, wait_until

from test_e2e import ask, connect, count_aborted, stream_text

CHAT = "v1/chat/completions"
FOREVER = 3_600_000
TOKEN = rb'"content":"[^"]'


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack")) as made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    with stack_of(tmp_path, "--drain-delay", "3") as made:
        yield made


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    seen = b""
    while not re.search(wanted, seen):
        data = connection.recv(65536)
        assert data, "the connection has ended"
        seen += data
    return seen


def read_all(connection: socket.socket) -> bytes:
    """Until its end or its reset."""
    seen = b""
    try:
        while data := connection.recv(65536):
            seen += data
    except ConnectionResetError:
        pass
    return seen


@pytest.mark.parametrize("script", [{"first_delay_ms": FOREVER}, {"text": "word " * 500, "delay_ms": 20}], ids=["prefill", "stream"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_call(stack: Stack, script: dict[str, Any], stream: bool):
    """Within 100 ms, at the best of three: the machine may be busy just then."""

    def tell_s() -> float:
        before = count_aborted(stack.sim)
        with closing(send(stack.envoy.port, script, stream=stream)) as connection:
            if stream and "text" in script:
                read_until(connection, TOKEN)
            wait_until(lambda: stack.sim.server.running)
            connection.close()
            took_s = wait_until(lambda: len(stack.sim.server.aborted) == before + 1)
        note(f"the model server was told after {took_s * 1000:.1f} ms")
        assert not stack.sim.server.running
        return took_s

    assert any(tell_s() < 0.1 for _ in range(3))


def test_requests_in_flight_are_given_back(stack: Stack):
    before = len(stack.ext_proc.requests())
    with closing(send(stack.envoy.port, {"first_delay_ms": FOREVER})):
        wait_until(lambda: stack.sim.server.running)
    wait_until(lambda: len(stack.ext_proc.requests()) > before)
    assert stack.ext_proc.requests()[-1].status == "the client has gone"


def test_ext_proc_killed_amid_requests_is_a_503_or_a_broken_body(own: Stack):
    started = send(own.envoy.port, {"text": "word " * 500, "delay_ms": 20})
    seen = read_until(started, TOKEN)
    waiting = send(own.envoy.port, {"first_delay_ms": FOREVER})
    wait_until(lambda: len(own.sim.server.running) == 2)
    own.ext_proc.process.kill()
    with closing(started), closing(waiting):
        seen += read_all(started)
        answer = read_until(waiting, b"}}")
    assert b"[DONE]" not in seen
    assert not seen.endswith(b"0\r\n\r\n"), "cut off, but it looks whole"
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["code"] == 503
    wait_until(lambda: not own.sim.server.running)
    before = len(own.sim.server.requests)
    for stream in (False, True):
        refused = httpx.post(f"{own.url}/{CHAT}", json={"messages": ask(), "stream": stream}, timeout=20)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "Service Unavailable"
    assert len(own.sim.server.requests) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ext_proc_ends_in_good_order(own: Stack, number: signal.Signals):
    script = {"text": "one two three four five six", "delay_ms": 150}
    got: list[str] = []

    def ask_for_a_stream() -> None:
        with connect(own.url) as client:
            got.append(stream_text(client, messages=ask(script))[0])

    with grpc.insecure_channel(own.ext_proc.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = {name: health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=20) for name in ("readiness", "liveness")}
        assert {next(state).status for state in states.values()} == {health_pb2.HealthCheckResponse.SERVING}
        running = threading.Thread(target=ask_for_a_stream)
        running.start()
        wait_until(lambda: own.sim.server.running)
        own.ext_proc.process.send_signal(number)
        assert next(states["readiness"]).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest(service="liveness")).status == health_pb2.HealthCheckResponse.SERVING
        with connect(own.url) as client:  # whoever has not seen it yet is still served
            assert stream_text(client, messages=ask({"text": "late"}))[0] == "late"
        for state in states.values():
            state.cancel()
    own.ext_proc.process.send_signal(number)  # enough of the delay
    running.join(20)
    assert got == [script["text"]]
    assert own.ext_proc.process.wait(10) == 0
    assert httpx.post(f"{own.url}/{CHAT}", json={"messages": ask()}, timeout=20).status_code == 503
