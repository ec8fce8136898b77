"""launch.py NAME[:VERSION]: start a real front end of a model server with a fake engine behind it, on loopback, in the foreground.

Prints `ready grpc=HOST:PORT [http=HOST:PORT]` and runs until SIGINT, SIGTERM or SIGHUP. `start` does the same for a test.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import model
import prepare

ZMQ = ["pyzmq>=26", "msgspec>=0.19"]
READY_SECONDS = 60
LOG_SECONDS = 24 * 3600
# Releases the suite asks for unless told otherwise; a name without a version means the first.
VERSIONS: dict[str, tuple[str, ...]] = {
    "vllm-native": ("0.33.0", "0.22.1"),
    "sglang-runtime": ("0.5.23", "0.5.16"),
    "sglang-api": ("0.5.23", "0.5.22"),
    "smg-vllm-python": ("0.14.1",),
    "smg-vllm-rust": ("1.13.0",),
    "smg-sglang-rust": ("1.13.0",),
}
WITH_HTTP = ("vllm-native", "sglang-api")


class Ports(NamedTuple):
    """Loopback ports of one engine; `handshake` is between front end and engine."""

    grpc: int
    http: int
    handshake: int

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.handshake}"


@dataclasses.dataclass(frozen=True)
class Engine:
    """A running front end. `folder` holds its logs; `http` is "" where it serves gRPC alone."""

    name: str
    version: str
    grpc: str
    http: str
    model: Path
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = dataclasses.field(repr=False)
    spawn: Callable[[], None] = dataclasses.field(repr=False)

    @property
    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self.processes.values())

    def restart(self) -> None:
        """Start it again, on the same ports."""
        _stop(self.processes)
        self.spawn()

    def log(self, kind: str) -> list[Any]:
        """What the fake engine logged of a kind, "request" or "abort", in order."""
        path = self.folder / "log.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [entry[kind] for entry in entries if kind in entry]


def parse(spec: str) -> tuple[str, str]:
    """Name and version of `NAME[:VERSION]`."""
    name, _, version = spec.partition(":")
    if name not in VERSIONS:
        raise SystemExit(f"no engine {name!r}; there are: {', '.join(VERSIONS)}")
    return name, version or VERSIONS[name][0]


def fetch(spec: str) -> None:
    """Put what an engine needs into the cache. Raises UnavailableError."""
    name, version = parse(spec)
    cache = prepare.cache_folder()
    with prepare.locked(cache):
        _COMMANDS[name](cache, version, Ports(0, 0, 0), cache / "model")


@contextlib.contextmanager
def start(spec: str, *, script: Path | None = None, grpc_port: int = 0, http_port: int = 0) -> Iterator[Engine]:
    """Run an engine until the block ends. Raises UnavailableError where a package cannot be had, RuntimeError where it does not start."""
    name, version = parse(spec)
    cache = prepare.cache_folder()
    ports = Ports(grpc_port or _free_port(), http_port or _free_port(), _free_port())
    with prepare.locked(cache):
        folder = model.write(cache / "model")
        commands = _COMMANDS[name](cache, version, ports, folder)
    run = _run_folder(cache, f"{name}-{version}-{ports.grpc}")
    public = [ports.grpc, ports.http] if name in WITH_HTTP else [ports.grpc]
    http = f"127.0.0.1:{ports.http}" if name in WITH_HTTP else ""
    children: dict[str, subprocess.Popen[bytes]] = {}

    def spawn() -> None:
        for role, command in commands.items():
            children[role] = _spawn(command, run, role, script)
        _wait(run, children, commands, public)

    try:
        spawn()
        yield Engine(name, version, f"127.0.0.1:{ports.grpc}", http, folder, run, children, spawn)
    finally:
        _stop(children)


def _vllm_native(cache: Path, version: str, ports: Ports, folder: Path) -> dict[str, list[str]]:
    python = prepare.environment(cache, "zmq", ZMQ)
    wheel = prepare.wheel_files(cache, python, "vllm", version, "vllm/vllm-rs")
    server = [str(wheel / "vllm/vllm-rs"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(ports.http)]
    server += ["--grpc-port", str(ports.grpc), "--served-model-name", model.NAME, "--handshake-port", str(ports.handshake)]
    server += ["--data-parallel-size", "1", "--data-parallel-size-local", "0"]
    return {"server": server, "engine": _script(python, "fake_vllm_core", ports.address, version)}


def _sglang(cache: Path, version: str, pattern: str, *more: str) -> tuple[Path, Path]:
    # The compiled files are built for these interpreters alone.
    base = prepare.find_python("3.12", "3.11", "3.13")
    python = prepare.environment(cache, "sglang", ["fastapi>=0.115", "openai>=2", "msgspec>=0.19", "numpy>=2"], base)
    return python, prepare.wheel_files(cache, python, "sglang", version, pattern, *more)


def _sglang_runtime(cache: Path, version: str, ports: Ports, folder: Path) -> dict[str, list[str]]:
    library = "*/_grpc.cpython-*.so" if _number(version) >= (0, 5, 18) else "*/_core.cpython-*.so"
    entrypoints = "sglang/srt/entrypoints"
    python, wheel = _sglang(cache, version, library, f"{entrypoints}/grpc_bridge.py", f"{entrypoints}/openai/protocol.py")
    return {"server": _script(python, "fake_sglang_runtime", str(wheel), str(ports.grpc), str(folder))}


def _sglang_api(cache: Path, version: str, ports: Ports, folder: Path) -> dict[str, list[str]]:
    python, wheel = _sglang(cache, version, "*/_server.cpython-*.so")
    return {"server": _script(python, "fake_sglang_api", str(wheel), version, str(ports.http), str(ports.grpc), str(folder))}


def _smg_vllm_python(cache: Path, version: str, ports: Ports, folder: Path) -> dict[str, list[str]]:
    proto = ["smg-grpc-proto==0.4.28"] if version == VERSIONS["smg-vllm-python"][0] else []
    python = prepare.environment(cache, f"smg-python-{version}", [f"smg-grpc-servicer=={version}", "msgspec>=0.19", *proto])
    return {"server": _script(python, "smg_vllm_python", str(ports.grpc), str(folder))}


def _smg_rust(kind: str, engine: str) -> Callable[[Path, str, Ports, Path], dict[str, list[str]]]:
    def commands(cache: Path, version: str, ports: Ports, folder: Path) -> dict[str, list[str]]:
        python = prepare.environment(cache, f"smg-{version}", [f"smg=={version}", *ZMQ])
        return {
            "server": _script(python, "smg_rust", kind, str(ports.grpc), ports.address, str(folder)),
            "engine": _script(python, engine, ports.address),
        }

    return commands


# Name -> the processes of an engine by role, after putting what they need into the cache.
_COMMANDS: dict[str, Callable[[Path, str, Ports, Path], dict[str, list[str]]]] = {
    "vllm-native": _vllm_native,
    "sglang-runtime": _sglang_runtime,
    "sglang-api": _sglang_api,
    "smg-vllm-python": _smg_vllm_python,
    "smg-vllm-rust": _smg_rust("vllm", "fake_vllm_core"),
    "smg-sglang-rust": _smg_rust("sglang", "fake_smg_scheduler"),
}


def _run_folder(cache: Path, name: str) -> Path:
    """An empty folder for a run's logs. Those of yesterday go."""
    for old in (cache / "run").glob("*"):
        if old.name == name or old.stat().st_mtime < time.time() - LOG_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    folder = cache / "run" / name
    folder.mkdir(parents=True)
    return folder


