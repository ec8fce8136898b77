"""The openai SDK -> Envoy -> ext-proc -> a simulated model server, in every dialect."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from stack import Stack, events_of, make_sim, stack_of, wait_until

from gaie_codec import snapshots
from test_e2e import RAISED, TARGETS, Target, ask, connect, count_aborted, encode, stream_text

NEWEST = [target for target in TARGETS if target.snapshot == snapshots.load(target.dialect).name]
"""Each dialect, and sglang.runtime both ways."""


def name_of(target: Target) -> str:
    return target.dialect + ("-passthrough" if target.passes_through else "")


@pytest.fixture(scope="module", params=NEWEST, ids=name_of)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(scope="module")
def stack(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    way = "--passthrough" if target.passes_through else "--no-passthrough"
    with stack_of(tmp_path_factory.mktemp("stack"), way, sims=[make_sim(target.dialect)]) as made:
        yield made


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with connect(stack.url) as made:
        yield made


def test_all_dialects_are_here():
    assert {target.dialect for target in NEWEST} == {
        "vllm.engine",
        "vllm.inference",
        "sglang.scheduler",
        "sglang.runtime",
        "sglang.api",
    }


@pytest.mark.parametrize("text", ["Hello there.", "Emoji 🌍👋🏽 and 你好", ""])
def test_unary_and_stream_agree(client: openai.OpenAI, text: str):
    messages = ask({"text": text})
    unary = client.chat.completions.create(model="", messages=messages)
    streamed, chunks = stream_text(client, messages=messages, stream_options={"include_usage": True})
    assert unary.choices[0].message.content == streamed == text
    assert unary.choices[0].finish_reason == "stop"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    assert chunks[-1].usage == unary.usage
    assert unary.usage is not None
    assert unary.usage.completion_tokens == len(encode(text)) + 1


def test_chunks_come_one_by_one(client: openai.OpenAI, stack: Stack):
    messages = ask({"text": "one two three four five", "delay_ms": 60})
    at: list[float] = []
    was_running = []
    for chunk in client.chat.completions.create(model="", stream=True, messages=messages):
        if any(choice.delta.content for choice in chunk.choices):
            at.append(time.monotonic())
            was_running.append(bool(stack.sim.server.running))
    assert len(at) >= 5
    assert all(was_running[:4]), "the answer was held until it was whole"
    assert at[-1] - at[0] > 0.06 * 3


def test_completions(client: openai.OpenAI):
    prompt = f"x [[sim {json.dumps({'text': 'one two'})}]]"
    unary = client.completions.create(model="", prompt=prompt)
    chunks = list(client.completions.create(model="", prompt=prompt, stream=True))
    assert unary.choices[0].text == "".join(choice.text for chunk in chunks for choice in chunk.choices) == "one two"


def test_two_choices_where_one_call_has_them_and_a_refusal_elsewhere(client: openai.OpenAI, target: Target):
    texts = ["first", "the second is longer"]
    messages = ask({"text": texts})
    if target.fans_out:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model="", messages=messages, n=2, stream=stream)
            assert refused.value.param == "n"
        return
    unary = client.chat.completions.create(model="", messages=messages, n=2)
    assert [(choice.index, choice.message.content) for choice in unary.choices] == list(enumerate(texts))
    _, chunks = stream_text(client, messages=messages, n=2)
    for index, text in enumerate(texts):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == text
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]


@pytest.mark.parametrize(("stop", "kept"), [("STOP", "one two "), (["zzz", "two ST"], "one "), ("never", "one two STOP three")])
def test_stop_strings(client: openai.OpenAI, stop: Any, kept: str):
    messages = ask({"text": "one two STOP three"})
    unary = client.chat.completions.create(model="", messages=messages, stop=stop)
    streamed, chunks = stream_text(client, messages=messages, stop=stop)
    assert unary.choices[0].message.content == streamed == kept
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]


def test_a_stop_string_that_we_match_ends_the_call(client: openai.OpenAI, stack: Stack, target: Target):
    before = count_aborted(stack.sim)
    messages = ask({"text": "one two STOP" + " more" * 400, "delay_ms": 10})
    for _ in range(3):  # on one connection: what was cut leaves it in order
        text, chunks = stream_text(client, messages=messages, stop="STOP")
        assert text == "one two "
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    cuts = 3 if target.dialect == "sglang.scheduler" else 0  # the others are told the stop strings
    wait_until(lambda: not stack.sim.server.running)
    assert len(stack.sim.server.aborted) == before + cuts


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_request_is_named(client: openai.OpenAI, stack: Stack, stream: bool):
    before = len(stack.sim.server.requests)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="", messages=ask(), stream=stream, temperature=-1)
    assert refused.value.param == "temperature"
    body = refused.value.response.json()
    assert set(body) == {"error"}
    assert (body["error"]["code"], body["error"]["type"]) == (400, "BadRequestError")
    assert refused.value.response.headers["content-type"] == "application/json"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=ask(), stream=stream)
    assert len(stack.sim.server.requests) == before


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_status(client: openai.OpenAI, target: Target, code: str, stream: bool):
    messages = ask({"error": {"code": code, "message": "the server says no", "after": 0}})
    status = target.status(code)
    with pytest.raises(RAISED[status]) as caught:
        client.chat.completions.create(model="", messages=messages, stream=stream)
    error = caught.value.response.json()["error"]
    assert (caught.value.status_code, error["code"]) == (status, status)
    assert ("the server says no" in error["message"]) == (status < 500)
    assert caught.value.response.headers["content-type"] == "application/json"


def test_an_error_amid_the_stream_is_an_event_and_no_done_follows(stack: Stack):
    body = {"messages": ask({"text": "one two three", "error": {"code": "INTERNAL", "message": "boom", "after": 2}}), "stream": True}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200
    events = events_of(answer.text)
    assert json.loads(events[-1])["error"]["code"] == 500
    assert len(events) >= 2
    assert "boom" not in answer.text
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("script", [{"complete": False}, {"finish": "abort"}, {"finish": "error"}])
def test_no_proper_finish_is_an_error(client: openai.OpenAI, script: dict[str, Any]):
    messages = ask({"text": "cut", **script})
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="", messages=messages)
    with pytest.raises(openai.APIError):
        stream_text(client, messages=messages)


def test_an_unknown_endpoint_is_not_found(client: openai.OpenAI, target: Target):
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(model="", input="x")
    if target.dialect in ("vllm.inference", "sglang.api"):
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="", input="x")
    if not target.passes_through:
        return
    answer = client.embeddings.create(model="sim", input=["one", "two words"])
    assert [len(one.embedding) for one in answer.data] == [8, 8]
