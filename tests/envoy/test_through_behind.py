"""Behind another endpoint picker that understands OpenAI JSON only: it picks, ours transcodes, and it sees JSON both ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import httpx
import openai
import pytest
from harness import Envoy, ExtProcThread, body, headers, headers_of, kind, trailers
from stack import ExtProc, envoy_of, events_of, ext_proc_of, make_sim, wait_until

from gaie_codec.adapters import DIALECTS
from gaie_codec.ext_proc.picking import DESTINATION
from test_e2e import SimThread, ask, connect, count_aborted, stream_text

CHAT = "v1/chat/completions"
# Servers that tell errors by the status and in a message, and that know stop strings and do not.
CHAINS = [(dialect, "header") for dialect in DIALECTS] + [("vllm.engine", "metadata")]


class JsonPicker:
    """A stand-in for llm-d's EPP: holds the request until it is whole, reads its JSON, picks, and passes the answer on as it comes.

    `requests` and `answers` are what it saw: the JSON of requests, and (status, content type, body so far) of answers.
    """

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Any] = []
        self.answers: list[list[Any]] = []
        self.server = ExtProcThread(self._process)

    async def _process(self, read: Any, write: Any) -> None:
        with suppress(grpc.aio.BaseError):  # who is gone needs no answer
            await self._pass(read, write)

    async def _pass(self, read: Any, write: Any) -> None:
        whole = b""
        answer: list[Any] = [0, "", b""]
        while (message := await read()) is not None:
            what = kind(message)
            if what == "request_body":
                whole += message.request_body.body
                if message.request_body.end_of_stream:
                    self.requests.append(json.loads(whole))
                    named = {"x_gateway_destination_endpoint": self.address}
                    await write(headers("request", {DESTINATION: self.address}, **named))
                    for start in range(0, len(whole), 60_000):
                        piece = whole[start : start + 60_000]
                        await write(body("request", piece, end=start + len(piece) == len(whole)))
            elif what == "response_headers":
                seen = headers_of(message)
                answer[:2] = int(seen[":status"]), seen["content-type"]
                self.answers.append(answer)
                await write(headers("response"))
            elif what == "response_body":
                answer[2] += message.response_body.body
                await write(body("response", message.response_body.body, end=message.response_body.end_of_stream))
            elif what == "response_trailers":
                await write(trailers("response"))


class Chain(NamedTuple):
    picker: JsonPicker
    ext_proc: ExtProc
    envoy: Envoy
    sim: SimThread


@pytest.fixture(scope="module", params=CHAINS, ids="-".join)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with chain_of(tmp_path_factory.mktemp("chain"), *request.param) as made:
        httpx.post(f"{made.envoy.url}/{CHAT}", json={"messages": ask()}, timeout=20)
        wait_until(lambda: "is ready" in made.ext_proc.log())
        yield made


@contextmanager
def chain_of(directory: Path, dialect: str, destination: str = "header", *, more: Sequence[str] = ()) -> Iterator[Chain]:
    with ExitStack() as stack:
        sim = make_sim(dialect)
        stack.callback(sim.stop)
        picker = JsonPicker()
        stack.callback(picker.server.stop)
        picker.address = f"127.0.0.1:{sim.port}"
        own = ("--listen", "127.0.0.1:0", "--picker", "none", "--dialect", dialect, "--tokenizer", "builtin", "--log-level", "info")
        ext_proc = stack.enter_context(ext_proc_of(directory, *own, "--no-passthrough", *more))
        envoy = stack.enter_context(envoy_of(directory, ext_proc.address, behind=picker.server.address, destination=destination))
        yield Chain(picker, ext_proc, envoy, sim)
        assert picker.server.errors == []


@pytest.fixture(scope="module")
def client(chain: Chain) -> Iterator[openai.OpenAI]:
    with connect(chain.envoy.url) as made:
        yield made


def last_answer(chain: Chain, before: int) -> list[Any]:
    assert len(chain.picker.answers) == before + 1
    return chain.picker.answers[-1]


def test_json_goes_both_ways(chain: Chain, client: openai.OpenAI):
    before = len(chain.picker.answers)
    messages = ask({"text": "one two"})
    answer = client.chat.completions.with_raw_response.create(model="", messages=messages)
    assert answer.parse().choices[0].message.content == "one two"
    assert chain.picker.requests[-1]["messages"] == messages
    status, content_type, seen = last_answer(chain, before)
    assert (status, content_type) == (200, "application/json")
    assert json.loads(seen) == json.loads(answer.content)
    assert json.loads(seen)["usage"]["completion_tokens"] > 0


def test_events_go_through_one_by_one(chain: Chain, client: openai.OpenAI):
    before = len(chain.picker.answers)
    running, texts = [], []
    for chunk in client.chat.completions.create(model="", messages=ask({"text": "one two three", "delay_ms": 60}), stream=True):
        for choice in chunk.choices:
            if choice.delta.content:
                running.append(bool(chain.sim.server.running))
                texts.append(choice.delta.content)
    assert "".join(texts) == "one two three"
    assert all(running[:2])
    status, content_type, seen = last_answer(chain, before)
    assert (status, content_type.partition(";")[0]) == (200, "text/event-stream")
    assert events_of(seen.decode())[-1] == "[DONE]"


def test_a_long_prompt_goes_through(chain: Chain):
    messages = [{"role": "user", "content": "Hi"}]
    answer = httpx.post(f"{chain.envoy.url}/{CHAT}", json={"messages": messages, "user": "x" * 3_000_000}, timeout=20)
    assert answer.status_code == 200
    assert chain.sim.server.requests[-1].prompt_token_ids or chain.sim.server.requests[-1].prompt_text


def fail(chain: Chain, after: int) -> httpx.Response:
    script = {"text": "one two three", "error": {"code": "INTERNAL", "message": "boom", "after": after}}
    return httpx.post(f"{chain.envoy.url}/{CHAT}", json={"messages": ask(script), "stream": True}, timeout=3)


def test_an_error_amid_the_stream_is_an_event(chain: Chain):
    before = len(chain.picker.answers)
    answer = fail(chain, after=2)
    status, content_type, seen = last_answer(chain, before)
    assert (status, seen) == (answer.status_code, answer.content)
    assert (status, content_type.partition(";")[0]) == (200, "text/event-stream")
    assert json.loads(events_of(answer.text)[-1])["error"]["code"] == 500
    assert "[DONE]" not in answer.text


def test_an_error_before_the_first_token_is_json(chain: Chain):
    answer = fail(chain, after=0)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == 500


def test_an_error_before_the_first_token_is_seen_by_the_picker(chain: Chain):
    before = len(chain.picker.answers)
    answer = fail(chain, after=0)
    status, content_type, seen = last_answer(chain, before)
    assert (status, content_type, seen) == (500, "application/json", answer.content)


def test_what_is_wrong_with_a_request_is_told_through_it(chain: Chain, client: openai.OpenAI):
    before, asked = len(chain.picker.answers), len(chain.sim.server.requests)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="", messages=ask(), temperature=-1)
    assert refused.value.param == "temperature"
    assert last_answer(chain, before)[:2] == [400, "application/json"]
    assert len(chain.sim.server.requests) == asked


def test_stop_strings_and_clients_that_go_away(chain: Chain, client: openai.OpenAI):
    messages = ask({"text": "one STOP" + " more" * 400, "delay_ms": 5})
    for _ in range(2):
        assert stream_text(client, messages=messages, stop="STOP")[0] == "one "
    before = count_aborted(chain.sim)
    with client.chat.completions.create(model="", messages=ask({"text": "one " * 400, "delay_ms": 20}), stream=True) as stream:
        next(iter(stream))
        assert chain.sim.server.running
    wait_until(lambda: len(chain.sim.server.aborted) == before + 1, within_s=5)


def test_a_server_that_is_not_there_is_a_5xx_in_json(tmp_path: Path):
    with chain_of(tmp_path, "vllm.engine") as chain:
        good = chain.picker.address
        for address, status in (("127.0.0.1:1", 503), ("junk", 502), (good, 200)):
            chain.picker.address = address
            answer = httpx.post(f"{chain.envoy.url}/{CHAT}", json={"messages": ask()}, timeout=20)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["code"] == status


@pytest.mark.parametrize("dialect", ["sglang.scheduler", "sglang.api"])
def test_the_first_request_to_a_server_that_is_not_listed(dialect: str, tmp_path: Path):
    with chain_of(tmp_path, dialect) as chain:
        answer = httpx.post(f"{chain.envoy.url}/{CHAT}", json={"messages": ask({"text": "one"})}, timeout=20)
        assert answer.status_code == 200, answer.text


def test_a_stop_string_in_the_last_words_ends_the_answer(tmp_path: Path):
    with chain_of(tmp_path, "sglang.scheduler") as chain:
        for number in range(12):
            body = {"messages": ask({"text": "one STOP" + " w" * (number % 4)}), "stop": "STOP", "stream": True}
            answer = httpx.post(f"{chain.envoy.url}/{CHAT}", json=body, timeout=2)
            assert events_of(answer.text)[-1] == "[DONE]"


def test_a_deadline_amid_streams_ends_them(tmp_path: Path):
    """The model server is told the deadline too, so that both ends meet now and then."""
    answers: list[str] = []

    def post(url: str) -> None:
        for _ in range(3):
            with suppress(httpx.ReadTimeout):
                body = {"messages": ask({"text": "word " * 300, "delay_ms": 10}), "stream": True}
                answers.append(httpx.post(url, json=body, timeout=2).text)

    with chain_of(tmp_path, "vllm.engine", more=("--request-timeout", "0.5")) as chain:
        threads = [threading.Thread(target=post, args=(f"{chain.envoy.url}/{CHAT}",)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 48
    assert {json.loads(events_of(answer)[-1]).get("error", {}).get("code") for answer in answers} == {504}
