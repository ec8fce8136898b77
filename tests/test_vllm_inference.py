"""`vllm.inference`: zeros and absences that mean greedy or the model's default are never sent, and only what the snapshot knows is."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    Code,
    Constraint,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    MalformedRequestError,
    Media,
    ModelInfo,
    PromptEvent,
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
from gaie_codec._fit import fit
from gaie_codec.testing import event_streams
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import answer_to, answer_to_all, frames_of

NAMES = snapshots.SNAPSHOTS["vllm.inference"]
ADAPTERS = {name: adapters.get(snapshots.load("vllm.inference", name)) for name in NAMES}
OLD, NEW = ADAPTERS[NAMES[0]], ADAPTERS[NAMES[-1]]
TOKENIZER = load_tokenizer("builtin")
CHAT = "/v1/chat/completions"
everywhere = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def since(adapter, name):
    return NAMES.index(adapter.snapshot.name) >= NAMES.index(name)


def ask(adapter=NEW, headers=(), told=None, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    transcoder = Transcoder(adapter, tokenizer=TOKENIZER, model=told)
    return transcoder.request("POST", CHAT, headers, json.dumps(body).encode(), request_id="r")


def sent(call):
    return call.transcoder.adapter.request_type.FromString(call.message)


def encoded(adapter=NEW, *, request=None, **sampling):
    return adapter.encode_request(request or InferenceRequest(request_id="r", sampling=SamplingParams(**sampling)))


# Requests


@everywhere
def test_the_service_and_the_method(adapter):
    service = "vllm.Inference" if since(adapter, "0.27.1") else "vllm.Generate"
    assert ask(adapter, stream=True).path == adapter.generate_path == f"/{service}/GenerateStream"
    assert ask(adapter, stream=False).path == f"/{service}/Generate"
    assert set(adapter.generate_paths) == {f"/{service}/GenerateStream", f"/{service}/Generate"}


@everywhere
def test_temperature_is_always_sent(adapter):
    for asked, said in ((None, 1.0), (0.0, 0.0), (0.5, 0.5)):
        message = encoded(adapter, temperature=asked)
        assert message.HasField("temperature"), "unset is greedy"
        assert message.temperature == said
    assert adapter.decode_request(adapter.request_type()).sampling.temperature == 0.0


@everywhere
def test_what_cuts_off_is_sent_as_off(adapter):
    random = encoded(adapter).sampling
    assert (random.top_p, random.min_p) == (1.0, 0.0)
    has_presence = since(adapter, "0.32.0")
    assert random.top_k == (0 if has_presence else 2**31 - 1), "0 was the model's default once"
    if has_presence:
        assert all(random.HasField(name) for name in ("top_k", "top_p", "min_p"))
    assert adapter.decode_request(encoded(adapter, top_k=7)).sampling.top_k == 7
    # What another gateway left out.
    plain = adapter.decode_request(adapter.request_type()).sampling
    assert (plain.top_k, plain.top_p, plain.min_p, plain.repetition_penalty, plain.n) == (0, 1.0, 0.0, 1.0, 1)


@everywhere
def test_a_rendered_chat_goes_as_ids(adapter):
    message = sent(ask(adapter))
    assert message.WhichOneof("prompt") == "token_ids"
    assert list(message.token_ids.ids) == ask(adapter).inference.prompt_token_ids
    assert message.response.output_text
    assert not message.response.output_token_ids
    text = encoded(adapter, request=InferenceRequest(request_id="r", prompt_text=""))
    assert (text.WhichOneof("prompt"), adapter.decode_request(text).prompt_text) == ("text", "")


@everywhere
def test_an_empty_stop_string_is_never_sent(adapter):
    knows_stops = "stop" in adapter.sends
    assert list(encoded(adapter, stop=("", "a", "")).stopping.stop_strings) == (["a"] if knows_stops else [])


@everywhere
def test_ids_are_asked_for_with_log_probabilities(adapter):
    options = sent(ask(adapter, logprobs=True, top_logprobs=3)).response
    assert options.output_token_ids, "log probabilities do not name the sampled token"
    assert (options.output_logprobs, options.output_candidates.top_n) == (True, 3)
    assert options.output_candidates.WhichOneof("select") == "top_n"
    assert encoded(adapter, logprobs=0).response.output_candidates.WhichOneof("select") == "top_n"
    assert sent(ask(adapter, return_token_ids=True)).response.output_token_ids


NEW_FIELDS = {
    "0.26.0": {"ec_transfer_params"},
    "0.28.0": {"data_parallel_rank", "session_id", "media", "media.uuid", "skip_special_tokens"},
    "0.29.0": {"lora_name"},
    "0.30.0": {"watermarking"},
    "0.32.0": {"bad_words_token_ids", "grammar_from_first_token", "thinking_token_budget"},
}


def test_what_older_snapshots_cannot_say():
    for adapter in ADAPTERS.values():
        missing = {name for first, names in NEW_FIELDS.items() if not since(adapter, first) for name in names}
        assert NEW.carries - adapter.carries == missing
        assert adapter.carries <= NEW.carries
        assert not adapter.carries & {"n", "bad_words", "spaces_between_special_tokens"}


@pytest.mark.parametrize(
    ("name", "value", "first", "param"),
    [
        ("media", (Media(kind="image", url="https://host/a"),), "0.28.0", "messages"),
        ("lora_name", "l", "0.29.0", "model"),
        ("data_parallel_rank", 0, "0.28.0", "x-data-parallel-rank"),
        ("priority", -3, None, None),
        ("cache_salt", "s", None, None),
        ("kv_transfer_params", '{"a":1}', None, None),
        ("ec_transfer_params", '{"a":1}', "0.26.0", "ec_transfer_params"),
        ("watermarking", True, "0.30.0", "watermarking"),
    ],
)
@everywhere
def test_routing_fields_are_sent_or_refused_by_name(adapter, name, value, first, param):
    request = InferenceRequest(request_id="r", prompt_token_ids=[5], **{name: value})
    if first is None or since(adapter, first):
        assert fit(adapter, request, drops=False) == (request, ())
        if name != "data_parallel_rank":
            assert getattr(adapter.decode_request(encoded(adapter, request=request)), name) == value
        return
    with pytest.raises(UnsupportedFieldError) as caught:
        fit(adapter, request, drops=False)
    assert caught.value.param == param
    dropped = fit(adapter, request, drops=True)
    assert dropped == (msgspec.structs.replace(request, **{name: getattr(InferenceRequest(request_id=""), name)}), (param,))


def test_the_rank_goes_as_metadata():
    call = ask(headers={"x-data-parallel-rank": "3", "traceparent": "x"})
    assert call.metadata == (("traceparent", "x"), ("x-data-parallel-rank", "3"))
    assert ask().metadata == ()
    with pytest.raises(UnsupportedFieldError):
        ask(OLD, headers={"x-data-parallel-rank": "3"})


def test_media_go_by_url_or_as_data():
    media = (Media(kind="image", url="https://host/a", uuid="u"), Media(kind="video", url="data:x"), Media(kind="audio", url="http://b"))
    message = encoded(request=InferenceRequest(request_id="r", media=media))
    assert [one.WhichOneof("source") for one in message.media] == ["url", "data_uri", "url"]
    assert NEW.decode_request(message).media == media


@pytest.mark.parametrize("text", ["{}", '{"a":5,"b":[1.5,null,true,{"c":"d"}],"e":-9007199254740991}'])
def test_kv_transfer_params_come_back_as_they_were(text):
    message = encoded(request=InferenceRequest(request_id="r", kv_transfer_params=text))
    read = NEW.decode_request(NEW.request_type.FromString(message.SerializeToString())).kv_transfer_params
    assert json.loads(read) == json.loads(text)
    assert "5.0" not in read, "a Struct has doubles only; what is whole was an integer"


@pytest.mark.parametrize("number", [2**53, -(2**53), 10**30])
def test_an_integer_that_a_struct_would_change_is_refused(number):
    with pytest.raises(MalformedRequestError, match="53 bits") as caught:
        ask(kv_transfer_params={"a": [{"b": number}]})
    assert caught.value.param == "kv_transfer_params"


def test_levels_that_no_protobuf_parser_takes_are_refused():
    text = '{"a":' * 31 + "{}" + "}" * 31
    message = encoded(request=InferenceRequest(request_id="r", kv_transfer_params=text))
    assert NEW.decode_request(NEW.request_type.FromString(message.SerializeToString())).kv_transfer_params == text
    for deep in (f'{{"a":{text}}}', '{"a":' + "[" * 900 + "]" * 900 + "}"):
        with pytest.raises(MalformedRequestError, match="32 levels") as caught:
            encoded(request=InferenceRequest(request_id="r", kv_transfer_params=deep))
        assert caught.value.param == "kv_transfer_params"


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (Constraint(kind="json_object"), "json_object"),
        (Constraint(kind="json_schema", value="{}"), "json"),
        (Constraint(kind="choice", value=("a", "b")), "choice"),
        (Constraint(kind="grammar", value="g"), "grammar"),
        (Constraint(kind="regex", value=""), "regex"),
        (Constraint(kind="structural_tag", value="{}"), "structural_tag"),
    ],
)
@everywhere
def test_constraints(adapter, constraint, field):
    message = encoded(adapter, constraint=constraint)
    assert message.decoding.WhichOneof("structured_output") == field
    assert adapter.decode_request(message).sampling.constraint == constraint


def test_several_choices_are_several_calls():
    call = ask(n=3, seed=7)
    assert [sent_one.request_id for sent_one in map(NEW.request_type.FromString, (one.message for one in call.calls))] == [
        "chatcmpl-r-0",
        "chatcmpl-r-1",
        "chatcmpl-r-2",
    ]
    assert [NEW.request_type.FromString(one.message).sampling.seed for one in call.calls] == [7, 8, 9]
    assert all(NEW.request_type.FromString(one.message).sampling.num_sequences == 0 for one in call.calls)


# Answers


def piece(text, tokens=1, **fields):
    return TokensEvent(text=text, completion_tokens=tokens, **fields)


def end(text="", **fields):
    return FinishEvent(**{"text": text, "is_delta": True, "completion_tokens": 3, **fields})


def wire(*events, adapter=NEW):
    return frames_of(adapter, events)


def test_pieces_go_out_as_they_come_and_the_prompt_is_counted():
    answer = answer_to(
        ask(stream=True, stream_options={"include_usage": True}),
        [wire(PromptEvent(prompt_tokens=11), piece("Hel"), piece(""), piece("lo "), end("world", cached_tokens=4))],
    )
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in answer.events[:-2]]
    assert texts == ["", "Hel", "lo ", "world"]
    assert answer.events[-3]["choices"][0]["finish_reason"] == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens) == (11, 3, 4)


def test_a_unary_answer_says_all_in_one_message():
    message = NEW.encode_response(end("Hello", prompt_tokens=11, finish_reason="length"))
    assert message.HasField("prompt_info")
    answer = answer_to(ask(), [encode_frame(message.SerializeToString())])
    assert answer.content() == "Hello"
    assert answer.json["usage"] == {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


@pytest.mark.parametrize("trailers", [(("grpc-status", "3"), ("grpc-message", "no")), (("grpc-status", "13"),)])
def test_what_fails_after_the_prompt_and_before_a_token_is_a_plain_error(trailers):
    """The stream begins with a message about the prompt whatever follows it."""
    answer = answer_to(ask(stream=True), [wire(PromptEvent(prompt_tokens=11))], trailers=trailers)
    assert answer.status == {"3": 400, "13": 500}[trailers[0][1]]
    assert set(answer.json) == {"error"}
    late = answer_to(ask(stream=True), [wire(PromptEvent(prompt_tokens=11), piece("Hel"))], trailers=trailers)
    assert (late.status, late.content(), b"[DONE]" in late.body) == (200, "Hel", False)


@everywhere
def test_an_aborted_answer_is_an_error(adapter):
    """Releases before 0.30 say OK."""
    aborted = end("x", finish_reason="abort", completion_tokens=0)
    assert answer_to(ask(adapter), [wire(aborted, adapter=adapter)]).status == 500
    late = answer_to(ask(adapter, stream=True), [wire(piece("Hel"), aborted, adapter=adapter)])
    assert (late.content(), late.events[-1]["error"]["code"]) == ("Hel", 500)


@pytest.mark.parametrize(("field", "value", "stop_reason"), [("eos_token_id", 2, None), ("stop_token_id", 7, 7), ("stop_string", "S", "S")])
def test_what_ended_the_choice(field, value, stop_reason):
    message = NEW.response_type()
    message.outputs.finish_info.finish_reason = 2
    setattr(message.outputs.finish_info, field, value)
    answer = answer_to(ask(stop=["S"]), [encode_frame(message.SerializeToString())])
    assert answer.json["choices"][0]["stop_reason"] == stop_reason


def test_the_newest_server_is_trusted_with_stop_strings_and_the_first_is_not():
    """Text of a server that holds back itself goes out as it comes, even what looks like a stop string."""
    assert answer_to(ask(stop=["STOP"]), [wire(piece("a STO"), piece("P b"), end())]).content() == "a STOP b"
    call = ask(OLD, stop=["STOP"], stream=True)
    assert list(sent(call).stopping.stop_strings) == []
    answer = answer_to(call, [wire(piece("a STO"), piece("P b"), end(), adapter=OLD)])
    assert answer.content() == "a "
    assert (answer.events[-2]["choices"][0]["stop_reason"], answer.usage.completion_tokens) == ("STOP", 2)
    assert ask(OLD, stop=["STOP"]).path.endswith("/GenerateStream"), "only a stream can be ended"


def test_log_probabilities_and_ids():
    ids = TOKENIZER.encode("Hello", add_special_tokens=False)
    entries = tuple(TokenLogprob(token_id=token, logprob=-0.5, top=((token, -0.5), (ids[0], -1.5))) for token in ids)
    call = ask(logprobs=True, top_logprobs=1, return_token_ids=True)
    answer = answer_to(call, [wire(end("Hello", token_ids=ids, logprobs=entries, completion_tokens=3))])
    choice = answer.json["choices"][0]
    assert choice["token_ids"] == ids
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["H", "ell", "o"]
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [1, 1, 1]
    # A row may be empty, or missing altogether.
    message = NEW.response_type()
    message.outputs.token_ids.extend(ids)
    message.outputs.logprobs.extend([-1.0] * 3)
    message.outputs.candidate_tokens.add()
    (event,) = NEW.decode_response(message)
    assert [entry.top for entry in event.logprobs] == [(), (), ()]


def test_tokens_are_counted_once_with_and_without_their_ids():
    for fields, ids in (({}, []), ({"return_token_ids": True}, [5, 6])):
        answer = answer_to(ask(**fields), [wire(piece("a", 2, token_ids=ids), piece("b", 2, token_ids=ids), end(completion_tokens=4))])
        assert answer.usage.completion_tokens == 4


def test_kv_transfer_params_of_the_finish():
    answer = answer_to(ask(), [wire(end(kv_transfer_params='{"a":[1,{"b":2.5}]}'))])
    assert answer.json["kv_transfer_params"] == {"a": [1, {"b": 2.5}]}


@everywhere
@given(data=st.data(), stream=st.booleans())
def test_events_come_back(adapter, data, stream):
    request = InferenceRequest(request_id="r", stream=stream, sampling=SamplingParams(logprobs=2, stop=("a",), stop_token_ids=(5,)))
    for event in data.draw(event_streams(request, adapter)):
        message = adapter.response_type.FromString(adapter.encode_response(event).SerializeToString())
        prompt = [] if isinstance(event, PromptEvent) or not event.prompt_tokens else [PromptEvent(prompt_tokens=event.prompt_tokens)]
        expected = event
        if not isinstance(event, PromptEvent):
            tells_cached = isinstance(event, FinishEvent) and adapter.snapshot.has_field("FinishInfo", "num_cached_tokens")
            changed = {"prompt_tokens": 0, "cached_tokens": event.cached_tokens if tells_cached else 0}
            expected = msgspec.structs.replace(event, **changed, **({"is_delta": True} if isinstance(event, FinishEvent) else {}))
        assert adapter.decode_response(message) == (*prompt, expected)
        is_plain = isinstance(event, TokensEvent) and not prompt
        assert adapter.decode_text(message) == ((0, event.text, event.completion_tokens) if is_plain else None)


def test_what_this_wire_cannot_tell():
    assert NEW.decode_response(NEW.response_type()) == ()
    with pytest.raises(UsageError, match="no message for a ErrorEvent"):
        NEW.encode_response(ErrorEvent(code=Code.INTERNAL))


def test_several_calls_give_one_answer():
    call = ask(n=2, stream=True)
    streams = [[wire(PromptEvent(prompt_tokens=11), piece(text), end())] for text in ("a", "b")]
    answer = answer_to_all(call, streams, order=[1, 0])
    assert (answer.content(0), answer.content(1)) == ("a", "b")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 6)


# The model


def test_model_info_comes_back():
    info = ModelInfo(
        model_path="/m", served_model_name="m", aliases=("n",), max_model_len=4096, is_multimodal=True, lora_adapters={"l": "l"}
    )
    assert NEW.decode_model_info(NEW.encode_model_info(info)) == info
    for adapter in ADAPTERS.values():
        answers = adapter.encode_model_info(info)
        assert tuple(answers) == adapter.info_paths
        if answers:
            only_first = adapter.decode_model_info({adapter.info_paths[0]: answers[adapter.info_paths[0]]})
            assert (only_first.max_model_len, only_first.served_model_name) == (4096, "")
    assert OLD.info_paths == ()
    assert OLD.decode_model_info({}) == ModelInfo()


def test_a_lora_adapter_is_asked_for_by_its_name():
    model = ModelInfo(served_model_name="m", lora_adapters={"l": "l"})
    message = sent(ask(told=model, model="l"))
    assert (message.model, message.lora_name) == ("m", "l")
    assert sent(ask(told=model, model="m")).lora_name == ""


def test_bad_words_go_as_the_ids_that_vllm_bans():
    """At the beginning of a text, and after a space where that is another token. Older snapshots have no place for them."""
    for adapter in ADAPTERS.values():
        transcoder = Transcoder(adapter, tokenizer=TOKENIZER)
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "bad_words": ["Hello", " world"]}).encode()
        if not since(adapter, "0.32.0"):
            with pytest.raises(UnsupportedFieldError) as caught:
                transcoder.request("POST", "/v1/chat/completions", [], body, request_id="r")
            assert caught.value.param == "bad_words"
            continue
        call = transcoder.request("POST", "/v1/chat/completions", [], body, request_id="r")
        banned = [list(one.ids) for one in adapter.request_type.FromString(call.message).decoding.bad_words_token_ids]
        words = {TOKENIZER._tokenizer.decode(ids) for ids in banned}
        assert {"Hello", "world"} <= words <= {"Hello", " Hello", "world", " world"}
        assert call.dropped == ()
