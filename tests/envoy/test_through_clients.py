"""HTTP/1.1 and HTTP/2 clients of Envoy: what they may send, and what they and the model server get of headers and trailers."""

from __future__ import annotations

import json
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import h2.connection
import h2.events
import httpx
import pytest
from harness import GrpcThread
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from stack import Stack, arguments, envoy_of, events_of, ext_proc_of, stack_of, wait_until

from test_e2e import ask, count_aborted, encode

CHAT = "/v1/chat/completions"
VERSIONS = [pytest.param({"http2": False}, id="http1"), pytest.param({"http1": False, "http2": True}, id="http2")]
GRPCS = {"grpc-status", "grpc-message", "grpc-encoding", "grpc-accept-encoding", "trailer"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack"), "--unsupported", "drop", dialect="sglang.scheduler") as made:
        yield made


@pytest.fixture(params=VERSIONS)
def client(request: pytest.FixtureRequest, stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=20, **request.param) as made:
        yield made


def test_answers_and_errors_have_clean_headers(client: httpx.Client):
    good = client.post(CHAT, json={"messages": ask({"text": "one"})}, headers={"x-request-id": "of-mine"})
    stream = client.post(CHAT, json={"messages": ask({"text": "one"}), "stream": True}, headers={"x-request-id": "of-mine"})
    wrong = client.post(CHAT, json={"messages": 3}, headers={"x-request-id": "of-mine"})
    no = client.post(CHAT, json={"messages": ask({"error": {"code": "UNAVAILABLE"}})}, headers={"x-request-id": "of-mine"})
    for answer, status, kind in (
        (good, 200, "application/json"),
        (stream, 200, "text/event-stream"),
        (wrong, 400, "application/json"),
        (no, 503, "application/json"),
    ):
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (status, kind)
        assert answer.headers["x-request-id"] == "of-mine"
        assert not GRPCS & answer.headers.keys()
    assert good.json()["choices"][0]["message"]["content"] == "one"
    assert events_of(stream.text)[-1] == "[DONE]"


def test_events_come_one_by_one(client: httpx.Client, stack: Stack):
    body = {"messages": ask({"text": "one two three", "delay_ms": 60}), "stream": True}
    running = []
    with client.stream("POST", CHAT, json=body) as answer:
        for line in answer.iter_lines():
            if '"content":"' in line:
                running.append(bool(stack.sim.server.running))
    assert len(running) >= 3
    assert all(running[:2])


def test_a_connection_is_used_again_after_an_answer_was_cut_short(client: httpx.Client, stack: Stack):
    before = count_aborted(stack.sim)
    ports = set()
    body = {"messages": ask({"text": "one STOP" + " more" * 400, "delay_ms": 5}), "stop": "STOP", "stream": True}
    for _ in range(4):
        with client.stream("POST", CHAT, json=body) as answer:
            text = "".join(answer.iter_text())
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert events_of(text)[-1] == "[DONE]"
    assert len(ports) == 1
    wait_until(lambda: len(stack.sim.server.aborted) == before + 4)


def test_what_was_dropped_is_told(client: httpx.Client):
    answer = client.post(CHAT, json={"messages": ask(), "best_of_all": 3, "user": "me"})
    assert answer.status_code == 200
    assert "best_of_all" in answer.headers["x-gaie-codec-dropped"]


def test_a_body_without_a_length_and_a_path_with_a_query(client: httpx.Client, stack: Stack):
    own_id = uuid.uuid4().hex
    body = json.dumps({"messages": ask({"text": "one"})}).encode()
    answer = client.post(f"{CHAT}?api-version=1", content=iter([body[:10], body[10:]]), headers={"x-request-id": own_id})
    assert answer.json()["choices"][0]["message"]["content"] == "one"
    assert stack.ext_proc.request(own_id).path == CHAT


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", CHAT, b"", 405),
        ("POST", CHAT, b"", 400),
        ("POST", CHAT, b"not json", 400),
        ("POST", CHAT, b"\xff\xfe", 400),
        ("GET", "/v1/models", b"", 404),
        ("GET", "/", b"", 404),
        ("POST", "/nope", b"{}", 404),
        ("DELETE", CHAT, b"", 405),
    ],
)
def test_what_is_no_request_is_refused_in_json(client: httpx.Client, method: str, path: str, content: bytes, status: int):
    answer = client.request(method, path, content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    assert answer.headers["content-type"] == "application/json"


def test_a_head_request_is_answered_without_a_body(client: httpx.Client):
    answer = client.head("/v1/models")
    assert (answer.status_code, answer.content) == (404, b"")


def test_grpc_that_is_none_gets_a_grpc_status(client: httpx.Client):
    path = "/sglang.grpc.scheduler.SglangScheduler/Generate"
    headers = {"content-type": "application/grpc", "te": "trailers"}
    for content in (b"", b"junk", b"\0\0\0\0\x05abc", b"\1\0\0\0\x01a", b"\0\0\0\0\0\0\0\0\0\0"):
        answer = client.post(path, content=content, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/grpc"
        assert answer.headers["grpc-status"] in ("3", "12"), content
        assert answer.content == b""


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_with_a_body_that_it_asks_leave_for(stack: Stack, version: str, tmp_path: Path):
    (tmp_path / "body.json").write_text(json.dumps({"messages": ask({"text": "one"}), "user": "x" * 2_000_000}))
    command = ["curl", "-sS", "--fail", "--max-time", "20", version, "-H", "content-type: application/json"]
    command += ["-H", "expect: 100-continue", "--data-binary", f"@{tmp_path}/body.json", f"{stack.url}{CHAT}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "one"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wrong", [True, False])
def test_trailers_end_a_request_and_none_come_back(stack: Stack, stream: bool, wrong: bool):
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    pseudo = [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "here")]
    connection.send_headers(1, [*pseudo, ("content-type", "application/json")])
    messages = ask({"text": "one two"}) if not wrong else 3
    connection.send_data(1, json.dumps({"messages": messages, "stream": stream}).encode())
    connection.send_headers(1, [("x-checksum", "1")], end_stream=True)
    events: list[Any] = []
    with socket.create_connection(("127.0.0.1", stack.envoy.port), timeout=20) as stream_socket:
        stream_socket.sendall(connection.data_to_send())
        while not any(isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)) for event in events):
            events += connection.receive_data(stream_socket.recv(65536))
            stream_socket.sendall(connection.data_to_send())
    (head,) = (dict(event.headers) for event in events if isinstance(event, h2.events.ResponseReceived))
    body = b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived))
    assert isinstance(events[-1], h2.events.StreamEnded)
    assert head[b":status"] == (b"400" if wrong else b"200")
    assert (b"[DONE]" in body) == (stream and not wrong)
    left = [dict(event.headers) for event in events if isinstance(event, h2.events.TrailersReceived)]
    assert all(not trailers for trailers in left), left


