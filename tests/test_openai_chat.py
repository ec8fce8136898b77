"""Chat completion requests: taken as leniently as vLLM takes them, refused by name, and nothing dropped in silence."""

from __future__ import annotations

import json

import pytest

from gaie_codec import (
    Constraint,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    SamplingParams,
    UnsupportedFieldError,
)
from gaie_codec.openai import chat
from gaie_codec.openai.chat import ChatOptions
from gaie_codec.openai.endpoint import Asked
from gaie_codec.openai.policy import CHAT_TYPES
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
USER = {"role": "user", "content": "Hello"}
PLAIN = ModelInfo()


def decode(fields=None, /, *, model=PLAIN, fixed_id=None, **more):
    """Decode a request; `fields` for the whole body as bytes, or fields whose names are no Python names."""
    body = fields if isinstance(fields, bytes) else json.dumps({"messages": [USER], **(fields or {}), **more}).encode()
    return chat.decode_request(body, Asked(request_id="host", tokenizer=TOKENIZER, model=model, fixed_id=fixed_id))


def sampling(fields=None, /, **more):
    return decode(fields, **more).inference.sampling


def prompt(**fields) -> str:
    return TOKENIZER._tokenizer.decode(decode(**fields).inference.prompt_token_ids, skip_special_tokens=False)


def refused(kind=MalformedRequestError, fields=None, /, **more):
    with pytest.raises(kind) as caught:
        decode(fields, **more)
    assert type(caught.value) is kind
    return caught.value


# The body


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_any_unicode_encoding_of_json(encoding):
    body = json.dumps({"messages": [USER], "stop": "é😀"}, ensure_ascii=False).encode(encoding)
    assert sampling(body).stop == ("é😀",)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "\xff"}',
        "{}".encode("utf-16")[:-1],
        b'{"stop": "\\ud800"}',
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json(body):
    error = refused(MalformedRequestError, body)
    assert error.message.startswith("There was an error parsing the body")
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("body", "place", "expected"),
    [
        (b"{", 1, "Expecting property name enclosed in double quotes"),
        (b"\0", 0, "Expecting value"),
        (b"{'SECRET': []}", 1, "Expecting property name enclosed in double quotes"),
        (b'{"messages": []} xyz', 17, "Extra data"),
    ],
)
def test_where_the_json_is_wrong(body, place, expected):
    error = refused(MalformedRequestError, body)
    assert (error.param, error.error_type) == (f"body.{place}", "Bad Request")
    told = f"'loc': 'body.{place}', 'msg': 'JSON decode error', 'ctx': {{'error': {expected!r}}}"
    assert error.message == f"1 validation error:\n  {{'type': 'json_invalid', {told}}}"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400"])
def test_what_is_no_finite_number_is_out_of_its_fields_range(number):
    error = refused(MalformedRequestError, b'{"messages": [{"role": "user", "content": "x"}], "temperature": %b}' % number)
    assert error.param == "temperature"
    assert error.message.startswith("temperature must be a finite number, got ")


@pytest.mark.parametrize("body", [b"", b"null"])
def test_no_body(body):
    assert "Field required" in refused(MalformedRequestError, body).message


@pytest.mark.parametrize("body", [b"[]", b"null", b'"messages"', b"5"])
def test_json_that_is_no_object(body):
    assert refused(MalformedRequestError, body).param == "body"


@pytest.mark.parametrize("text", ["\ud83d", "\ude00\ud83d"])
def test_a_lone_surrogate_is_refused_wherever_it_stands(text):
    for fields in ({"messages": [{"role": "user", "content": text}]}, {"model": text}, {"stop": text}, {"unknown": text}):
        refused(MalformedRequestError, fields)


@pytest.mark.parametrize("field", [b'"model":"\\ud800"', b'"\\ud800":1', b'"kv_transfer_params":{"a":"\\ud800"}'])
def test_a_lone_surrogate_is_refused_beside_a_number_beyond_a_double(field):
    refused(MalformedRequestError, b'{"x":1e999,"messages":[{"role":"user","content":"hi"}],%b}' % field)


