"""Endpoints that do not generate, behind Envoy: what the processor answers itself, and prompts to embed."""

from __future__ import annotations

import json

import pytest

from ext_proc_stream import GRPC, GRPC_HEAD, OK, TOKENIZER, FakeServer, Stream, codecs, gateway
from gaie_codec import EmbeddingEvent, ModelInfo, Transcoder, encode_frame
from gaie_codec.ext_proc.gateway import Declared
from gaie_codec.openai.models import encode_models, model_entries

EMBEDDINGS = "/v1/embeddings"
DIALECTS = ["vllm.engine", "sglang.scheduler", "sglang.runtime"]


def told(stream):
    assert stream.immediate is not None
    assert stream.processor.mode == "local"
    assert stream.processor.is_over
    return json.loads(stream.immediate.body)


def post(path, fields, *servers, **options):
    return Stream(gateway(*servers or (FakeServer(),)), **options).ask(json.dumps(fields).encode(), path=path)


def get(path, *servers, **options):
    return Stream(gateway(*servers or (FakeServer(),), **options)).ask(path=path, method="GET", content_type="")


# Answered here


def test_tokens_are_counted_here():
    stream = post("/tokenize", {"prompt": "hi"})
    assert told(stream)["tokens"] == TOKENIZER.encode("hi", add_special_tokens=True)
    assert stream.immediate.status.code == 200
    names = [option.header.key for option in stream.immediate.headers.set_headers]
    assert names == ["content-type", "x-request-id"]
    assert told(post("/detokenize", {"tokens": told(stream)["tokens"]}))["prompt"].endswith("hi")
    assert told(get("/version?x"))["version"]


def test_a_long_prompt_is_tokenized_when_the_host_likes():
    stream = post("/tokenize", {"prompt": "word " * 1000}, defers_over=100)
    assert stream.processor.deferred
    stream.take(stream.processor.resume(stream.processor.prepare()))
    assert told(stream)["count"] > 1000


def test_what_is_wrong_is_said_here():
    for fields, status in ({}, 400), ({"prompt": "a", "model": "other"}, 404):
        stream = post("/tokenize", fields)
        assert stream.immediate.status.code == status
        assert stream.processor.error is not None
    assert get("/tokenize").immediate.status.code == 405


def test_of_several_models_the_one_that_is_meant():
    other = FakeServer("10.0.0.2:1")
    other.transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=ModelInfo(served_model_name="other", max_model_len=7))
    for model, length in ("m", 100_000), ("other", 7), ("", 100_000):
        assert told(post("/tokenize", {"prompt": "a", "model": model}, FakeServer(), other))["max_model_len"] == length
    assert post("/tokenize", {"prompt": "a", "model": "x"}, FakeServer(), other).immediate.status.code == 404


def test_servers_of_http_answer_for_themselves():
    for servers in [(FakeServer(dialect="http"),), (FakeServer(), FakeServer("10.0.0.2:1", "http"))]:
        stream = post("/tokenize", {"prompt": "a"}, *servers)
        assert stream.immediate is None
        assert stream.request.ended
    passing = gateway(FakeServer(), declared=lambda: Declared(transcodes=False))
    assert Stream(passing).ask(b"{}", path="/tokenize").immediate is None


def test_one_model_of_the_list():
    listed = encode_models(model_entries(("org/m", "n"), created=1))
    for path, name in (("/v1/models/n", "n"), ("/v1/models/org%2Fm", "org/m"), ("/v1/models/org/m?x", "org/m")):
        assert told(get(path, models=lambda: listed))["id"] == name
    assert get("/v1/models/x", models=lambda: listed).immediate.status.code == 404
    unwanted = get("/v1/models/m").immediate
    assert unwanted.status.code == 404
    assert b"--serve-models" in bytes(unwanted.body)


# Embeddings


def answer_of(server, request, values):
    coder = server.transcoder.adapter.embed
    message = server.transcoder.adapter.snapshot.method_at(coder.path).request.FromString(request.body[5:])
    ids = coder.decode_request(message).prompt_token_ids
    return ids, encode_frame(coder.encode_response(EmbeddingEvent(values=values, prompt_tokens=len(ids))).SerializeToString())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_prompt_is_embedded(dialect):
    server = FakeServer(dialect=dialect, passthrough=False)
    stream = post(EMBEDDINGS, {"input": ["hi"], "encoding_format": "base64"}, server)
    assert stream.request.headers[":path"] == server.transcoder.adapter.embed.path
    ids, frame = answer_of(server, stream.request, [0.5, -1.0])
    assert ids == stream.processor.plan.inference.prompt_token_ids == TOKENIZER.encode("hi", add_special_tokens=True)
    stream.answer([frame])
    body = json.loads(stream.response.body)
    assert body["data"][0]["embedding"] == "AAAAPwAAgL8="
    assert stream.response.headers[":status"] == "200"
    assert stream.processor.usage.prompt_tokens == len(ids)


def test_envoy_makes_one_call():
    stream = post(EMBEDDINGS, {"input": ["a", "b"]})
    assert (stream.immediate.status.code, json.loads(stream.immediate.body)["error"]["param"]) == (400, "input")


def test_bytes_keep_their_type():
    stream = post(EMBEDDINGS, {"input": [1], "encoding_format": "bytes"})
    stream.answer([answer_of(FakeServer(), stream.request, [1.0])[1]])
    assert stream.response.headers["content-type"] == "application/octet-stream"
    assert json.loads(stream.response.headers["metadata"])["data"][0]["shape"] == [1]
    assert stream.response.body == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_grpc_that_embeds_is_read_as_it_passes(dialect):
    server = FakeServer(dialect=dialect)
    _, observer = codecs(dialect)
    coder = observer.adapter.embed
    call = next(iter(codecs(dialect, passthrough=False)[0].request("POST", EMBEDDINGS, (), b'{"input": [1, 2, 3]}', request_id="r").calls))
    assert coder.path in observer.paths
    stream = Stream(gateway(server)).ask(
        encode_frame(call.message), path=coder.path, content_type=GRPC, headers=[("traceparent", "00-1-2-01")]
    )
    plan = stream.processor.plan
    assert (plan.inference.prompt_token_ids, plan.mode) == ([1, 2, 3], "grpc-in-grpc-out")
    assert plan.inference.trace_headers["traceparent"] == "00-1-2-01"
    assert stream.request.body == encode_frame(call.message)
    frame = encode_frame(coder.encode_response(EmbeddingEvent(values=[1.0], prompt_tokens=3)).SerializeToString())
    stream.answer([frame], headers=GRPC_HEAD, trailers=OK)
    assert stream.response.body == frame
    assert stream.processor.usage.prompt_tokens == 3
    assert stream.processor.error is None
