"""`POST /v1/completions`: prompts in four forms, what is refused by name, and the answer's form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    FinishEvent,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    RequestError,
    TokensEvent,
    Transcoder,
    UnsupportedFieldError,
)
from gaie_codec.openai import chat, completions
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import answer_to, answer_to_all, frames_of

TOKENIZER = load_tokenizer("builtin")
TRANSCODER = Transcoder("vllm.engine", tokenizer=TOKENIZER)
PATH = "/v1/completions"


def ids(text, special=True):
    return TOKENIZER.encode(text, add_special_tokens=special)


def ask(told=None, **fields):
    host = TRANSCODER if told is None else Transcoder("vllm.engine", tokenizer=TOKENIZER, model=told)
    return host.request("POST", PATH, (), json.dumps({"prompt": "Hello", **fields}).encode(), request_id="r")


def refused(kind=RequestError, told=None, **fields):
    with pytest.raises(kind) as caught:
        ask(told, **fields)
    assert 400 <= caught.value.http_status < 500
    return caught.value


def wire(*events):
    return frames_of(TRANSCODER.adapter, events)


# The request


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("Hello", [ids("Hello")]),
        (["Hello"], [ids("Hello")]),
        (["Hello", "a b"], [ids("Hello"), ids("a b")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["Hello", [7]], [ids("Hello"), [7]]),
    ],
)
def test_prompts(prompt, token_ids):
    call = ask(prompt=prompt)
    assert [one.prompt_token_ids for one in call.prompts] == token_ids
    assert [one.request_id for one in call.prompts] == [f"cmpl-r-{place}" for place in range(len(token_ids))]
    assert call.id == "cmpl-r"
    assert all(one.prompt_text is None for one in call.prompts)


def test_special_tokens_are_added_unless_not_wanted():
    assert ask(add_special_tokens=False).inference.prompt_token_ids == ids("Hello", special=False)
    assert ask().inference.prompt_token_ids == ids("Hello")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "Field required"),
        (5, "valid string"),
        ({}, "valid string"),
        ([], "non-empty"),
        ("", "empty"),
        ([[]], "empty"),
        ([{}], "valid string or a list"),
        ([["a"]], "valid string or a list"),
        ([5, "a"], "valid string or a list"),
        ([TOKENIZER.vocab_size], "out of vocabulary"),
        ([[-1]], "out of vocabulary"),
        (["a"] * 1025, "at most 1024 prompts"),
    ],
)
def test_prompts_that_are_none(prompt, words):
    error = refused(MalformedRequestError, prompt=prompt)
    assert words in error.message


def test_sixteen_tokens_unless_told_and_the_rest_of_the_context_for_null():
    told = ModelInfo(max_model_len=100)
    length = len(ids("Hello"))
    assert ask().inference.sampling.max_tokens == 16
    assert ask(told, max_tokens=None).inference.sampling.max_tokens == 100 - length
    assert ask(told, max_tokens=5).inference.sampling.max_tokens == 5
    assert refused(max_tokens=0).param == "max_tokens"
    assert refused(told=told, max_tokens=101).param == "max_tokens"
    assert refused(told=ModelInfo(max_model_len=length)).param == "input_tokens"
    assert ask(truncate_prompt_tokens=1).inference.prompt_token_ids == ids("Hello")[-1:]


REFUSALS = [
    ("logprobs", 3),
    ("echo", True),
    ("suffix", "x"),
    ("best_of", 2),
    ("prompt_embeds", "x"),
    ("use_beam_search", True),
    ("prompt_logprobs", 1),
    ("return_tokens_as_token_ids", True),
]


@pytest.mark.parametrize(("field", "value"), REFUSALS)
def test_what_is_not_there_yet_is_refused_by_name(field, value):
    error = refused(UnsupportedFieldError, **{field: value})
    assert error.param == field
    assert field in error.message


def test_what_asks_for_nothing_is_no_fault():
    harmless = {field: values[-1] for field, values in completions.REFUSED.items()}
    assert ask(**harmless).dropped == ()
    assert ask(user="u", unknown=1, messages=[], chat_template="x").dropped == ("chat_template", "messages", "unknown")


def test_every_field_of_chat_has_its_place_here():
    """A field that chat knows is read, refused or advisory here too, or it is about messages."""
    here = completions.READ | completions.ADVISORY | completions.REFUSED.keys()
    of_messages = set(
        "messages chat_template add_generation_prompt continue_final_message chat_template_kwargs reasoning_effort tools tool_choice"
        " documents top_logprobs max_completion_tokens".split()
    )
    assert (chat.READ | chat.ADVISORY | chat.REFUSED.keys()) - here == of_messages
    assert not completions.READ & completions.REFUSED.keys()


def test_ids_names_and_routing():
    served = ModelInfo(served_model_name="m", lora_adapters={"l": "adapter-1"})
    assert refused(ModelNotFoundError, told=served, model="x").http_status == 404
    assert ask(served).inference.model == ask(served, model="m").inference.model == "m"
    assert refused(UnsupportedFieldError, told=served, model="l").param == "model", "this dialect has no place for an adapter"
    assert refused(UnsupportedFieldError, priority=3).param == "priority"
    call = ask(request_id="mine", kv_transfer_params={"a": 1}, return_token_ids=True)
    assert (call.id, call.inference.request_id) == ("cmpl-mine", "cmpl-mine-0")
    assert json.loads(call.inference.kv_transfer_params) == {"a": 1}
    assert call.inference.return_token_ids


# The answer


def test_a_whole_body():
    answer = answer_to(ask(), [wire(FinishEvent(token_ids=ids(" world", special=False), finish_reason="length", prompt_tokens=2))])
    made = len(ids(" world", special=False))
    assert answer.json == {
        "id": "cmpl-r",
        "object": "text_completion",
        "created": 1700000000,
        "model": "",
        "choices": [{"index": 0, "text": " world", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "system_fingerprint": TRANSCODER.system_fingerprint,
        "usage": {"prompt_tokens": 2, "completion_tokens": made, "total_tokens": 2 + made},
    }


def test_a_stream_has_text_and_no_role():
    events = [TokensEvent(token_ids=[token]) for token in ids("a b c", special=False)] + [
        FinishEvent(finish_reason="length", prompt_tokens=2)
    ]
    answer = answer_to(ask(stream=True, stream_options={"include_usage": True}), [wire(*events)])
    *chunks, usage, done = answer.events
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a b c"
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"text_completion"}
    assert all("delta" not in chunk["choices"][0] for chunk in chunks)
    assert (usage["choices"], usage["usage"]["prompt_tokens"]) == ([], 2)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_choices_of_several_prompts_and_the_ids_of_theirs():
    fields = {"prompt": ["Hello", "a b"], "n": 2, "return_token_ids": True}
    prompts = [ids("Hello"), ids("a b")]
    streams = [
        [wire(*(FinishEvent(index=index, token_ids=[40 + 2 * number + index], prompt_tokens=len(prompts[number])) for index in (0, 1)))]
        for number in (0, 1)
    ]
    unary = answer_to_all(ask(**fields), streams)
    assert [choice["index"] for choice in unary.json["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in unary.json["choices"]] == [[40], [41], [42], [43]]
    assert [choice["prompt_token_ids"] for choice in unary.json["choices"]] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert "prompt_token_ids" not in unary.json
    assert unary.json["usage"]["prompt_tokens"] == sum(map(len, prompts))
    streamed = answer_to_all(ask(stream=True, **fields), streams, order=[1, 0])
    parts = {chunk["choices"][0]["index"]: chunk["choices"][0] for chunk in streamed.events[:-1]}
    assert [parts[index]["token_ids"] for index in range(4)] == [[40], [41], [42], [43]]
    assert [parts[index]["prompt_token_ids"] for index in range(4)] == [prompts[0]] * 2 + [prompts[1]] * 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
KNOWN = sorted(completions.READ | completions.REFUSED.keys() | {"messages"})


@given(prompt=JSON, more=st.dictionaries(st.sampled_from(KNOWN), JSON, max_size=3), stream=st.booleans())
def test_any_body_is_refused_or_answered(prompt, more, stream):
    body = json.dumps({"prompt": prompt, "stream": stream, **more}).encode()
    try:
        call = TRANSCODER.request("POST", PATH, (), body, request_id="r")
    except RequestError:
        return
    finishes = [[wire(*(FinishEvent(index=index, token_ids=[40]) for index in range(one.choices)))] for one in call.calls]
    assert answer_to_all(call, finishes).error is None
