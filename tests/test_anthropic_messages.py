"""Requests for messages: what a chat template gets of them, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    CodecError,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    SamplingParams,
    Transcoder,
    UnsupportedEndpointError,
    UnsupportedFieldError,
)
from gaie_codec.anthropic import messages
from gaie_codec.openai import chat
from gaie_codec.openai.endpoint import Asked
from gaie_codec.text import formats
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
MODEL_TOKENIZER = load_tokenizer(str(Path(__file__).parent / "golden" / "model"))  # its template knows enable_thinking
USER = {"role": "user", "content": "Hello"}
TOOL = {"name": "f", "description": "does f", "input_schema": {"type": "object", "properties": {"x": {"type": "number"}}}}
CHAT_TOOL = {"type": "function", "function": {"name": "f", "description": "does f", "parameters": TOOL["input_schema"]}}
HERMES = formats.TOOL_FORMATS["hermes"]
MODEL = ModelInfo(served_model_name="sim", max_model_len=2048)
TRANSCODER = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=MODEL, tool_call_parser="none")
TEXT = {"type": "text", "text": "Hi"}
PNG = {"type": "base64", "media_type": "image/png", "data": "AAAA"}


def decode(fields=None, /, *, tokenizer=TOKENIZER, **more):
    body = {"model": "m", "max_tokens": 64, "messages": [USER], **(fields or {}), **more}
    return messages.decode_request(json.dumps(body).encode(), asked(tokenizer))


def asked(tokenizer=TOKENIZER, **fields) -> Asked:
    return Asked(request_id="r", tokenizer=tokenizer, model=ModelInfo(), tool_format=HERMES, accepts_media=True, **fields)


def refused(kind=MalformedRequestError, /, **fields) -> CodecError:
    with pytest.raises(kind) as caught:
        decode(**fields)
    assert type(caught.value) is kind
    return caught.value


def conversation(*said, monkeypatch, tokenizer=TOKENIZER, **fields):
    """What is asked of a chat instead."""
    asked_for = []

    def decode_fields(fields, asked, *, id_prefix):
        asked_for.append(fields)
        raise MalformedRequestError("that is enough")

    monkeypatch.setattr(chat, "decode_fields", decode_fields)
    refused(messages=list(said), tokenizer=tokenizer, **fields)
    return asked_for[0]


@pytest.fixture
def chat_of(monkeypatch):
    return lambda *said, **fields: conversation(*said, monkeypatch=monkeypatch, **fields)


def test_a_plain_request() -> None:
    decoded = decode()
    same = chat.decode_request(json.dumps({"model": "m", "max_tokens": 64, "messages": [USER]}).encode(), asked())
    assert decoded.inference.prompt_token_ids == same.inference.prompt_token_ids
    assert decoded.inference.sampling == same.inference.sampling
    assert (decoded.inference.request_id, decoded.options.id, decoded.options.model) == ("msg_r", "msg_r", "m")
    assert decoded.ignored == ()


def test_sampling() -> None:
    decoded = decode(temperature=0.5, top_p=0.9, top_k=7, max_tokens=9, stop_sequences=["a", "b"], stream=True)
    assert decoded.inference.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=7, max_tokens=9, stop=("a", "b"))
    assert decoded.options.stream
    assert decoded.inference.stream


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("Be kind.", "Be kind."),
        ([{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "kind."}], "Be kind."),
        ([{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "Be kind."}], "Be kind."),
    ],
)
def test_system(chat_of, system, text) -> None:
    assert chat_of(USER, system=system)["messages"] == [{"role": "system", "content": text}, USER]


@pytest.mark.parametrize("system", ["", None, []])
def test_no_system(chat_of, system) -> None:
    assert chat_of(USER, system=system)["messages"] == [USER]


def test_a_system_message_further_down_goes_to_the_front_where_the_template_wants_it(chat_of) -> None:
    said = [USER, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER]
    kept = chat_of(*said, system="Be kind.")["messages"]
    assert [message["role"] for message in kept] == ["system", "user", "system", "user"]

    def render_chat(said, **_):
        raise MalformedRequestError("system must be first")

    strict = SimpleNamespace(render_chat=render_chat)
    moved = chat_of(*said, system="Be kind.", tokenizer=strict)["messages"]
    assert moved == [{"role": "system", "content": "Be kind.Be brief."}, USER, USER]


def test_blocks_of_text_and_images(chat_of) -> None:
    said = [TEXT, {"type": "image", "source": PNG}, {"type": "image", "source": {"type": "url", "url": "https://x/y"}}]
    assert chat_of({"role": "user", "content": said})["messages"] == [
        {
            "role": "user",
            "content": [
                TEXT,
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://x/y"}},
            ],
        }
    ]
    assert chat_of({"role": "user", "content": [TEXT, {"type": "text", "text": ""}]})["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_tool_loop(chat_of) -> None:
    said = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "opaque"},
                TEXT,
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "toolu_2", "name": "g"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "1"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [TEXT, TEXT, {"type": "image", "source": PNG}]},
                {"type": "tool_result", "tool_use_id": "toolu_3", "is_error": True},
                {"type": "text", "text": "Go on."},
            ],
        },
    ]
    assert chat_of(*said)["messages"] == [
        USER,
        {
            "role": "assistant",
            "content": "Hi",
            "reasoning": "hm",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"id": "toolu_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "1"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Hi\nHi"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "Go on."},
    ]


def test_templates_have_no_place_for_failures_of_tools() -> None:
    said = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "it failed", "is_error": True}]},
    ]
    assert decode(messages=said).ignored == ("tool_result.is_error",)


def test_tools(chat_of) -> None:
    said = chat_of(USER, tools=[{**TOOL, "cache_control": {"type": "ephemeral"}}, {"name": "g", "input_schema": {}}])
    assert said["tools"] == [CHAT_TOOL, {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}]
    assert "tool_choice" not in said
    assert "tools" not in chat_of(USER, tools=[], tool_choice={"type": "auto"})


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
@pytest.mark.parametrize("one", [True, False])
def test_tool_choice(chat_of, choice, chosen, one) -> None:
    said = chat_of(USER, tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": one})
    assert (said["tool_choice"], said["parallel_tool_calls"]) == (chosen, not one)


def test_a_call_that_has_no_id_gets_one_as_anthropic_has_them() -> None:
    assert decode(tools=[TOOL]).output.id_style == "anthropic"
    mistral = msgspec.structs.replace(asked(), tool_format=formats.TOOL_FORMATS["mistral"])
    body = {"model": "m", "max_tokens": 1, "messages": [USER], "tools": [TOOL]}
    assert messages.decode_request(json.dumps(body).encode(), mistral).output.id_style == "mistral", "its templates take no other"


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
        ({"output_config": {"effort": "high"}}, "high"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "max"}}, "max"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}, None),
    ],
)
def test_how_much_to_think(chat_of, fields, effort) -> None:
    assert chat_of(USER, tokenizer=MODEL_TOKENIZER, **fields).get("reasoning_effort") == effort


def test_thinking_that_cannot_be_switched_off_is_little(chat_of) -> None:
    def refuses(_, *, template_kwargs):
        if template_kwargs["reasoning_effort"] == "none":
            raise MalformedRequestError("no such effort")
        return "a prompt"

    def takes_it_for_most(_, *, template_kwargs):
        return template_kwargs["reasoning_effort"].replace("none", "max")

    for render_chat in (refuses, takes_it_for_most):
        for accepts in (True, False):
            tokenizer = SimpleNamespace(render_chat=render_chat, accepts_content_parts=accepts)
            assert chat_of(USER, tokenizer=tokenizer, thinking={"type": "disabled"})["reasoning_effort"] == "low"


def test_the_budget_of_thinking_is_sent_where_it_can_be() -> None:
    body = {"model": "m", "max_tokens": 2000, "messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 1500}}
    for dialect, budget, dropped in (("vllm.inference", 1500, ()), ("vllm.engine", None, ("thinking.budget_tokens",))):
        call = Transcoder(dialect, tokenizer=TOKENIZER).request("POST", "/v1/messages", {}, json.dumps(body).encode(), request_id="r")
        assert (call.inference.sampling.thinking_token_budget, call.dropped) == (budget, dropped)


def test_an_output_format_is_held_to() -> None:
    schema = {"type": "object"}
    constraint = decode(output_config={"format": {"type": "json_schema", "schema": schema}}).inference.sampling.constraint
    assert (constraint.kind, json.loads(constraint.value)) == ("json_schema", schema)


def test_what_has_no_effect_is_reported() -> None:
    fields = {"metadata": {"user_id": "u"}, "service_tier": "auto", "container": "c", "context_management": {}}
    assert decode(fields).ignored == ("container", "context_management")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "body.max_tokens"),
        ({"max_tokens": 0}, "body.max_tokens"),
        ({"max_tokens": "many"}, "body.max_tokens"),
        ({"model": ""}, "body.model"),
        ({"model": 5}, "body.model"),
        ({"messages": None}, "body.messages"),
        ({"messages": []}, None),
        ({"messages": ["Hi"]}, "body.messages.0"),
        ({"messages": [{"content": "Hi"}]}, "body.messages.0.role"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "body.messages.0.role"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "body.messages.0.role"),
        ({"messages": [{"role": "user"}]}, "body.messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "body.messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "body.messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "body.messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "body.messages.0.content.0.source"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "body.messages.0.content.0.source.data"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": []}]}]}, "body.messages.0.content.0.input"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 5}]}]}, "body.messages.0.content.0.tool_use_id"),
        ({"system": 5}, "body.system"),
        ({"stop_sequences": "a"}, "body.stop_sequences"),
        ({"stop_sequences": ["a", 5]}, "body.stop_sequences.1"),
        ({"stop_sequences": list("abcde")}, "body.stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"tools": ["f"]}, "body.tools.0"),
        ({"tools": [{"input_schema": {}}]}, "body.tools.0.name"),
        ({"tools": [{"name": "f"}]}, "body.tools.0.input_schema"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "body.tools.0.input_schema"),
        ({"tools": [{"name": "f", "input_schema": {}, "description": 5}]}, "body.tools.0.description"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "body.tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": ["any"]}}, "body.tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "on"}}, "body.thinking.type"),
        ({"thinking": {"type": "enabled"}}, "body.thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "body.thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "body"),
        ({"output_config": {"effort": "little"}}, "body.output_config.effort"),
        ({"output_config": {"format": {"type": "text"}}}, "body.output_config.format.type"),
        ({"output_config": {"format": {}}}, "body.output_config.format.schema"),
    ],
)
def test_what_is_refused(fields, param) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "search_result"}]}]}]},
            "messages.0.content.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "messages.0.content.0.source.type"),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ],
)
def test_what_is_not_there(fields, param) -> None:
    assert refused(UnsupportedFieldError, **fields).param == param


@pytest.mark.parametrize("missing", ["model", "max_tokens", "messages"])
def test_what_must_be_there(missing) -> None:
    body = {"model": "m", "max_tokens": 64, "messages": [USER]}
    del body[missing]
    with pytest.raises(MalformedRequestError, match="Field required") as caught:
        messages.decode_request(json.dumps(body).encode(), asked())
    assert caught.value.param == f"body.{missing}"


def test_through_a_transcoder() -> None:
    body = {"model": "sim", "max_tokens": 5, "messages": [USER]}
    call = TRANSCODER.request("POST", "/v1/messages?beta=true", {"x-api-key": "k"}, json.dumps(body).encode(), request_id="r")
    assert call.id == "msg_r"
    assert call.http_path == "/v1/messages"
    with pytest.raises(ModelNotFoundError):
        TRANSCODER.request("POST", "/v1/messages", {}, json.dumps({**body, "model": "x"}).encode(), request_id="r")
    with pytest.raises(UnsupportedEndpointError):
        TRANSCODER.request("POST", "/v1/messages/batches", {}, b"", request_id="r")


def count(transcoder=TRANSCODER, **fields) -> dict:
    body = json.dumps({"model": "sim", "messages": [USER], **fields}).encode()
    _, chunk, _ = transcoder.answer("POST", "/v1/messages/count_tokens", {}, body, created=1)
    return json.loads(chunk.data)


@pytest.mark.parametrize("fields", [{}, {"system": "Be kind."}, {"thinking": {"type": "disabled"}}])
def test_tokens_are_those_of_the_prompt(fields) -> None:
    body = json.dumps({"model": "sim", "max_tokens": 5, "messages": [USER], **fields}).encode()
    prompt = TRANSCODER.request("POST", "/v1/messages", {}, body, request_id="r").inference.prompt_token_ids
    assert count(**fields) == {"input_tokens": len(prompt), "context_management": {"original_input_tokens": len(prompt)}}


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ModelNotFoundError):
        count(model="x")
    with pytest.raises(MalformedRequestError, match="maximum context length"):
        count(messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(MalformedRequestError, match="tool-call parser"):
        count(tools=[TOOL])
    with pytest.raises(UnsupportedEndpointError) as caught:
        TRANSCODER.answer("GET", "/v1/messages/count_tokens", {}, b"", created=1)
    assert caught.value.allow == "POST"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "role", "content", "name", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KINDS = st.sampled_from(["text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking", "document", "base64", "url"])
KEYS = ("text", "source", "id", "tool_use_id", "name", "input", "content", "is_error", "thinking", "data", "url")
BLOCK = st.deferred(
    lambda: st.fixed_dictionaries({"type": KINDS | JSON}, optional=dict.fromkeys(KEYS, JSON | st.lists(BLOCK, max_size=2) | BLOCK))
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": st.text(max_size=3) | st.lists(BLOCK, max_size=3) | JSON}
)
FIELDS = st.fixed_dictionaries(
    {"model": st.just("m"), "max_tokens": st.integers(1, 3000) | JSON, "messages": st.lists(MESSAGE | JSON, max_size=3) | JSON},
    optional={
        "system": JSON | st.lists(BLOCK, max_size=2),
        "tools": st.lists(st.fixed_dictionaries({"name": st.just("f") | JSON}, optional={"input_schema": JSON, "type": JSON}), max_size=2)
        | JSON,
        "tool_choice": st.fixed_dictionaries({"type": st.sampled_from(["auto", "any", "tool", "none"])}, optional={"name": st.just("f")})
        | JSON,
        "thinking": st.fixed_dictionaries({"type": st.sampled_from(["enabled", "disabled"])}, optional={"budget_tokens": st.integers()})
        | JSON,
        "output_config": st.fixed_dictionaries({}, optional={"effort": JSON, "format": JSON}) | JSON,
        "stop_sequences": st.lists(st.text(max_size=2), max_size=5) | JSON,
        **dict.fromkeys(("temperature", "top_k", "metadata", "stream", "chat_template_kwargs", "kv_transfer_params"), JSON),
    },
)


@given(body=FIELDS.map(lambda fields: json.dumps(fields).encode()) | JSON.map(lambda value: json.dumps(value).encode()) | st.binary())
def test_any_body_is_decoded_or_refused(body) -> None:
    try:
        decoded = messages.decode_request(body, asked())
    except CodecError:
        return
    assert decoded.inference.prompt_token_ids
