"""Log probabilities of the prompt and of selected tokens as clients see them, and what else of the prompt an answer shows."""

from __future__ import annotations

import json

import pytest

from gaie_codec import (
    FinishEvent,
    MalformedRequestError,
    ModelInfo,
    PromptEvent,
    PromptLogprob,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    UnsupportedFieldError,
    adapters,
)
from gaie_codec.openai.logprobs import encode_prompt_logprobs
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import answer_to, answer_to_all, frames_of

TOKENIZER = load_tokenizer("builtin")
MODEL = ModelInfo(max_model_len=4096)
HOSTS = {one: Transcoder(one, tokenizer=TOKENIZER, model=MODEL, passthrough=False) for one in adapters.DIALECTS}
ENGINE = HOSTS["vllm.engine"]
USER = {"role": "user", "content": "hi"}
A, B = TOKENIZER.encode("a b", add_special_tokens=False)


def ask(host=ENGINE, **fields):
    body = json.dumps({"messages": [USER], **fields}).encode()
    return host.request("POST", "/v1/chat/completions", (), body, request_id="r")


def of_prompt(call, top=2):
    first, *others = call.inference.prompt_token_ids
    likely = ((A, -3.0), (B, -4.0))[: top - 1]
    return (
        PromptLogprob(token_id=first),
        *(PromptLogprob(token_id=one, logprob=-1.0, rank=1, top=((one, -1.0), *likely)) for one in others),
    )


def texts(token_ids):
    pieces = TOKENIZER.detokenizer((), skip_special_tokens=False)
    return [pieces.decode([one]) for one in token_ids]


@pytest.mark.parametrize("host", [pytest.param(host, id=dialect) for dialect, host in HOSTS.items()])
def test_every_dialect_shows_them_once_for_all_choices(host):
    call = ask(host, prompt_logprobs=2, n=2, temperature=1)
    known = of_prompt(call)
    told = {"prompt_logprobs": known, "prompt_tokens": len(known), "completion_tokens": 1, "finish_reason": "length", "token_ids": [A]}
    text = "a" if host.adapter.sends_text else None
    streams = []
    for one in call.calls:
        events = [FinishEvent(index=index, choice_id=f"r_{index}", text=text, **told) for index in range(one.choices)]
        streams.append([frames_of(host.adapter, events)])
    answer = answer_to_all(call, streams)
    assert answer.error is None
    shown = answer.json["prompt_logprobs"]
    ids = call.inference.prompt_token_ids
    assert shown[0] is None
    assert [next(iter(place.items())) for place in shown[1:]] == [
        (str(token_id), {"logprob": -1.0, "rank": 1, "decoded_token": name}) for token_id, name in zip(ids[1:], texts(ids)[1:], strict=True)
    ]
    for token_id, place in zip(ids[1:], shown[1:], strict=True):
        if token_id != A:
            assert place[str(A)] == {"logprob": -3.0, "rank": 2, "decoded_token": "a"}
    assert all("prompt_logprobs" not in choice for choice in answer.json["choices"])


def test_as_many_as_asked_although_more_are_sent_for_the_output():
    call = ask(HOSTS["sglang.scheduler"], prompt_logprobs=1, logprobs=True, top_logprobs=3)
    entry = TokenLogprob(token_id=A, logprob=-0.5, top=((A, -0.5), (B, -1.0), (5, -2.0)))
    event = FinishEvent(token_ids=[A], logprobs=(entry,), prompt_logprobs=of_prompt(call, 3), finish_reason="length")
    answer = answer_to(call, [frames_of(HOSTS["sglang.scheduler"].adapter, [event])]).json
    assert {len(place) for place in answer["prompt_logprobs"][1:]} == {1}
    assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3


def test_ranks_that_are_unknown_are_null():
    call = ask(prompt_logprobs=1)
    event = FinishEvent(token_ids=[A], prompt_logprobs=of_prompt(call, 1), finish_reason="length")
    answer = answer_to(call, [frames_of(ENGINE.adapter, [event])]).json
    assert {one["rank"] for place in answer["prompt_logprobs"][1:] for one in place.values()} == {None}


