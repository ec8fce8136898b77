"""The same engines behind `gaie-codec ext-proc` and a real Envoy: answers are those of `serve`, statuses are true, and what ends, ends."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import Served, ask

sys.path.append(str(Path(__file__).resolve().parent.parent / "envoy"))

from harness import Envoy  # of the tests that need no engines

EXCEPTIONS = {400: openai.BadRequestError, 429: openai.RateLimitError, 500: openai.InternalServerError, 503: openai.InternalServerError}


@pytest.fixture(scope="module")
def behind(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of an Envoy in front of the engine."""
    folder = tmp_path_factory.mktemp("envoy")
    command = [
        sys.executable,
        "-m",
        "gaie_codec.cli",
        "ext-proc",
        "--endpoint",
        served.engine.grpc,
        "--tokenizer",
        str(served.engine.model),
    ]
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context((folder / "ext_proc.txt").open("w"))
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", *served.traits.serve], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        stack.callback(process.communicate, timeout=30)
        stack.callback(process.terminate)
        assert process.stdout is not None
        ready = re.fullmatch(r"ready ext_proc=(\S+)\n", process.stdout.readline())
        assert ready is not None, (folder / "ext_proc.txt").read_text()
        envoy = Envoy(folder, ext_proc=ready[1])
        stack.callback(envoy.stop)
        plain = httpx.Client(timeout=30, trust_env=False)
        yield stack.enter_context(openai.OpenAI(base_url=f"{envoy.url}/v1", api_key="none", max_retries=0, http_client=plain))
    assert "Traceback" not in (folder / "ext_proc.txt").read_text()


def said(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_answers_are_those_of_serve(served: Served, behind: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "mock-model", "messages": ask({"text": "Emoji 🌍 and 你好"}), "max_tokens": 64}
    direct, through = served.chat(**request), behind.chat.completions.create(**request)
    assert through.choices[0].message.content == direct.choices[0].message.content
    assert (through.choices[0].finish_reason, through.usage) == (direct.choices[0].finish_reason, direct.usage)
    assert said(behind.chat.completions.create(stream=True, **request)) == direct.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_status(served: Served, behind: openai.OpenAI, stream: bool) -> None:
    for status, expected in served.traits.statuses.items():
        messages = ask({"error": {"status": status, "message": "the engine says no"}})
        with pytest.raises(EXCEPTIONS[expected]) as caught:
            list(behind.chat.completions.create(model="mock-model", messages=messages, max_tokens=8, stream=True)) if stream else (
                behind.chat.completions.create(model="mock-model", messages=messages, max_tokens=8)
            )
        assert caught.value.status_code == expected


def test_a_stop_string_ends_the_engines_work_too(served: Served, behind: openai.OpenAI) -> None:
    """Whoever matches it: the engine, or the gateway, which then has to tell the engine."""
    messages = ask({"text": "one STOP" + " more" * 100, "delay": 0.02})
    started = time.monotonic()
    chunks = behind.chat.completions.create(model="mock-model", messages=messages, max_tokens=400, stop=["STOP"], stream=True)
    assert said(chunks) == "one "
    assert time.monotonic() - started < 3, "the whole would take eight seconds"


def test_a_client_that_leaves_ends_the_engines_work(served: Served, behind: openai.OpenAI) -> None:
    if served.traits.passthrough:
        pytest.skip("the fake handlers of SGLang's OpenAI JSON do not log aborts")
    before = len(served.engine.log("abort"))
    with behind.chat.completions.create(
        model="mock-model", messages=ask({"text": "w " * 200, "delay": 0.05}), max_tokens=400, stream=True
    ) as stream:
        next(iter(stream))
    give_up = time.monotonic() + 10
    while len(served.engine.log("abort")) == before and time.monotonic() < give_up:
        time.sleep(0.05)
    assert len(served.engine.log("abort")) > before
