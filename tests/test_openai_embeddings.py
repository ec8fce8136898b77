"""`/v1/embeddings`: vLLM's own answers on every wire that embeds, every form of input and output, and servers that answer wrongly."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    BodyChunk,
    Code,
    CodecError,
    EmbeddingEvent,
    InferenceRequest,
    Limits,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    RequestError,
    ResponseHead,
    Transcoder,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    adapters,
    encode_frame,
    snapshots,
)
from gaie_codec.adapters import DIALECTS
from gaie_codec.compat._supported import EMBEDDING_FIELDS, embedding_treatment
from gaie_codec.testing import ByteTokenizer
from gaie_codec.tokenizer_sources import load_tokenizer
from wire_fields import leaves

GOLDEN = Path(__file__).parent / "golden"
CASES = {path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "vllm-http-only").glob("embed_*.json"))}
PATH = "/v1/embeddings"
TOKENIZER = load_tokenizer(str(GOLDEN / "model"))
MODEL = ModelInfo(max_model_len=2048, served_model_name="test-model", is_generation=False)
ALL = [(dialect, name) for dialect in DIALECTS for name in snapshots.SNAPSHOTS[dialect] if not snapshots.load(dialect, name).refused]
EMBEDDING = [key for key in ALL if adapters.get(snapshots.load(*key)).embed is not None]
OK = [("grpc-status", "0")]


def transcoder_for(dialect="vllm.engine", name=None, *, tokenizer=TOKENIZER, model=MODEL, **options):
    return Transcoder(dialect, snapshot=name, tokenizer=tokenizer, model=model, passthrough=False, **options)


def vector(token_ids):
    """The scripted engine of the goldens."""
    return [(-1) ** place * (len(token_ids) + place) / 16 for place in range(8)]


def answer(call, events=None, *, status=OK):
    """Status, headers and body of the answer of a server that answers each call by its event."""
    coder = call.transcoder.adapter.embed
    response = call.response(created=1795421476)
    outputs = []
    for number in reversed(range(len(call.calls))):  # in any order
        request = coder.decode_request(coder_request(call, number))
        told = events[number] if events is not None else event_for(request.prompt_token_ids)
        outputs += response.receive_headers([("content-type", "application/grpc")], call=number)
        outputs += response.receive_data(encode_frame(coder.encode_response(told).SerializeToString()), call=number)
        outputs += response.receive_trailers(status, call=number)
    assert response.ended
    head = outputs[0]
    assert isinstance(head, ResponseHead)
    return head.status, dict(head.headers), b"".join(out.data for out in outputs if isinstance(out, BodyChunk))


def coder_request(call, number):
    return call.transcoder.adapter.snapshot.method_at(call.calls[number].path).request.FromString(call.calls[number].message)


def event_for(token_ids):
    values = vector(token_ids)
    return EmbeddingEvent(values=values, dimensions=len(values), prompt_tokens=len(token_ids))


def ask(fields, transcoder=None, headers=()):
    return (transcoder or transcoder_for()).request("POST", PATH, headers, json.dumps(fields).encode(), request_id="r")


def embed(fields, transcoder=None, events=None):
    status, _, body = answer(ask(fields, transcoder), events)
    assert status == 200, body
    return json.loads(body)


def whole(fields, transcoder=None):
    """The answer to a request, be it refused or not."""
    try:
        call = ask(fields, transcoder)
    except RequestError as error:
        return error.http_status, {}, json.dumps({"error": error_body(error)}).encode()
    return answer(call)


def error_body(error):
    return {"message": error.message, "type": error.error_type, "param": error.param, "code": error.http_status}


# vLLM's own answers


@pytest.mark.parametrize("key", EMBEDDING, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_golden(name, key):
    case = CASES[name]
    status, headers, body = whole(case["request"], transcoder_for(*key))
    assert status == case["status"]
    if headers:
        assert headers["content-type"] == case["headers"]["content-type"]
    if case["request"].get("encoding_format") == "bytes":
        assert body.hex() == case["body"]
        return
    ours, theirs = json.loads(body), json.loads(case["body"])
    if status != 200:  # vLLM repeats what was wrong
        theirs["error"]["message"] = re.sub(r", 'input': '[^']*'", "", theirs["error"]["message"])
    if "created" in theirs:
        ours["created"] = theirs["created"]
    assert ours == theirs
    assert [*ours] == [*theirs]


def test_every_wire_with_an_embed_method_is_here():
    assert {dialect for dialect, _ in EMBEDDING} == {"vllm.engine", "sglang.scheduler", "sglang.runtime"}
    for dialect, name in ALL:
        if (dialect, name) not in EMBEDDING:
            assert dialect in ("vllm.inference", "sglang.api")
            with pytest.raises(UnsupportedEndpointError, match="is not supported"):
                ask({"input": "a"}, transcoder_for(dialect, name))


# Input


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [5]], [[97], [5]]),
    ],
)
def test_forms_of_input(value, prompts):
    call = ask({"input": value}, transcoder_for(tokenizer=ByteTokenizer()))
    assert [one.inference.prompt_token_ids for one in call.calls] == prompts == [one.prompt_token_ids for one in call.prompts]
    assert len({coder_request(call, number).request_id for number in range(len(prompts))}) == len(prompts)


def test_a_list_gives_as_many_embeddings_in_order_and_their_tokens_summed():
    body = embed({"input": ["a", "bb bb bb", [1, 2]]})
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    counts = [len(TOKENIZER.encode(text, add_special_tokens=True)) for text in ("a", "bb bb bb")] + [2]
    assert [one["embedding"] for one in body["data"]] == [vector(range(count)) for count in counts]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == sum(counts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "body.input"),
        ({"input": None}, "body.input"),
        ({"input": 5}, "body.input"),
        ({"input": {}}, "body.input"),
        ({"input": [["a"]]}, "body.input.0"),
        ({"input": ["a", 1]}, "body.input.1"),
        ({"input": [None]}, "body.input.0"),
        ({"input": []}, None),
        ({"input": ""}, None),
        ({"input": [[]]}, None),
        ({"input": [-1]}, None),
        ({"input": [10**30]}, None),
        ({"messages": "hi"}, "body.messages"),
        ({"messages": []}, None),
        ({"input": "a", "encoding_format": "hex"}, "body.encoding_format"),
        ({"input": "a", "encoding_format": None}, "body.encoding_format"),
        ({"input": "a", "embed_dtype": "float64"}, "body.embed_dtype"),
        ({"input": "a", "endianness": 1}, "body.endianness"),
        ({"input": "a", "dimensions": "x"}, "body.dimensions"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "body.truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 5000}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "up"}, "body.truncation_side"),
        ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ({"input": [1] * 2049}, "input_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True, "continue_final_message": True}, None),
    ],
)
def test_malformed(fields, param):
    with pytest.raises(MalformedRequestError) as caught:
        ask(fields)
    assert (caught.value.http_status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_activation": False}, "use_activation"),
        ({"normalize": False}, "normalize"),
        ({"padding": "max_length"}, "padding"),
        ({"chat_template": "x"}, "chat_template"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"encoding_format": "base64", "embed_dtype": "fp8_e4m3"}, "embed_dtype"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
def test_refused_by_name(fields, param):
    with pytest.raises(UnsupportedFieldError) as caught:
        ask({"input": "a", **fields})
    assert caught.value.param == param


def test_what_has_no_effect_is_reported():
    call = ask({"input": "a", "priority": 2, "cache_salt": "s", "strange": 1, "user": "u"}, transcoder_for(unsupported="drop"))
    assert call.dropped == ("cache_salt", "priority", "strange")


def test_a_host_of_one_call_takes_one_prompt():
    one = transcoder_for(limits=Limits(max_calls=1))
    assert ask({"input": ["a"]}, one).path.endswith("/Embed")
    with pytest.raises(UnsupportedFieldError) as caught:
        ask({"input": ["a", "b"]}, one)
    assert caught.value.param == "input"


def test_lists_as_long_as_clients_send_them():
    call = ask({"input": [[number % 100] for number in range(2048)]})
    assert len(call.calls) == 2048
    assert len(embed({"input": [[7]] * 1000})["data"]) == 1000


class Bracketed(ByteTokenizer):
    """With special tokens around a text: 1 and 2."""

    def encode(self, text, *, add_special_tokens):
        bare = super().encode(text, add_special_tokens=False)
        return [1, *bare, 2] if add_special_tokens else bare


@pytest.mark.parametrize(
    ("fields", "token_ids"),
    [
        ({}, [1, *b"abcdef", 2]),
        ({"add_special_tokens": False}, [*b"abcdef"]),
        ({"truncate_prompt_tokens": 4}, [1, *b"ab", 2]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, [1, *b"ef", 2]),
        ({"truncate_prompt_tokens": 4, "add_special_tokens": False}, [*b"abcd"]),
        ({"truncate_prompt_tokens": 8}, [1, *b"abcdef", 2]),
        ({"truncate_prompt_tokens": 1}, [1]),
        ({"input": [5, 6, 7], "truncate_prompt_tokens": 2}, [5, 6]),
        ({"input": [5, 6, 7], "truncate_prompt_tokens": 2, "truncation_side": "left"}, [6, 7]),
        ({"input": "x" * 200, "truncate_prompt_tokens": -1}, [1, *b"x" * 98, 2]),
    ],
)
def test_a_prompt_keeps_its_beginning_and_its_special_tokens(fields, token_ids):
    transcoder = transcoder_for(tokenizer=Bracketed(), model=ModelInfo(max_model_len=100))
    assert ask({"input": "abcdef", **fields}, transcoder).inference.prompt_token_ids == token_ids


def test_messages_are_rendered_without_a_generation_prompt():
    messages = [{"role": "user", "content": "hi"}]
    transcoder = transcoder_for(tokenizer=ByteTokenizer())
    assert bytes(ask({"messages": messages}, transcoder).inference.prompt_token_ids) == b"user: hi\n"
    with_prompt = ask({"messages": messages, "add_generation_prompt": True}, transcoder)
    assert bytes(with_prompt.inference.prompt_token_ids) == b"user: hi\nassistant: "


def test_what_goes_to_the_server_besides_the_prompt():
    headers = [("x-data-parallel-rank", "3"), ("traceparent", "00-1-2-01"), ("x-request-id", "mine")]
    call = ask({"input": [4]}, transcoder_for("sglang.scheduler"), headers)
    assert coder_request(call, 0).data_parallel_rank == 3
    assert dict(call.metadata)["traceparent"] == "00-1-2-01"
    assert call.id == "embd-mine"
    with pytest.raises(MalformedRequestError, match="data-parallel-rank must be between 1"):
        ask({"input": [4]}, transcoder_for("sglang.scheduler"), [("x-data-parallel-rank", "0")])
    native = ask({"input": [4]}, transcoder_for("sglang.runtime"), headers[1:])
    assert coder_request(native, 0).trace_headers == {"traceparent": "00-1-2-01"}
    with pytest.raises(UnsupportedFieldError) as caught:
        ask({"input": [4]}, headers=headers)
    assert caught.value.param == "x-data-parallel-rank"


def test_models():
    lora = ModelInfo(served_model_name="m", lora_adapters={"tuned": "7"})
    with pytest.raises(UnsupportedFieldError):
        ask({"model": "tuned", "input": "a"}, transcoder_for(model=lora))
    with pytest.raises(ModelNotFoundError):
        ask({"model": "other", "input": "a"}, transcoder_for(model=lora))
    assert embed({"model": "", "input": "a"}, transcoder_for(model=lora))["model"] == "m"


# Output


def test_base64_is_what_the_floats_are():
    floats = embed({"input": "hello"})["data"][0]["embedding"]
    packed = base64.b64decode(embed({"input": "hello", "encoding_format": "base64"})["data"][0]["embedding"])
    assert list(struct.unpack("<8f", packed)) == floats


@pytest.mark.parametrize(
    ("dtype", "order", "expected"),
    [
        ("float32", "little", "0000403e"),
        ("float32", "big", "3e400000"),
        ("float32", "native", "0000403e"),
        ("float16", "little", "0032"),
        ("float16", "big", "3200"),
        ("bfloat16", "little", "403e"),
        ("bfloat16", "big", "3e40"),
    ],
)
def test_types_and_byte_orders(dtype, order, expected):
    event = [EmbeddingEvent(values=[0.1875])]
    fields = {"input": [1], "embed_dtype": dtype, "endianness": order}
    encoded = embed({**fields, "encoding_format": "base64"}, events=event)["data"][0]["embedding"]
    assert base64.b64decode(encoded).hex() == expected
    assert embed(fields, events=event)["data"][0]["embedding"] == [0.1875], "numbers are numbers"


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [("float16", 70000.0, "007c"), ("float16", -70000.0, "00fc"), ("float16", 65519.0, "ff7b"), ("bfloat16", 3.4028234e38, "807f")],
)
def test_what_is_too_large_for_a_narrow_type_is_infinite(dtype, value, expected):
    event = [EmbeddingEvent(values=[value])]
    body = embed({"input": [1], "encoding_format": "base64", "embed_dtype": dtype}, events=event)
    assert base64.b64decode(body["data"][0]["embedding"]).hex() == expected


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_is_the_nearest(value):
    body = embed({"input": [1], "encoding_format": "base64", "embed_dtype": "bfloat16"}, events=[EmbeddingEvent(values=[value])])
    (packed,) = struct.unpack("<H", base64.b64decode(body["data"][0]["embedding"]))
    (found,) = struct.unpack("<f", struct.pack("<I", packed << 16))
    assert math.isinf(found) or abs(found - value) <= max(abs(value) * 2.0**-8, 2.0**-133)


def test_bytes_come_with_their_places_in_a_header():
    status, headers, body = answer(ask({"input": [[1], [2, 3]], "encoding_format": "bytes", "request_id": "x\x7f", "model": "test-model"}))
    metadata = json.loads(headers["metadata"])
    assert (status, len(body)) == (200, 64)
    assert metadata["id"] == "embd-x\x7f"
    assert headers["metadata"].isascii()
    assert headers["metadata"].isprintable()
    assert metadata["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    for item, token_ids in zip(metadata["data"], ([1], [2, 3]), strict=True):
        assert item["shape"] == [8]
        assert list(struct.unpack("<8f", body[item["start"] : item["end"]])) == vector(token_ids)
    _, headers, only = answer(ask({"input": [[1], [2, 3]], "encoding_format": "bytes_only"}))
    assert (only, "metadata" in headers) == (body, False)


def test_dimensions_of_a_model_that_allows_them():
    transcoder = transcoder_for(model=msgspec.structs.replace(MODEL, is_matryoshka=True))
    shortened = embed({"input": [1, 2], "dimensions": 3}, transcoder)["data"][0]["embedding"]
    kept = vector([1, 2])[:3]
    assert shortened == pytest.approx([value / math.hypot(*kept) for value in kept])
    assert embed({"input": [1], "dimensions": 2}, transcoder, [EmbeddingEvent(values=[0.0] * 4)])["data"][0]["embedding"] == [0.0, 0.0]
    for wrong in (0, -1):
        with pytest.raises(MalformedRequestError, match="greater than 0"):
            ask({"input": "a", "dimensions": wrong}, transcoder)
    status, _, body = answer(ask({"input": "a", "dimensions": 9}, transcoder))
    assert (status, json.loads(body)["error"]["param"]) == (400, "dimensions"), "there are 8"
    listed = transcoder_for(model=msgspec.structs.replace(MODEL, matryoshka_dimensions=(2, 4)))
    assert len(embed({"input": "a", "dimensions": 4}, listed)["data"][0]["embedding"]) == 4
    with pytest.raises(MalformedRequestError, match="one of"):
        ask({"input": "a", "dimensions": 3}, listed)


# Servers that answer wrongly


@pytest.mark.parametrize("key", EMBEDDING, ids="-".join)
@pytest.mark.parametrize(
    "event",
    [
        EmbeddingEvent(values=[]),
        EmbeddingEvent(values=[1.0, math.nan]),
        EmbeddingEvent(values=[math.inf]),
        EmbeddingEvent(values=[-math.inf, 0.0]),
    ],
)
def test_vectors_that_cannot_be_told(event, key):
    status, _, body = answer(ask({"input": "a"}, transcoder_for(*key)), [event])
    assert (status, json.loads(body)["error"]["type"]) == (502, "BadGatewayError")


def test_vectors_of_the_wrong_length():
    assert answer(ask({"input": "a"}), [EmbeddingEvent(values=[1.0, 2.0], dimensions=3)])[0] == 502
    assert answer(ask({"input": ["a", "b"]}), [EmbeddingEvent(values=[1.0]), EmbeddingEvent(values=[1.0, 2.0])])[0] == 502


def frames(call, *events):
    return b"".join(encode_frame(call.transcoder.adapter.embed.encode_response(event).SerializeToString()) for event in events)


@pytest.mark.parametrize("key", EMBEDDING, ids="-".join)
def test_answers_that_are_too_few_too_many_or_cut_off(key):
    call = ask({"input": "a"}, transcoder_for(*key))
    event = event_for([1])
    for data, trailers, status in [
        (b"", OK, 502),
        (frames(call, event)[:-1], OK, 502),
        (frames(call, event)[:-1], None, 502),
        (frames(call, event, event), OK, 502),
        (encode_frame(b"\xff" * 9), OK, 502),
        (encode_frame(b""), OK, 502),
        (b"", [("grpc-status", "3"), ("grpc-message", "too long")], 400),
        (b"", [("grpc-status", "12"), ("grpc-message", "")], 501),
        (b"", [("grpc-status", "14")], 503),
    ]:
        response = call.response(created=1)
        outputs = [*response.receive_headers([("content-type", "application/grpc")]), *response.receive_data(data)]
        if not response.ended:
            outputs += response.receive_eof() if trailers is None else response.receive_trailers(trailers)
        assert (response.ended, outputs[0].status) == (True, status), (data, trailers)
        assert isinstance(response.error, CodecError)
        assert json.loads(b"".join(out.data for out in outputs if isinstance(out, BodyChunk)))["error"]["code"] == status


@pytest.mark.parametrize("trailers", [None, [("grpc-status", "13")]])
def test_a_vector_that_came_is_an_answer_whatever_ends_it(trailers):
    call = ask({"input": "a"})
    response = call.response(created=1)
    outputs = [*response.receive_headers([("content-type", "application/grpc")]), *response.receive_data(frames(call, event_for([1])))]
    outputs += response.receive_eof() if trailers is None else response.receive_trailers(trailers)
    assert (outputs[0].status, response.ended, response.error) == (200, True, None)


def test_one_call_of_several_fails():
    call = ask({"input": ["a", "b"]})
    response = call.response(created=1)
    response.receive_headers([("content-type", "application/grpc")])
    assert not response.receive_data(frames(call, event_for([1])))
    assert not response.receive_trailers(OK)
    outputs = response.receive_status(Code.RESOURCE_EXHAUSTED, "full", call=1)
    assert (outputs[0].status, response.ended) == (429, True)


@pytest.mark.parametrize("name", ["intree-0.5.8", "smg-0.3.2"])
def test_an_error_in_the_envelope_of_older_servers(name):
    call = ask({"input": "a"}, transcoder_for("sglang.scheduler", name))
    message = call.transcoder.adapter.snapshot.message("EmbedResponse")()
    message.error.message = "out of memory at /secret"
    response = call.response(created=1)
    response.receive_headers([("content-type", "application/grpc")])
    outputs = response.receive_message(message.SerializeToString())
    assert outputs[0].status == 500
    assert b"secret" not in b"".join(out.data for out in outputs if isinstance(out, BodyChunk))


# Laws


@pytest.mark.parametrize("key", EMBEDDING, ids="-".join)
def test_both_halves_of_a_coder_are_inverses(key):
    adapter = adapters.get(snapshots.load(*key))
    coder = adapter.embed
    request = InferenceRequest(request_id="r", prompt_token_ids=[1, 2])
    if "data_parallel_rank" in coder.sends:
        request = msgspec.structs.replace(request, data_parallel_rank=2)
    if "trace_headers" in coder.sends:
        request = msgspec.structs.replace(request, trace_headers={"traceparent": "x"})
    assert coder.decode_request(coder.encode_request(request)) == request
    event = EmbeddingEvent(values=[0.5, -1.0], dimensions=2, prompt_tokens=3)
    (back,) = coder.decode_response(coder.encode_response(event))
    assert msgspec.structs.replace(back, dimensions=2) == event
    method = adapter.snapshot.method_at(coder.path)
    assert not method.server_streaming
    assert isinstance(coder.encode_request(request), method.request)


# Wire fields that are not written, or not read, with the reason.
UNWRITTEN = {
    "tokenized.original_text": "the ids say it all",
    "mm_inputs": "no media in embeddings yet",
    "sampling_params": "the servers do not look at it",
    "log_metrics": "the server's own default",
    "token_type_ids": "for cross-encoders, which are not asked",
    "is_cross_encoder": "likewise",
    "texts": "likewise",
    "routing_key": "for routers",
}
UNREAD = {
    "request_id": "one prompt a call",
    "complete.batch_embeddings": "one prompt a call",
    "error.code": "a name of the servicer's own",
    "error.details": "the message says it",
}


@pytest.mark.parametrize("key", EMBEDDING, ids="-".join)
def test_every_wire_field_is_used_or_listed(key):
    coder = adapters.get(snapshots.load(*key)).embed
    method = snapshots.load(*key).method_at(coder.path)
    assert leaves(method.request.DESCRIPTOR, UNWRITTEN) == set(coder.sends.values())
    envelope = "complete." if "complete" in method.response.DESCRIPTOR.fields_by_name else ""
    known = {f"{envelope}{name}" for name in ("embedding", "prompt_tokens", "cached_tokens", "embedding_dim")} | {
        "error.message",
        "meta_info",
    }
    assert leaves(method.response.DESCRIPTOR, UNREAD) <= known


EXAMPLES = {
    "model (of a LoRA adapter)": {"model": "tuned"},
    "model": {"model": "test-model"},
    "input": {"input": "b"},
    "messages": {"messages": [{"role": "user", "content": "hi"}]},
    "dimensions": {"dimensions": 2},
    "use_activation": {"use_activation": False},
    "normalize": {"normalize": False},
    "encoding_format": {"encoding_format": "base64"},
    "embed_dtype": {"embed_dtype": "float16"},
    "endianness": {"endianness": "big"},
    "truncation_side": {"truncation_side": "left"},
    "chat_template_kwargs": {"chat_template_kwargs": {}},
    "continue_final_message": {"continue_final_message": False},
}
HEADERS = {"x-data-parallel-rank (header)": ("x-data-parallel-rank", "3"), "traceparent (header)": ("traceparent", "00-1-2-01")}


@pytest.mark.parametrize("key", EMBEDDING, ids="-".join)
@pytest.mark.parametrize("field", EMBEDDING_FIELDS)
def test_every_field_is_treated_as_the_page_says(field, key):
    model = msgspec.structs.replace(MODEL, is_matryoshka=True, lora_adapters={"tuned": "7"})
    transcoder = transcoder_for(*key, model=model)
    found = embedding_treatment(transcoder.adapter, field)
    value = {"request_id": "x", "cache_salt": "x", "padding": "max_length", "chat_template": "x"}.get(field, 1)
    fields = {} if field in HEADERS else EXAMPLES.get(field, {field: value})
    body = fields if "messages" in fields else {"input": "a", **fields}
    headers = [HEADERS[field]] if field in HEADERS else []
    if found.kind == "refused":
        with pytest.raises(UnsupportedFieldError) as caught:
            ask(body, transcoder, headers)
        assert caught.value.param == field.partition(" ")[0]
        return
    call = ask(body, transcoder, headers)
    assert call.dropped == (("priority",) if found.how == "reported" else ())
    if found.kind == "sent":
        assert call.calls != ask({"input": "a"}, transcoder).calls


@given(st.data())
def test_cuts_do_not_matter_and_nothing_but_codec_errors(data):
    call = ask({"input": ["a", "b c"], "encoding_format": data.draw(st.sampled_from(["float", "base64", "bytes"]))})
    stream = frames(call, event_for([1]))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(stream) - 1))
        stream = stream[:place] + data.draw(st.binary(max_size=3)) + stream[place + 1 :]

    def run(pieces):
        response = call.response(created=1)
        outputs = []
        for number in (0, 1):
            if response.ended:
                break
            outputs += response.receive_headers([("content-type", "application/grpc")], call=number)
            for piece in pieces:
                outputs += response.receive_data(piece, call=number)
            outputs += response.receive_trailers(OK, call=number)
        assert response.ended
        return outputs

    cut = data.draw(st.integers(0, len(stream)))
    assert run([stream]) == run([stream[:cut], stream[cut:]])


def test_what_cannot_be_done_is_left_out_where_the_operator_chose_so():
    body = msgspec.json.encode({"input": "a", "normalize": False, "structured_outputs": {"whitespace_pattern": "x"}, "unheard_of": 1})
    with pytest.raises(UnsupportedFieldError) as caught:
        transcoder_for().request("POST", PATH, [], body, request_id="r")
    assert caught.value.param == "normalize"
    call = transcoder_for(unsupported="drop").request("POST", PATH, [], body, request_id="r")
    assert set(call.dropped) == {"normalize", "structured_outputs", "unheard_of"}