def test_what_nobody_told_is_null():
    answer = answer_to(ask(prompt_logprobs=1), [frames_of(ENGINE.adapter, [FinishEvent(token_ids=[A], finish_reason="length")])]).json
    assert answer["prompt_logprobs"] is None
    assert encode_prompt_logprobs(()) is None


@pytest.mark.parametrize("part", [slice(2), slice(-2, None)])
def test_a_part_of_the_prompt_is_told_where_it_stands(part):
    call = ask(prompt_logprobs=1)
    token_ids = call.inference.prompt_token_ids
    told = tuple(PromptLogprob(token_id=one, logprob=-1.0) for one in token_ids[part])
    event = FinishEvent(token_ids=[A], prompt_logprobs=told, finish_reason="length")
    shown = answer_to(call, [frames_of(ENGINE.adapter, [event])]).json["prompt_logprobs"]
    known = [None if place is None else int(next(iter(place))) for place in shown]
    expected = [None] * len(token_ids)
    expected[part] = token_ids[part]
    assert known == expected


def test_they_may_come_before_all_tokens():
    host = HOSTS["vllm.inference"]
    call = ask(host, prompt_logprobs=1)
    events = [
        PromptEvent(prompt_tokens=3, prompt_logprobs=of_prompt(call)),
        FinishEvent(text="a", completion_tokens=1, finish_reason="length"),
    ]
    answer = answer_to(call, [frames_of(host.adapter, events)])
    assert len(answer.json["prompt_logprobs"]) == len(call.inference.prompt_token_ids)


def test_an_impossible_token_has_a_finite_logprob():
    call = ask(prompt_logprobs=1)
    first, *others = call.inference.prompt_token_ids
    known = [PromptLogprob(token_id=first), *(PromptLogprob(token_id=one, logprob=float("-inf")) for one in others)]
    event = FinishEvent(token_ids=[A], prompt_logprobs=tuple(known), finish_reason="length")
    answer = answer_to(call, [frames_of(ENGINE.adapter, [event])]).json
    assert answer["prompt_logprobs"][1][str(others[0])]["logprob"] == -9999.0


