"""`sglang.scheduler`: its many zeros that mean something are never left to chance, and what the scheduler refuses the gateway does."""

from __future__ import annotations

import json

import msgspec
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from smg_grpc_proto.generated import sglang_scheduler_pb2

from gaie_codec import (
    Code,
    Constraint,
    EndOfBody,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    MalformedMessageError,
    MalformedRequestError,
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
from strategies import answer_to, as_read, frames_of

NAMES = [name for name in snapshots.SNAPSHOTS["sglang.scheduler"] if not snapshots.load("sglang.scheduler", name).refused]
ADAPTERS = {name: adapters.get(snapshots.load("sglang.scheduler", name)) for name in NAMES}
OLD, NEW = ADAPTERS["intree-0.5.3.post2"], ADAPTERS["smg-0.4.28"]
INLINE_ERRORS = [name for name, adapter in ADAPTERS.items() if adapter.snapshot.has_field("GenerateResponse", "error")]
TOKENIZER = load_tokenizer("builtin")
EOS = 2
CHAT = "/v1/chat/completions"


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


HELLO = ids("Hello world")
everywhere = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def ask(adapter=NEW, headers=(), **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return Transcoder(adapter, tokenizer=TOKENIZER).request("POST", CHAT, headers, json.dumps(body).encode(), request_id="r")


def sent(call):
    return call.transcoder.adapter.request_type.FromString(call.message)


# Requests


@everywhere
def test_scalars_without_presence_are_always_written(adapter):
    message = adapter.encode_request(InferenceRequest(request_id="r", prompt_token_ids=[5]))
    params = message.sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty, params.n) == (1.0, 1.0, -1, 1.0, 1)
    assert params.skip_special_tokens
    assert params.spaces_between_special_tokens
    assert message.logprob_start_len == -1, "0 would ask for the log probabilities of the whole prompt"
    assert not message.return_logprob
    assert not params.HasField("max_new_tokens"), "unset means as many as the context holds"
    greedy = adapter.encode_request(InferenceRequest(request_id="r", sampling=SamplingParams(temperature=0.0)))
    assert greedy.sampling_params.temperature == 0.0
    assert adapter.decode_request(greedy).sampling.temperature == 0.0


@everywhere
def test_reasoning_is_announced_unless_a_grammar_is_to_hold_from_the_first_token(adapter):
    request = InferenceRequest(request_id="r", prompt_token_ids=[5], thinks=True)
    message = adapter.encode_request(request)
    assert adapter.decode_request(message).thinks == ("thinks" in adapter.sends)
    at_once = msgspec.structs.replace(request, sampling=SamplingParams(grammar_from_first_token=True))
    assert not adapter.decode_request(adapter.encode_request(at_once)).thinks


def test_zeros_are_read_as_the_servicer_reads_them():
    sampling = NEW.decode_request(NEW.request_type()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty, sampling.n) == (0.0, 1.0, 0, 1.0, 1)


@everywhere
def test_stop_strings_stay_here_and_log_probabilities_start_at_the_output(adapter):
    message = sent(ask(adapter, stop=["STOP"], include_stop_str_in_output=True, logprobs=True, top_logprobs=3, stop_token_ids=[7]))
    assert list(message.sampling_params.stop) == []
    assert list(message.sampling_params.stop_token_ids) == [7]
    assert message.sampling_params.no_stop_trim
    assert (message.return_logprob, message.top_logprobs_num, message.logprob_start_len) == (True, 3, -1)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_rank_0_is_said_only_where_it_can_be_told_from_none(adapter):
    has_presence = adapter.request_type.DESCRIPTOR.fields_by_name["data_parallel_rank"].has_presence
    assert has_presence == (adapter is NEW)
    assert adapter.decode_request(sent(ask(adapter, headers={"x-data-parallel-rank": "3"}))).data_parallel_rank == 3
    assert adapter.decode_request(sent(ask(adapter))).data_parallel_rank is None
    if has_presence:
        assert sent(ask(adapter, headers={"x-data-parallel-rank": "0"})).HasField("data_parallel_rank")
    else:
        with pytest.raises(MalformedRequestError) as caught:
            ask(adapter, headers={"x-data-parallel-rank": "0"})
        assert caught.value.param == "x-data-parallel-rank"


@pytest.mark.parametrize(
    ("constraint", "field", "value", "read"),
    [
        (Constraint(kind="json_object"), "json_schema", '{"type": "object"}', Constraint(kind="json_object")),
        (Constraint(kind="json_schema", value="{}"), "json_schema", "{}", Constraint(kind="json_schema", value="{}")),
        (Constraint(kind="choice", value=("a.b", "c|d")), "regex", r"(?:a\.b|c\|d)", Constraint(kind="regex", value=r"(?:a\.b|c\|d)")),
        (Constraint(kind="grammar", value="g"), "ebnf_grammar", "g", Constraint(kind="grammar", value="g")),
        (Constraint(kind="structural_tag", value="{}"), "structural_tag", "{}", Constraint(kind="structural_tag", value="{}")),
    ],
)
def test_constraints(constraint, field, value, read):
    message = NEW.encode_request(InferenceRequest(request_id="r", sampling=SamplingParams(constraint=constraint)))
    assert message.sampling_params.WhichOneof("constraint") == field
    assert getattr(message.sampling_params, field) == value
    assert NEW.decode_request(message).sampling.constraint == read


def test_biases_are_keyed_by_text():
    message = NEW.encode_request(InferenceRequest(request_id="r", sampling=SamplingParams(logit_bias={5: 0.5})))
    assert dict(message.sampling_params.logit_bias) == {"5": 0.5}
    assert NEW.decode_request(message).sampling.logit_bias == {5: 0.5}
    for key in ("x", "\N{SUPERSCRIPT TWO}", "-5", "9" * 5000):
        wrong = NEW.request_type.FromString(message.SerializeToString())
        wrong.sampling_params.logit_bias[key] = 1.0
        with pytest.raises(MalformedRequestError) as refused:
            NEW.decode_request(wrong)
        assert refused.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": 5}, "seed"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"priority": 5}, "priority"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ],
)
def test_what_the_wire_has_not_is_refused_by_name(fields, param):
    with pytest.raises(UnsupportedFieldError) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_several_choices_are_asked_for_as_a_stream():
    for stream in (True, False):
        message = sent(ask(n=2, stream=stream, temperature=1))
        assert (message.sampling_params.n, message.stream) == (2, True)
    assert not sent(ask(stream=False)).stream


