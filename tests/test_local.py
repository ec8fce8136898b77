"""What is answered without the model server: models, tokenizer, version."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    BodyChunk,
    CodecError,
    EndOfBody,
    Limits,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    RequestTooLargeError,
    ResponseHead,
    Transcoder,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    adapters,
    snapshots,
)
from gaie_codec.testing import ByteTokenizer
from gaie_codec.tokenizer_sources import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES = {name: json.loads((GOLDEN / "vllm-http-only" / f"{name}.json").read_text()) for name in ("tokenize_chat", "detokenize", "version")}
TOKENIZER = load_tokenizer(str(GOLDEN / "model"))
MODEL = ModelInfo(
    max_model_len=2048,
    served_model_name="test-model",
    model_path="org/model",
    aliases=("other",),
    lora_adapters={"tuned": "7"},
    server_version="0.33.0",
)
TRANSCODER = Transcoder("vllm.inference", tokenizer=TOKENIZER, model=MODEL)


def ask(method, path, fields=None, transcoder=TRANSCODER, headers=()):
    body = b"" if fields is None else json.dumps(fields).encode()
    head, chunk, end = transcoder.answer(method, path, headers, body, created=1700000000, version="ours")
    assert isinstance(head, ResponseHead)
    assert isinstance(chunk, BodyChunk)
    assert isinstance(end, EndOfBody)
    assert (head.status, dict(head.headers)) == (200, {"content-type": "application/json", "content-length": str(len(chunk.data))})
    return chunk.data


def told(*asked, **options):
    return json.loads(ask(*asked, **options))


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case = CASES[name]
    method, _, path = case["path"].rpartition(" ")
    assert ask(method or "POST", path, case["request"]).decode() == case["body"]


def test_there_is_no_tokenizer_info_as_by_default_in_vllm():
    assert TRANSCODER.answer("GET", "/tokenizer_info", (), b"", created=1) is None
    with pytest.raises(UnsupportedEndpointError) as caught:
        TRANSCODER.request("GET", "/tokenizer_info", (), b"", request_id="r")
    assert caught.value.http_status == 404


# Tokens


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "ab"}, "ab"),
        ({"prompt": ""}, ""),
        ({"messages": [{"role": "user", "content": "hi"}]}, "user: hi\nassistant: "),
        ({"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}, "user: hi\n"),
        ({"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, None),
    ],
)
def test_tokenize(fields, text):
    body = told("POST", "/tokenize", fields, transcoder=Transcoder("vllm.engine", tokenizer=ByteTokenizer()))
    assert body["count"] == len(body["tokens"])
    assert text is None or bytes(body["tokens"]).decode() == text
    assert (body["max_model_len"], body["token_strs"]) == (0, None)


def test_special_tokens_are_added_to_a_prompt_and_not_to_a_chat():
    seen = []

    class Spy(ByteTokenizer):
        def encode(self, text, *, add_special_tokens):
            seen.append(add_special_tokens)
            return super().encode(text, add_special_tokens=add_special_tokens)

    transcoder = Transcoder("vllm.engine", tokenizer=Spy())
    for fields in ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        ask("POST", "/tokenize", fields, transcoder)
        ask("POST", "/tokenize", {**fields, "add_special_tokens": "prompt" not in fields}, transcoder)
    assert seen == [True, False, False, True]


def test_token_texts_are_those_of_the_vocabulary():
    body = told("POST", "/tokenize", {"prompt": "hello you", "return_token_strs": True})
    assert "".join(body["token_strs"]) == "hello\u0120you"
    assert len(body["token_strs"]) == body["count"]
    with pytest.raises(UnsupportedFieldError, match="return_token_strs"):
        ask("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}, Transcoder("vllm.engine", tokenizer=ByteTokenizer()))


def test_detokenize():
    tokens = told("POST", "/tokenize", {"prompt": "Größe 🌍"})["tokens"]
    assert told("POST", "/detokenize", {"tokens": tokens}) == {"prompt": "Größe 🌍"}
    assert told("POST", "/detokenize", {"tokens": tokens[:-1]})["prompt"].endswith("\ufffd")
    assert told("POST", "/detokenize", {"tokens": []}) == {"prompt": ""}
    assert told("POST", "/detokenize", {"tokens": [104, 105]}, transcoder=Transcoder("vllm.engine", tokenizer=ByteTokenizer())) == {
        "prompt": "hi"
    }


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "body.prompt"),
        ("/tokenize", {"prompt": 5}, "body.prompt"),
        ("/tokenize", {"messages": 5}, "body.messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "maybe"}, "body.add_special_tokens"),
        ("/tokenize", [], "body"),
        ("/detokenize", {}, "body.tokens"),
        ("/detokenize", {"tokens": "a"}, "body.tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "body.tokens.1"),
        ("/detokenize", {"tokens": [-1]}, "body.tokens.0"),
        ("/detokenize", {"tokens": [8006]}, None),
        ("/detokenize", {"tokens": [10**40]}, None),
    ],
)
def test_malformed(path, fields, param):
    with pytest.raises(MalformedRequestError) as caught:
        ask("POST", path, fields)
    assert caught.value.param == param


def test_refused():
    for path in ("/tokenize", "/detokenize"):
        with pytest.raises(ModelNotFoundError):
            ask("POST", path, {"model": "x", "prompt": "a", "tokens": [1]})
        with pytest.raises(MalformedRequestError, match="Unsupported Media Type"):
            ask("POST", path, {"prompt": "a"}, headers=[("content-type", "text/plain")])
        with pytest.raises(RequestTooLargeError):
            ask("POST", path, {"prompt": "aaa"}, Transcoder("vllm.engine", tokenizer=TOKENIZER, limits=Limits(max_request_bytes=5)))
    with pytest.raises(UnsupportedFieldError, match="chat_template"):
        ask("POST", "/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"})


def test_without_a_tokenizer_there_are_no_tokens():
    passed = Transcoder("sglang.runtime", model=MODEL)
    assert passed.answer("POST", "/tokenize", (), b"{}", created=1) is None
    assert [entry["id"] for entry in told("GET", "/v1/models", transcoder=passed)["data"]] == ["test-model", "other", "test-model:tuned"]


# Models, version


def test_models_have_vllms_keys():
    body = told("GET", "/v1/models")
    assert [*body] == ["object", "data"]
    own, alias, lora = body["data"]
    assert [*own] == ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"]
    assert {**own, "permission": None} == {
        "id": "test-model",
        "object": "model",
        "created": 1700000000,
        "owned_by": "vllm",
        "root": "org/model",
        "parent": None,
        "max_model_len": 2048,
        "permission": None,
    }
    [permission] = own["permission"]
    assert permission["id"].startswith("modelperm-")
    assert [name for name, value in permission.items() if value is True] == ["allow_sampling", "allow_logprobs", "allow_view"]
    assert (alias["id"], alias["root"], alias["parent"]) == ("other", "org/model", None)
    assert (lora["id"], lora["parent"], lora["max_model_len"]) == ("tuned", "test-model", None)


def test_one_model():
    listed = told("GET", "/v1/models")["data"]
    assert [told("GET", f"/v1/models/{entry['id']}") for entry in listed] == listed
    slashed = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=ModelInfo(model_path="org/model"))
    assert told("GET", "/v1/models/org/model?x=1", transcoder=slashed)["id"] == "org/model"
    for wrong in ("/v1/models/nothing", "/v1/models/", "/v1/models/test-model/"):
        with pytest.raises(ModelNotFoundError) as caught:
            ask("GET", wrong)
        assert caught.value.http_status == 404


def test_version_is_the_servers_where_it_told_one():
    assert told("GET", "/version") == {"version": "0.33.0"}
    assert told("GET", "/version", transcoder=Transcoder("vllm.engine", tokenizer=TOKENIZER)) == {"version": "ours"}


@pytest.mark.parametrize("dialect", ["vllm.inference", "sglang.scheduler", "sglang.runtime", "sglang.api"])
def test_what_tells_a_version(dialect):
    adapter = adapters.get(snapshots.load(dialect))
    info = ModelInfo(model_path="m", served_model_name="m", server_version="1.2.3")
    assert adapter.decode_model_info(adapter.encode_model_info(info)).server_version == "1.2.3"
    first = {adapter.info_paths[0]: adapter.encode_model_info(msgspec.structs.replace(info, server_version=""))[adapter.info_paths[0]]}
    assert adapter.decode_model_info(first).server_version == ""


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/test-model", "GET, HEAD"),
        ("PUT", "/version", "GET, HEAD"),
        ("GET", "/tokenize", "POST"),
        ("HEAD", "/detokenize", "POST"),
    ],
)
def test_other_methods(method, path, allow):
    with pytest.raises(UnsupportedEndpointError) as caught:
        ask(method, path)
    assert (caught.value.http_status, caught.value.allow) == (405, allow)


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/model", "/tokenize/", "/health", ""])
def test_all_else_is_none_of_these(path):
    assert TRANSCODER.answer("POST", path, (), b"{}", created=1) is None


def status(transcoder, path, body):
    """Of an answer that needs nobody, or of the refusal to ask; 200 for a call. Anything but a CodecError is our bug."""
    try:
        if transcoder.answer("POST", path, (), body, created=1) is None:
            transcoder.request("POST", path, (), body, request_id="r")
    except CodecError as error:
        return error.http_status
    return 200


@given(st.sampled_from(["/tokenize", "/detokenize"]), st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_arbitrary_bodies_raise_only_codec_errors(path, body):
    assert status(TRANSCODER, path, body) in (200, 400, 404)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3),
    max_leaves=12,
)
NAMES = (
    "prompt messages tokens model add_special_tokens return_token_strs tools input encoding_format dimensions embed_dtype endianness"
    " truncate_prompt_tokens truncation_side priority cache_salt request_id queries documents items data_1 data_2 text_1 text_2 query"
    " top_n chat_template_kwargs continue_final_message add_generation_prompt"
).split()
EMBEDDING = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=MODEL)


@given(
    st.sampled_from(["/tokenize", "/detokenize", "/v1/embeddings", "/v1/score", "/v1/rerank"]),
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6),
)
def test_arbitrary_fields_raise_only_codec_errors(path, fields):
    assert status(EMBEDDING, path, json.dumps(fields).encode()) in (200, 400, 404)