def test_a_number_beyond_a_double_in_kv_transfer_params_is_refused():
    refused(MalformedRequestError, b'{"messages":[{"role":"user","content":"hi"}],"kv_transfer_params":{"a":1e999}}')


def test_the_last_of_several_equal_keys_counts():
    assert sampling(b'{"messages":[{"role":"user","content":"x"}],"top_k":1,"top_k":2}').top_k == 2


# Scalars


@pytest.mark.parametrize(
    ("field", "sent", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", 1, 1.0),
        ("temperature", True, 1.0),
        ("temperature", None, 1.0),
        ("top_p", "1", 1.0),
        ("top_k", "5", 5),
        ("top_k", 5.0, 5),
        ("top_k", True, 1),
        ("top_k", " 5 ", 5),
        ("top_k", "5.0", 5),
        ("top_k", None, 0),
        ("top_k", -1, 0),
        ("n", None, 1),
        ("n", 3.0, 3),
        ("seed", "-7", -7),
        ("seed", -1, None),
        ("seed", None, None),
        ("min_p", "0.25", 0.25),
        ("frequency_penalty", -2, -2.0),
        ("presence_penalty", 2, 2.0),
        ("repetition_penalty", 1.5, 1.5),
        ("ignore_eos", "yes", True),
        ("ignore_eos", "OFF", False),
        ("ignore_eos", 1, True),
        ("ignore_eos", 0.0, False),
        ("skip_special_tokens", None, True),
        ("skip_special_tokens", "f", False),
        ("spaces_between_special_tokens", False, False),
        ("include_stop_str_in_output", True, True),
        ("stop", None, ()),
        ("stop", "a", ("a",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", [], ()),
        ("stop_token_ids", ["5", 6.0], (5, 6)),
        ("logit_bias", {"5": 1, " 6": "0.5", "7": True}, {5: 1.0, 6: 0.5, 7: 1.0}),
        ("logit_bias", {"5": 1000, "6": -1000, "7": "nan", "8": "inf"}, {5: 100.0, 6: -100.0, 7: -100.0, 8: 100.0}),
        ("logit_bias", None, {}),
        ("bad_words", ["x"], ("x",)),
        ("allowed_token_ids", [1], (1,)),
    ],
)
def test_scalars_are_taken_leniently(field, sent, value):
    decoded = getattr(sampling({field: sent}), field)
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize(
    ("field", "sent", "param"),
    [
        ("temperature", "hot", "body.temperature"),
        ("temperature", [], "body.temperature"),
        ("top_k", 1.5, "body.top_k"),
        ("top_k", "1.5", "body.top_k"),
        ("top_k", "", "body.top_k"),
        ("top_k", {}, "body.top_k"),
        ("n", "many", "body.n"),
        ("stream", 2, "body.stream"),
        ("stream", "perhaps", "body.stream"),
        ("stream", [], "body.stream"),
        ("model", 5, "body.model"),
        ("stop", 5, "body.stop"),
        ("stop", ["a", 5], "body.stop"),
        ("stop", ["a", "b", "c", "d", "e"], "body.stop"),
        ("stop", [""], None),
        ("stop", "", None),
        ("stop_token_ids", 5, "body.stop_token_ids"),
        ("stop_token_ids", [None], "body.stop_token_ids.0"),
        ("stop_token_ids", [-1], "stop_token_ids"),
        ("stop_token_ids", [TOKENIZER.vocab_size], "stop_token_ids"),
        ("allowed_token_ids", [], "allowed_token_ids"),
        ("bad_words", [""], None),
        ("bad_words", [5], "body.bad_words.0"),
        ("logit_bias", {"a": 1}, "logit_bias"),
        ("logit_bias", {"5": None}, "body.logit_bias.5"),
        ("logit_bias", {"5": []}, "body.logit_bias.5"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {str(TOKENIZER.vocab_size): 1}, "logit_bias"),
        ("logit_bias", [], "body.logit_bias"),
        ("seed", 2**63, "body.seed"),
        ("seed", -(2**63) - 1, "body.seed"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", "nan", "temperature"),
        ("temperature", 10**400, "body.temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.1, "top_p"),
        ("top_p", "nan", "top_p"),
        ("top_k", -2, None),
        ("n", 16385, None),
        ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", 0, "max_tokens"),
        ("min_tokens", -1, None),
        ("truncate_prompt_tokens", -2, "body.truncate_prompt_tokens"),
        ("truncation_side", "middle", "body.truncation_side"),
        ("top_logprobs", 3, "top_logprobs"),
        ("top_logprobs", -2, "top_logprobs"),
        ("cache_salt", "", "cache_salt"),
        ("cache_salt", "a/b", "cache_salt"),
        ("cache_salt", "x" * 129, "cache_salt"),
        ("kv_transfer_params", "{}", "body.kv_transfer_params"),
        ("chat_template_kwargs", [], "body.chat_template_kwargs"),
        ("chat_template_kwargs", {"chat_template": "{{ secrets }}"}, None),
        ("chat_template", "{{ secrets }}", None),
        ("ignore_eos", None, "body.ignore_eos"),
        ("min_tokens", None, "body.min_tokens"),
        ("reasoning_effort", "much", "body.reasoning_effort"),
        ("thinking_token_budget", True, "thinking_token_budget"),
        ("stream_interval", 0, "body.stream_interval"),
        ("watermarking", "perhaps", "body.watermarking"),
        ("ec_transfer_params", [], "body.ec_transfer_params"),
        ("repetition_detection", {"max_pattern_size": -1}, None),
        ("documents", [{"title": 1}], "body.documents.0"),
        ("documents", {}, "body.documents"),
        ("documents", ["text"], "body.documents.0"),
        ("request_id", "x" * 1025, "request_id"),
        ("stream_options", {"include_usage": True}, "stream_options"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(field, sent, param):
    with pytest.raises(MalformedRequestError) as caught:
        decode({field: sent})
    assert caught.value.param == param
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_p": 1.5}, "min_p must be in [0, 1]"),
        ({"min_p": "nan"}, "min_p must be in [0, 1]"),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be in [-2, 2]"),
        ({"presence_penalty": "nan"}, "presence_penalty must be in [-2, 2]"),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero"),
        ({"repetition_penalty": "inf"}, "repetition_penalty must be a finite number"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens must be less than or equal to max_tokens=5"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "Cannot set both"),
    ],
)
def test_ranges_in_vllms_words(fields, words):
    assert words in refused(MalformedRequestError, fields).message


def test_errors_never_repeat_text():
    for name, value in (("temperature", "SECRET"), ("stop", [1, "SECRET"]), ("logit_bias", {"SECRET": 1}), ("messages", "SECRET")):
        assert "SECRET" not in str(refused(MalformedRequestError, {name: value}))


def test_greedy_sampling_has_no_nucleus_and_a_tiny_temperature_is_raised():
    greedy = sampling(temperature=0, top_p=0.5, top_k=7, min_p=0.5)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0.0, 1.0, 0, 0.0)
    assert sampling(temperature=0.001).temperature == 0.01


def test_what_was_not_asked_is_openais_default():
    assert sampling() == SamplingParams(temperature=1.0)


# Lengths


def test_max_completion_tokens_goes_before_max_tokens():
    assert sampling(max_completion_tokens=5, max_tokens=9).max_tokens == 5
    assert sampling(max_completion_tokens=None, max_tokens=9).max_tokens == 9
    assert sampling().max_tokens is None


SMALL = ModelInfo(max_model_len=20)
SIZE = len(decode().inference.prompt_token_ids)


def test_max_tokens_is_what_the_context_leaves():
    assert 2 < SIZE < 19
    assert sampling(model=SMALL).max_tokens == 20 - SIZE
    assert sampling(model=SMALL, max_tokens=20).max_tokens == 20 - SIZE
    assert sampling(model=SMALL, max_tokens=3).max_tokens == 3
    assert refused(max_tokens=21, model=SMALL).param == "max_tokens"


def test_a_prompt_that_fills_the_context_is_refused():
    assert sampling(model=ModelInfo(max_model_len=SIZE + 1)).max_tokens == 1
    assert refused(model=ModelInfo(max_model_len=SIZE)).param == "input_tokens"


def test_truncation():
    whole = decode().inference.prompt_token_ids

    def kept(keep, model=PLAIN, **more):
        return decode(truncate_prompt_tokens=keep, model=model, **more).inference.prompt_token_ids

    assert kept(2) == whole[-2:], "vLLM keeps the end"
    assert kept(2, truncation_side="right") == whole[:2]
    assert kept(2, truncation_side="left") == whole[-2:]
    assert kept(SIZE) == kept(SIZE + 1) == kept(-1) == kept(None) == whole
    with pytest.raises(MalformedRequestError, match="prompt cannot be empty"):
        kept(0)
    assert refused(truncate_prompt_tokens=21, model=SMALL).param == "truncate_prompt_tokens"
    # -1 is the whole context, and then there is no room to answer.
    assert refused(truncate_prompt_tokens=-1, model=ModelInfo(max_model_len=SIZE - 1)).param == "input_tokens"


# The model


SERVED = ModelInfo(served_model_name="m", aliases=("other",), default_sampling_params={"temperature": 0.6, "top_k": 20, "top_p": 0.8})


@pytest.mark.parametrize(("sent", "name"), [("m", "m"), ("other", "other"), ("", "m"), (None, "m")])
def test_models_that_are_served(sent, name):
    decoded = decode({"model": sent}, model=SERVED)
    assert (decoded.inference.model, decoded.options.model) == (name, name)


def test_a_model_that_is_not_served():
    error = refused(ModelNotFoundError, {"model": "gpt"}, model=SERVED)
    assert (error.http_status, error.param) == (404, "model")
    assert decode({"model": "any"}).options.model == "any", "nothing is known"
    assert decode({"model": "/m"}, model=ModelInfo(model_path="/m")).options.model == "/m"
    refused(ModelNotFoundError, {"model": "n"}, model=ModelInfo(model_path="/m"))


def test_the_models_defaults_fill_only_what_the_client_left_open():
    params = sampling(model=SERVED)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.8)
    params = sampling(model=SERVED, temperature=1, top_k=0)
    assert (params.temperature, params.top_k, params.top_p) == (1.0, 0, 0.8)
    assert sampling(model=SERVED, temperature=None).temperature == 0.6, "null is silence"
    assert sampling(model=ModelInfo(default_sampling_params={"temperature": None, "unknown": 1})).temperature == 1.0


# Ids, options


def test_the_clients_own_ids_win():
    assert decode().inference.request_id == "chatcmpl-host"
    assert decode(request_id="body").inference.request_id == "chatcmpl-body"
    assert decode(request_id="body", fixed_id="header").inference.request_id == "chatcmpl-header"
    assert decode(request_id="x" * 1024).inference.request_id == "chatcmpl-" + "x" * 1024


def test_options_of_the_answer():
    assert decode().options == ChatOptions(id="chatcmpl-host", model="")
    streamed = decode(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}, return_token_ids=True)
    assert streamed.options == ChatOptions(
        id="chatcmpl-host", model="", stream=True, include_usage=True, continuous_usage=True, return_token_ids=True
    )
    assert streamed.inference.stream
    assert not decode(stream=True, stream_options={"continuous_usage_stats": True}).options.continuous_usage, "part of include_usage"
    assert decode(stream_options={}).options == ChatOptions(id="chatcmpl-host", model="")
    assert refused(stream=True, stream_options={"include_usage": "x"}).param == "body.stream_options.include_usage"


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_logprobs(fields, logprobs):
    decoded = decode(fields)
    assert decoded.inference.sampling.logprobs == logprobs
    assert decoded.options.logprobs == (logprobs is not None)


@pytest.mark.parametrize("top", [21, -1])
def test_too_many_logprobs(top):
    assert refused(logprobs=True, top_logprobs=top).param == "logprobs"


# What must match


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
            Constraint(kind="json_schema", value='{"type": "object"}'),
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"a": 1}}},
            Constraint(kind="structural_tag", value='{"type": "structural_tag", "format": {"a": 1}}'),
        ),
        ({"structured_outputs": {"json": '{"a":1}'}}, Constraint(kind="json_schema", value='{"a":1}')),
        ({"structured_outputs": {"json": {"a": 1}}}, Constraint(kind="json_schema", value='{"a": 1}')),
        ({"structured_outputs": {"regex": "a+"}}, Constraint(kind="regex", value="a+")),
        ({"structured_outputs": {"grammar": "root ::= x"}}, Constraint(kind="grammar", value="root ::= x")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint(kind="choice", value=("a", "b"))),
        ({"structured_outputs": {"json_object": True}}, Constraint(kind="json_object")),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, Constraint(kind="structural_tag", value='{"a": 1}')),
        ({"structured_outputs": {"regex": "a", "json": None}, "response_format": {"type": "text"}}, Constraint(kind="regex", value="a")),
        ({"structured_outputs": None}, None),
    ],
)
def test_constraints(fields, constraint):
    assert sampling(fields).constraint == constraint


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": "json"},
        {"response_format": {}},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": "{}"}}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "grammar": "b"}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": 5}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": "a"}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_constraints_that_make_no_sense(fields):
    refused(MalformedRequestError, fields)


