"""`examples/trtllm`: the dialect that docs/adding-a-server.md adds, held to the laws of the others, and the page held to the files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    Bridge,
    CodecError,
    Constraint,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    ModelInfo,
    Observer,
    PromptEvent,
    RequestError,
    SamplingParams,
    TokensEvent,
    Transcoder,
    UsageError,
    encode_frame,
)
from gaie_codec.adapters.wire import regex_of_choices
from gaie_codec.proto.canonical import normalized, schema_hash
from gaie_codec.proto.catalogue import Provenance
from gaie_codec.proto.compile import compile_folder, read_schema, select
from gaie_codec.testing import ByteTokenizer, event_streams, inference_requests, messages, openai_requests
from strategies import Convention, answer_to, events_of, frames_of, messages_of, partitions, scripts

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "trtllm"
PAGE = ROOT / "docs" / "adding-a-server.md"
CHAT = "/v1/chat/completions"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_trtllm_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = load("schema")
SNAPSHOT = SCHEMA.load()
ADAPTER = load("adapter").adapter(SNAPSHOT)
TRANSCODER = Transcoder(ADAPTER, tokenizer=ByteTokenizer(), model=ModelInfo(max_model_len=4096))


def ask(transcoder: Transcoder = TRANSCODER, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return transcoder.request("POST", CHAT, {}, json.dumps(body).encode(), request_id="r")


def sent(call):
    return ADAPTER.request_type.FromString(call.message)


# The schema


def test_the_schema_is_what_its_provenance_says():
    provenance = msgspec.json.decode((SCHEMA.FOLDER / "provenance.json").read_bytes(), type=Provenance)
    assert (provenance.dialect, provenance.snapshot) == (SNAPSHOT.dialect, SNAPSHOT.name)
    assert provenance.schema_hash == schema_hash(normalized(compile_folder(SCHEMA.FOLDER).file))


def test_the_schema_is_that_of_the_published_package():
    package = find_spec("smg_grpc_proto")
    if package is None:
        pytest.skip("needs smg-grpc-proto")
    published = select(read_schema(Path(package.origin).parent), ["trtllm"])
    assert schema_hash(normalized(published.files)) == schema_hash(normalized(compile_folder(SCHEMA.FOLDER).file))


# The facts


def test_every_field_that_the_adapter_claims_is_there():
    assert ADAPTER.carries == ADAPTER.sends.keys() | ADAPTER.emulates.keys()
    assert not ADAPTER.sends.keys() & ADAPTER.emulates.keys()
    known = {*InferenceRequest.__struct_fields__, *SamplingParams.__struct_fields__}
    assert {name for name in ADAPTER.carries if not name.startswith("constraint.")} <= known
    assert len(ADAPTER.sends) == len(load("adapter")._FIELDS), "a field of the table that no message has"


def test_every_wire_field_is_read_or_listed_with_a_reason():
    read = {*ADAPTER.sends.values(), *ADAPTER.also_reads}
    listed = PAGE.read_text().partition("## Fields left unset\n")[2].partition("\n## ")[0]
    for path in leaves(ADAPTER.request_type.DESCRIPTOR):
        parents = {path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)}
        assert path in read or any(f"`{name}`" in listed for name in parents), path


def leaves(descriptor, prefix=""):
    for field in descriptor.fields:
        if field.message_type is not None:
            yield from leaves(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


# Requests


def heard(request: InferenceRequest) -> InferenceRequest:
    """The request as it can come back: without what is done by other means, and with what the wire writes in another way."""
    outer, inner = (
        {name: getattr(plain, name) for name in ADAPTER.emulates if name in plain.__struct_fields__}
        for plain in (InferenceRequest(request_id=""), SamplingParams())
    )
    if request.sampling.logprobs == 0:
        inner["logprobs"] = 1
    constraint = request.sampling.constraint
    if constraint is not None and constraint.kind == "choice":
        inner["constraint"] = Constraint(kind="regex", value=regex_of_choices(constraint.value))
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **inner), **outer)


@given(request=inference_requests(ADAPTER))
def test_requests_come_back(request):
    again = ADAPTER.decode_request(ADAPTER.request_type.FromString(ADAPTER.encode_request(request).SerializeToString()))
    assert again == heard(request)


@given(message=messages(SNAPSHOT, "GenerateRequest"))
def test_any_request_decodes_or_is_refused(message):
    decode_or_refuse(ADAPTER.decode_request, message)


@given(body=openai_requests())
def test_every_openai_request_is_sent_or_refused_by_name(body):
    if body.get("logit_bias"):
        with pytest.raises(RequestError) as caught:
            ask(**body)
        assert caught.value.param == "logit_bias"
    else:
        again = ADAPTER.decode_request(sent(ask(**body)))
        assert (again.sampling.n, again.sampling.seed) == (body.get("n", 1), body.get("seed"))


def test_a_field_that_the_wire_has_not_is_refused_by_name():
    for name, value in {"logit_bias": {"5": 1}, "priority": 1, "cache_salt": "x", "allowed_token_ids": [1], "seed": -2}.items():
        with pytest.raises(RequestError) as caught:
            ask(max_tokens=5, **{name: value})
        assert caught.value.param == name
    dropping = Transcoder(ADAPTER, tokenizer=ByteTokenizer(), unsupported="drop")
    assert ask(dropping, max_tokens=5, logit_bias={"5": 1}, priority=1).dropped == ("priority", "logit_bias")


def test_max_tokens_is_never_left_to_the_server():
    assert sent(ask()).max_tokens == 4096 - len(ask().inference.prompt_token_ids)
    with pytest.raises(RequestError) as caught:
        ask(Transcoder(ADAPTER, tokenizer=ByteTokenizer()))
    assert caught.value.param == "max_tokens"


def test_what_the_servicer_would_pass_over_is_written_so_that_it_does_not():
    message = sent(ask(max_tokens=5, logprobs=True, response_format={"type": "json_object"}))
    assert message.output_config.logprobs == 1
    assert (message.guided_decoding.guide_type, message.guided_decoding.guide) == (2, '{"type": "object"}')
    assert message.include_stop_token_in_output


# Answers


@given(data=st.data())
def test_answers_come_back(data):
    sampling = SamplingParams(n=2, logprobs=2, stop_token_ids=(7,))
    request = InferenceRequest(request_id="r", prompt_token_ids=[1], sampling=sampling, stream=data.draw(st.booleans()))
    events = data.draw(event_streams(request, ADAPTER))
    for event, message in zip(events, messages_of(ADAPTER, events), strict=True):
        assert ADAPTER.decode_response(ADAPTER.response_type.FromString(message)) == (event,)


@given(message=messages(SNAPSHOT, "GenerateResponse"))
def test_any_answer_decodes_or_is_refused(message):
    decode_or_refuse(ADAPTER.decode_response, message)
    index, token_ids = ADAPTER.decode_tokens(message)
    if token_ids:
        (event,) = ADAPTER.decode_response(message)
        assert (event.index, event.token_ids) == (index, token_ids)


def decode_or_refuse(decode, message):
    with contextlib.suppress(CodecError):
        decode(message)


@given(data=st.data(), n=st.integers(1, 2))
def test_a_stream_and_a_body_say_the_same_however_the_bytes_are_cut(data, n):
    fields = {
        "n": n,
        "max_tokens": 40,
        **data.draw(st.sampled_from([{}, {"stop": "bc"}, {"stop": "b", "include_stop_str_in_output": True}])),
    }
    script = data.draw(scripts(token_ids=st.sampled_from([97, 98, 99, 0xC3, 0xA9, 256]), n=n))
    stream = frames_of(ADAPTER, events_of(script, Convention(counts="cumulative", repeats="all")))
    streamed = answer_to(ask(stream=True, **fields), [stream])
    body = frames_of(ADAPTER, events_of(script, Convention(counts="cumulative", repeats="unary")))
    whole = answer_to(ask(**fields), [body])
    assert whole.error is streamed.error is None
    assert [whole.content(index) for index in range(n)] == [streamed.content(index) for index in range(n)]
    assert whole.usage == streamed.usage
    assert answer_to(ask(stream=True, **fields), data.draw(partitions(stream))).same == streamed.same


def test_the_gateway_ends_a_choice_whose_stop_string_the_server_passed_over():
    pieces = [TokensEvent(token_ids=list(b"one ST")), TokensEvent(token_ids=list(b"OP two")), FinishEvent(finish_reason="length")]
    answer = answer_to(ask(stop="STOP", max_tokens=40, stream=True), [frames_of(ADAPTER, pieces)])
    assert answer.content() == "one "
    assert answer.events[-2]["choices"][0]["finish_reason"] == "stop"


REASONS = {"timeout": 504, "cancelled": 500, "error": 500, "": 200, "stop_word": 200, "stop": 200, "length": 200}


@pytest.mark.parametrize(("reason", "status"), REASONS.items())
def test_finish_reasons(reason, status):
    message = ADAPTER.response_type()
    message.complete.finish_reason = reason
    message.complete.output_token_ids.extend(b"hi")
    answer = answer_to(ask(max_tokens=5), [encode_frame(message.SerializeToString())])
    assert answer.status == status
    if status == 200:
        assert answer.json["choices"][0]["finish_reason"] == ("length" if reason == "length" else "stop")


def test_other_ends_on_this_wire():
    aborted = FinishEvent(index=1, finish_reason="abort")
    matched = FinishEvent(token_ids=[1], matched_stop="STOP")
    timeout = ADAPTER.decode_response(ADAPTER.response_type(complete={"finish_reason": "timeout", "sequence_index": 1}))[0]
    assert isinstance(timeout, ErrorEvent)
    for event in (aborted, matched, timeout):
        assert ADAPTER.decode_response(ADAPTER.encode_response(event)) == (event,)
    assert ADAPTER.decode_response(ADAPTER.response_type()) == ()
    with pytest.raises(UsageError, match="PromptEvent"):
        ADAPTER.encode_response(PromptEvent())


def test_the_model_comes_back():
    info = ModelInfo(model_path="org/model", max_model_len=100, vocab_size=7)
    assert ADAPTER.decode_model_info(ADAPTER.encode_model_info(info)) == info


def test_it_is_observed_and_bridged_like_any_other():
    call = ask(max_tokens=5, stop="x", n=2, seed=3, logprobs=True, response_format={"type": "json_object"})
    observed = Observer(ADAPTER).request(call.path, {}, call.frame)
    assert observed.inference == ADAPTER.decode_request(sent(call))
    bridged = Bridge(ADAPTER, "vllm.engine", tokenizer=ByteTokenizer()).request(call.path, {}, call.frame)
    assert [one.path for one in bridged.calls] == ["/vllm.grpc.engine.VllmEngine/Generate"]
    assert bridged.dropped == ()


# The demo and the page


def test_the_demo_answers():
    if find_spec("smg_grpc_proto") is None:
        pytest.skip("needs smg-grpc-proto")
    done = subprocess.run([sys.executable, str(EXAMPLE / "demo.py")], capture_output=True, text=True, check=True)
    _, request, stream, _, body, refused = [part.partition("\n")[2] for part in f"\n{done.stdout}".split("--- ")]
    assert 'stop: " STOP"' in request
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    said = "A gateway stands before servers. \N{EARTH GLOBE EUROPE-AFRICA}"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == said
    assert stream.rstrip().endswith("data: [DONE]")
    assert json.loads(body)["choices"][0]["message"]["content"] == said
    assert json.loads(refused)["error"]["param"] == "logit_bias"


def test_the_excerpts_of_the_page_are_current():
    blocks = re.findall(r"^```python\n# ((?:examples/trtllm|tests)/\w+\.py)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    for name, code in blocks:
        assert f"\n{code}" in (ROOT / name).read_text(), code


def test_the_page_has_a_word_for_every_field_of_an_adapter():
    page = PAGE.read_text()
    assert not [name for name in ADAPTER.__struct_fields__ if f"`{name}`" not in page]
