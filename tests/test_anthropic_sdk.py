"""The whole way: the anthropic SDK -> `gaie-codec serve` -> gRPC -> the simulated model server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest

from gaie_codec import ModelInfo
from sim_thread import SimThread
from test_e2e import ask, encode, serve

DIALECTS = ("vllm.engine", "vllm.inference", "sglang.scheduler", "sglang.runtime", "sglang.api")
RAISED = {
    "INVALID_ARGUMENT": (400, "invalid_request_error", anthropic.BadRequestError),
    "PERMISSION_DENIED": (403, "permission_error", anthropic.PermissionDeniedError),
    "NOT_FOUND": (404, "not_found_error", anthropic.NotFoundError),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", anthropic.RateLimitError),
    "INTERNAL": (500, "api_error", anthropic.InternalServerError),
    "UNAVAILABLE": (503, "overloaded_error", anthropic.InternalServerError),
}


@pytest.fixture(scope="module", params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def url(dialect: str) -> Iterator[str]:
    thread = SimThread(dialect, model=ModelInfo(served_model_name="sim", max_model_len=2048), tokenizer="builtin")
    try:
        with serve(thread.port, "--tokenizer", "builtin", "--enable-prompt-tokens-details", dialect=dialect) as base:
            yield base
    finally:
        thread.stop()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=30) as made:
        yield made


def request(script: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"model": "sim", "max_tokens": 500, "messages": ask(script), **fields}


@pytest.mark.parametrize("text", ["Hello there.", "Emoji \N{EARTH GLOBE EUROPE-AFRICA} and \N{CJK UNIFIED IDEOGRAPH-4F60}", ""])
def test_unary_and_stream_agree(client: anthropic.Anthropic, text: str) -> None:
    asked = request({"text": text}, system="Be kind.", metadata={"user_id": "me"})
    unary = client.messages.create(**asked)
    assert [(block.type, block.text) for block in unary.content if block.type == "text"] == [("text", text)]
    assert (unary.stop_reason, unary.stop_sequence, unary.role, unary.model) == ("end_turn", None, "assistant", "sim")
    assert unary.id.startswith("msg_")
    assert unary.usage.output_tokens == len(encode(text)) + 1
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert (final.content[0].type, final.content[0].text) == ("text", text)
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", unary.usage.output_tokens)
    read = final.usage.cache_read_input_tokens, unary.usage.cache_read_input_tokens
    assert None not in read
    assert final.usage.input_tokens + (read[0] or 0) == unary.usage.input_tokens + (read[1] or 0)


def test_tokens_are_counted_before_they_are_paid(client: anthropic.Anthropic) -> None:
    said: list[Any] = ask()
    count = client.messages.count_tokens(model="sim", messages=said, system="Be kind.")
    usage = client.messages.create(model="sim", max_tokens=5, messages=said, system="Be kind.").usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_why_it_ended(client: anthropic.Anthropic) -> None:
    long = client.messages.create(**request({"text": "many words come here"}, max_tokens=3))
    assert (long.stop_reason, long.usage.output_tokens) == ("max_tokens", 3)
    for stream in (False, True):
        asked = request({"text": "one two STOP three"}, stop_sequences=["STOP", "never"])
        if stream:
            with client.messages.stream(**asked) as events:
                stopped = events.get_final_message()
        else:
            stopped = client.messages.create(**asked)
        assert stopped.content[0].type == "text"
        assert stopped.content[0].text == "one two "
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")


@pytest.mark.parametrize("code", RAISED)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_model_server(client: anthropic.Anthropic, dialect: str, code: str, stream: bool) -> None:
    if dialect == "sglang.runtime" and code == "INVALID_ARGUMENT":
        code, told = "INTERNAL", code  # it tells of a ValueError as INTERNAL
    else:
        told = code
    if dialect == "vllm.inference" and code not in ("INVALID_ARGUMENT", "UNAVAILABLE"):
        code = "INTERNAL"  # it tells no other
    status, kind, raised = RAISED[code]
    asked = request({"error": {"code": told, "message": "the server says no", "after": 0}})
    with pytest.raises(raised) as caught:
        client.messages.create(**asked, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.body["error"]["type"] == kind
    assert ("the server says no" in str(caught.value)) == (status < 500)


def test_an_error_amid_the_stream(client: anthropic.Anthropic) -> None:
    asked = request({"text": "one two three", "error": {"code": "INTERNAL", "message": "boom", "after": 2}})
    with pytest.raises(anthropic.APIStatusError) as caught, client.messages.stream(**asked) as stream:
        assert stream.get_final_message() is None
    assert caught.value.body["error"]["type"] == "api_error"
    assert "boom" not in str(caught.value)


def test_errors_of_the_request(client: anthropic.Anthropic, url: str, dialect: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**request(model="other"))
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens must be positive") as refused:
        client.messages.create(**request(max_tokens=0))
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.count_tokens(model="sim", messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.list()
    assert httpx.get(f"{url}/v1/messages").json()["error"]["type"] == "invalid_request_error"
    answer = httpx.post(f"{url}/v1/messages", json=request(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1500, foo=1))
    assert answer.status_code == 200
    assert answer.headers["x-gaie-codec-dropped"] == "foo" + (", thinking.budget_tokens" if dialect != "vllm.inference" else "")


@pytest.fixture(scope="module", params=["vllm.engine", "vllm.inference", "sglang.api"])
def parsing(request: pytest.FixtureRequest) -> Iterator[anthropic.Anthropic]:
    """In front of a model that thinks and calls tools."""
    thread = SimThread(request.param, model=ModelInfo(served_model_name="sim", max_model_len=2048), tokenizer="builtin")
    options = ["--tokenizer", "builtin", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
    try:
        with (
            serve(thread.port, *options, dialect=request.param) as base,
            anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, timeout=30) as made,
        ):
            yield made
    finally:
        thread.stop()


WEATHER: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLS = "".join(f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>\n' for city in ("Rome", "Zürich"))


@pytest.mark.parametrize("step", [1, 7])
def test_a_tool_loop(parsing: anthropic.Anthropic, step: int) -> None:
    asked = request({"text": f"<think>\nRome, and Zürich.\n</think>\n\nLet me see. {CALLS}", "step": step}, tools=[WEATHER])
    unary = parsing.messages.create(**asked)
    with parsing.messages.stream(**asked) as stream:
        told = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    thinking, text, *calls = unary.content
    assert thinking.type == "thinking"
    assert thinking.thinking.strip() == "Rome, and Zürich."
    assert thinking.signature
    assert text.type == "text"
    assert text.text.strip() == "Let me see."
    assert unary.stop_reason == final.stop_reason == "tool_use"
    assert [(call.type, call.name, call.input) for call in calls if call.type == "tool_use"] == [
        ("tool_use", "weather", {"city": city}) for city in ("Rome", "Zürich")
    ]
    assert "".join(told).replace(" ", "") == '{"city":"Rome"}{"city":"Zürich"}'
    assert [block.to_dict().keys() for block in final.content] == [block.to_dict().keys() for block in unary.content]
    for one, other in zip(final.content, unary.content, strict=True):
        own = {"id", "signature", "parsed_output"}  # of the request, or of the SDK alone
        assert {key: value for key, value in one if key not in own} == {key: value for key, value in other if key not in own}
    ids = [block.id for block in final.content if block.type == "tool_use"]
    assert len(set(ids)) == 2
    assert all(id.startswith("toolu_") for id in ids)
    results: list[Any] = [{"type": "tool_result", "tool_use_id": id, "content": "sunny"} for id in ids]
    again: list[Any] = [*asked["messages"], {"role": "assistant", "content": final.content}, {"role": "user", "content": results}]
    again.append({"role": "user", "content": ask({"text": "</think>Sun."})[0]["content"]})
    last = parsing.messages.create(model="sim", max_tokens=50, messages=again, tools=[WEATHER])
    assert [block.text for block in last.content if block.type == "text"] == ["Sun."]


def test_the_tool_runner_of_the_sdk(parsing: anthropic.Anthropic) -> None:
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tells the weather."""
        return f"sunny in {city}"

    runner = parsing.beta.messages.tool_runner(**request({"text": f"</think>{CALLS}"}), tools=[weather], max_iterations=2)
    first, second = runner
    assert first.stop_reason == "tool_use"
    assert second.stop_reason == "end_turn"
    assert "sunny in" in str(second.content), "what the tool said has come to the model"


def test_structured_output_of_the_sdk(parsing: anthropic.Anthropic) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    answer = parsing.messages.parse(**request({"text": '</think>{"name": "Ada", "age": 36}'}), output_format=Person)
    assert answer.parsed_output == Person(name="Ada", age=36)


def test_a_call_that_is_cut_off(parsing: anthropic.Anthropic) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'
    for finish, reason in (("length", "max_tokens"), ("stop", "end_turn")):
        asked = request({"text": f"</think>{text}", "finish": finish}, tools=[WEATHER])
        unary = parsing.messages.create(**asked)
        assert [block.text for block in unary.content if block.type == "text"] == [text]
        with parsing.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["tool_use"]
        assert unary.stop_reason == final.stop_reason == reason