def test_constraint_options_that_the_wire_has_not():
    error = refused(UnsupportedFieldError, {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}})
    assert error.param == "structured_outputs.whitespace_pattern"


def test_a_schema_of_any_depth_is_taken_or_refused():
    for depth in range(400, 1100, 2):
        schema = b'{"a":' * depth + b"1" + b"}" * depth
        body = b'{"messages":[{"role":"user","content":"x"}],"structured_outputs":{"json":%b}}' % schema
        try:
            decode(body)
        except MalformedRequestError:
            break


# Messages


def tool_call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_the_forms_of_content_give_one_prompt():
    parts = [{"type": "text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]
    assert prompt() == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(messages=[{"role": "user", "content": parts}]) == prompt(messages=[{"role": "user", "content": "Hel\nlo"}])
    assert prompt(messages=[{"role": "user", "content": []}]) == prompt(messages=[{"role": "user"}])


def test_a_conversation():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U", "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [tool_call('{"a":1}')]},
        {"role": "tool", "content": "R", "tool_call_id": "1"},
    ]
    text = prompt(messages=messages)
    for part in ("system\nS", "user\nU", '"name": "f"', '{"a": 1}', "<tool_response>\nR"):
        assert part in text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_end_of_the_prompt():
    assert prompt(add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"
    messages = [USER, {"role": "assistant", "content": "Well"}]
    assert prompt(messages=messages, add_generation_prompt=False, continue_final_message=True).endswith("<|im_start|>assistant\nWell")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("Hello", "body.messages"),
        ({}, "body.messages"),
        (["Hello"], "body.messages.0"),
        ([{"content": "x"}], "body.messages.0.role"),
        ([{"role": 5, "content": "x"}], "body.messages.0.role"),
        ([USER, {"role": "user", "content": 5}], "body.messages.1.content"),
        ([{"role": "user", "content": None}], "body.messages.0.content"),
        ([{"role": "user", "content": ["x"]}], "body.messages.0.content.0"),
        ([{"role": "user", "content": [{"text": "x"}]}], "body.messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "body.messages.0.content.0.text"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "body.messages.0.tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "body.messages.0.tool_calls.0.function"),
        ([{"role": "assistant", "tool_calls": [tool_call(5)]}], "body.messages.0.tool_calls.0.function.arguments"),
        ([{"role": "assistant", "tool_calls": [tool_call("{")]}], "messages.0.tool_calls.0.function.arguments"),
        ([], None),
    ],
)
def test_messages_that_are_none(messages, param):
    assert refused(messages=messages).param == param


