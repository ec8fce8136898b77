"""Model servers that speak OpenAI HTTP themselves: everything passes as it is, and is counted. And what a pool says of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from harness import Envoy
from stack import ExtProc, arguments, envoy_of, ext_proc_of, make_sim, stack_of, wait_until
from test_through_grpc import call, encoded

from test_e2e import ask, connect, stream_text

CHAT = "/v1/chat/completions"
# What each hop says for itself.
HOPS = {"date", "server", "transfer-encoding", "content-length", "connection"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


class HttpServer:
    """An OpenAI HTTP server that notes what it gets. `model` in the body says how to answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.note(self, b"")
                self.whole(200, b'{"object": "list", "data": [{"id": "http-model"}]}')

            def do_POST(self) -> None:
                if self.headers.get("transfer-encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.note(self, body)
                try:
                    asked = json.loads(body)
                except ValueError:
                    self.whole(422, b'{"detail":"is no JSON"}')
                    return
                if asked.get("stream"):
                    self.events(asked)
                else:
                    self.whole(200, json.dumps({"id": "x", "odd": [1.0, 2e3], "usage": USAGE}, indent=1).encode())

            def whole(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("x-of-its-own", "1")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def events(self, asked: Any) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                last = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
                pieces = [b": comment\r\n\r\n"]
                pieces += [b'data: {"a":\n', b"\ndata: x\n\nda", b"ta: y\n\n", last[:9], last[9:], b"data: [DONE]\n\n"]
                for piece in pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                    if asked.get("model") == "slow":
                        outer.sent.release()
                        outer.seen.acquire(timeout=20)
                self.wfile.write(b"0\r\n\r\n")

        self.sent = threading.Semaphore(0)
        self.seen = threading.Semaphore(0)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def note(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.requests.append((handler.command, handler.path, headers, body))

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    made = HttpServer()
    yield made
    made.stop()


class Passing(NamedTuple):
    ext_proc: ExtProc
    envoy: Envoy
    is_buffered: bool


@pytest.fixture(scope="module", params=["full-duplex", "buffered"])
def passing(request: pytest.FixtureRequest, server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Passing]:
    directory = tmp_path_factory.mktemp("http")
    with ExitStack() as stack:
        ext_proc = stack.enter_context(ext_proc_of(directory, *arguments(f"127.0.0.1:{server.port},dialect=http")))
        envoy = stack.enter_context(envoy_of(directory, ext_proc.address, upstream_protocol="http", body_mode=request.param))
        yield Passing(ext_proc, envoy, request.param == "buffered")


def both(server: HttpServer, envoy: Envoy, content: bytes, own_id: str) -> tuple[httpx.Response, httpx.Response]:
    """The answers straight from it, and through Envoy."""
    headers = {"content-type": "application/json", "x-request-id": own_id, "authorization": "Bearer secret"}
    direct, through = (
        httpx.post(f"{base}{CHAT}?api-version=1", content=content, headers=headers, timeout=20)
        for base in (f"http://127.0.0.1:{server.port}", envoy.url)
    )
    return direct, through


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("whole", b'{ "messages" : [], "odd": 1.0 }', 200),
        ("stream", b'{"stream":true, "messages":[]}', 200),
        ("wrong", b"junk \xff", 422),
        ("long", b'{"messages": "' + b"x" * 3_000_000 + b'"}', 200),
    ],
)
def test_both_ways_nothing_is_changed(server: HttpServer, passing: Passing, name: str, content: bytes, status: int):
    ext_proc, envoy, _ = passing
    direct, through = both(server, envoy, content, name)
    assert (direct.status_code, direct.content) == (through.status_code, through.content)
    assert direct.status_code == status
    left = {key: value for key, value in direct.headers.items() if key not in HOPS}
    assert left.items() <= {key: value for key, value in through.headers.items() if key not in HOPS}.items()
    (method, path, _, sent), (to_method, to_path, headers, got) = server.requests[-2:]
    assert (method, path, sent) == (to_method, to_path, got)
    # In full duplex Envoy takes the length away, whatever it is told.
    length, coding = (str(len(content)), None) if passing.is_buffered else (None, "chunked")
    assert (headers.get("content-length"), headers.get("transfer-encoding")) == (length, coding)
    assert headers["authorization"] == "Bearer secret"
    line = ext_proc.request(name)
    assert (line.mode, line.path, line.status) == ("passthrough", CHAT, str(status))
    counted = (7, 5) if name != "wrong" else (0, 0)
    assert (line.prompt_tokens, line.completion_tokens) == counted


def test_events_come_one_by_one(server: HttpServer, passing: Passing):
    _, envoy, is_buffered = passing
    if is_buffered:  # or as one whole
        for _ in range(7):
            server.seen.release()
        answer = httpx.post(f"{envoy.url}{CHAT}", json={"stream": True, "model": "slow"}, timeout=10)
        assert answer.content.endswith(b"data: [DONE]\n\n")
        return
    got = b""
    with httpx.stream("POST", f"{envoy.url}{CHAT}", json={"stream": True, "model": "slow"}, timeout=10) as answer:
        pieces = answer.iter_raw()
        for ending in (b"\r\n\r\n", b'"a":\n', b"da", b"y\n\n", b'data: {"c', b"\n\n", b"[DONE]\n\n"):
            assert server.sent.acquire(timeout=10)
            while not got.endswith(ending):
                got += next(pieces)
            server.seen.release()
        assert next(pieces, None) is None


def test_its_own_list_of_models_and_its_other_methods(server: HttpServer, passing: Passing):
    envoy = passing.envoy
    assert httpx.get(f"{envoy.url}/v1/models").json()["data"][0]["id"] == "http-model"
    assert httpx.post(f"{envoy.url}/tokenize", json={"prompt": "x"}).status_code == 200
    assert server.requests[-1][1] == "/tokenize"


def test_a_grpc_call_is_unimplemented_there(passing: Passing):
    envoy = passing.envoy
    assert call(envoy.authority, *encoded("vllm.engine", "g")).code == "UNIMPLEMENTED"


def test_a_model_server_that_is_down_is_a_503_in_json(tmp_path: Path):
    server = HttpServer()
    settings = arguments(f"127.0.0.1:{server.port},dialect=http")
    with ext_proc_of(tmp_path, *settings) as ext_proc, envoy_of(tmp_path, ext_proc.address, upstream_protocol="http") as envoy:
        server.stop()
        answer = httpx.post(f"{envoy.url}{CHAT}", json={"messages": []}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "Service Unavailable")


def pool(protocol: str) -> str:
    return (
        "apiVersion: inference.networking.k8s.io/v1\nkind: InferencePool\nmetadata: {name: pool}\nspec:\n"
        "  selector: {matchLabels: {app: x}}\n  targetPorts: [{number: 8000}]\n"
        f"  appProtocol: {protocol}\n  endpointPickerRef: {{name: epp, port: {{number: 9002}}}}\n"
    )


class TestAPool:
    @pytest.mark.parametrize("protocol", ["http", "kubernetes.io/h2c"])
    def test_to_a_server_of_http_everything_passes(self, server: HttpServer, tmp_path: Path, protocol: str):
        (tmp_path / "pool.yaml").write_text(pool(protocol))
        settings = [*arguments(f"127.0.0.1:{server.port},dialect=http"), "--pool", str(tmp_path / "pool.yaml")]
        with ext_proc_of(tmp_path, *settings) as ext_proc, envoy_of(tmp_path, ext_proc.address, upstream_protocol="http") as envoy:
            direct, through = both(server, envoy, b'{"messages": []}', "one")
            assert (direct.status_code, direct.content) == (through.status_code, through.content)
            assert ext_proc.request("one").mode == "passthrough"

    def test_a_new_protocol_is_for_new_requests(self, tmp_path: Path):
        """The model server speaks gRPC alone: what passes as it is has an error of Envoy's or the server's for an answer."""
        file = tmp_path / "pool.yaml"
        file.write_text(pool("kubernetes.io/h2c"))
        with stack_of(tmp_path, "--pool", str(file)) as stack, connect(stack.url) as client:
            started = client.chat.completions.create(
                model="", messages=ask({"text": "one two three four five six seven", "delay_ms": 400}), stream=True
            )
            chunks = [next(iter(started))]
            file.write_text(pool("http"))
            modes = []

            def mode() -> str:
                own_id = f"r{len(modes)}"
                httpx.post(f"{stack.url}{CHAT}", json={"messages": ask({"text": "one"})}, headers={"x-request-id": own_id}, timeout=20)
                modes.append(stack.ext_proc.request(own_id).mode)
                return modes[-1]

            assert mode() in ("http-in-grpc-out", "passthrough")
            wait_until(lambda: mode() == "passthrough")
            seen = call(stack.envoy.authority, *encoded("vllm.engine", "g"))
            assert (seen.code, "appProtocol is http" in seen.details) == ("UNAVAILABLE", True)
            chunks += started
            text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            assert text == "one two three four five six seven"
            file.write_text(pool("kubernetes.io/h2c"))
            wait_until(lambda: mode() == "http-in-grpc-out")
            assert stream_text(client, messages=ask({"text": "again"}))[0] == "again"
            file.write_text("nonsense: [")  # the last good one stays
            assert mode() == "http-in-grpc-out"


class TestModels:
    def test_they_are_listed_if_asked_for(self, tmp_path: Path):
        sims = [make_sim(), make_sim("sglang.runtime")]
        with stack_of(tmp_path, "--serve-models", sims=sims) as stack, connect(stack.url) as client:
            models = list(client.models.list())
            assert {model.id for model in models} == {"sim"}
            answer = httpx.get(f"{stack.url}/v1/models")
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["content-length"] == str(len(answer.content))
            assert httpx.head(f"{stack.url}/v1/models").status_code == 200

    def test_they_are_not_found_otherwise(self, tmp_path: Path):
        with stack_of(tmp_path) as stack, connect(stack.url) as client, pytest.raises(openai.NotFoundError) as caught:
            client.models.list()
        assert caught.value.response.json()["error"]["code"] == 404
