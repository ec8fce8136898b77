"""`/v1/responses` for the openai SDK and LangChain: through `gaie-codec serve` and a simulated server."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai.types.responses import Response

from gaie_codec import ModelInfo
from gaie_codec.tokenizer_sources import load_tokenizer
from sim_thread import SimThread
from test_e2e import connect, serve

TOKENIZER = load_tokenizer("builtin")
MODEL = ModelInfo(served_model_name="sim", max_model_len=2048)
DIALECTS = ("vllm.engine", "vllm.inference", "sglang.scheduler", "sglang.runtime", "sglang.api")
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]


def ask(**script: Any) -> str:
    return f"Hi [[sim {json.dumps(script, ensure_ascii=False)}]]"


@pytest.fixture(scope="module", params=DIALECTS)
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    dialect = request.param
    thread = SimThread(dialect, model=MODEL, tokenizer="builtin")
    options = ["--tokenizer", "builtin"] + (["--no-passthrough"] if dialect == "sglang.runtime" else [])
    try:
        with serve(thread.port, *options, dialect=dialect) as url, connect(url) as made:
            yield made
    finally:
        thread.stop()


def same(one: Response, other: Response) -> bool:
    """Equal but for ids and time."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: without(item)
                for key, item in value.items()
                if key not in ("id", "created_at", "call_id", "parsed", "parsed_arguments")
            }
        return [without(item) for item in value] if isinstance(value, list) else value

    return bool(without(one.to_dict()) == without(other.to_dict()))


class City(pydantic.BaseModel):
    name: str
    people: int


class TestThroughSim:
    @pytest.mark.parametrize("text", ["Hello there.", "Emoji 🌍👋🏽 and 你好", ""])
    def test_create_and_stream_agree(self, client: openai.OpenAI, text: str) -> None:
        request: dict[str, Any] = {"model": "", "input": ask(text=text), "instructions": "Be brief.", "metadata": {"a": "b"}}
        unary = client.responses.create(**request)
        assert unary.output_text == text
        assert (unary.status, unary.metadata, unary.instructions) == ("completed", {"a": "b"}, "Be brief.")
        with client.responses.stream(**request) as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
        assert same(final, unary)
        assert unary.usage is not None
        assert unary.usage.output_tokens == len(TOKENIZER.encode(text, add_special_tokens=False)) + 1

    def test_parse(self, client: openai.OpenAI) -> None:
        request: dict[str, Any] = {"model": "", "input": ask(text='{"name": "Rome", "people": 3}'), "text_format": City}
        parsed = client.responses.parse(**request)
        assert parsed.output_parsed == City(name="Rome", people=3)
        with client.responses.stream(**request) as stream:
            assert stream.get_final_response().output_parsed == parsed.output_parsed

    def test_incomplete(self, client: openai.OpenAI) -> None:
        request: dict[str, Any] = {"model": "", "input": ask(text="many words come here"), "max_output_tokens": 3}
        unary = client.responses.create(**request)
        assert unary.status == "incomplete"
        assert unary.incomplete_details is not None
        assert unary.incomplete_details.reason == "max_output_tokens"
        *_, last = client.responses.create(**request, stream=True)
        assert last.type == "response.incomplete"
        assert same(last.response, unary)

    def test_a_conversation_is_sent_back_as_it_came(self, client: openai.OpenAI) -> None:
        first = client.responses.create(model="", input=ask(text="one"))
        again: Any = [{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": ask(text="two")}]
        assert client.responses.create(model="", input=again).output_text == "two"

    def test_log_probabilities(self, client: openai.OpenAI) -> None:
        request: dict[str, Any] = {
            "model": "",
            "input": ask(text="Hello there"),
            "top_logprobs": 2,
            "include": ["message.output_text.logprobs"],
        }
        unary = client.responses.create(**request)
        logprobs = unary.output[0].content[0].logprobs
        streamed = [
            one for event in client.responses.create(**request, stream=True) if event.type.endswith("text.delta") for one in event.logprobs
        ]
        assert [(one.token, one.logprob) for one in logprobs] == [(one.token, one.logprob) for one in streamed]
        assert "".join(one.token for one in logprobs).startswith("Hello there")
        assert [len(one.top_logprobs) for one in logprobs[:2]] == [2, 2]

    @pytest.mark.parametrize("stream", [False, True])
    def test_error_before_the_first_token(self, client: openai.OpenAI, stream: bool) -> None:
        error = {"code": "RESOURCE_EXHAUSTED", "message": "the server says no", "after": 0}
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(model="", input=ask(error=error), stream=stream)
        assert caught.value.status_code in (429, 500)

    def test_error_amid_the_stream(self, client: openai.OpenAI) -> None:
        error = {"code": "INTERNAL", "message": "boom", "after": 2}
        stream = client.responses.create(model="", input=ask(text="one two three", error=error), stream=True)
        events = []
        with pytest.raises(openai.APIError):
            events.extend(stream)  # takes what came before
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.code == "server_error"
        assert "boom" not in str(events)

    def test_what_is_not_stored_cannot_be_asked_for(self, client: openai.OpenAI) -> None:
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="not stored"):
                call("resp_1")
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="", input="x", previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="nope", input="x")

    def test_what_has_no_effect_is_named(self, client: openai.OpenAI) -> None:
        answer = client.responses.with_raw_response.create(
            model="", input=ask(text="x"), store=True, include=["reasoning.encrypted_content"]
        )
        assert answer.headers["x-gaie-codec-dropped"] == "include.reasoning.encrypted_content, store"
        assert answer.parse().output_text == "x"