def test_messages_are_required():
    assert refused(MalformedRequestError, b"{}").param == "body.messages"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_media_is_refused(kind):
    error = refused(UnsupportedFieldError, messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])
    assert error.param == "messages.0.content.0"


def test_template_variables_of_the_client_do_not_replace_the_templates_own():
    assert prompt(chat_template_kwargs={"messages": [], "add_generation_prompt": False, "tools": [1]}) == prompt()


# Tools


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"tools": TOOLS}, MalformedRequestError, None),
        ({"tools": TOOLS, "tool_choice": "auto"}, MalformedRequestError, None),
        ({"tools": TOOLS, "tool_choice": "any"}, MalformedRequestError, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, MalformedRequestError, "tool_choice.function"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, MalformedRequestError, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, MalformedRequestError, "tool_choice"),
        ({"tool_choice": "auto"}, MalformedRequestError, "tool_choice"),
        ({"tools": [], "tool_choice": "none"}, MalformedRequestError, "tools"),
        ({"tools": [{}], "tool_choice": "none"}, MalformedRequestError, "body.tools.0.function"),
        ({"tools": [{"function": {}}], "tool_choice": "none"}, MalformedRequestError, "body.tools.0.function.name"),
        ({"tools": "f", "tool_choice": "none"}, MalformedRequestError, "body.tools"),
    ],
)
def test_tools_that_cannot_be_called(fields, kind, param):
    assert refused(kind, fields).param == param


