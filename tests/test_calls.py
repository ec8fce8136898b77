"""One request, one call or several: what each of them asks for, and how their answers become one."""

from __future__ import annotations

import json

import pytest

from gaie_codec import (
    BodyChunk,
    CancelCall,
    Code,
    EndOfBody,
    FinishEvent,
    Limits,
    ModelInfo,
    ResponseHead,
    State,
    TokensEvent,
    Transcoder,
    TruncatedResponseError,
    UnsupportedFieldError,
    UsageError,
)
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import OK_TRAILERS, answer_to_all, frames_of, single_bytes

TOKENIZER = load_tokenizer("builtin")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ONE_CALL = Transcoder("vllm.engine", tokenizer=TOKENIZER)
BY_CHOICE = Transcoder("vllm.engine", snapshot="intree-0.14.0", tokenizer=TOKENIZER)
ENDS_HERE = Transcoder("vllm.inference", snapshot="0.25.1", tokenizer=TOKENIZER)  # one choice a call, and no stop strings


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def ask(transcoder=BY_CHOICE, path=CHAT, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {}
    return transcoder.request("POST", path, (), json.dumps(body | fields).encode(), request_id="r")


def sent(call):
    return [call.transcoder.adapter.request_type.FromString(one.message) for one in call.calls]


def wire(*events, adapter=BY_CHOICE.adapter):
    return frames_of(adapter, events)


def tokens(text, **fields):
    return TokensEvent(token_ids=ids(text), **fields)


# What is asked


def test_one_call_has_its_parts_on_the_call_itself():
    call = ask(ONE_CALL, n=2, seed=5)
    (one,) = call.calls
    assert (call.path, call.message, call.metadata, call.frame, call.headers) == (
        one.path,
        one.message,
        one.metadata,
        one.frame,
        one.headers,
    )
    assert (one.choices, one.first_index, one.prompt) == (2, 0, 0)
    assert ("content-type", "application/grpc") in call.headers


def test_each_choice_gets_a_call_with_an_id_and_a_seed_of_its_own():
    call = ask(n=3, seed=-2, temperature=0.5)
    assert [message.request_id for message in sent(call)] == ["chatcmpl-r-0", "chatcmpl-r-1", "chatcmpl-r-2"]
    assert [message.sampling_params.seed for message in sent(call)] == [-2, -1, 0], "a seed that was given goes on counting, as vLLM's does"
    assert not any(message.sampling_params.HasField("seed") for message in sent(ask(n=3)))
    assert [(one.choices, one.first_index, one.prompt) for one in call.calls] == [(1, 0, 0), (1, 1, 0), (1, 2, 0)]
    assert call.inference.sampling.n == 3
    assert call.id == call.inference.request_id == "chatcmpl-r"
    assert "3 to" in repr(call)
    for part in ("path", "message", "metadata", "frame", "headers"):
        with pytest.raises(UsageError, match=r"takes 3 calls.*max_calls=1"):
            getattr(call, part)


def test_each_prompt_gets_calls_of_its_own():
    call = ask(ONE_CALL, COMPLETIONS, prompt=["a", "bc"], n=2)
    assert [(one.choices, one.first_index, one.prompt) for one in call.calls] == [(2, 0, 0), (2, 2, 1)]
    assert [message.request_id for message in sent(call)] == ["cmpl-r-0", "cmpl-r-1"]
    assert [list(message.tokenized.input_ids) for message in sent(call)] == [prompt.prompt_token_ids for prompt in call.prompts]
    both = ask(BY_CHOICE, COMPLETIONS, prompt=["a", "bc"], n=2)
    assert [(one.first_index, one.prompt) for one in both.calls] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [message.request_id for message in sent(both)] == ["cmpl-r-0-0", "cmpl-r-0-1", "cmpl-r-1-0", "cmpl-r-1-1"]


def host(transcoder, **how):
    return Transcoder(transcoder.adapter, tokenizer=TOKENIZER, **how)


@pytest.mark.parametrize(("limit", "fits"), [(1, False), (2, False), (3, True)])
def test_a_host_says_how_many_calls_it_makes(limit, fits):
    limited = host(BY_CHOICE, limits=Limits(max_calls=limit))
    if fits:
        assert len(ask(limited, n=3).calls) == 3
        return
    with pytest.raises(UnsupportedFieldError, match=f"`n` takes 3 calls.*at most {limit}") as caught:
        ask(limited, n=3)
    assert (caught.value.param, caught.value.http_status) == ("n", 400)


def test_too_many_prompts_are_refused_by_name_and_choices_may_be_dropped():
    limited = host(ONE_CALL, limits=Limits(max_calls=1))
    assert len(ask(limited, COMPLETIONS, prompt="a", n=5).calls) == 1
    with pytest.raises(UnsupportedFieldError, match="`prompt` takes 2 calls") as caught:
        ask(limited, COMPLETIONS, prompt=["a", "b"])
    assert caught.value.param == "prompt"
    dropping = host(BY_CHOICE, limits=Limits(max_calls=2), unsupported="drop")
    call = ask(dropping, COMPLETIONS, prompt=["a", "b"], n=2)
    assert (call.dropped, [message.sampling_params.n for message in sent(call)]) == (("n",), [1, 1])
    with pytest.raises(UnsupportedFieldError, match="takes 3 calls"):
        ask(dropping, COMPLETIONS, prompt=["a", "b", "c"])


def test_a_stream_is_asked_for_where_only_a_stream_can_be_ended():
    scheduler = Transcoder("sglang.scheduler", tokenizer=TOKENIZER)
    for stream, stop, asked in ((False, None, False), (True, None, True), (False, "S", True)):
        assert sent(ask(scheduler, stream=stream, stop=stop))[0].stream is asked
        assert all(one.path.endswith("Stream") == asked for one in ask(ENDS_HERE, n=2, stream=stream, stop=stop).calls)


# How the answers become one


def test_choices_have_their_places_and_the_prompt_counts_once():
    call = ask(n=2)
    streams = [
        [wire(tokens("Hello", prompt_tokens=7, cached_tokens=3), FinishEvent())],
        [wire(tokens("Bye", prompt_tokens=7), FinishEvent())],
    ]
    for order in ([0, 1], [1, 0]):
        answer = answer_to_all(call, streams, order=order)
        assert [choice["message"]["content"] for choice in answer.json["choices"]] == ["Hello", "Bye"]
        made = len(ids("Hello")) + len(ids("Bye"))
        assert answer.json["usage"] == {"prompt_tokens": 7, "completion_tokens": made, "total_tokens": 7 + made}
        assert answer.usage.cached_tokens == 3


def test_each_prompt_counts():
    call = ask(ONE_CALL, COMPLETIONS, prompt=["a", "bc"])
    streams = [[wire(FinishEvent(token_ids=ids("x"), prompt_tokens=told), adapter=ONE_CALL.adapter)] for told in (5, 0)]
    # Where a server tells nothing, the prompt is as long as it was made.
    assert answer_to_all(call, streams).usage.prompt_tokens == 5 + len(call.prompts[1].prompt_token_ids)


def test_all_role_chunks_come_with_the_first_message_of_any_call():
    response = ask(n=2, stream=True).response(created=1)
    for place in (0, 1):
        assert response.receive_headers(call=place) == ()
    head, body = response.receive_data(wire(tokens("Bye")), call=1)
    assert isinstance(head, ResponseHead)
    events = [json.loads(line.removeprefix(b"data: ")) for line in body.data.strip().split(b"\n\n")]
    assert [event["choices"][0]["index"] for event in events] == [0, 1, 1]
    assert response.state is State.AWAIT_MESSAGE, "of several calls, that which is furthest behind"
    assert "2 of 2 choices unfinished" in repr(response)


def test_a_call_that_is_not_needed_any_longer_is_named_while_others_go_on():
    adapter = ENDS_HERE.adapter
    piece = lambda text: wire(TokensEvent(text=text, completion_tokens=1), adapter=adapter)  # noqa: E731
    for stream in (True, False):
        response = ask(ENDS_HERE, n=2, stop="STOP", stream=stream).response(created=1)
        for place in (0, 1):
            response.receive_headers(call=place)
        response.receive_data(piece("b"), call=1)
        outputs = response.receive_data(piece("a STOP"), call=0)
        assert outputs[-1] == CancelCall(0)
        assert len([out for out in outputs if isinstance(out, BodyChunk)]) == stream
        assert not response.ended
        # A host need not be quick: what comes in spite of it is passed over, and named once.
        assert response.receive_data(piece("more") + piece("STOP"), call=0) == ()
        assert response.receive_data(b"\x02no frame", call=0) == ()
        assert response.receive_status(Code.CANCELLED, call=0) == ()
        last = response.receive_data(piece("c STOP"), call=1)
        assert isinstance(last[-1], EndOfBody), "the end says it for the last"
        assert response.ended
        assert response.error is None
        assert response.usage.completion_tokens == 3
        assert response.receive_trailers(OK_TRAILERS, call=1) == ()


def test_what_follows_the_end_of_a_call_is_not_looked_at_however_it_is_cut():
    everything = wire(TokensEvent(text="a STOP", completion_tokens=1), adapter=ENDS_HERE.adapter) + b"\x02no frame"
    call = ask(ENDS_HERE, n=2, stop="STOP")
    answers = [answer_to_all(call, [pieces, pieces], obeys_cancel=False) for pieces in ([everything], single_bytes(everything))]
    assert answers[0].same == answers[1].same
    assert answers[0].error is None


@pytest.mark.parametrize("stream", [True, False])
def test_one_call_that_fails_fails_the_answer(stream):
    call = ask(n=2, stream=stream)
    response = call.response(created=1)
    outputs = [out for place in (0, 1) for out in response.receive_headers(call=place)]
    outputs += response.receive_data(wire(tokens("Hello")), call=0)
    outputs += response.receive_trailers((("grpc-status", "8"), ("grpc-message", "slow down")), call=1)
    assert response.ended
    assert response.error.code is Code.RESOURCE_EXHAUSTED
    assert outputs[0].status == (200 if stream else 429)
    assert b"slow down" in outputs[-2].data
    assert b"[DONE]" not in outputs[-2].data
    assert response.receive_data(wire(tokens("more")), call=0) == ()
    assert response.receive_eof(call=0) == ()


def test_one_call_that_ends_without_its_finish_is_truncation():
    answer = answer_to_all(ask(n=2), [[wire(tokens("a"), FinishEvent())], [wire(tokens("b"))]])
    assert (answer.status, type(answer.error)) == (502, TruncatedResponseError)


def test_there_is_no_call_of_another_number():
    response = ask(n=2).response(created=1)
    for place in (2, -1):
        for receive in (
            lambda place=place: response.receive_headers(call=place),
            lambda place=place: response.receive_data(b"", call=place),
            lambda place=place: response.receive_message(b"", call=place),
            lambda place=place: response.receive_eof(call=place),
        ):
            with pytest.raises(UsageError, match=f"call {place} of 2"):
                receive()


def test_several_calls_need_no_more_context_than_one():
    told = host(BY_CHOICE, model=ModelInfo(max_model_len=100))
    lengths = {message.sampling_params.max_tokens for message in sent(ask(told, n=2))}
    assert lengths == {100 - len(ask(told).inference.prompt_token_ids)}