# Answers


def test_a_stop_string_ends_the_choice_here_and_the_call_with_it():
    everything = HELLO + ids(" STOP now")
    for size in (1, 2, 3, len(everything)):
        chunks = [TokensEvent(token_ids=everything[place : place + size], prompt_tokens=3) for place in range(0, len(everything), size)]
        for stream in (True, False):
            call = ask(stop=["STOP"], stream=stream)
            response = call.response(created=1)
            response.receive_headers()
            outputs = [out for event in chunks for out in response.receive_data(frames_of(NEW, [event]))]
            assert isinstance(outputs[-1], EndOfBody), "the host need not wait for a server that goes on"
            assert response.error is None
            answer = answer_to(call, [frames_of(NEW, chunks)])
            assert answer.content() == "Hello world "
            choice = answer.json["choices"][0] if not stream else answer.events[-2]["choices"][0]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
            # H, ell, o, " world", " ", S, T, O, P: what follows in the same message is not counted.
            assert answer.usage.completion_tokens == response.usage.completion_tokens == 9


def test_a_stop_string_in_a_finish_alone_is_cut_and_counted_too():
    answer = answer_to(ask(stop=["STOP"]), [frames_of(NEW, [FinishEvent(token_ids=HELLO + ids(" STOP now"), finish_reason="length")])])
    assert (answer.content(), answer.usage.completion_tokens) == ("Hello world ", 9)
    assert (answer.json["choices"][0]["finish_reason"], answer.json["choices"][0]["stop_reason"]) == ("stop", "STOP")


@pytest.mark.parametrize(
    ("fields", "matched", "stop_reason"),
    [({}, EOS, None), ({"stop_token_ids": [EOS]}, EOS, EOS), ({"stop_token_ids": [7]}, 7, 7), ({}, 7, 7)],
)
def test_eos_named_by_the_server_is_no_stop_reason(fields, matched, stop_reason):
    answer = answer_to(ask(**fields), [frames_of(NEW, [FinishEvent(token_ids=[*HELLO, matched], matched_stop=matched)])])
    assert answer.json["choices"][0]["stop_reason"] == stop_reason


def test_both_servicers_give_the_same():
    """The Rust one repeats everything in Complete, the Python one the last delta."""
    chunks = [TokensEvent(token_ids=[token], completion_tokens=place, prompt_tokens=3) for place, token in enumerate([*HELLO, EOS], 1)]
    bodies = {
        answer_to(
            ask(stream=True), [frames_of(NEW, [*chunks, FinishEvent(token_ids=repeated, matched_stop=EOS, completion_tokens=5)])]
        ).body
        for repeated in ([*HELLO, EOS], [EOS], [])
    }
    assert len(bodies) == 1