@pytest.mark.parametrize("choice", ["none", None])
def test_tools_without_a_choice_only_change_the_prompt(choice):
    assert '"name": "f"' in prompt(tools=TOOLS, tool_choice=choice)
    assert prompt(tool_choice=choice) == prompt()


# Nothing is dropped in silence


@pytest.mark.parametrize("name", sorted(chat.ADVISORY))
def test_advisory_fields_are_accepted_and_change_nothing(name):
    decoded = decode({name: {"user": "me", "length_penalty": 2}.get(name, {"any": ["thing"]})})
    assert decoded == decode()
    assert decoded.ignored == ()


@pytest.mark.parametrize("name", sorted(chat.REFUSED))
def test_fields_that_would_change_the_output_are_refused_by_name(name):
    assert refused(UnsupportedFieldError, {name: ASKING_IN_VAIN.get(name, True)}).param == name
    for harmless in chat.REFUSED[name]:
        if harmless is not None or CHAT_TYPES.get(name, ("", True))[1]:
            assert decode({name: harmless}) == decode()
    asked = Asked(request_id="host", tokenizer=TOKENIZER, model=PLAIN, drops=True)
    dropped = chat.decode_request(json.dumps({"messages": [USER], name: ASKING_IN_VAIN.get(name, True)}).encode(), asked)
    assert dropped.ignored == (name,)
    assert dropped.prompts == decode().prompts


