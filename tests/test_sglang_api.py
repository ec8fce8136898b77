"""`sglang.api`: frames that repeat everything, errors that come as items of a stream that is OK, and stop strings that leak."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    BodyEvent,
    Code,
    Constraint,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    MalformedRequestError,
    Media,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    UnsupportedFieldError,
    UsageError,
    adapters,
    encode_frame,
    snapshots,
)
from gaie_codec.testing import event_streams, inference_requests
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import answer_to, answer_to_all, as_read, frames_of

NAMES = snapshots.SNAPSHOTS["sglang.api"]
ADAPTERS = {name: adapters.get(snapshots.load("sglang.api", name)) for name in NAMES}
OLD, NEW = ADAPTERS["0.5.22"], ADAPTERS["0.5.23"]
TOKENIZER = load_tokenizer("builtin")
MODEL = ModelInfo(max_model_len=4096)
EOS = 2
CHAT = "/v1/chat/completions"
everywhere = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def ask(adapter=NEW, headers=(), told=MODEL, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return Transcoder(adapter, tokenizer=TOKENIZER, model=told).request("POST", CHAT, headers, json.dumps(body).encode(), request_id="r")


def sent(one):
    return NEW.request_type.FromString(one.message)


def encoded(adapter=NEW, *, request=None, **sampling):
    return adapter.encode_request(request or InferenceRequest(request_id="r", sampling=SamplingParams(**sampling)))


# Requests


def test_what_is_sent_for_a_chat():
    call = ask(
        headers={"traceparent": "x", "x-data-parallel-rank": "0"},
        stop=["S", "T"],
        logprobs=True,
        top_logprobs=2,
        seed=-5,
        logit_bias={"5": 0.5},
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        stop_token_ids=[7],
        priority=-1,
        cache_salt="s",
        stream=True,
    )
    assert (call.path, call.metadata) == ("/sglang.api.v1.SglangService/Generate", (("traceparent", "x"),))
    message = sent(call)
    params = message.sampling_params.one
    assert list(message.input_ids.one.ids) == call.inference.prompt_token_ids
    assert (message.rid.one, message.stream, message.cache_salt.one, message.priority) == ("chatcmpl-r", True, "s", -1)
    assert (message.return_logprob.one, message.top_logprobs_num.one) == (True, 2)
    assert not message.HasField("logprob_start_len")
    assert message.HasField("routed_dp_rank")
    assert (params.top_k, params.top_p, params.repetition_penalty, params.sampling_seed, params.n) == (-1, 1.0, 1.0, -5, 0)
    assert (list(params.stop.many.items), list(params.stop_token_ids.items)) == (["S", "T"], [7])
    assert (params.no_stop_trim, params.skip_special_tokens, dict(params.logit_bias)) == (True, False, {"5": 0.5})
    assert params.max_new_tokens == 4096 - len(message.input_ids.one.ids), "more than the context holds is an error there"
    assert not sent(ask()).sampling_params.one.HasField("stop"), "an empty list is not nothing"


def test_unset_max_tokens_would_be_128_and_is_refused():
    with pytest.raises(MalformedRequestError, match="128") as caught:
        ask(told=None)
    assert caught.value.param == "max_tokens"
    assert sent(ask(told=None, max_tokens=5)).sampling_params.one.max_new_tokens == 5
    assert NEW.decode_request(NEW.request_type()).sampling.max_tokens == 128


@pytest.mark.parametrize(
    ("constraint", "field", "value"),
    [
        (Constraint(kind="json_object"), "json_schema", '{"type": "object"}'),
        (Constraint(kind="json_schema", value="{}"), "json_schema", "{}"),
        (Constraint(kind="regex", value="a"), "regex", "a"),
        (Constraint(kind="grammar", value="g"), "ebnf", "g"),
        (Constraint(kind="structural_tag", value="{}"), "structural_tag", "{}"),
    ],
)
@everywhere
def test_constraints(adapter, constraint, field, value):
    message = encoded(adapter, constraint=constraint)
    assert getattr(message.sampling_params.one, field) == value
    assert adapter.decode_request(message).sampling.constraint == constraint


def test_choices_have_a_field_only_in_the_newest():
    choice = Constraint(kind="choice", value=("a.b", "c"))
    assert list(encoded(NEW, constraint=choice).sampling_params.one.choice) == ["a.b", "c"]
    assert NEW.decode_request(encoded(NEW, constraint=choice)).sampling.constraint == choice
    assert encoded(OLD, constraint=choice).sampling_params.one.regex == r"(?:a\.b|c)"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ],
)
def test_what_the_wire_has_not_is_refused_by_name(fields, param):
    with pytest.raises(UnsupportedFieldError) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_what_the_old_snapshot_cannot_say():
    assert {name for name in NEW.carries - OLD.carries if "." not in name} == {"priority", "cache_salt", "lora_name"}
    for fields, param in (({"priority": 1}, "priority"), ({"cache_salt": "s"}, "cache_salt")):
        with pytest.raises(UnsupportedFieldError) as caught:
            ask(OLD, **fields)
        assert caught.value.param == param


def test_media_keep_their_kind_and_their_detail():
    media = (Media(kind="image", url="http://a", detail="low"), Media(kind="image", url="data:b"), Media(kind="audio", url="http://c"))
    message = encoded(request=InferenceRequest(request_id="r", media=media, sampling=SamplingParams(max_tokens=1)))
    assert [one.item.ref.url for one in message.image_data.many.items] == ["http://a", "data:b"]
    assert NEW.decode_request(message).media == media
    alone = NEW.request_type()
    alone.video_data.item.source = "http://d"
    assert NEW.decode_request(alone).media == (Media(kind="video", url="http://d"),)


def test_lists_of_one_are_read_like_the_one():
    message = NEW.request_type()
    message.rid.many.items.append("r")
    message.text.many.items.append("t")
    message.sampling_params.one.stop.one = "S"
    read = NEW.decode_request(message)
    assert (read.request_id, read.prompt_text, read.sampling.stop) == ("r", "t", ("S",))


@everywhere
@given(data=st.data())
def test_requests_come_back(adapter, data):
    request = data.draw(inference_requests(adapter))
    message = adapter.encode_request(request)
    assert adapter.decode_request(type(message).FromString(message.SerializeToString())) == as_read(adapter, request)


# Answers


def so_far(text, tokens=None, **fields):
    return TokensEvent(text=text, is_cumulative=True, completion_tokens=len(text) if tokens is None else tokens, prompt_tokens=7, **fields)


def end(text, tokens=None, **fields):
    return FinishEvent(text=text, completion_tokens=len(text) if tokens is None else tokens, prompt_tokens=7, **fields)


def wire(*events, adapter=NEW):
    return frames_of(adapter, events)


def test_frames_that_repeat_everything_are_said_once():
    frames = [so_far("a"), so_far("a"), so_far("ab"), so_far("abc"), end("abcd", 5, matched_stop=EOS)]
    for stream in (True, False):
        answer = answer_to(ask(stream=stream), [wire(*frames)])
        assert answer.content() == "abcd"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 5)
    assert answer.json["choices"][0]["stop_reason"] is None, "EOS is no stop reason"
    streamed = answer_to(ask(stream=True), [wire(*frames)])
    assert [chunk["choices"][0]["delta"]["content"] for chunk in streamed.events[:-1]] == ["", "a", "b", "c", "d"]


def test_a_stop_string_that_leaks_in_the_servers_text_is_cut():
    """The server trims only what came in one step; the rest of a stop string is in its frames, and in the last one too."""
    for frames, text in (
        ([so_far("a S"), so_far("a STO"), end("a STOP", matched_stop="STOP")], "a "),
        ([so_far("a S"), so_far("a STO"), end("a ", 6, matched_stop="STOP")], "a "),  # trimmed at last, and shorter than before
        ([so_far("a S"), end("a S", 6, matched_stop="STOP")], "a "),  # and trimmed by its last step
        ([end("a STOP and more", matched_stop="STOP")], "a "),
        ([so_far("a ST"), end("a STATE", finish_reason="length")], "a STATE"),
        ([so_far("a STOP"), end("a STOP", finish_reason="length")], "a "),  # passed over by the server
    ):
        for stream in (True, False):
            answer = answer_to(ask(stop=["STOP"], stream=stream), [wire(*frames)])
            assert answer.error is None
            assert answer.content() == text, frames
            choice = answer.events[-2]["choices"][0] if stream else answer.json["choices"][0]
            assert choice["stop_reason"] == (None if text == "a STATE" else "STOP")
    shown = answer_to(ask(stop=["STOP"], include_stop_str_in_output=True), [wire(so_far("a ST"), end("a STOP", matched_stop="STOP"))])
    assert shown.content() == "a STOP"


def item(code, message="why", index=None):
    made = NEW.response_type()
    made.error.error.code = code
    made.error.error.message = message
    if index is not None:
        made.error.index = index
    return encode_frame(made.SerializeToString())


@pytest.mark.parametrize(
    ("code", "expected"), [(400, 400), (404, 404), (413, 400), (429, 429), (499, 499), (500, 500), (503, 503), (504, 504), (0, 500)]
)
def test_an_error_item_is_an_answer_though_the_status_is_ok(code, expected):
    for stream in (True, False):
        answer = answer_to(ask(stream=stream), [item(code)])
        assert answer.status == expected
        assert (answer.json["error"]["message"] == "why") == (expected < 499), "the server's own words are for the client's own faults"
    late = answer_to(ask(stream=True), [wire(so_far("ab")), item(code, index=0)])
    assert (late.status, late.content(), late.events[-1]["error"]["code"]) == (200, "ab", expected)
    assert b"[DONE]" not in late.body
    assert late.usage.completion_tokens == 2


@pytest.mark.parametrize(("status", "expected"), [(429, 429), (503, 503), (400, 400), (None, 500)])
def test_an_abort_with_and_without_a_status(status, expected):
    made = NEW.response_type()
    made.frame.text = "ab"
    made.frame.meta_info.finish_reason.abort.message = "why"
    if status is not None:
        made.frame.meta_info.finish_reason.abort.status_code = status
    frame = encode_frame(made.SerializeToString())
    assert answer_to(ask(), [frame]).status == expected
    late = answer_to(ask(stream=True), [wire(so_far("ab")), frame])
    assert (late.content(), late.events[-1]["error"]["code"]) == ("ab", expected)


@pytest.mark.parametrize(
    ("set_it", "reason", "matched"),
    [
        (lambda reason: reason.stop.SetInParent(), "stop", None),
        (lambda reason: reason.stop.matched.tokens.ids.extend([1, 7]), "stop", 7),
        (lambda reason: reason.stop.matched.tokens.SetInParent(), "stop", None),
        (lambda reason: setattr(reason.stop.matched, "str", ""), "stop", ""),
        (lambda reason: setattr(reason.length, "length", 3), "length", None),
        (lambda reason: setattr(reason, "unknown", "new"), "new", None),
        (lambda reason: setattr(reason, "unknown", ""), "stop", None),
    ],
)
def test_finish_reasons(set_it, reason, matched):
    made = NEW.response_type()
    set_it(made.frame.meta_info.finish_reason)
    (event,) = NEW.decode_response(made)
    assert (event.finish_reason, event.matched_stop) == (reason, matched)


def test_the_token_that_ended_the_choice_is_among_the_ids_whether_the_server_sends_it_or_not():
    """0.5.22 leaves it out, and counts it."""
    for ids in ([5, 6], [5, 6, EOS]):
        answer = answer_to(ask(return_token_ids=True), [wire(end("ab", 3, token_ids=ids, matched_stop=EOS))])
        assert answer.json["choices"][0]["token_ids"] == [5, 6, EOS]
        assert answer.usage.completion_tokens == 3


def test_log_probabilities_come_once():
    token_ids = TOKENIZER.encode("Hello", add_special_tokens=False)
    entries = tuple(TokenLogprob(token_id=token, logprob=-0.5, top=((token, -0.5),)) for token in token_ids)
    frames = [so_far("H", token_ids=token_ids[:1], logprobs=entries[:1]), end("Hello", 3, token_ids=token_ids, logprobs=entries)]
    for stream in (True, False):
        answer = answer_to(ask(logprobs=True, top_logprobs=1, stream=stream), [wire(*frames)])
        parts = [chunk["choices"][0] for chunk in answer.events[:-1]] if stream else answer.json["choices"]
        assert [one["token"] for part in parts if part["logprobs"] for one in part["logprobs"]["content"]] == ["H", "ell", "o"]


def test_several_choices_are_several_calls():
    call = ask(n=2, seed=7, stream=True)
    assert [sent(one).rid.one for one in call.calls] == ["chatcmpl-r-0", "chatcmpl-r-1"]
    assert [sent(one).sampling_params.one.sampling_seed for one in call.calls] == [7, 8]
    answer = answer_to_all(call, [[wire(so_far("a"), end("ab"))], [wire(so_far("c"), end("cd"))]], order=[1, 0])
    assert (answer.content(0), answer.content(1)) == ("ab", "cd")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 4)


@everywhere
@given(data=st.data(), stream=st.booleans())
def test_events_come_back(adapter, data, stream):
    request = InferenceRequest(request_id="r", stream=stream, sampling=SamplingParams(logprobs=2, stop=("a",), stop_token_ids=(5,)))
    tells_cached = adapter.snapshot.has_field("GenerateMetaInfo", "cached_tokens")
    for event in data.draw(event_streams(request, adapter)):
        message = adapter.response_type.FromString(adapter.encode_response(event).SerializeToString())
        expected = msgspec.structs.replace(event, cached_tokens=event.cached_tokens if tells_cached else 0)
        assert adapter.decode_response(message) == (expected,)
        plain = (0, event.text, event.completion_tokens) if isinstance(event, TokensEvent) else None
        assert adapter.decode_text(message) == plain
    error = ErrorEvent(code=Code.RESOURCE_EXHAUSTED, message="m", index=0)
    assert adapter.decode_response(adapter.encode_response(error)) == (error,)
    assert adapter.decode_text(adapter.encode_response(error)) is None
    assert adapter.decode_response(adapter.response_type()) == ()
    with pytest.raises(UsageError, match="BodyEvent"):
        adapter.encode_response(BodyEvent(data=b""))


# The model


def test_model_info_comes_back():
    info = ModelInfo(
        model_path="/m",
        served_model_name="m",
        tokenizer_path="/t",
        max_model_len=4096,
        default_sampling_params={"top_k": 20},
        lora_adapters={"l": "l"},
    )
    for adapter in ADAPTERS.values():
        answers = adapter.encode_model_info(info)
        assert set(answers) <= set(adapter.info_paths)
        read = adapter.decode_model_info(answers)
        assert read == (info if "/sglang.api.v1.SglangService/ListModels" in answers else msgspec.structs.replace(info, lora_adapters={}))
        only_first = adapter.decode_model_info({adapter.info_paths[0]: answers[adapter.info_paths[0]]})
        assert (only_first.served_model_name, only_first.max_model_len) == ("m", 0)