@pytest.mark.parametrize("name", INLINE_ERRORS)
@pytest.mark.parametrize(
    ("status", "expected"), [("400", 400), ("429", 429), ("503", 503), ("500", 500), ("", 500), ("x", 500), ("\u00b2", 500)]
)
def test_an_error_in_the_stream_is_an_answer_with_its_status(name, status, expected):
    adapter = ADAPTERS[name]
    message = adapter.response_type()
    message.error.message = "too long"
    message.error.http_status_code = status
    frame = encode_frame(message.SerializeToString())
    early = answer_to(ask(adapter, stream=True), [frame])
    assert early.status == expected
    assert (json.loads(early.body)["error"]["message"] == "too long") == (expected < 500)
    late = answer_to(ask(adapter, stream=True), [frames_of(adapter, [TokensEvent(token_ids=HELLO)]), frame])
    assert (late.status, late.content(), late.events[-1]["error"]["code"]) == (200, "Hello world", expected)
    assert b"[DONE]" not in late.body


def test_errors_are_inline_in_old_snapshots_only():
    assert INLINE_ERRORS == ["intree-0.5.3.post2", "intree-0.5.8", "smg-0.3.2", "smg-0.4.4"]
    error = ErrorEvent(code=Code.RESOURCE_EXHAUSTED, message="m")
    assert OLD.decode_response(OLD.encode_response(error)) == (error,)
    with pytest.raises(UsageError, match="ErrorEvent"):
        NEW.encode_response(error)


def test_an_abort_is_an_error():
    answer = answer_to(ask(stream=True), [frames_of(NEW, [TokensEvent(token_ids=HELLO), FinishEvent(finish_reason="abort")])])
    assert answer.events[-1]["error"]["code"] == 500


def test_messages_that_say_nothing_and_columns_of_unequal_length():
    assert NEW.decode_response(NEW.response_type()) == ()
    assert NEW.decode_tokens(NEW.response_type()) == (0, [])
    message = NEW.response_type()
    message.chunk.output_logprobs.token_ids.extend([1, 2])
    message.chunk.output_logprobs.token_logprobs.append(-1.0)
    with pytest.raises(MalformedMessageError, match="1 token_logprobs for 2 token_ids"):
        NEW.decode_response(message)


@everywhere
@given(data=st.data())
def test_events_come_back(adapter, data):
    request = InferenceRequest(request_id="r", stream=True, sampling=SamplingParams(n=2, logprobs=2, stop_token_ids=(5,)))
    for event in data.draw(event_streams(request, adapter)):
        message = adapter.response_type.FromString(adapter.encode_response(event).SerializeToString())
        assert adapter.decode_response(message) == (event,)
        tokens = event.token_ids if isinstance(event, TokensEvent) else []
        assert adapter.decode_tokens(message)[1] == tokens


def test_what_only_some_snapshots_tell():
    event = TokensEvent(token_ids=[5], reasoning_tokens=7, logprobs=(TokenLogprob(token_id=5, logprob=-0.5),))
    for adapter in ADAPTERS.values():
        (read,) = adapter.decode_response(adapter.encode_response(event))
        assert read.reasoning_tokens == (7 if adapter.snapshot.has_field("GenerateStreamChunk", "reasoning_tokens") else 0)


# The published stubs, as an oracle that shares no code with the snapshots


@given(data=st.data())
def test_the_published_stubs_read_the_same(data):
    request = data.draw(inference_requests(NEW))
    message = NEW.encode_request(request)
    published = sglang_scheduler_pb2.GenerateRequest.FromString(message.SerializeToString())
    assert meaning(published) == meaning(message)
    assert NEW.decode_request(published) == as_read(NEW, request)
    for event in data.draw(event_streams(request, NEW)):
        told = NEW.encode_response(event)
        assert meaning(sglang_scheduler_pb2.GenerateResponse.FromString(told.SerializeToString())) == meaning(told)


def meaning(message) -> dict:
    return MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=message.DESCRIPTOR.file.pool)


# The model, and what is not spoken


def test_model_info_comes_back_with_the_adapters_that_are_loaded():
    info = ModelInfo(
        model_path="/m",
        served_model_name="m",
        tokenizer_path="/t",
        max_model_len=4096,
        vocab_size=512,
        eos_token_ids=(2, 0),
        default_sampling_params={"top_k": 20},
        lora_adapters={"l": "id-1"} if len(NEW.info_paths) > 1 else {},
    )
    assert NEW.decode_model_info(NEW.encode_model_info(info)) == info
    for adapter in ADAPTERS.values():
        answers = adapter.encode_model_info(info)
        assert tuple(answers) == adapter.info_paths
        first = {adapter.info_paths[0]: answers[adapter.info_paths[0]]}
        assert adapter.decode_model_info(first).max_model_len == 4096, "all but the first may be missing"
        message = first[adapter.info_paths[0]]
        message.max_context_length = message.vocab_size = -1
        unknown = adapter.decode_model_info(first)
        assert (unknown.max_model_len, unknown.vocab_size) == (0, 0)


def test_the_first_snapshot_is_not_spoken():
    with pytest.raises(UsageError, match="wire-incompatible"):
        Transcoder("sglang.scheduler", snapshot="intree-0.5.3", tokenizer=TOKENIZER)