ASKING_IN_VAIN = {
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
    "vllm_xargs": {"a": 1},
}


def test_booleans_that_ask_for_nothing_may_be_said_in_other_words():
    assert decode({"use_beam_search": "no", "repetition_detection": {"max_pattern_size": 0}}) == decode()


def test_options_of_structured_outputs_are_refused_by_name():
    outputs = {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}
    error = refused(UnsupportedFieldError, structured_outputs=outputs)
    assert error.param == "structured_outputs.disable_any_whitespace"
    asked = Asked(request_id="host", tokenizer=TOKENIZER, model=PLAIN, drops=True)
    decoded = chat.decode_request(json.dumps({"messages": [USER], "structured_outputs": outputs}).encode(), asked)
    assert decoded.ignored == ("structured_outputs.disable_any_whitespace", "structured_outputs.whitespace_pattern")
    assert decoded.inference.sampling.constraint == Constraint(kind="json_schema", value="{}")


def test_a_constraint_holds_from_the_first_token_where_reasoning_is_not_wanted():
    asked = {"response_format": {"type": "json_object"}}
    assert sampling(asked, include_reasoning=False).grammar_from_first_token
    assert not sampling(asked).grammar_from_first_token
    assert not sampling(include_reasoning=False).grammar_from_first_token


def test_unknown_fields_are_accepted_and_reported():
    assert decode({"zeta": 1, "alpha": None, "": 0}).ignored == ("", "alpha", "zeta")