def _script(python: Path, name: str, *arguments: str) -> list[str]:
    return [str(python), str(prepare.HERE / f"{name}.py"), *arguments]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3])


def _spawn(command: list[str], run: Path, role: str, script: Path | None) -> subprocess.Popen[bytes]:
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", NO_COLOR="1")
    env |= {"ENGINE_LOG": str(run / "log.jsonl"), "ENGINE_SCRIPT": str(script.absolute()) if script else ""}
    with open(run / f"{role}.txt", "wb") as output:
        return subprocess.Popen(
            command,
            cwd=run,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)  # whatever ends the parent, SIGKILL too


def _wait(run: Path, children: dict[str, subprocess.Popen[bytes]], commands: dict[str, list[str]], public: list[int]) -> None:
    marked = [role for role, command in commands.items() if command[1].endswith(".py")]
    deadline = time.monotonic() + READY_SECONDS
    while not (all("READY\n" in _text(run, role) for role in marked) and all(map(_listening, public))):
        for role, child in children.items():
            if child.poll() is not None:
                raise RuntimeError(f"the {role} ended with status {child.returncode}:\n{_text(run, role)[-3000:]}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not ready after {READY_SECONDS} s; see {run}")
        time.sleep(0.05)


def _stop(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children.values():
            if child.poll() is None:
                os.killpg(child.pid, number)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(child.poll() is None for child in children.values()):
            time.sleep(0.02)


def _text(run: Path, role: str) -> str:
    return (run / f"{role}.txt").read_text(errors="replace")


def _free_port() -> int:
    """A port nobody has, below the range that the system itself hands out, so that nobody gets it meanwhile."""
    top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(min(20000, top - 1000), top), 500):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no free port")


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", metavar="NAME[:VERSION]", help=", ".join(VERSIONS))
    parser.add_argument("--grpc-port", type=int, default=0, help="default: a free one")
    parser.add_argument("--http-port", type=int, default=0, help=f"default: a free one; of {' and '.join(WITH_HTTP)}")
    parser.add_argument("--script", type=Path, help="JSON file for requests that bring no script; read again for each")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        with start(options.spec, script=options.script, grpc_port=options.grpc_port, http_port=options.http_port) as engine:
            sys.stderr.write(f"logs: {engine.folder}\n")
            sys.stdout.write(f"ready grpc={engine.grpc}{f' http={engine.http}' if engine.http else ''}\n")
            sys.stdout.flush()
            while True:
                signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)
    except (prepare.UnavailableError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
