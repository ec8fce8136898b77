"""`POST /v1/completions`: prompts in four forms, what is refused by name, and the answer's form."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    FinishEvent,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    PromptLogprob,
    RequestError,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    UnsupportedFieldError,
    adapters,
)
from gaie_codec.openai import chat, completions
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import answer_to, answer_to_all, frames_of, scripts, told

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
        ([5.0, "6"], [[5, 6]]),
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
        (None, "non-empty"),
        (5, "valid string"),
        ({}, "valid string"),
        ([], "at least one prompt"),
        ("", "empty"),
        ([[]], "empty"),
        ([{}], "'loc': 'body.prompt.0', 'msg': 'Input should be a valid list'"),
        ([["a"]], "'loc': 'body.prompt.0.0', 'msg': 'Input should be a valid integer"),
        ([5, "a"], "'loc': 'body.prompt.1', 'msg': 'Input should be a valid integer"),
        (["Hello", [7]], "'loc': 'body.prompt.1', 'msg': 'Input should be a valid string'"),
        ([TOKENIZER.vocab_size], f"Token id {TOKENIZER.vocab_size} is out of vocabulary"),
        ([[-1]], "greater than or equal to 0"),
        (["a"] * 1025, "maximum allowed count of 1024"),
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
    ("suffix", "x"),
    ("prompt_embeds", "x"),
    ("use_beam_search", True),
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
        " documents top_logprobs max_completion_tokens return_prompt_text"
        " parallel_tool_calls include_reasoning".split()
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


# Log probabilities and echo


ABC = ids("a b c", special=False)


def entry(token_id, logprob=-0.5, *others):
    return TokenLogprob(token_id=token_id, logprob=logprob, top=((token_id, logprob), *others))


def token(token_id, **more):
    return TokensEvent(token_ids=[token_id], logprobs=(entry(token_id, -0.5, (ids("x", special=False)[0], -1.5)),), **more)


PROMPT_IDS = ids("Hello")
PROMPT = (
    PromptLogprob(token_id=PROMPT_IDS[0]),
    *(PromptLogprob(token_id=one, logprob=-1.0, rank=1, top=((one, -1.0), (ABC[0], -2.0))) for one in PROMPT_IDS[1:]),
)
FINISH = FinishEvent(finish_reason="length", prompt_tokens=len(PROMPT_IDS))


def streamed_and_unary(*events, **fields):
    """The pieces of the one choice of a stream, and the choice of the unary answer to the same."""
    stream = answer_to(ask(stream=True, **fields), [wire(*events)])
    whole = answer_to(ask(**fields), [wire(*events)])
    assert stream.error is whole.error is None
    return [event["choices"][0] for event in stream.events[:-1]], whole.json["choices"][0]


@pytest.mark.parametrize(("value", "asked"), [(None, None), (0, 0), (3, 3), (True, 1), ("2", 2), (20, 20)])
def test_logprobs_are_a_number(value, asked):
    call = ask(logprobs=value)
    assert call.inference.sampling.logprobs == asked
    assert call.inference.sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("field", "value"), [("logprobs", 21), ("logprobs", -1), ("logprobs", -2), ("prompt_logprobs", 21), ("prompt_logprobs", -1)]
)
def test_too_many_logprobs_are_refused(field, value):
    error = refused(MalformedRequestError, **{field: value})
    assert error.param == field
    if value > -2:
        kind, most = ("prompt" if field.startswith("prompt") else "sample"), TOKENIZER.vocab_size if value == -1 else value
        assert error.message.startswith(f"Requested {kind} logprobs of {most}, which is greater than max allowed: 20")


def test_no_stream_has_room_for_those_of_the_prompt():
    error = refused(MalformedRequestError, prompt_logprobs=1, stream=True)
    assert error.message == "`prompt_logprobs` are not available when `stream=True`. (parameter=prompt_logprobs)"
    assert ask(prompt_logprobs=0, stream=True).inference.sampling.prompt_logprobs == 0
    assert refused(MalformedRequestError, prompt_logprobs=-2).param == "prompt_logprobs"


def test_columns_go_on_from_chunk_to_chunk():
    parts, whole = streamed_and_unary(*map(token, ABC), FINISH, logprobs=2)
    assert [part["logprobs"]["text_offset"] for part in parts] == [[0], [1], [3], []]
    assert whole["logprobs"] == {
        "text_offset": [0, 1, 3],
        "token_logprobs": [-0.5] * 3,
        "tokens": ["a", " b", " c"],
        "top_logprobs": [{text: -0.5, "x": -1.5} for text in ("a", " b", " c")],
    }


def test_the_sampled_token_comes_first_and_of_equal_texts_the_last_counts():
    broken = ids("\N{SAUROPOD}", special=False)
    tops = TokenLogprob(token_id=broken[0], logprob=-0.5, top=((ABC[0], -0.125), (broken[1], -0.25), (broken[0], -0.5)))
    _, whole = streamed_and_unary(TokensEvent(token_ids=broken[:1], logprobs=(tops,)), FINISH, logprobs=3)
    assert len(broken) > 1
    assert list(whole["logprobs"]["top_logprobs"][0].items()) == [("", -0.25), ("a", -0.125)]


def test_ids_for_texts():
    _, whole = streamed_and_unary(*map(token, ABC[:2]), FINISH, logprobs=1, return_tokens_as_token_ids=True)
    names = [f"token_id:{one}" for one in ABC[:2]]
    assert whole["logprobs"]["tokens"] == names
    assert whole["logprobs"]["text_offset"] == [0, len(names[0])]
    assert [list(top) for top in whole["logprobs"]["top_logprobs"]] == [[name] for name in names]
    host = Transcoder("vllm.engine", tokenizer=TOKENIZER, return_tokens_as_token_ids=True)
    for asked, shown in ((None, names[:1]), (False, ["a"])):
        body = {"prompt": "Hello", "logprobs": 0, "return_tokens_as_token_ids": asked}
        call = host.request("POST", PATH, (), json.dumps(body).encode(), request_id="r")
        assert answer_to(call, [wire(token(ABC[0]), FINISH)]).json["choices"][0]["logprobs"]["tokens"] == shown


def test_echo_begins_the_first_chunk_of_each_choice():
    fields = {"prompt": [ids("Hello", special=False), [*ABC[:2]]], "n": 2, "echo": True}
    streams = [
        [
            wire(
                *(TokensEvent(index=index, token_ids=[ABC[2]]) for index in (0, 1)),
                *(FinishEvent(index=index, finish_reason="length") for index in (0, 1)),
            )
        ]
    ] * 2
    unary = answer_to_all(ask(**fields), streams)
    assert [choice["text"] for choice in unary.json["choices"]] == ["Hello c"] * 2 + ["a b c"] * 2
    streamed = answer_to_all(ask(stream=True, **fields), streams)
    firsts = [event["choices"][0] for event in streamed.events[:-1] if event["choices"][0]["finish_reason"] is None]
    assert [(first["index"], first["text"]) for first in firsts] == [(0, "Hello c"), (1, "Hello c"), (2, "a b c"), (3, "a b c")]
    assert [first["prompt_token_ids"] for first in firsts] == [ids("Hello")] * 2 + [ABC[:2]] * 2, (
        "as by vLLM, which sends them with an echo"
    )


def test_an_echo_comes_though_nothing_is_generated():
    parts, whole = streamed_and_unary(FinishEvent(finish_reason="stop"), echo=True)
    assert [part["text"] for part in parts] == [whole["text"]] == ["Hello"]


def test_ids_of_the_prompt_instead_of_its_text():
    parts, whole = streamed_and_unary(TokensEvent(token_ids=ABC[:1]), FINISH, echo=True, return_token_ids=True)
    assert [part["text"] for part in parts] == [whole["text"], ""] == ["a", ""]
    assert parts[0]["prompt_token_ids"] == whole["prompt_token_ids"] == PROMPT_IDS
    assert whole["token_ids"] == ABC[:1]


def test_echo_with_logprobs_asks_for_those_of_the_prompt():
    assert ask(echo=True, logprobs=2).inference.sampling.prompt_logprobs == 2
    assert ask(echo=True, logprobs=2, prompt_logprobs=3).inference.sampling.prompt_logprobs == 3
    assert ask(echo=True).inference.sampling.prompt_logprobs is None
    first = TokensEvent(token_ids=ABC[:1], logprobs=(entry(ABC[0]),), prompt_logprobs=PROMPT)
    parts, whole = streamed_and_unary(first, FINISH, echo=True, logprobs=1)
    texts = [TOKENIZER.detokenizer((), skip_special_tokens=False).peek(one) for one in PROMPT_IDS]
    assert whole["logprobs"]["tokens"] == parts[0]["logprobs"]["tokens"] == [*texts, "a"]
    assert whole["logprobs"]["token_logprobs"] == [None, *[-1.0] * (len(texts) - 1), -0.5]
    assert whole["logprobs"]["top_logprobs"][0] is None
    assert whole["logprobs"]["text_offset"][-1] == len("".join(texts))
    assert whole["prompt_logprobs"][0] is None
    assert "prompt_logprobs" not in parts[0]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_echo_of_nothing_but_the_prompt_hides_the_one_token(logprobs):
    fields = {"echo": True, "max_tokens": 0, "logprobs": logprobs}
    assert ask(**fields).inference.sampling.max_tokens == 1
    first = TokensEvent(token_ids=ABC[:1], logprobs=(entry(ABC[0]),), prompt_logprobs=PROMPT)
    parts, whole = streamed_and_unary(first, FINISH, **fields)
    assert [part["text"] for part in parts] == [whole["text"]] == ["Hello"]
    if logprobs:
        assert len(whole["logprobs"]["tokens"]) == len(PROMPT_IDS)
        assert parts[0]["logprobs"] == whole["logprobs"]
    assert answer_to(ask(**fields), [wire(first, FINISH)]).json["usage"]["completion_tokens"] == 1


def test_prompt_logprobs_are_vllms():
    answer = answer_to(ask(prompt_logprobs=2), [wire(FinishEvent(token_ids=ABC[:1], prompt_logprobs=PROMPT, finish_reason="length"))])
    first, second, *_ = answer.json["choices"][0]["prompt_logprobs"] + [None]
    assert first is None
    if second is not None:
        text = TOKENIZER.detokenizer((), skip_special_tokens=False).peek(PROMPT_IDS[1])
        assert second == {
            str(PROMPT_IDS[1]): {"logprob": -1.0, "rank": 1, "decoded_token": text},
            str(ABC[0]): {"logprob": -2.0, "rank": 2, "decoded_token": "a"},
        }


def test_no_logprob_is_lost_while_text_is_held_back():
    stop = "b c d"
    parts, whole = streamed_and_unary(*map(token, ABC), FinishEvent(finish_reason="length"), logprobs=0, stop=[stop])
    assert [part["text"] for part in parts][:2] == ["a", " "], "the beginning of a stop string is held back"
    assert [part["logprobs"]["tokens"] for part in parts][:3] == [["a"], [" b"], [" c"]]
    assert whole["text"] == "a b c"


def fold(answer):
    """What a client that puts a stream together gets, in the form of a unary body."""
    *chunks, last, done = answer.events
    assert done == "[DONE]"
    choices = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            choice["text"] += part["text"]
            if part["logprobs"] is not None:
                known = choice["logprobs"] or {key: [] for key in part["logprobs"]}
                choice["logprobs"] = {key: known[key] + part["logprobs"][key] for key in known}
            if "token_ids" in part:
                choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
            choice |= {key: part[key] for key in ("prompt_token_ids", "finish_reason", "stop_reason") if key in part}
    head = {key: last[key] for key in ("id", "object", "created", "model", "usage", "system_fingerprint")}
    return {**head, "choices": [choices[index] for index in sorted(choices)]}


TOKEN_IDS = st.sampled_from([*ids("a STOP b \N{SAUROPOD}e\u0301", special=False), *TOKENIZER.eos_token_ids, 300])
HOSTS = {
    dialect: Transcoder(dialect, tokenizer=TOKENIZER, model=ModelInfo(max_model_len=4096), passthrough=False)
    for dialect in adapters.DIALECTS
}


@pytest.mark.parametrize("host", [pytest.param(host, id=dialect) for dialect, host in HOSTS.items()])
@given(data=st.data())
def test_folding_the_stream_gives_the_unary_body(host, data):
    optional = {
        "logprobs": st.integers(0, 2),
        "echo": st.booleans(),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
        "stop": st.sampled_from(["STOP", ["b", "zz"]]),
        "max_tokens": st.integers(0, 8),
        "n": st.integers(1, 2),
        "stop_token_ids": st.just(ABC[:1]),
        "prompt": st.sampled_from(["Hello", ["Hello", "a b"], [5, 6], [[5], [6, 7]]]),
    }
    if "include_stop_str_in_output" in host.adapter.carries:
        optional["include_stop_str_in_output"] = st.booleans()
    fields = data.draw(st.fixed_dictionaries({}, optional=optional))
    if fields.get("max_tokens") == 0:
        fields["echo"] = True
    body = {"prompt": "Hello", **fields}

    def call(**more):
        return host.request("POST", PATH, (), json.dumps({**body, **more}).encode(), request_id="r")

    asked = call(stream=True, stream_options={"include_usage": True})
    streams = []
    for prompt in range(len(asked.prompts)):
        script = data.draw(scripts(token_ids=TOKEN_IDS, n=fields.get("n", 1), logprobs=True, max_pieces=4))
        entries = tuple(
            PromptLogprob(token_id=one, logprob=-0.5 if place else None) for place, one in enumerate(asked.prompts[prompt].prompt_token_ids)
        )
        for one in asked.calls:
            if one.prompt == prompt:
                first = one.first_index - prompt * fields.get("n", 1)
                shifted = msgspec.structs.replace(one, first_index=first)
                events = told(script, shifted, host.adapter, TOKENIZER)
                if one.inference.sampling.prompt_logprobs is not None:
                    events = [msgspec.structs.replace(event, prompt_logprobs=entries) for event in events]
                streams.append([frames_of(host.adapter, events)])
    streamed, unary = answer_to_all(asked, streams), answer_to_all(call(), streams)
    assert streamed.error is unary.error is None
    folded, whole = fold(streamed), unary.json
    for mine, choice in zip(folded["choices"], whole["choices"], strict=True):
        choice.pop("prompt_logprobs", None)  # no stream shows them
        if "return_token_ids" not in fields or not fields["return_token_ids"]:
            mine.pop("prompt_token_ids", None)  # streams show them with an echo, as by vLLM
        if choice["logprobs"] is not None:
            offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
            assert offsets == [sum(map(len, tokens[:place])) for place in range(len(tokens))]
    assert folded == whole


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
