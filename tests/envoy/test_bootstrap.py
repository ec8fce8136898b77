"""The generator's bootstrap in the real Envoy: that it is taken, whatever the options, and that it does what they say."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from harness import (
    Envoy,
    ExtProcThread,
    GrpcThread,
    body,
    echo,
    envoy_binary,
    headers,
    headers_of,
    immediate,
    kind,
    mutation,
    trailers,
    validate,
)

from gaie_codec.ext_proc.envoy_config import envoy_config
from gaie_codec.ext_proc.messages import ProcessingResponse

DESTINATION = "x-gateway-destination-endpoint"
TO_GRPC = {":path": "/s/M", "content-type": "application/grpc", "te": "trailers"}
JSON = {"content-type": "application/json"}
StartEnvoy = Callable[..., Envoy]
StartExtProc = Callable[[Any], ExtProcThread]

OPTIONS: dict[str, tuple[Any, ...]] = {
    "upstream": (None, "127.0.0.1:1", "[::1]:1", "model.example:1"),
    "destination": ("header", "metadata"),
    "upstream_protocol": ("h2c", "http"),
    "body_mode": ("full-duplex", "buffered"),
    "behind": (None, "epp.example:9002"),
}
EITHER = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
FURTHER: list[dict[str, Any]] = [
    {"listen": "[::]:0"},
    {"listen": "0.0.0.0:8080", "admin": "[::1]:9901"},
    {"ext_proc": "[::1]:9002"},
    {"ext_proc": "localhost:9002", "ext_proc_tls": True},
    {"behind": "127.0.0.1:9003", "behind_tls": True},
    {"timeout_s": 1.5, "stream_idle_timeout_s": 0.001},
    {"timeout_s": 3e9, "stream_idle_timeout_s": 0},
    {"access_log": True},
]


@pytest.mark.parametrize("options", EITHER + FURTHER, ids=lambda options: "-".join(str(value) for value in options.values()))
def test_envoy_takes_every_combination(tmp_path: Path, options: dict[str, Any]):
    validate(tmp_path, envoy_config(**{"listen": "127.0.0.1:0", "ext_proc": "127.0.0.1:9002", **options}))


def test_envoy_takes_what_the_command_prints(tmp_path: Path):
    command = [sys.executable, "-m", "gaie_codec.cli", "envoy-config", "--listen", "[::1]:0", "--ext-proc", "epp:9002", "--access-log"]
    path = tmp_path / "envoy.yaml"
    path.write_bytes(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    check = [str(envoy_binary()), "-c", str(path), "--mode", "validate"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def model_server(cleanup: contextlib.ExitStack) -> GrpcThread:
    """A gRPC server that answers a message with itself, three times."""

    async def answer(requests: Any, context: Any) -> Any:
        async for request in requests:
            for _ in range(3):
                yield request

    server = GrpcThread({"s": {"M": grpc.stream_stream_rpc_method_handler(answer)}})
    cleanup.callback(server.stop)
    return server


def to_grpc(destination: str | None, **metadata: str) -> Any:
    """HTTP in, gRPC out, in full duplex: one frame there, and back the bytes of all frames as text."""
    chosen = {} if destination is None else {DESTINATION: destination}

    async def process(read: Any, write: Any) -> None:
        content = b""
        while (message := await read()) is not None:
            what = kind(message)
            if what == "request_body" and message.request_body.end_of_stream:
                await write(headers("request", TO_GRPC | chosen, ("content-length",), **metadata))
                await write(body("request", b"\0\0\0\0\x02hi", end=True))
            elif what == "response_headers" and headers_of(message)[":status"] != "200":
                await write(headers("response"))
            elif what == "response_body" and message.response_body.end_of_stream:
                await write(body("response", message.response_body.body, end=True))
            elif what == "response_body":
                content += message.response_body.body
            elif what == "response_trailers":
                await write(headers("response", {":status": "200", "content-type": "text/plain"}))
                await write(body("response", content.replace(b"\0\0\0\0\x02", b""), end=False))
                await write(trailers("response", {}, ("grpc-status", "grpc-message")))

    return process


CLIENTS = [pytest.param({"http2": False}, id="http1"), pytest.param({"http1": False, "http2": True}, id="http2")]


@pytest.mark.parametrize("versions", CLIENTS)
def test_the_header_chooses_the_model_server(
    versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread
):
    envoy = start_envoy(ext_proc=start_ext_proc(to_grpc(model_server.address)).address)
    with httpx.Client(**versions) as client:
        answer = client.post(f"{envoy.url}/v1/x", content=b"{}")
    assert (answer.status_code, answer.text) == (200, "hihihi")


def test_the_metadata_chooses_the_model_server(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread):
    ext_proc = start_ext_proc(to_grpc(None, x_gateway_destination_endpoint=model_server.address))
    envoy = start_envoy(ext_proc=ext_proc.address, destination="metadata")
    assert httpx.post(f"{envoy.url}/v1/x", content=b"{}").text == "hihihi"


def test_a_fixed_model_server_needs_no_choice(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread):
    envoy = start_envoy(ext_proc=start_ext_proc(to_grpc(None)).address, upstream=f"localhost:{model_server.port}")
    assert httpx.post(f"{envoy.url}/v1/x", content=b"{}").text == "hihihi"


def test_a_client_cannot_choose(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread):
    ext_proc = start_ext_proc(echo)
    envoy = start_envoy(ext_proc=ext_proc.address)
    assert httpx.post(f"{envoy.url}/v1/x", content=b"{}", headers={DESTINATION: model_server.address}).status_code == 503
    assert DESTINATION not in headers_of(ext_proc.seen[0][0])


def test_envoy_listens_on_ipv6(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    envoy = start_envoy(listen="[::1]:0", ext_proc=start_ext_proc(to_grpc(model_server.address)).address)
    assert httpx.post(f"{envoy.url}/v1/x", content=b"{}").text == "hihihi"


@pytest.fixture
def http_server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            # Envoy has the length no more once ext_proc may have changed the body.
            content = b""
            while (size := int(self.rfile.readline(), 16)) > 0:
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_server_may_speak_http1(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, http_server: str):
    envoy = start_envoy(ext_proc=start_ext_proc(echo).address, upstream=http_server, upstream_protocol="http")
    assert httpx.post(f"{envoy.url}/v1/x", content=b"abc").content == b"abc"


def test_another_picker_in_front_sees_json_and_its_choice_reaches_ours(
    start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread
):
    chosen = model_server.address

    async def pick(read: Any, write: Any) -> None:
        """As endpoint pickers do: hold the headers until the body is there, then name the model server in both ways."""
        content = b""
        while (message := await read()) is not None:
            what = kind(message)
            if what == "request_body":
                content += message.request_body.body
                if message.request_body.end_of_stream:
                    await write(headers("request", {DESTINATION: chosen}, x_gateway_destination_endpoint=chosen))
                    await write(body("request", content, end=True))
            elif what == "response_headers":
                await write(headers("response"))
            elif what == "response_body":
                await write(body("response", message.response_body.body, end=message.response_body.end_of_stream))
            elif what == "response_trailers":
                await write(trailers("response"))

    behind, ours = start_ext_proc(pick), start_ext_proc(to_grpc(None))
    envoy = start_envoy(ext_proc=ours.address, behind=behind.address)
    assert httpx.post(f"{envoy.url}/v1/x", content=b'{"prompt":"a"}').text == "hihihi"
    first = ours.seen[0][0]
    assert headers_of(first)[DESTINATION] == chosen
    assert first.metadata_context.filter_metadata["envoy.lb"][DESTINATION] == chosen
    assert b"".join(message.request_body.body for message in ours.seen[0] if kind(message) == "request_body") == b'{"prompt":"a"}'
    assert b"".join(message.response_body.body for message in behind.seen[0] if kind(message) == "response_body") == b"hihihi"


def error_of(answer: httpx.Response) -> Any:
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (None, answer.status_code)
    return error


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens; kept, so that nothing else gets it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("mode", ["full-duplex", "buffered"])
@pytest.mark.parametrize("versions", CLIENTS)
def test_an_ext_proc_server_that_is_down_is_an_openai_503(mode: str, versions: Any, start_envoy: StartEnvoy, nobody: str):
    envoy = start_envoy(ext_proc=nobody, body_mode=mode)
    with httpx.Client(**versions) as client:
        answer = client.post(f"{envoy.url}/v1/x", content=b"{}")
    assert answer.status_code == 503
    error = error_of(answer)
    assert (error["type"], error["message"]) == ("Service Unavailable", "The endpoint picker did not answer")


def test_the_words_of_an_ext_proc_server_that_fails_are_not_the_clients_business(start_envoy: StartEnvoy, start_ext_proc: StartExtProc):
    async def fail(read: Any, write: Any) -> None:
        await read()
        raise RuntimeError("secret")

    envoy = start_envoy(ext_proc=start_ext_proc(fail).address)
    answer = httpx.post(f"{envoy.url}/v1/x", content=b"{}")
    assert answer.status_code == 503
    assert "secret" not in answer.text
    error_of(answer)


@pytest.mark.parametrize("wrong", [headers("response"), headers("request", {"x-a": "line\nline"})], ids=["out of turn", "no header value"])
def test_an_answer_that_envoy_cannot_use_is_an_openai_503(wrong: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc):
    async def answer(read: Any, write: Any) -> None:
        await read()
        await write(wrong)
        await read()

    envoy = start_envoy(ext_proc=start_ext_proc(answer).address)
    error = error_of(httpx.post(f"{envoy.url}/v1/x", content=b"{}"))
    assert (error["code"], error["message"]) == (503, "The endpoint picker gave an answer that cannot be used")


def test_an_ext_proc_server_that_is_silent_is_an_openai_504_where_bodies_are_buffered(
    start_envoy: StartEnvoy, start_ext_proc: StartExtProc
):
    async def wait(read: Any, write: Any) -> None:
        while await read() is not None:
            pass

    def shorten(settings: Any) -> None:
        manager = settings["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        for found in manager["http_filters"]:
            if "message_timeout" in found["typed_config"]:
                found["typed_config"]["message_timeout"] = "0.2s"

    envoy = start_envoy(ext_proc=start_ext_proc(wait).address, body_mode="buffered", change=shorten)
    answer = httpx.post(f"{envoy.url}/v1/x", content=b"{}")
    assert answer.status_code == 504
    assert error_of(answer)["message"] == "The endpoint picker did not answer in time"


@pytest.mark.parametrize("what", ["nobody", "no destination", "not an address", "a list"])
def test_a_model_server_that_is_not_there_is_an_openai_503(what: str, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, nobody: str):
    destination = {"nobody": nobody, "not an address": "there", "a list": f"{nobody},{nobody}"}.get(what)
    ext_proc = start_ext_proc(to_grpc(destination))
    envoy = start_envoy(ext_proc=ext_proc.address, access_log=True)
    answer = httpx.post(f"{envoy.url}/v1/x", content=b"{}")
    assert answer.status_code == 503
    assert error_of(answer)["type"] == "Service Unavailable"
    (line,) = envoy.access_log()
    assert (line["status"], line["flags"]) == (503, "UF" if what == "nobody" else "UH")
    seen = {kind(message): message for message in ext_proc.seen[0]}
    assert headers_of(seen["response_headers"])["content-type"] == "application/json", "ext_proc sees what the client gets"
    assert seen["response_body"].response_body.end_of_stream


@pytest.mark.parametrize("status", [200, 400, 429, 503])
@pytest.mark.parametrize("when", ["request_headers", "request_body", "response_headers"])
def test_an_immediate_response_stays_as_it_is(status: int, when: str, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, nobody: str):
    """Also in place of Envoy's own 503, at the response's headers."""
    pass_on = to_grpc(nobody)

    async def process(read: Any, write: Any) -> None:
        async def watch() -> Any:
            message = await read()
            if kind(message) == when:
                await write(immediate(status, b'{"ours":true}', JSON, details="our words"))
                while message is not None:
                    message = await read()
            return message

        await pass_on(watch, write)

    envoy = start_envoy(ext_proc=start_ext_proc(process).address, access_log=True)
    answer = httpx.post(f"{envoy.url}/v1/x", content=b"{}")
    assert (answer.status_code, answer.json(), answer.headers["content-length"]) == (status, {"ours": True}, "13")
    assert answer.headers["content-type"] == "application/json"
    assert envoy.access_log()[0]["details"] == "our_words"


def test_another_pickers_plain_text_becomes_openai_json(start_envoy: StartEnvoy, start_ext_proc: StartExtProc):
    async def refuse(read: Any, write: Any) -> None:
        await read()
        await write(immediate(429, b"inference error"))
        await read()

    envoy = start_envoy(ext_proc=start_ext_proc(refuse).address)
    error = error_of(httpx.post(f"{envoy.url}/v1/x", content=b"{}"))
    assert (error["type"], error["message"]) == ("RateLimitError", "inference error")


def test_for_grpc_clients_errors_stay_text(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, nobody: str):
    ext_proc = start_ext_proc(echo)
    envoy = start_envoy(ext_proc=ext_proc.address)
    with grpc.insecure_channel(envoy.authority) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/s/M")(b"", timeout=20)
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, "no healthy upstream")


def test_what_is_no_request_is_an_openai_400(start_envoy: StartEnvoy, start_ext_proc: StartExtProc):
    """Which an ext_proc server sees as a response to nothing."""
    ext_proc = start_ext_proc(echo)
    envoy = start_envoy(ext_proc=ext_proc.address)
    with socket.create_connection(("127.0.0.1", envoy.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/x HTTP/1.1\r\n\r\n")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"message":"The proxy refused the request: missing_host_header","param":null,"type":"BadRequestError"' in answer
    assert [kind(message) for message in ext_proc.seen[0][:2]] == ["response_headers", "response_body"]


@pytest.mark.parametrize("mode", ["full-duplex", "buffered"])
@pytest.mark.parametrize("versions", CLIENTS)
def test_a_body_of_many_megabytes_passes_both_ways(
    mode: str, versions: Any, start_envoy: StartEnvoy, start_ext_proc: StartExtProc, http_server: str
):
    async def buffered(read: Any, write: Any) -> None:
        while (message := await read()) is not None:
            response = ProcessingResponse()
            getattr(response, kind(message)).SetInParent()
            if kind(message) == "request_headers":
                mutation(response.request_headers.response.header_mutation, {}, ("content-length",))
                mutation(response.request_headers.response.header_mutation, {"transfer-encoding": "chunked"})
            await write(response)

    content = os.urandom(20_000_000)  # above the HTTP/2 window that Envoy gives by itself
    process = echo if mode == "full-duplex" else buffered
    envoy = start_envoy(ext_proc=start_ext_proc(process).address, upstream=http_server, upstream_protocol="http", body_mode=mode)
    with httpx.Client(timeout=60, **versions) as client:
        answer = client.post(f"{envoy.url}/v1/x", content=content)
    assert answer.status_code == 200, answer.text[:200]
    assert answer.content == content


def test_a_thousand_streams_and_more_at_once(start_envoy: StartEnvoy, cleanup: contextlib.ExitStack, start_ext_proc: StartExtProc):
    """Envoy's default circuit breaker would refuse those after the first 1024."""
    count = 1100
    arrived = threading.Semaphore(0)
    go = threading.Event()

    async def answer(requests: Any, context: Any) -> Any:
        async for request in requests:
            arrived.release()
            while not go.is_set():
                await asyncio.sleep(0.05)
            yield request

    server = GrpcThread({"s": {"M": grpc.stream_stream_rpc_method_handler(answer)}})
    cleanup.callback(server.stop)
    envoy = start_envoy(ext_proc=start_ext_proc(echo).address, upstream=server.address)
    with grpc.insecure_channel(envoy.authority) as channel:
        call = channel.unary_unary("/s/M")
        under_way = [call.future(b"x", timeout=90) for _ in range(count)]
        try:
            assert all(arrived.acquire(timeout=60) for _ in range(count)), envoy.stats("(rq_active|overflow)")
        finally:
            go.set()
        assert [done.result(60) for done in under_way] == [b"x"] * count


def test_the_access_log_is_json_lines(start_envoy: StartEnvoy, start_ext_proc: StartExtProc, model_server: GrpcThread):
    envoy = start_envoy(ext_proc=start_ext_proc(to_grpc(model_server.address)).address, access_log=True)
    httpx.post(f"{envoy.url}/v1/x", content=b"{}", headers={"x-request-id": 'a"b'})
    (line,) = envoy.access_log()
    assert (line["status"], line["flags"], line["details"], line["upstream"]) == (200, "-", "via_upstream", model_server.address)
    assert line["request_id"] == 'a"b'
    assert json.dumps(line)