def test_log_probabilities_of_the_prompt_are_asked_for():
    assert decode({"prompt_logprobs": 2}).inference.sampling.prompt_logprobs == 2
    assert decode({"prompt_logprobs": 0, "stream": True}).inference.sampling.prompt_logprobs == 0
    assert refused(prompt_logprobs=1, stream=True).message.startswith("`prompt_logprobs` are not available when `stream=True`.")
    assert refused(prompt_logprobs=-2).param == refused(prompt_logprobs=21).param == "prompt_logprobs"
    assert decode({"echo": True}).inference.sampling.prompt_logprobs == 0
    assert decode({"echo": True, "logprobs": True, "top_logprobs": 2}).inference.sampling.prompt_logprobs == 2
    assert f"Requested sample logprobs of {TOKENIZER.vocab_size}," in refused(logprobs=True, top_logprobs=-1).message


ASSISTANT = {"role": "assistant", "content": "So"}


@pytest.mark.parametrize(
    ("fields", "role", "echo"),
    [
        ({}, "assistant", ""),
        ({"messages": [USER, ASSISTANT]}, "assistant", "So"),
        (
            {"messages": [USER, ASSISTANT | {"content": [{"type": "text", "text": "So"}, {"type": "text", "text": "it"}]}]},
            "assistant",
            "So\nit",
        ),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, "assistant", ""),
        ({"add_generation_prompt": False}, "user", USER["content"]),
        ({"messages": [USER, ASSISTANT], "add_generation_prompt": False, "continue_final_message": True}, "assistant", "So"),
    ],
)
def test_an_echo_is_the_message_that_goes_on(fields, role, echo):
    options = decode({"echo": True, **fields}).options
    assert (options.role, options.echo) == (role, echo)
    assert decode(fields).options.echo == ""


def test_the_prompts_text_is_shown_to_who_asks():
    text = decode({"return_prompt_text": True}).options.prompt_text
    assert USER["content"] in text
    assert decode().options.prompt_text is None


def test_every_field_is_in_one_table():
    assert not chat.READ & chat.ADVISORY
    assert not chat.READ & set(chat.REFUSED)
    assert not chat.ADVISORY & set(chat.REFUSED)


