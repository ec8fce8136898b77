"""The whole way: a real Envoy, `gaie-codec ext-proc` as a process of its own, and simulated model servers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Envoy

from gaie_codec import ModelInfo
from test_e2e import SimThread, ask

WAIT_S = 20
COMMAND = ("-m", "gaie_codec.cli", "ext-proc")

_LINE = re.compile(
    r"request '(?P<id>[^']*)': (?P<method>\S+) '(?P<path>[^']*)', (?P<mode>\S+) \((?P<reason>.*?)\) to (?P<where>\S+): "
    r"(?P<status>the client has gone|\d+), (?P<prompt>\d+) \+ (?P<completion>\d+) tokens, first after (?P<first>\S+) s, \S+ s in all"
    r"(?:: (?P<error>.*))?$",
    re.MULTILINE,
)


class Logged(NamedTuple):
    """What the log says of one request."""

    id: str
    method: str
    path: str
    mode: str
    reason: str
    where: str
    status: str
    prompt_tokens: int
    completion_tokens: int
    error: str


class ExtProc:
    """`gaie-codec ext-proc` with these arguments, or another program that says where it listens."""

    def __init__(self, directory: Path, *arguments: str, program: Sequence[str] = COMMAND) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._log_path = directory / "ext_proc.log"
        self._log = self._log_path.open("wb")
        command = [sys.executable, *program, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        ready = re.fullmatch(r"ready ext_proc=(\S+)\n", self.process.stdout.readline())
        if ready is None:
            self.process.kill()
            self._close()
            pytest.fail(f"ext-proc did not start: {self.log()}")
        self.address = ready[1]

    def log(self) -> str:
        """All that it wrote to stderr."""
        return self._log_path.read_text(errors="replace")

    def requests(self) -> list[Logged]:
        """What the log says of requests that are over, oldest first."""
        found = []
        for line in _LINE.finditer(self.log()):
            numbers = int(line["prompt"]), int(line["completion"])
            names = (line[name] for name in ("id", "method", "path", "mode", "reason", "where", "status"))
            found.append(Logged(*names, *numbers, line["error"] or ""))
        return found

    def request(self, request_id: str) -> Logged:
        """The line about this request, once it is there."""
        wait_until(lambda: any(one.id == request_id for one in self.requests()))
        (found,) = (one for one in self.requests() if one.id == request_id)
        return found

    def stop(self) -> None:
        """End it as an operator would; fails the test if it wrote a traceback or ended badly."""
        self.end()
        assert "Traceback" not in self.log(), self.log()

    def end(self) -> None:
        """Likewise, whatever it wrote."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                assert self.process.wait(WAIT_S) == 0
        finally:
            self.process.kill()
            self._close()

    def _close(self) -> None:
        self.process.wait(WAIT_S)
        self._log.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Stack(NamedTuple):
    """All of it, running."""

    envoy: Envoy
    ext_proc: ExtProc
    sims: Sequence[SimThread]

    @property
    def url(self) -> str:
        return self.envoy.url

    @property
    def sim(self) -> SimThread:
        return self.sims[0]


def make_sim(dialect: str = "vllm.engine", **options: Any) -> SimThread:
    """A model server, of a model that is called "sim"."""
    model = ModelInfo(served_model_name="sim", max_model_len=options.pop("max_model_len", 2048))
    return SimThread(dialect, **{"model": model, "tokenizer": "builtin", **options})


@contextlib.contextmanager
def ext_proc_of(directory: Path, *arguments: str, program: Sequence[str] = COMMAND) -> Iterator[ExtProc]:
    """An ext_proc server on a free port that logs each request."""
    ext_proc = ExtProc(directory, *arguments, program=program)
    try:
        yield ext_proc
    finally:
        ext_proc.stop()


def arguments(*endpoints: str, tokenizer: str = "builtin") -> list[str]:
    """Of `gaie-codec ext-proc` in front of these model servers."""
    listed = [part for endpoint in endpoints for part in ("--endpoint", endpoint)]
    return ["--listen", "127.0.0.1:0", "--tokenizer", tokenizer, "--log-level", "info", *listed]


@contextlib.contextmanager
def envoy_of(directory: Path, ext_proc: str, **options: Any) -> Iterator[Envoy]:
    """An Envoy, whose log pytest shows where a test fails."""
    envoy = Envoy(directory, ext_proc=ext_proc, **options)
    try:
        yield envoy
    finally:
        sys.stdout.write(envoy.log())
        envoy.stop()


@contextlib.contextmanager
def stack_of(
    directory: Path, *extra: str, sims: Sequence[SimThread] | None = None, dialect: str | None = None, **options: Any
) -> Iterator[Stack]:
    """Simulated model servers behind an ext_proc server with `extra` arguments; `options` are Envoy's."""
    running = list(sims) if sims is not None else [make_sim(dialect or "vllm.engine")]
    with contextlib.ExitStack() as stack:
        for sim in running:
            stack.callback(sim.stop)
        endpoints = [f"127.0.0.1:{sim.port},dialect={sim.server.adapter.dialect}" for sim in running]
        ext_proc = stack.enter_context(ext_proc_of(directory, *arguments(*endpoints), *extra))
        envoy = stack.enter_context(envoy_of(directory, ext_proc.address, **options))
        yield Stack(envoy, ext_proc, running)


def wait_until(happened: Callable[[], Any], *, within_s: float = WAIT_S) -> float:
    """Wait for it; returns how many seconds that took."""
    started = time.monotonic()
    while not happened():
        assert time.monotonic() < started + within_s, f"not within {within_s} s"
        time.sleep(0.001)
    return time.monotonic() - started


def note(measured: str) -> None:
    """For who looks at what was measured: `pytest -rP`."""
    sys.stdout.write(measured + "\n")


def events_of(text: str) -> list[str]:
    """The data of each server-sent event."""
    assert text.endswith("\n\n"), "cut off amid an event"
    return [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]


def send(port: int, script: dict[str, Any], *, stream: bool = True) -> socket.socket:
    """A request for a scripted answer on a connection of its own, over HTTP/1.1."""
    body = json.dumps({"messages": ask(script), "stream": stream}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


class Proxy:
    """Passes TCP connections on to a port, until they are cut off with a reset."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        cut, self._sockets = self._sockets, []
        for one in cut:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Reading threads hold the socket open: the reset comes once they have let go.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD)
            one.close()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