def test_tokens_by_their_ids_in_a_chat():
    call = ask(logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    event = FinishEvent(token_ids=[A], logprobs=(TokenLogprob(token_id=A, logprob=-0.5, top=((B, -0.25),)),), finish_reason="length")
    (shown,) = answer_to(call, [frames_of(ENGINE.adapter, [event])]).json["choices"][0]["logprobs"]["content"]
    name, other = (f"token_id:{one}" for one in (A, B))
    assert shown == {
        "token": name,
        "logprob": -0.5,
        "bytes": list(name.encode()),
        "top_logprobs": [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in ((name, -0.5), (other, -0.25))],
    }


def test_the_sampled_token_is_the_first_of_the_likeliest_as_with_vllm():
    host = HOSTS["sglang.scheduler"]
    entry = TokenLogprob(token_id=A, logprob=-3.0, top=((B, -0.5), (5, -1.0)))
    event = FinishEvent(token_ids=[A], logprobs=(entry,), finish_reason="length")
    wire = [frames_of(host.adapter, [event])]
    (shown,) = answer_to(ask(host, logprobs=True, top_logprobs=2), wire).json["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in shown["top_logprobs"]] == ["a", " b"]


SELECTING = [name for name, host in HOSTS.items() if "logprob_token_ids" in host.adapter.carries]


def test_who_can_be_asked_for_selected_tokens():
    assert SELECTING == ["vllm.inference", "sglang.scheduler", "sglang.api"]
    with pytest.raises(UnsupportedFieldError) as refused:
        ask(logprobs=True, logprob_token_ids=[A])
    assert refused.value.param == "logprob_token_ids"
    assert ask(logprobs=True, logprob_token_ids=[]).inference.sampling.logprobs == 0


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
@pytest.mark.parametrize("dialect", SELECTING)
def test_selected_tokens_are_shown_instead_of_the_likeliest(dialect, endpoint):
    host = HOSTS[dialect]
    asked = {"logprobs": 1, "logprob_token_ids": [B, A]} | ({"prompt": "hi"} if endpoint == "completions" else {"messages": [USER]})
    call = host.request("POST", f"/v1/{endpoint}", (), json.dumps(asked).encode(), request_id="r")
    sampling = call.inference.sampling
    assert (sampling.logprobs, sampling.logprob_token_ids) == (0, (B, A))
    selected = ((B, -2.0), (A, -3.0))
    entry = TokenLogprob(token_id=A, logprob=-3.0, top=((5, -0.5),), selected=selected)
    text = "a" if host.adapter.sends_text else None
    event = FinishEvent(token_ids=[A], text=text, logprobs=(entry,), finish_reason="length", completion_tokens=1)
    shown = answer_to(call, [frames_of(host.adapter, [event])]).json["choices"][0]["logprobs"]
    if endpoint == "completions":
        assert shown["top_logprobs"] == [{"a": -3.0, " b": -2.0}]
    else:
        assert [(one["token"], one["logprob"]) for one in shown["content"][0]["top_logprobs"]] == [("a", -3.0), (" b", -2.0)]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("chat/completions", {"messages": [USER], "logprob_token_ids": [5]}, "`logprobs` must be set"),
        ("completions", {"prompt": "hi", "logprob_token_ids": [5]}, "`logprobs` must be set"),
        ("completions", {"prompt": "hi", "logprob_token_ids": [5], "logprobs": 1, "echo": True, "max_tokens": 0}, "there are none"),
        ("completions", {"prompt": "hi", "logprob_token_ids": [-5], "logprobs": 1}, "out-of-vocab"),
    ],
)
def test_selections_that_make_no_sense(path, fields, words):
    with pytest.raises(MalformedRequestError, match=words) as refused:
        HOSTS["sglang.api"].request("POST", f"/v1/{path}", (), json.dumps(fields).encode(), request_id="r")
    assert refused.value.param == "logprob_token_ids"


EVENTS = [TokensEvent(token_ids=[B]), FinishEvent(finish_reason="length")]


def test_an_echo_begins_the_content():
    fields = {"messages": [USER, {"role": "assistant", "content": "So"}], "echo": True, "n": 2, "temperature": 1}
    wire = [frames_of(ENGINE.adapter, [type(one)(**{**as_fields(one), "index": index}) for index in (0, 1) for one in EVENTS])]
    unary = answer_to(ask(**fields), wire)
    assert [unary.content(index) for index in (0, 1)] == ["So b"] * 2
    stream = answer_to(ask(stream=True, **fields), wire)
    deltas = [event["choices"][0]["delta"] for event in stream.events[:4]]
    assert deltas == [{"role": "assistant", "content": ""}] * 2 + [{"content": "So"}] * 2
    assert [stream.content(index) for index in (0, 1)] == ["So b"] * 2


def as_fields(event):
    return {name: getattr(event, name) for name in event.__struct_fields__}


def test_without_a_generation_prompt_the_last_role_goes_on():
    fields = {"add_generation_prompt": False, "echo": True}
    wire = [frames_of(ENGINE.adapter, EVENTS)]
    assert answer_to(ask(**fields), wire).json["choices"][0]["message"]["role"] == "user"
    assert answer_to(ask(stream=True, **fields), wire).events[0]["choices"][0]["delta"]["role"] == "user"


def test_the_prompts_text():
    wire = [frames_of(ENGINE.adapter, EVENTS)]
    call = ask(return_prompt_text=True)
    shown = answer_to(call, wire).json["prompt_text"]
    assert TOKENIZER.encode(shown, add_special_tokens=False) == call.inference.prompt_token_ids
    assert answer_to(ask(return_prompt_text=True, stream=True), wire).events[0]["prompt_text"] == shown
    assert "prompt_text" not in answer_to(ask(), wire).json