READ_BUT_INVISIBLE_IN_THE_REQUEST = {
    "messages",
    "model",
    "request_id",
    "chat_template",
    "include_reasoning",
    "parallel_tool_calls",
}  # see the tests above; every request has them
ASKING = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "max_completion_tokens": 7,
    "return_token_ids": True,
    "documents": [{}],
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "chat_template_kwargs": {"a": 1},
    "reasoning_effort": "low",
    "tools": TOOLS,
    "tool_choice": "none",
    "truncate_prompt_tokens": 2,
    "truncation_side": "right",
    "priority": 3,
    "cache_salt": "s",
    "session_id": "s",
    "kv_transfer_params": {"a": 1},
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "max_tokens": 5,
    "min_tokens": 1,
    "stop": "s",
    "stop_token_ids": [5],
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "ignore_eos": True,
    "n": 2,
    "seed": 5,
    "include_stop_str_in_output": True,
    "logit_bias": {"5": 1},
    "bad_words": ["x"],
    "allowed_token_ids": [5],
    "thinking_token_budget": 5,
    "stream_interval": 5,
    "watermarking": True,
    "ec_transfer_params": {"a": 1},
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "echo": True,
    "logprob_token_ids": [5],
    "prompt_logprobs": 1,
    "return_prompt_text": True,
    "return_tokens_as_token_ids": True,
}
NEEDS = {
    "logprob_token_ids": {"logprobs": True},
    "echo": {"add_generation_prompt": False},
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "truncation_side": {"truncate_prompt_tokens": 2},
    "tools": {"tool_choice": "none"},
    "continue_final_message": {"add_generation_prompt": False},
}
# Their effect depends on the template and the tokenizer, and those of this model have no use for them.
NOT_USED_BY_THIS_MODEL = {"documents", "chat_template_kwargs", "reasoning_effort", "add_special_tokens", "tool_choice"}


def test_every_field_that_is_read_has_an_example():
    assert set(ASKING) | READ_BUT_INVISIBLE_IN_THE_REQUEST == chat.READ


@pytest.mark.parametrize("name", sorted(set(ASKING) - NOT_USED_BY_THIS_MODEL))
def test_every_field_that_is_read_has_an_effect(name):
    needed = NEEDS.get(name, {})
    assert decode({name: ASKING[name], **needed}) != decode(needed)


class RecordingTokenizer:
    """Remembers how it was asked."""

    accepts_content_parts = False
    vocab_size = TOKENIZER.vocab_size

    def __init__(self, **fields):
        self.seen = {}
        chat.decode_request(json.dumps({"messages": [USER], **fields}).encode(), Asked(request_id="r", tokenizer=self, model=PLAIN))

    def render_chat(self, messages, **options):
        self.seen |= options
        return "x"

    def encode(self, text, *, add_special_tokens):
        self.seen["add_special_tokens"] = add_special_tokens
        return [1]


def test_reserved_template_variables_do_not_reach_any_tokenizer():
    fields = {"chat_template_kwargs": {**dict.fromkeys(chat._RESERVED_TEMPLATE_KWARGS - {"chat_template"}, 1), "mine": 2}}
    assert RecordingTokenizer(**fields).seen["template_kwargs"] == {"mine": 2}


@pytest.mark.parametrize("name", sorted(NOT_USED_BY_THIS_MODEL - {"tool_choice"}))
def test_what_is_for_the_template_reaches_it(name):
    seen = RecordingTokenizer(**{name: ASKING[name]}).seen
    expected = {
        "documents": {"documents": [{}]},
        "chat_template_kwargs": {"template_kwargs": {"a": 1}},
        "reasoning_effort": {"template_kwargs": {"reasoning_effort": "low", "enable_thinking": True}},
        "add_special_tokens": {"add_special_tokens": True},
    }[name]
    assert {key: seen[key] for key in expected} == expected


def test_a_prompt_that_no_tokens_could_make_short_enough_is_not_tokenized(monkeypatch: pytest.MonkeyPatch):
    longest = TOKENIZER.max_token_chars
    model = ModelInfo(max_model_len=100)
    monkeypatch.setattr(TOKENIZER, "encode", lambda *_, **__: pytest.fail("it is tokenized"))
    error = refused(messages=[{"role": "user", "content": "x" * (100 * longest + 1)}], model=model)
    assert error.param == "input_text"
    assert f"{100 * longest} are the most" in error.message
    with pytest.raises(pytest.fail.Exception):
        decode(messages=[{"role": "user", "content": "x" * 50 * longest}], model=model)
