"""`sglang.runtime`, both ways in: OpenAI JSON as the client sent it, and typed requests whose answers keep JSON in a map of texts."""

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
    MalformedMessageError,
    MalformedRequestError,
    Media,
    ModelInfo,
    SamplingParams,
    TokensEvent,
    Transcoder,
    UnsupportedFieldError,
    UsageError,
    adapters,
    encode_frame,
    snapshots,
)
from gaie_codec.adapters.sglang.runtime import DEFAULT_MAX_TOKENS
from gaie_codec.testing import event_streams, inference_requests
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import answer_to, answer_to_all, as_read

NAMES = snapshots.SNAPSHOTS["sglang.runtime"]
ADAPTERS = {name: adapters.get(snapshots.load("sglang.runtime", name)) for name in NAMES}
OLD, NEW = ADAPTERS["0.5.16"], ADAPTERS["0.5.23"]
TOKENIZER = load_tokenizer("builtin")
EOS = 2
MODEL = ModelInfo(max_model_len=4096)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SERVICE = "/sglang.runtime.v1.SglangService"
everywhere = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


HELLO = ids("Hello world")


def ask(adapter=NEW, headers=(), told=MODEL, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    transcoder = Transcoder(adapter, tokenizer=TOKENIZER, model=told, passthrough=False)
    return transcoder.request("POST", CHAT, headers, json.dumps(body).encode(), request_id="r")


def sent(one):
    return NEW.request_type.FromString(one.message)


def encoded(adapter=NEW, *, request=None, **sampling):
    return adapter.encode_request(request or InferenceRequest(request_id="r", sampling=SamplingParams(**sampling)))


# Typed requests


def test_what_is_sent_for_a_chat():
    call = ask(
        headers={"traceparent": "x", "x-data-parallel-rank": "0"}, stop=["S"], logprobs=True, top_logprobs=2, seed=5, n=2, stream=True
    )
    assert (call.path, call.metadata) == (f"{SERVICE}/Generate", ()), "trace context goes in the message"
    message = sent(call)
    params = message.sampling_params
    assert list(message.input_ids) == call.inference.prompt_token_ids
    assert (message.rid, message.stream, message.return_logprob, message.top_logprobs_num) == ("chatcmpl-r", True, True, 2)
    assert not message.HasField("logprob_start_len")
    assert dict(message.trace_headers) == {"traceparent": "x"}
    assert message.HasField("routed_dp_rank")
    assert (params.top_k, params.top_p, params.repetition_penalty, params.n, params.seed) == (-1, 1.0, 1.0, 2, 5)
    assert list(params.stop) == ["S"]
    assert params.max_new_tokens == 4096 - len(message.input_ids)


def test_unset_max_tokens_would_be_128_and_is_refused():
    with pytest.raises(MalformedRequestError, match="128") as caught:
        ask(told=ModelInfo())
    assert caught.value.param == "max_tokens"
    assert sent(ask(told=ModelInfo(), max_tokens=5)).sampling_params.max_new_tokens == 5
    assert NEW.decode_request(NEW.request_type()).sampling.max_tokens == DEFAULT_MAX_TOKENS == 128


def test_a_text_prompt_has_a_method_of_its_own():
    request = InferenceRequest(request_id="r", prompt_text="Hi", sampling=SamplingParams(max_tokens=5))
    assert NEW.path_for(request) == f"{SERVICE}/TextGenerate"
    message = NEW.encode_request(request)
    assert (message.DESCRIPTOR.name, message.text) == ("TextGenerateRequest", "Hi")
    assert NEW.decode_request(message) == request


@pytest.mark.parametrize(
    ("constraint", "old", "new"),
    [
        (Constraint(kind="json_object"), ("json_schema", '{"type": "object"}'), None),
        (Constraint(kind="json_schema", value="{}"), ("json_schema", "{}"), None),
        (Constraint(kind="regex", value="a"), ("regex", "a"), None),
        (Constraint(kind="choice", value=("a.b", "c")), ("regex", r"(?:a\.b|c)"), "choice"),
        (Constraint(kind="grammar", value="g"), None, "ebnf"),
        (Constraint(kind="structural_tag", value="{}"), None, "structural_tag"),
    ],
)
def test_constraints(constraint, old, new):
    name = f"constraint.{constraint.kind}"
    for adapter in ADAPTERS.values():
        has_guided = adapter is not OLD
        if name not in adapter.carries:
            assert old is None
            assert not has_guided
            continue
        params = encoded(adapter, constraint=constraint).sampling_params
        if has_guided and new:
            assert params.guided_decoding.WhichOneof("constraint") == new
            assert not params.HasField("json_schema")
            assert not params.HasField("regex")
        else:
            assert getattr(params, old[0]) == old[1]
            assert not has_guided or not params.HasField("guided_decoding"), "never both ways at once"
        read = adapter.decode_request(encoded(adapter, constraint=constraint)).sampling.constraint
        assert read == (constraint if new is None or has_guided else Constraint(kind="regex", value=old[1]))
    message = NEW.request_type()
    message.sampling_params.guided_decoding.json_schema = "{}"
    assert NEW.decode_request(message).sampling.constraint == Constraint(kind="json_schema", value="{}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ],
)
def test_what_the_wire_has_not_is_refused_by_name(fields, param):
    with pytest.raises(UnsupportedFieldError) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_what_older_snapshots_cannot_say():
    new_in_19 = {"priority", "n", "seed", "constraint.grammar", "constraint.structural_tag"}
    for name, adapter in ADAPTERS.items():
        missing = set() if adapter is NEW else {"media"}
        assert NEW.carries - adapter.carries == missing | (new_in_19 if adapter is OLD else set()), name


def test_media_go_beside_the_ids():
    media = tuple(Media(kind=kind, url=f"http://{kind}") for kind in ("image", "video", "audio"))
    message = encoded(request=InferenceRequest(request_id="r", prompt_token_ids=[5], media=media, sampling=SamplingParams(max_tokens=1)))
    assert (list(message.image_data), list(message.video_data), list(message.audio_data)) == (
        ["http://image"],
        ["http://video"],
        ["http://audio"],
    )
    assert NEW.decode_request(message).media == media


@everywhere
@given(data=st.data())
def test_requests_come_back(adapter, data):
    request = data.draw(inference_requests(adapter))
    message = adapter.encode_request(request)
    assert adapter.decode_request(type(message).FromString(message.SerializeToString())) == as_read(adapter, request)


# Typed answers


def reply(token_ids, total=None, *, finish="null", id="a", text=None, **meta):
    message = NEW.response_type() if text is None else NEW.snapshot.message("TextGenerateResponse")()
    if text is None:
        message.output_ids.extend(token_ids)
    else:
        message.text = text
    told = {"id": id, "prompt_tokens": 7, "completion_tokens": len(token_ids) if total is None else total, **meta}
    message.meta_info.update({key: json.dumps(value) for key, value in told.items()})
    message.meta_info["finish_reason"] = finish if isinstance(finish, str) else json.dumps(finish)
    return message


def framed(*messages):
    return b"".join(encode_frame(message.SerializeToString()) for message in messages)


STOP = {"type": "stop", "matched": EOS}


def test_what_a_real_server_says_in_its_map():
    message = reply(
        [*HELLO, EOS], finish=STOP, cached_tokens=3, reasoning_tokens=2, weight_version="default", dp_rank=None, e2e_latency=0.5
    )
    assert NEW.decode_response(message) == (
        FinishEvent(
            choice_id="a",
            token_ids=[*HELLO, EOS],
            finish_reason="stop",
            matched_stop=EOS,
            prompt_tokens=7,
            completion_tokens=5,
            cached_tokens=3,
            reasoning_tokens=2,
        ),
    )
    chunk = reply(HELLO, output_token_logprobs=[[-0.25, 64, None], [None, 5, "x"]], output_top_logprobs=[[[-0.25, 64, None]], None])
    (event,) = NEW.decode_response(chunk)
    assert event.is_cumulative
    assert [(entry.token_id, entry.logprob, entry.top) for entry in event.logprobs] == [
        (64, -0.25, ((64, -0.25),)),
        (5, float("-inf"), ()),
    ]


@pytest.mark.parametrize(
    ("finish", "reason", "matched"),
    [
        ({"type": "length", "length": 4}, "length", None),
        ({"type": "stop"}, "stop", None),
        ({"type": "stop", "matched": "S"}, "stop", "S"),
        ({"type": "stop", "matched": [1, 7]}, "stop", 7),
        ({"type": "stop", "matched": []}, "stop", None),
        ({"type": "abort", "message": "m"}, "abort", None),
        ({"type": "other"}, "other", None),
    ],
)
def test_finish_reasons(finish, reason, matched):
    (event,) = NEW.decode_response(reply(HELLO, finish=finish))
    assert (event.finish_reason, event.matched_stop) == (reason, matched)


@pytest.mark.parametrize("finish", ["{", "5", '{"type":5}', "[]", '{"type":"stop","matched":{}}', "[" * 50_000])
def test_a_finish_reason_of_another_form_is_malformed(finish):
    with pytest.raises(MalformedMessageError, match="finish_reason"):
        NEW.decode_response(reply(HELLO, finish=finish))
    assert answer_to(ask(), [framed(reply(HELLO, finish=finish))]).status == 502


@pytest.mark.parametrize(("key", "value"), [("id", "{"), ("output_token_logprobs", "[[1]]"), ("output_top_logprobs", "5")])
def test_other_broken_texts_are_malformed(key, value):
    message = reply(HELLO, output_token_logprobs=[[-0.25, 64, None]])
    message.meta_info[key] = value
    with pytest.raises(MalformedMessageError, match="meta_info"):
        NEW.decode_response(message)
    message = reply(HELLO)
    message.meta_info["prompt_tokens"] = "-5"
    (event,) = NEW.decode_response(message)
    assert event.prompt_tokens == 0


def test_cumulative_and_incremental_streams_give_the_same():
    everything = [*HELLO, EOS]
    cumulative = [reply(everything[:end]) for end in range(1, 5)] + [reply(everything, finish=STOP)]
    incremental = [reply([token], total) for total, token in enumerate(HELLO, 1)] + [reply([EOS], 5, finish=STOP)]
    late = [*incremental[:-1], reply([EOS], 5), reply([], 5, finish=STOP)]
    for stream in (True, False):
        answers = [answer_to(ask(stream=stream), [framed(*messages)]) for messages in (cumulative, incremental, late)]
        assert {answer.content() for answer in answers} == {"Hello world"}
        assert {answer.usage for answer in answers} == {answers[0].usage}
        assert (answers[0].usage.prompt_tokens, answers[0].usage.completion_tokens) == (7, 5)
    assert answers[0].json["choices"][0]["stop_reason"] is None, "EOS is no stop reason"


def test_a_stop_string_is_cut_from_ids_that_keep_it():
    """The server trims the text, which is not asked for; the ids keep the stop string."""
    kept = ids("Hello STOP")
    answer = answer_to(ask(stop=["STOP"], stream=True), [framed(reply(HELLO[:1]), reply(kept, finish={"type": "stop", "matched": "STOP"}))])
    assert answer.content() == "Hello "
    assert answer.events[-2]["choices"][0]["stop_reason"] == "STOP"
    assert answer.usage.completion_tokens == len(kept)


def test_choices_are_told_apart_by_their_name():
    length = {"type": "length", "length": 1}
    messages = [
        reply(HELLO[:1], id="x"),
        reply(ids("Bye")[:1], id="y"),
        reply(HELLO, id="x", finish=length),
        reply(ids("Bye"), id="y", finish=length),
    ]
    answer = answer_to(ask(n=2, stream=True, temperature=1), [framed(*messages)])
    assert (answer.content(0), answer.content(1)) == ("Hello world", "Bye")
    third = answer_to(ask(n=2, stream=True, temperature=1), [framed(*messages[:2], reply([5], id="z"))])
    assert third.events[-1]["error"]["code"] == 502


def test_the_first_release_gets_a_call_for_each_choice():
    """0.5.16 ends a stream at the first choice that finishes, and a unary call never."""
    call = ask(OLD, n=2, temperature=1, stream=True)
    assert [sent(one).rid for one in call.calls] == ["chatcmpl-r-0", "chatcmpl-r-1"]
    streams = [[framed(reply(ids(text), finish=STOP))] for text in ("a", "b")]
    answer = answer_to_all(call, streams)
    assert (answer.content(0), answer.content(1), answer.usage.prompt_tokens) == ("a", "b", 7)


@pytest.mark.parametrize(("status", "expected"), [(400, 400), (429, 429), (503, 503), (500, 500), (499, 499)])
def test_an_abort_with_a_status_is_that_answer(status, expected):
    abort = reply(HELLO, finish={"type": "abort", "message": "why", "status_code": status, "err_type": "X"})
    assert NEW.decode_response(abort)[0].message == "why"
    assert answer_to(ask(), [framed(abort)]).status == expected
    late = answer_to(ask(stream=True), [framed(reply(HELLO), abort)])
    assert (late.content(), late.events[-1]["error"]["code"]) == ("Hello world", expected)


def test_an_abort_without_a_status_is_an_error_of_the_server():
    assert answer_to(ask(), [framed(reply(HELLO, finish={"type": "abort", "message": "why"}))]).status == 500


STATUSES = [
    ("13", "429: slow down", 429, "slow down"),
    ("13", "503: busy", 503, None),
    ("13", "400: no", 400, "no"),
    ("13", "boom", 500, None),
    ("13", "boom 429: no", 500, None),
    ("13", "200: no", 500, None),
    ("13", "1 validation error for ChatCompletionRequest\nmessages\n  Field required", 400, "Field required"),
    ("13", "12 validation errors for X\nmessages", 400, "validation errors"),
    ("13", "1 validation error", 500, None),
    ("8", "503: busy", 429, "503: busy"),
]


@pytest.mark.parametrize(("code", "words", "expected", "shown"), STATUSES)
def test_a_status_hidden_in_the_words_of_internal(code, words, expected, shown):
    percent = "".join(character if " " <= character < "\x7f" and character != "%" else f"%{ord(character):02x}" for character in words)
    trailers = (("grpc-status", code), ("grpc-message", percent))
    for call in (ask(), passed()):
        answer = answer_to(call, [], trailers=trailers)
        assert answer.status == expected
        message = json.loads(answer.body)["error"]["message"]
        assert (shown is None and words not in message) or (shown is not None and shown in message)


def test_text_answers_are_cumulative_text_without_ids():
    events = [event for message in (reply([], 1, text="a"), reply([], 2, text="ab", finish=STOP)) for event in NEW.decode_response(message)]
    assert [(event.text, event.token_ids, event.completion_tokens) for event in events] == [("a", [], 1), ("ab", [], 2)]
    assert events[0].is_cumulative
    assert not events[1].is_delta


@everywhere
@given(data=st.data(), text=st.booleans())
def test_events_come_back(adapter, data, text):
    prompt = {"prompt_text": "p"} if text else {"prompt_token_ids": [1]}
    n = 2 if "n" in adapter.carries else 1
    request = InferenceRequest(
        request_id="r", stream=True, sampling=SamplingParams(n=n, logprobs=2, stop=("a",), stop_token_ids=(5,)), **prompt
    )
    for event in data.draw(event_streams(request, adapter)):
        message = adapter.encode_response(event)
        expected = msgspec.structs.replace(event, index=0, token_ids=[] if text else event.token_ids)
        if isinstance(event, TokensEvent):
            expected = msgspec.structs.replace(expected, is_cumulative=True)
        assert adapter.decode_response(type(message).FromString(message.SerializeToString())) == (expected,)
    with pytest.raises(UsageError, match="ErrorEvent"):
        adapter.encode_response(ErrorEvent(code=Code.INTERNAL))


# Passed through


def passed(adapter=NEW, path=CHAT, headers=(), body=None, told=None, **fields):
    raw = body if body is not None else json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return Transcoder(adapter, model=told).request("POST", path, headers, raw, request_id="r")


def chunk(data, *, finished=False, status=None, adapter=NEW):
    event = BodyEvent(data=data if isinstance(data, bytes) else json.dumps(data).encode(), is_last=finished, http_status=status)
    return encode_frame(adapter.passthrough.encode_response(event, f"{SERVICE}/ChatComplete").SerializeToString())


def test_the_clients_own_bytes_go_out():
    body = b'{ "messages" : [{"role":"user","content":"h\\u00e9"}],\n"max_tokens":5, "temperature": 0.50 }'
    call = passed(body=body, headers={"traceparent": "x", "x-smg-routing-key": "k", "authorization": "secret"})
    message = NEW.snapshot.message("OpenAIRequest").FromString(call.message)
    assert call.path == f"{SERVICE}/ChatComplete"
    assert message.json_body == body
    assert dict(message.trace_headers) == {"traceparent": "x", "x-smg-routing-key": "k"}
    assert call.is_passthrough
    assert NEW.passthrough.decode_request(message) == (body, {"traceparent": "x", "x-smg-routing-key": "k"})
    assert passed(path=COMPLETIONS, body=b'{"prompt":"x"}').path == f"{SERVICE}/Complete"


def test_no_context_length_and_no_tokenizer_are_needed():
    call = passed()
    assert (call.inference.prompt_token_ids, call.inference.sampling.max_tokens) == ([], None)


ERROR = {"object": "error", "message": "boom", "type": "BadRequestError", "param": None, "code": 429}


@everywhere
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_that_looks_like_a_success_is_an_error(adapter, stream):
    """Before 0.5.22 there is no status_code, and only the body says so; SGLang has two forms of it."""
    has_status = adapter.snapshot.has_field("OpenAIStreamChunk", "status_code")
    assert has_status == (NAMES.index(adapter.snapshot.name) >= NAMES.index("0.5.22"))
    for body in (ERROR, {"error": {"message": "boom", "type": "x", "code": 429}}):
        answer = answer_to(
            passed(adapter, stream=stream), [chunk(body, finished=True, status=429 if has_status else None, adapter=adapter)]
        )
        assert (answer.status, answer.json["error"]["message"]) == (429, "boom")
    unnumbered = answer_to(passed(adapter, stream=stream), [chunk({"error": {"message": "boom"}}, finished=True, adapter=adapter)])
    assert unnumbered.status == 500


def test_the_status_wins_over_the_body():
    assert answer_to(passed(), [chunk({"error": {"message": "m", "code": 400}}, finished=True, status=503)]).status == 503
    assert answer_to(passed(), [chunk(b"no JSON at all", finished=True, status=429)]).status == 429


def test_old_snapshots_have_no_status_to_send():
    message = OLD.passthrough.encode_response(BodyEvent(data=b"{}", http_status=429, is_last=True), f"{SERVICE}/ChatComplete")
    assert OLD.passthrough.decode_response(message) == BodyEvent(data=b"{}", is_last=True)
    embedding = OLD.passthrough.encode_response(BodyEvent(data=b"{}", http_status=429, is_last=True), f"{SERVICE}/OpenAIEmbed")
    assert OLD.passthrough.decode_response(embedding) == BodyEvent(data=b"{}", http_status=429, is_last=True)


# The model


def test_model_info_comes_back():
    info = ModelInfo(model_path="/m", served_model_name="m", tokenizer_path="/t", max_model_len=4096, lora_adapters={"l": "l"})
    for adapter in ADAPTERS.values():
        answers = adapter.encode_model_info(info)
        assert set(answers) <= set(adapter.info_paths)
        assert adapter.decode_model_info(answers) == info
        only_first = adapter.decode_model_info({adapter.info_paths[0]: answers[adapter.info_paths[0]]})
        assert (only_first.served_model_name, only_first.max_model_len) == ("m", 0)
    answers[NEW.info_paths[0]].json_info = "{"
    with pytest.raises(MalformedMessageError, match="json_info"):
        NEW.decode_model_info(answers)
