"""One engine and one `gaie-codec serve` for each set-up, started once; tests are grouped by set-up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import launch
import openai
import prepare
import pytest
import traits

UNAVAILABLE: dict[str, str] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fetch what is missing, outside of any test's time limit, and leave out what cannot be had."""
    specs = {item: item.callspec.params["served"][1].spec for item in items if "served" in getattr(item, "fixturenames", ())}
    for spec in () if config.option.collectonly else dict.fromkeys(specs.values()):
        try:
            launch.fetch(spec)
        except prepare.UnavailableError as error:
            UNAVAILABLE[spec] = str(error)
    left_out = [item for item in items if specs.get(item) in UNAVAILABLE]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for spec, reason in UNAVAILABLE.items():
        terminalreporter.write_line(f"SKIPPED {spec}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if UNAVAILABLE and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@dataclasses.dataclass(frozen=True)
class Served:
    """gaie-codec in front of a running engine."""

    traits: traits.Traits
    engine: launch.Engine
    url: str
    client: openai.OpenAI
    http: httpx.Client

    def chat(self, **request: Any) -> Any:
        return self.client.chat.completions.create(**({"model": "mock-model"} | request))

    def stream(self, **request: Any) -> list[Any]:
        return list(self.chat(stream=True, **request))


@contextlib.contextmanager
def serve(engine: launch.Engine, *extra: str) -> Iterator[str]:
    """`gaie-codec serve` in front of an engine; gives its base URL."""
    command = [sys.executable, "-m", "gaie_codec.cli", "serve", "--upstream", f"grpc://{engine.grpc}", "--dialect", "auto"]
    command += ["--tokenizer", str(engine.model), "--listen", "127.0.0.1:0", *extra]
    with (engine.folder / "serve.txt").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        ready = re.fullmatch(r"ready http=(\S+)\n", process.stdout.readline())
        if ready is None:
            process.wait(timeout=20)
            pytest.fail(f"serve did not start: {(engine.folder / 'serve.txt').read_text()}", pytrace=False)
        yield f"http://{ready[1]}"
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert "Traceback" not in (engine.folder / "serve.txt").read_text()


@pytest.fixture(scope="session", params=traits.selected().items(), ids=lambda item: item[0])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    expected = request.param[1]
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(launch.start(expected.spec))
        url = stack.enter_context(serve(engine, *expected.serve))
        # No proxy: everything is on loopback.
        http = stack.enter_context(httpx.Client(base_url=url, timeout=30, trust_env=False))
        plain = httpx.Client(timeout=30, trust_env=False)
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=plain))
        yield Served(expected, engine, url, client, http)


@pytest.fixture(autouse=True)
def _alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """A model server that a test has ended fails this test, not all that follow."""
    if "served" not in request.fixturenames:
        yield
        return
    engine = request.getfixturevalue("served").engine
    yield
    if not engine.is_alive:
        words = "\n".join((engine.folder / "server.txt").read_text(errors="replace").splitlines()[-25:])
        engine.restart()
        pytest.fail(f"the request has ended {engine.name} {engine.version}:\n{words}", pytrace=False)


def ask(script: dict[str, Any] | None = None, text: str = " x") -> list[Any]:
    """Messages that carry a script."""
    mark = "" if script is None else f" [[mock {json.dumps(script, ensure_ascii=False)}]]"
    return [{"role": "user", "content": text + mark}]
