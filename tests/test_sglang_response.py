"""Answers in SGLang's flavor where no golden shows them: several choices, log probabilities, running usage, stops, and errors by host."""

from __future__ import annotations

import json

import pytest

from gaie_codec import (
    BodyChunk,
    Code,
    FinishEvent,
    ModelInfo,
    RequestError,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    UpstreamStatusError,
    UsageError,
    encode_error_response,
)
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
EOS = min(TOKENIZER.eos_token_ids)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def ask(path=CHAT, *, dialect="vllm.engine", options=None, **fields):
    prompt = {"prompt": "hi"} if path == TEXT else {"messages": [{"role": "user", "content": "hi"}]}
    made = {"model": ModelInfo(served_model_name="m", max_model_len=4096), **(options or {})}
    transcoder = Transcoder(dialect, tokenizer=TOKENIZER, flavor="sglang", **made)
    return transcoder.request("POST", path, {}, json.dumps({**prompt, **fields}).encode(), request_id="r")


def body_of(call, *events, status=("0", "")):
    response = call.response(created=1)
    outputs = [*response.receive_headers({})]
    for event in events:
        outputs += response.receive_message(call.transcoder.adapter.encode_response(event).SerializeToString())
    outputs += response.receive_trailers({"grpc-status": status[0], "grpc-message": status[1]})
    return b"".join(out.data for out in outputs if isinstance(out, BodyChunk)).decode()


def events_of(call, *events, **how):
    lines = body_of(call, *events, **how).split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line not in ("", "data: [DONE]")]


def choices(events):
    return [choice for event in events for choice in event["choices"]]


def role(index=0):
    delta = {"reasoning_content": None, "role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "matched_stop": None}


def content(text, index=0):
    return {**role(index), "delta": {"reasoning_content": None, "content": text}}


def end(index=0, reason="stop", matched=None):
    return {**role(index), "delta": {"reasoning_content": None}, "finish_reason": reason, "matched_stop": matched}


def test_a_choice_begins_with_its_role_when_it_first_gains_something():
    call = ask(stream=True, n=2)
    told = events_of(
        call,
        TokensEvent(index=1, token_ids=ids("a")),
        TokensEvent(index=1, token_ids=ids("b")),
        TokensEvent(index=0, token_ids=ids("c")),
        FinishEvent(index=0, finish_reason="length"),
        TokensEvent(index=1, token_ids=[EOS]),
        FinishEvent(index=1),
    )
    assert choices(told) == [role(1), content("a", 1), content("b", 1), role(), content("c"), end(reason="length"), end(1, matched=EOS)]
    assert {event["id"] for event in told} == {"r"}
    assert not any({"usage", "system_fingerprint"} & event.keys() for event in told)


def test_a_stop_string_and_a_stop_token_are_named():
    string = ask(stream=True, stop=["b"])
    assert choices(events_of(string, TokensEvent(token_ids=ids("a")), FinishEvent(token_ids=ids("a") + ids("b"), matched_stop="b")))[
        -1
    ] == end(matched="b")
    token = ask(stream=True, stop_token_ids=[7])
    assert choices(events_of(token, TokensEvent(token_ids=[7]), FinishEvent(matched_stop=7))) == [role(), end(matched=7)]
    other = ask(stream=True)
    assert choices(events_of(other, TokensEvent(token_ids=ids("a")), FinishEvent()))[-1] == end(), "not EOS, and the server names nothing"


def test_log_probabilities_of_tokens_without_text_are_not_lost():
    call = ask(stream=True, logprobs=True, top_logprobs=1)
    piece = ids("👋")[0]
    entry = TokenLogprob(token_id=piece, logprob=-0.5, top=((piece, -0.5),))
    last = TokenLogprob(token_id=EOS, logprob=-1.0)
    told = choices(
        events_of(
            call,
            TokensEvent(token_ids=[piece], logprobs=(entry,)),
            TokensEvent(token_ids=[EOS], logprobs=(last,)),
            FinishEvent(),
        )
    )
    assert [choice["delta"].get("content") for choice in told] == ["", "", None]
    assert [[one["logprob"] for one in (choice["logprobs"] or {}).get("content", ())] for choice in told] == [[], [-0.5], [-1.0]]


def test_usage_goes_along_when_asked_for():
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = ask(stream=True, stream_options=options, options={"prompt_tokens_details": True})
    told = events_of(call, TokensEvent(token_ids=ids("a"), prompt_tokens=9, cached_tokens=4), FinishEvent(finish_reason="length"))
    assert [event["usage"]["completion_tokens"] for event in told] == [1, 1, 1, 1]
    assert told[-1]["choices"] == []
    assert told[-1]["usage"] == {
        "prompt_tokens": 9,
        "total_tokens": 10,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 4},
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }


def test_a_stream_of_a_completion():
    call = ask(TEXT, stream=True, stream_options={"include_usage": True})
    told = events_of(call, TokensEvent(token_ids=ids("a")), TokensEvent(token_ids=ids("b")), TokensEvent(token_ids=[EOS]), FinishEvent())
    *chunks, usage = told
    assert [event["choices"] for event in chunks] == [
        [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "matched_stop": None}],
        [{"index": 0, "text": "b", "logprobs": None, "finish_reason": None, "matched_stop": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "matched_stop": EOS}],
    ]
    assert all(event["usage"] is None and event["object"] == "text_completion" for event in chunks)
    assert usage["usage"] == {"prompt_tokens": usage["usage"]["prompt_tokens"], "total_tokens": usage["usage"]["prompt_tokens"] + 3} | {
        "completion_tokens": 3,
        "reasoning_tokens": 0,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_with_log_probabilities(stream):
    call = ask(TEXT, stream=stream, echo=True, logprobs=1, return_token_ids=False)
    entry = TokenLogprob(token_id=ids("a")[0], logprob=-0.5, top=((ids("b")[0], -0.25),))
    told = body_of(call, TokensEvent(token_ids=ids("a"), logprobs=(entry,)), FinishEvent(finish_reason="length"))
    first = json.loads(told.split("\n\n")[0].removeprefix("data: "))["choices"][0]
    assert first["text"] == "hia"
    assert first["logprobs"]["tokens"][-1] == "a"
    assert first["logprobs"]["top_logprobs"][-1] == {"b": -0.25}
    assert set(first["logprobs"]["text_offset"]) == {-1}


def test_without_likeliest_there_is_no_column_of_them():
    call = ask(TEXT, logprobs=0)
    entry = TokenLogprob(token_id=ids("a")[0], logprob=-0.5)
    (choice,) = json.loads(body_of(call, FinishEvent(token_ids=ids("a"), logprobs=(entry,), finish_reason="length")))["choices"]
    assert choice["logprobs"] == {"text_offset": [-1], "token_logprobs": [-0.5], "tokens": ["a"], "top_logprobs": []}


def test_ids_of_a_chat_are_told_by_choice():
    body = json.loads(body_of(ask(return_token_ids=True), FinishEvent(token_ids=[*ids("a"), EOS])))
    assert body["choices"][0]["token_ids"] == [*ids("a"), EOS]
    assert body["choices"][0]["prompt_token_ids"]
    assert "prompt_token_ids" not in body


def test_several_prompts_and_ids_of_tokens():
    call = ask(TEXT, prompt=["x", "y"], return_token_ids=True)
    assert [one.inference.request_id for one in call.calls] == ["r-0", "r-1"]
    response = call.response(created=1)
    outputs = []
    for number in (0, 1):
        finish = FinishEvent(token_ids=[*ids("a"), EOS])
        outputs += response.receive_headers({}, call=number)
        outputs += response.receive_message(call.transcoder.adapter.encode_response(finish).SerializeToString(), call=number)
        outputs += response.receive_trailers({"grpc-status": "0"}, call=number)
    body = json.loads(outputs[1].data)
    assert [choice["token_ids"] for choice in body["choices"]] == [[*ids("a"), EOS]] * 2
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [ids("x"), ids("y")]
    assert body["metadata"] == {"weight_version": "default"}
    assert ask(TEXT).calls[0].inference.request_id == "r"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_sglangs_names_of_fields(path):
    call = ask(path, rid="mine", no_stop_trim=True, regex="a+")
    sampling = call.inference.sampling
    assert (call.id, sampling.include_stop_str_in_output, sampling.constraint.kind, sampling.constraint.value) == (
        "mine",
        True,
        "regex",
        "a+",
    )
    assert call.dropped == ()
    assert ask(path, ebnf="root ::= x").inference.sampling.constraint.kind == "grammar"
    assert ask(path, rid="mine", request_id="theirs", regex=None).id == "theirs"


def test_any_model_is_taken_and_named():
    assert json.loads(body_of(ask(model="other"), FinishEvent(token_ids=[EOS])))["model"] == "other"


def test_an_absent_limit_is_left_to_servers_that_know_it():
    assert ask().inference.sampling.max_tokens is None
    assert ask(dialect="sglang.api").inference.sampling.max_tokens > 4000
    assert ask(max_tokens=4000).inference.sampling.max_tokens == 4000


def test_errors_are_flat_but_in_a_stream():
    with pytest.raises(RequestError) as caught:
        ask(temperature=-1)
    _, chunk, _ = encode_error_response(caught.value, flavor="sglang")
    assert json.loads(chunk.data)["object"] == "error"
    late = events_of(ask(stream=True), TokensEvent(token_ids=ids("a")), status=("14", "gone"))[-1]
    assert late["error"] == {
        "object": "error",
        "message": "The model server is unavailable",
        "type": "SERVICE_UNAVAILABLE",
        "param": None,
        "code": 503,
    }
    assert json.loads(body_of(ask(), status=("8", "full"))) == {
        "object": "error",
        "message": "full",
        "type": "RateLimitError",
        "param": None,
        "code": 429,
    }
    assert json.loads(encode_error_response(UpstreamStatusError(Code.CANCELLED, ""))[1].data).keys() == {"error"}


def test_a_flavor_that_does_not_exist():
    with pytest.raises(UsageError, match="vllm, sglang"):
        Transcoder("vllm.engine", tokenizer=TOKENIZER, flavor="openai")
