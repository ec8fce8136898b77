"""Tool calls, reasoning, and the endpoints that are chats in other words, through gaie-codec to every engine: what the front ends make of
special tokens, text and constraints is theirs, and the parsers have to read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from conftest import Served, ask, serve

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🌍"}}\n</tool_call>'
THOUGHT = "<think>\nhm, 你\n</think>\n\n"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    if served.traits.passthrough:
        pytest.skip("the server reads its model's output itself")
    parsers = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    with serve(served.engine, *served.traits.serve, *parsers) as url:
        yield served.client.with_options(base_url=f"{url}/v1")


def read(client: openai.OpenAI, stream: bool, **request: Any) -> Any:
    """The choice; a stream's put together by the SDK."""
    if not stream:
        return client.chat.completions.create(model="mock-model", **request).choices[0]
    with client.chat.completions.stream(model="mock-model", **request) as chunks:
        return chunks.get_final_completion().choices[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_after_a_thought(client: openai.OpenAI, stream: bool, choice: str) -> None:
    found = read(client, stream, messages=ask({"text": f"{THOUGHT}{CALL}"}), tools=[TOOL], tool_choice=choice, max_tokens=300)
    assert found.message.reasoning == "\nhm, 你\n"
    (call,) = found.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Zürich 🌍"})
    assert found.finish_reason == "tool_calls"
    assert "<" not in (found.message.content or "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_before_an_answer(client: openai.OpenAI, stream: bool) -> None:
    found = read(client, stream, messages=ask({"text": f"{THOUGHT}42"}), max_tokens=300)
    assert (found.message.reasoning, found.message.content, found.finish_reason) == ("\nhm, 你\n", "\n\n42", "stop")


def test_reasoning_is_counted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mock-model", messages=ask({"text": f"{THOUGHT}42"}), max_tokens=300)
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_responses(client: openai.OpenAI, stream: bool) -> None:
    tool = {"type": "function", **TOOL["function"]}
    (message,) = ask({"text": f"{THOUGHT}Hello {CALL}"})
    request = {"model": "mock-model", "input": message["content"], "tools": [tool], "max_output_tokens": 300}
    if stream:
        with client.responses.stream(**request) as events:
            answer = events.get_final_response()
    else:
        answer = client.responses.create(**request)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert json.loads(answer.output[2].arguments) == {"city": "Zürich 🌍"}


def test_messages(client: openai.OpenAI) -> None:
    body = {"model": "mock-model", "max_tokens": 300, "messages": ask({"text": f"{THOUGHT}Hello {CALL}"})}
    body["tools"] = [{"name": "get_weather", "input_schema": TOOL["function"]["parameters"]}]
    answer = client.post("/messages", body=body, cast_to=dict)
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert (answer["content"][2]["input"], answer["stop_reason"]) == ({"city": "Zürich 🌍"}, "tool_use")