class TestWhatTheModelServerGets:
    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[dict[str, str]]]]:
        """The URL of an Envoy, and the metadata of the calls that came of it."""
        directory = tmp_path_factory.mktemp("told")
        told: list[dict[str, str]] = []

        async def generate(_: bytes, context: Any) -> None:
            told.append(dict(context.invocation_metadata()))
            await context.write(pb.GenerateResponse(complete=pb.GenerateComplete(output_ids=encode("Hi"), finish_reason="stop")))

        handler = grpc.unary_stream_rpc_method_handler(generate, response_serializer=pb.GenerateResponse.SerializeToString)
        with ExitStack() as stack:
            server = GrpcThread({"vllm.grpc.engine.VllmEngine": {"Generate": handler}})
            stack.callback(server.stop)
            more = ("--forward-header", "X-Tenant", "--request-timeout", "33")
            ext_proc = stack.enter_context(ext_proc_of(directory, *arguments(f"{server.address},dialect=vllm.engine"), *more))
            yield stack.enter_context(envoy_of(directory, ext_proc.address)).url, told

    @pytest.mark.parametrize("versions", VERSIONS)
    def test_no_credentials_and_nothing_that_is_not_its_own(self, told: tuple[str, list[dict[str, str]]], versions: Any):
        url, calls = told
        ours = {
            "x-request-id": "of-mine",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "x-tenant": "blue",
        }
        others = {
            "authorization": "Bearer secret",
            "cookie": "a=b",
            "accept-encoding": "gzip",
            "x-anything": "1",
            "grpc-timeout": "1S",
            "x-llm-d-inference-objective": "high",
            "x-gateway-destination-endpoint": "10.0.0.1:1",
            "x-gateway-destination-endpoint-subset": "10.0.0.1:1",
        }
        with httpx.Client(timeout=20, **versions) as client:
            answer = client.post(f"{url}{CHAT}", json={"messages": ask()}, headers={**ours, **others})
        assert answer.json()["choices"][0]["message"]["content"] == "Hi"
        got = calls[-1]
        assert got["x-request-id"] == "of-mine"
        assert got["x-tenant"] == "blue"
        assert got["traceparent"].split("-")[1] == "0af7651916cd43dd8448eb211c80319c"
        unexpected = others.keys() & got.keys() - {"x-gateway-destination-endpoint"}
        assert not unexpected
        assert "secret" not in str(got)
        assert got.get("x-gateway-destination-endpoint", "") != "10.0.0.1:1"
