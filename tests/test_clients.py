"""The helpers of real clients on top of the API: the openai SDK's accumulators, parsing and tool loop, and LangChain's ChatOpenAI.

What the model writes is scripted in the prompt (`[[sim ...]]`); all between the client and the model server is real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pydantic
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from gaie_codec import ModelInfo
from sim_thread import SimThread
from test_e2e import connect, serve

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
        "strict": True,
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


class Answer(pydantic.BaseModel):
    city: str
    degrees: int


@pytest.fixture(scope="module", params=["vllm.engine", "vllm.inference", "sglang.scheduler", "sglang.runtime", "sglang.api"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    sim = SimThread(request.param, model=ModelInfo(served_model_name="sim", max_model_len=4096), tokenizer="builtin")
    options = ("--tokenizer", "builtin", "--tool-call-parser", "hermes", "--no-passthrough")
    with serve(sim.port, *options, dialect=request.param) as address:
        yield address
    sim.stop()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with connect(url) as connected:
        yield connected


def says(text: str, **script) -> list[dict]:
    return [{"role": "user", "content": f"[[sim {json.dumps({'text': text, **script})}]]"}]


def test_the_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="sim", messages=says(f"Let me look. {CALL}{CALL}"), tools=[WEATHER], temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Let me look. "
    assert [call.function.parsed_arguments for call in message.tool_calls] == [{"city": "Zürich"}] * 2
    assert len({call.id for call in message.tool_calls}) == 2
    assert final.choices[0].finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert "content.delta" in kinds


def test_the_stream_helper_keeps_choices_apart(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="sim", messages=says(CALL), tools=[WEATHER], n=2) as stream:
        final = stream.get_final_completion()
    assert [choice.message.tool_calls[0].function.parsed_arguments for choice in final.choices] == [{"city": "Zürich"}] * 2
    assert len({choice.message.tool_calls[0].id for choice in final.choices}) == 2


def test_parse_gives_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = Answer(city="Bern", degrees=-3)
    completion = client.chat.completions.parse(model="sim", messages=says(answer.model_dump_json()), response_format=Answer)
    assert completion.choices[0].message.parsed == answer
    completion = client.chat.completions.parse(model="sim", messages=says(CALL), tools=[openai.pydantic_function_tool(Answer), WEATHER])
    assert completion.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_parse_tells_that_it_was_cut_off(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="sim", messages=says('{"city": "Bern", "degrees": 3}'), response_format=Answer, max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_loop(client: openai.OpenAI, stream: bool) -> None:
    messages: list = says(CALL)
    if stream:
        with client.chat.completions.stream(model="sim", messages=messages, tools=[WEATHER]) as chunks:
            message = chunks.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(model="sim", messages=messages, tools=[WEATHER]).choices[0].message
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    messages += [
        message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "7 degrees"},
    ]
    messages += says("It is 7 degrees.")
    last = client.chat.completions.create(model="sim", messages=messages, tools=[WEATHER])
    assert last.choices[0].message.content == "It is 7 degrees."
    assert last.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_no_tool_call(client: openai.OpenAI, stream: bool) -> None:
    cut = CALL[: CALL.index("rich")]
    if stream:
        chunks = [
            one for one in client.chat.completions.create(model="sim", messages=says(cut), tools=[WEATHER], stream=True) if one.choices
        ]
        assert chunks[-1].choices[0].finish_reason == "stop"
        told = "".join(call.function.arguments or "" for one in chunks for call in one.choices[0].delta.tool_calls or ())
        assert told == '{"city": "Zü'
    else:
        choice = client.chat.completions.create(model="sim", messages=says(cut), tools=[WEATHER]).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (cut, None, "stop")


def test_reasoning_comes_apart(url: str, client: openai.OpenAI) -> None:
    with connect(url) as connected:
        answer = connected.chat.completions.create(model="sim", messages=says("<think>why</think>because"))
    assert "why" in answer.choices[0].message.content, "the builtin template shows no reasoning, so none is looked for"


# LangChain


@tool
def get_weather(city: str) -> str:
    """Get weather."""
    return f"7 degrees in {city}"


@pytest.fixture(scope="module")
def model(url: str) -> ChatOpenAI:
    return ChatOpenAI(model="sim", base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def test_langchain_invoke_and_stream(model: ChatOpenAI) -> None:
    (message,) = says("Hello, world!")
    answer = model.invoke([HumanMessage(message["content"])])
    assert answer.content == "Hello, world!"
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"
    whole = None
    for chunk in model.stream([HumanMessage(message["content"])], stream_usage=True):
        whole = chunk if whole is None else whole + chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.content == "Hello, world!"
    assert whole.usage_metadata["input_tokens"] == answer.usage_metadata["input_tokens"]


def test_langchain_tools(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather])
    prompt = HumanMessage(says(CALL)[0]["content"])
    answer = bound.invoke([prompt])
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("get_weather", {"city": "Zürich"})]
    whole = None
    for chunk in bound.stream([prompt]):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Zürich"})]
    result = get_weather.invoke(answer.tool_calls[0])
    assert isinstance(result, ToolMessage)
    last = bound.invoke([prompt, answer, result, HumanMessage(says("7 degrees.")[0]["content"])])
    assert last.content == "7 degrees."


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_langchain_structured_output(model: ChatOpenAI, method: str) -> None:
    prompt = says('{"city": "Bern", "degrees": 3}')[0]["content"]
    assert model.with_structured_output(Answer, method=method).invoke(prompt) == Answer(city="Bern", degrees=3)


def test_langchain_structured_output_by_tool(model: ChatOpenAI) -> None:
    text = '<tool_call>\n{"name": "Answer", "arguments": {"city": "Bern", "degrees": 3}}\n</tool_call>'
    structured = model.with_structured_output(Answer, method="function_calling", tool_choice="auto")
    assert structured.invoke(says(text)[0]["content"]) == Answer(city="Bern", degrees=3)
