"""Very long prompts and answers through Envoy: they pass or are refused clearly, and other streams flow meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from stack import Stack, make_sim, note, stack_of, wait_until

from test_e2e import ask, connect

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack"), sims=[make_sim(max_model_len=8192)]) as made:
        yield made


class Flowing:
    """Streams, one after the other, and the silences in them."""

    def __init__(self, url: str) -> None:
        self.gaps_s: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._flow, args=(url,))
        self._thread.start()

    def _flow(self, url: str) -> None:
        messages = ask({"text": "word " * 10, "delay_ms": 20})
        with connect(url) as client:
            while not self._is_over.is_set():
                before = time.monotonic()
                for _ in client.chat.completions.create(model="", stream=True, messages=messages):
                    self.gaps_s.append(time.monotonic() - before)
                    before = time.monotonic()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def filled(kind: str, mebibytes: float) -> tuple[str, bytes]:
    """Path and body of a request of that size, which is long in that place."""
    if kind == "ids":
        return "/v1/completions", b'{"prompt": [' + b"50," * int(mebibytes * MIB / 3) + b"50]}"
    words = b"many words " * int(mebibytes * MIB / 11)
    if kind == "user":
        return "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "Hi"}], "user": "' + words + b'"}'
    return "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "' + words + b'"}]}'


@pytest.mark.parametrize(("kind", "mebibytes", "status"), [("words", 20, 400), ("ids", 20, 400), ("words", 70, 413), ("user", 20, 200)])
def test_a_very_long_request_passes_or_is_refused_clearly_while_other_streams_flow(stack: Stack, kind: str, mebibytes: int, status: int):
    path, body = filled(kind, mebibytes)
    flowing = Flowing(stack.url)
    try:
        wait_until(lambda: len(flowing.gaps_s) > 5)
        started = time.monotonic()
        answer = httpx.post(f"{stack.url}{path}", content=body, timeout=60)
        took_s = time.monotonic() - started
    finally:
        flowing.stop()
    note(f"{mebibytes} MiB: {answer.status_code} after {took_s:.2f} s; longest silence elsewhere {max(flowing.gaps_s):.2f} s")
    assert answer.status_code == status, answer.text[:200]
    if status != 200:
        assert answer.json()["error"]["code"] == status
        assert len(answer.text) < 1000, "the prompt came back"
    assert max(flowing.gaps_s) < 2


def test_a_very_long_prompt_arrives_whole(tmp_path: Path):
    sim = make_sim(max_model_len=50 * MIB)
    with stack_of(tmp_path, sims=[sim]) as stack:
        path, body = filled("ids", 20)
        started = time.monotonic()
        answer = httpx.post(f"{stack.url}{path}", content=body, timeout=60)
        note(f"{answer.status_code} after {time.monotonic() - started:.2f} s")
        assert answer.status_code == 200, answer.text[:200]
        asked = json.loads(body)["prompt"]
        assert list(sim.server.requests[-1].prompt_token_ids) == asked
        assert answer.json()["usage"]["prompt_tokens"] == len(asked)


def test_json_that_a_server_takes_as_it_is_may_be_long(tmp_path: Path):
    with stack_of(tmp_path, dialect="sglang.runtime") as stack:
        path, body = filled("user", 20)
        answer = httpx.post(f"{stack.url}{path}", content=body, timeout=60)
        assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "stop")


@pytest.mark.parametrize("stream", [True, False])
def test_a_large_answer_arrives_whole(stack: Stack, stream: bool):
    with connect(stack.url) as client:
        text = "word " * 600
        request = {"messages": ask({"text": text, "step": 100}), "logprobs": True, "top_logprobs": 20, "stream": stream}
        if stream:
            chunks = list(client.chat.completions.create(model="", **request))
            choices = [choice for chunk in chunks for choice in chunk.choices]
            assert "".join(choice.delta.content or "" for choice in choices) == text
            entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
        else:
            answer = client.chat.completions.with_raw_response.create(model="", **request)
            assert len(answer.content) > MIB
            (choice,) = answer.parse().choices
            assert choice.message.content == text
            entries = choice.logprobs.content
        assert len(entries) > 600
        assert {len(entry.top_logprobs) for entry in entries} == {20}