CALLS = "".join(f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>\n' for city in ("Rome", "Zürich"))


@pytest.fixture(scope="module", params=["vllm.engine", "vllm.inference", "sglang.api"])
def parsing(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """In front of a model that thinks and calls tools."""
    thread = SimThread(request.param, model=MODEL, tokenizer="builtin")
    options = ["--tokenizer", "builtin", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
    try:
        with serve(thread.port, *options, dialect=request.param) as url, connect(url) as made:
            yield made
    finally:
        thread.stop()


class TestParsedOutput:
    @pytest.mark.parametrize("step", [1, 7])
    def test_tool_call_loop(self, parsing: openai.OpenAI, step: int) -> None:
        text = f"<think>\nRome, and Zürich.\n</think>\n\nLet me see. {CALLS}"
        asked: list[Any] = [{"role": "user", "content": ask(text=text, step=step)}]
        unary = parsing.responses.create(model="", input=asked, tools=TOOLS)
        with parsing.responses.stream(model="", input=asked, tools=TOOLS) as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert same(final, unary)
        assert [item.type for item in unary.output] == ["reasoning", "message", "function_call", "function_call"]
        assert unary.output[0].content[0].text.strip() == "Rome, and Zürich."
        assert unary.output_text.strip() == "Let me see."
        assert unary.usage is not None
        assert unary.usage.output_tokens_details.reasoning_tokens > 3
        calls = [item for item in final.output if item.type == "function_call"]
        assert [json.loads(call.arguments)["city"] for call in calls] == ["Rome", "Zürich"]
        assert all(call.call_id.startswith("call_") for call in calls)
        assert len({call.call_id for call in calls}) == 2
        told = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert told[-1].snapshot == calls[1].arguments
        outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
        # The SDK's own way to send output back.
        again: list[Any] = [
            *asked,
            *(item.to_dict() for item in final.output),
            *outputs,
            {"role": "user", "content": ask(text="</think>Sun.")},
        ]
        assert parsing.responses.create(model="", input=again, tools=TOOLS).output_text == "Sun."

    @pytest.mark.parametrize("finish", ["stop", "length"])
    def test_a_broken_call(self, parsing: openai.OpenAI, finish: str) -> None:
        text = '<tool_call>\n{"name": "weather", "arguments": {"ci'
        request: dict[str, Any] = {"model": "", "input": ask(text=text, finish=finish), "tools": TOOLS}
        unary = parsing.responses.create(**request)
        assert [item.type for item in unary.output] == ["message"]
        assert unary.output_text == text
        with parsing.responses.stream(**request) as stream:
            events = list(stream)
        ended = [(event.item.type, event.item.status) for event in events if event.type == "response.output_item.done"]
        assert ended == [("function_call", "incomplete"), ("message", "completed" if finish == "stop" else "incomplete")]
        assert events[-1].type == ("response.completed" if finish == "stop" else "response.incomplete")
        assert same(events[-1].response, unary)

    @pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
    def test_a_call_that_is_demanded(self, parsing: openai.OpenAI, choice: Any) -> None:
        arguments = '{"city": "Rome"}'
        text = CALLS.partition("\n</tool_call>")[0] + "\n</tool_call>"
        unary = parsing.responses.create(model="", input=ask(text=text), tools=TOOLS, tool_choice=choice)
        calls = [item for item in unary.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", json.loads(arguments))]

    def test_pydantic_tools(self, parsing: openai.OpenAI) -> None:
        tool: Any = openai.pydantic_function_tool(City)["function"]
        call = '<tool_call>{"name": "City", "arguments": {"name": "Rome", "people": 3}}</tool_call>'
        request: dict[str, Any] = {"model": "", "input": ask(text=call), "tools": [{"type": "function", **tool}]}
        with parsing.responses.stream(**request) as stream:
            assert json.loads(stream.get_final_response().output[0].arguments) == {"name": "Rome", "people": 3}

    def test_langchain(self, parsing: openai.OpenAI) -> None:
        model = ChatOpenAI(base_url=str(parsing.base_url), api_key="none", model="sim", use_responses_api=True, max_retries=0)
        asked = ask(text="<think>hm</think>Hello there")
        whole = model.invoke(asked)
        streamed = functools.reduce(operator.add, model.stream(asked))
        assert whole.text == streamed.text == "Hello there"
        assert whole.usage_metadata == streamed.usage_metadata
        tools = model.bind_tools([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
        conversation: list[Any] = [HumanMessage(ask(text=f"<think>hm</think>{CALLS}"))]
        said = tools.invoke(conversation)
        assert [call["args"] for call in said.tool_calls] == [{"city": "Rome"}, {"city": "Zürich"}]
        assert [call["args"] for call in functools.reduce(operator.add, tools.stream(conversation)).tool_calls] == [
            {"city": "Rome"},
            {"city": "Zürich"},
        ]
        conversation += [said, *(ToolMessage("sunny", tool_call_id=call["id"]) for call in said.tool_calls)]
        assert tools.invoke([*conversation, HumanMessage(ask(text="</think>Sun."))]).text == "Sun."
        structured = model.with_structured_output(City).invoke(ask(text='</think>{"name": "Rome", "people": 3}'))
        assert structured == City(name="Rome", people=3)
