"""`vllm.engine`: what goes out comes back, nothing of the wire is overlooked, and the published stubs read it the same."""

from __future__ import annotations

import math

import msgspec
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2

from gaie_codec import (
    Constraint,
    FinishEvent,
    InferenceRequest,
    MalformedMessageError,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    adapters,
    snapshots,
)

ADAPTERS = {name: adapters.get(snapshots.load("vllm.engine", name)) for name in snapshots.SNAPSHOTS["vllm.engine"]}
OLD, NEW = ADAPTERS["intree-0.14.0"], ADAPTERS["smg-0.4.28"]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
UINT32 = st.integers(0, 2**32 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
NOT_ZERO = FLOAT32.filter(bool)  # these fields have no presence: the servicer reads 0 as the default
JSON = st.sampled_from(["", "{}", '{"a":[1,null]}'])


def constraints():
    texts = st.builds(Constraint, kind=st.sampled_from(["json_schema", "regex", "grammar", "structural_tag"]), value=TEXT)
    choices = st.builds(Constraint, kind=st.just("choice"), value=st.lists(TEXT, min_size=1, max_size=3).map(tuple))
    return texts | choices | st.just(Constraint(kind="json_object"))


def sampling_of(adapter):
    fields = {
        "temperature": st.none() | FLOAT32,
        "top_p": NOT_ZERO,
        "top_k": UINT32,
        "min_p": FLOAT32,
        "frequency_penalty": FLOAT32,
        "presence_penalty": FLOAT32,
        "repetition_penalty": NOT_ZERO,
        "max_tokens": st.none() | UINT32,
        "min_tokens": UINT32,
        "stop": st.lists(TEXT, max_size=3).map(tuple),
        "stop_token_ids": st.lists(UINT32, max_size=3).map(tuple),
        "skip_special_tokens": st.booleans(),
        "spaces_between_special_tokens": st.booleans(),
        "ignore_eos": st.booleans(),
        "n": st.integers(1, 2**32 - 1),
        "logprobs": st.none() | INT32,
        "seed": st.none() | INT32,
        "include_stop_str_in_output": st.booleans(),
        "logit_bias": st.dictionaries(INT32, FLOAT32, max_size=3),
        "constraint": st.none() | constraints(),
    }
    return st.fixed_dictionaries({}, optional={name: value for name, value in fields.items() if carries(adapter, name)})


def carries(adapter, name):
    return any(carried.split(".")[0] == name for carried in adapter.carries)


@st.composite
def requests(draw, adapter):
    fields = {"request_id": TEXT, "stream": st.booleans(), "data_parallel_rank": st.none() | INT32, "kv_transfer_params": JSON}
    prompt = draw(st.fixed_dictionaries({"prompt_token_ids": st.lists(UINT32, max_size=5)}) | st.fixed_dictionaries({"prompt_text": TEXT}))
    rest = {name: draw(value) for name, value in fields.items() if carries(adapter, name)}
    return InferenceRequest(**prompt, **rest, sampling=SamplingParams(**draw(sampling_of(adapter))))


@st.composite
def events(draw, adapter):
    top = st.lists(st.tuples(UINT32, FLOAT32), max_size=2).map(tuple)
    entries = st.builds(TokenLogprob, token_id=UINT32, logprob=FLOAT32, top=top)
    fields = {
        "index": draw(UINT32) if "n" in adapter.carries else 0,
        "token_ids": draw(st.lists(UINT32, max_size=4)),
        "logprobs": tuple(draw(st.lists(entries, max_size=3))) if "logprobs" in adapter.carries else (),
        "prompt_tokens": draw(UINT32),
        "completion_tokens": draw(UINT32),
        "cached_tokens": draw(UINT32),
    }
    if draw(st.booleans()):
        return TokensEvent(**fields)
    return FinishEvent(
        **fields,
        finish_reason=draw(TEXT.filter(bool)),
        matched_stop=draw(st.none() | TEXT | UINT32) if adapter.snapshot.has_field("GenerateComplete", "matched_stop_str") else None,
        kv_transfer_params=draw(JSON) if "kv_transfer_params" in adapter.carries else "",
    )


# Law 2: what goes out comes back


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@settings(max_examples=max(10, 3 * settings().max_examples // len(ADAPTERS)))  # they share nearly all code
@given(data=st.data())
def test_requests_come_back(adapter, data):
    request = data.draw(requests(adapter))
    before = msgspec.json.encode(request)
    message = adapter.encode_request(request)
    assert adapter.decode_request(adapter.request_type.FromString(message.SerializeToString())) == request
    assert msgspec.json.encode(request) == before, "encoding changed its input"


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@settings(max_examples=max(10, 3 * settings().max_examples // len(ADAPTERS)))  # they share nearly all code
@given(data=st.data())
def test_events_come_back(adapter, data):
    event = data.draw(events(adapter))
    message = adapter.response_type.FromString(adapter.encode_response(event).SerializeToString())
    assert adapter.decode_response(message) == (event,)
    tokens = event.token_ids if isinstance(event, TokensEvent) else []
    assert adapter.decode_tokens(message)[1] == tokens
    if tokens:
        assert adapter.decode_tokens(message)[0] == event.index


def test_doubles_are_rounded_to_the_wires_floats_and_no_further():
    params = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.1, logit_bias={5: -0.3})
    back = NEW.decode_request(NEW.encode_request(InferenceRequest(request_id="r", sampling=params))).sampling
    for name in ("temperature", "top_p", "min_p"):
        assert math.isclose(getattr(back, name), getattr(params, name), rel_tol=2**-24)
    assert math.isclose(back.logit_bias[5], -0.3, rel_tol=2**-24)


# Traps of this wire


def test_defaults_that_are_not_zero_are_written():
    sent = NEW.encode_request(InferenceRequest(request_id="r")).sampling_params
    assert (sent.top_p, sent.repetition_penalty, sent.n) == (1.0, 1.0, 1)
    assert sent.skip_special_tokens
    assert sent.spaces_between_special_tokens
    assert not sent.HasField("temperature"), "only a client's own is sent"
    for name in ("max_tokens", "logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens"):
        assert not sent.HasField(name)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("max_tokens", 0), ("logprobs", 0), ("seed", 0)])
def test_a_zero_with_presence_is_said(name, value):
    sent = NEW.encode_request(InferenceRequest(request_id="r", sampling=SamplingParams(**{name: value}))).sampling_params
    assert sent.HasField(name)
    assert getattr(sent, name) == value


def test_zeros_are_read_as_the_servicer_reads_them():
    assert NEW.decode_request(NEW.request_type()).sampling == SamplingParams(
        skip_special_tokens=False, spaces_between_special_tokens=False
    ), "flags without presence are what they are"


def test_messages_that_say_nothing_and_chunks_that_bring_nothing():
    assert NEW.decode_response(NEW.response_type()) == ()
    assert NEW.decode_tokens(NEW.response_type()) == (0, [])
    empty = NEW.response_type()
    empty.chunk.SetInParent()
    assert NEW.decode_response(empty) == (TokensEvent(),)
    empty.complete.SetInParent()
    assert NEW.decode_response(empty) == (FinishEvent(finish_reason="stop"),)


def test_json_object_false_is_no_constraint():
    message = NEW.request_type()
    message.sampling_params.json_object = False
    assert NEW.decode_request(message).sampling.constraint is None


@pytest.mark.parametrize(("field", "value"), [("matched_stop_str", ""), ("matched_token_id", 0)])
def test_a_match_that_equals_the_default_is_a_match(field, value):
    message = NEW.response_type()
    setattr(message.complete, field, value)
    (finish,) = NEW.decode_response(message)
    assert finish.matched_stop == value


def test_logprobs_of_unequal_length_are_malformed():
    message = NEW.response_type()
    message.chunk.output_logprobs.token_ids.extend([1, 2])
    message.chunk.output_logprobs.token_logprobs.append(-1.0)
    with pytest.raises(MalformedMessageError, match="1 token_logprobs for 2 token_ids"):
        NEW.decode_response(message)


def test_alternatives_may_be_missing_or_uneven():
    message = NEW.response_type()
    logprobs = message.chunk.output_logprobs
    logprobs.token_ids.extend([1, 2])
    logprobs.token_logprobs.extend([-1.0, -2.0])
    logprobs.top_logprobs.add(token_ids=[1, 7], values=[-1.0])
    (event,) = NEW.decode_response(message)
    assert event.logprobs == (
        TokenLogprob(token_id=1, logprob=-1.0, top=((1, -1.0),)),
        TokenLogprob(token_id=2, logprob=-2.0),
    )


@pytest.mark.parametrize("text", ["{", "nul", '{"a":1}x', "[" * 100_000, " ", "1e999"])
def test_kv_transfer_params_that_are_not_json_are_malformed(text):
    message = NEW.response_type()
    message.complete.kv_transfer_params_json = text
    with pytest.raises(MalformedMessageError, match="kv_transfer_params_json"):
        NEW.decode_response(message)


# What an older snapshot cannot say


NOT_YET = {
    "intree-0.14.0": {"n", "logprobs", "prompt_logprobs", "kv_transfer_params", "data_parallel_rank"},
    "smg-0.4.4": {"kv_transfer_params", "data_parallel_rank"},
    "smg-0.4.8": {"kv_transfer_params", "data_parallel_rank"},
}


def test_what_older_snapshots_do_not_carry():
    for name, adapter in ADAPTERS.items():
        assert NEW.carries - adapter.carries - {"grammar_from_first_token"} == NOT_YET.get(name, set())
        assert ("grammar_from_first_token" in adapter.carries) == (name == "smg-0.4.28")
        assert adapter.carries <= NEW.carries
        assert not carries(adapter, "bad_words")
        assert not carries(adapter, "allowed_token_ids")
        assert not adapter.carries & {"priority", "cache_salt", "lora_name"}


def test_paths():
    for adapter in ADAPTERS.values():
        assert adapter.generate_path == "/vllm.grpc.engine.VllmEngine/Generate"
        assert adapter.generate_paths == (adapter.generate_path,)
        assert adapter.path_for(InferenceRequest(request_id="r", stream=True)) == adapter.generate_path
        assert adapter.info_paths == ((INFO_PATH, SERVER_PATH) if adapter is NEW else (INFO_PATH,))
        tokenizer_path = None if adapter is OLD else "/vllm.grpc.engine.VllmEngine/GetTokenizer"
        assert adapter.tokenizer_path == tokenizer_path


@given(data=st.data())
def test_the_new_snapshot_reads_the_old_one_and_the_old_one_what_it_knows(data):
    request = data.draw(requests(OLD))
    assert NEW.decode_request(NEW.request_type.FromString(OLD.encode_request(request).SerializeToString())) == request
    event = data.draw(events(OLD))
    assert NEW.decode_response(NEW.response_type.FromString(OLD.encode_response(event).SerializeToString())) == (event,)
    assert OLD.decode_response(OLD.response_type.FromString(NEW.encode_response(event).SerializeToString())) == (event,)


# The published stubs, as an oracle that shares no code with the snapshots


@given(data=st.data())
def test_the_published_stubs_read_requests_the_same(data):
    message = NEW.encode_request(data.draw(requests(NEW)))
    published = vllm_engine_pb2.GenerateRequest.FromString(message.SerializeToString())
    assert meaning(published) == meaning(message)
    assert NEW.decode_request(published) == NEW.decode_request(message)


@given(data=st.data())
def test_the_published_stubs_read_responses_the_same(data):
    message = NEW.encode_response(data.draw(events(NEW)))
    published = vllm_engine_pb2.GenerateResponse.FromString(message.SerializeToString())
    assert meaning(published) == meaning(message)


def meaning(message) -> dict:
    return MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=message.DESCRIPTOR.file.pool)


# GetModelInfo

INFO_PATH = "/vllm.grpc.engine.VllmEngine/GetModelInfo"
SERVER_PATH = "/vllm.grpc.engine.VllmEngine/GetServerInfo"
INFO = ModelInfo(
    model_path="/models/m",
    served_model_name="m",
    tokenizer_path="org/m",
    max_model_len=8192,
    vocab_size=3072,
    eos_token_ids=(2, 0),
    default_sampling_params={"temperature": 0.6, "top_k": 20},
    is_generation=True,
)


def test_model_info_comes_back():
    answers = NEW.encode_model_info(INFO)
    message = answers[INFO_PATH]
    info_type = type(message)
    assert NEW.decode_model_info({path: type(one).FromString(one.SerializeToString()) for path, one in answers.items()}) == INFO
    published = vllm_engine_pb2.GetModelInfoResponse.FromString(message.SerializeToString())
    assert meaning(published) == meaning(message)
    assert NEW.decode_model_info({INFO_PATH: info_type()}) == ModelInfo(is_generation=False)


def test_an_old_servers_model_info_has_what_it_has():
    known = ModelInfo(model_path="/models/m", max_model_len=8192, vocab_size=3072)
    assert OLD.decode_model_info(OLD.encode_model_info(INFO)) == known
    assert [adapter.advertises_defaults for adapter in (OLD, NEW)] == [False, True]


@pytest.mark.parametrize("text", ["[1]", "{", "null", "{" * 100_000])
def test_default_sampling_params_that_are_no_object_are_malformed(text):
    answers = NEW.encode_model_info(INFO)
    answers[INFO_PATH].default_sampling_params_json = text
    with pytest.raises(MalformedMessageError, match="default_sampling_params_json"):
        NEW.decode_model_info(answers)
