"""OpenAI JSON that goes through: refused where the server would pass over a field, and answers that are checked on their way."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    BodyEvent,
    MalformedMessageError,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    RequestError,
    Transcoder,
    TruncatedResponseError,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    Usage,
    encode_frame,
)
from gaie_codec.openai import passthrough
from gaie_codec.testing import ByteTokenizer
from strategies import OK_TRAILERS, answer_to, damaged, partitions, single_bytes

NEW, OLD = Transcoder("sglang.runtime"), Transcoder("sglang.runtime", snapshot="0.5.16")
CHAT = "/v1/chat/completions"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/classify": {"input": "hi"},
    "/classify": {"input": "hi"},
    "/v1/score": {"query": "q", "items": ["a"]},
    "/score": {"query": "q", "items": ["a"]},
    "/v1/rerank": {"query": "q", "documents": ["a"]},
    "/rerank": {"query": "q", "documents": ["a"]},
}


def ask(path=CHAT, host=NEW, told=None, body=None, **fields):
    transcoder = host if told is None else Transcoder("sglang.runtime", model=told)
    raw = body if body is not None else json.dumps(BODIES[path] | fields).encode()
    return transcoder.request("POST", path, (), raw, request_id="r")


def refused(kind=RequestError, **how):
    with pytest.raises(kind) as caught:
        ask(**how)
    return caught.value


@pytest.mark.parametrize("path", BODIES)
def test_a_model_may_be_named_wherever_it_is_right(path):
    told = ModelInfo(served_model_name="m", lora_adapters={"l": "x"})
    call = ask(path, told=told, model="m")
    assert (call.inference.model, call.dropped) == ("m", ())
    assert refused(ModelNotFoundError, path=path, told=told, model="other").param == "model"
    if path.endswith("rerank"):  # whose body has no place for it
        assert refused(UnsupportedFieldError, path=path, told=told, model="m:l").param == "model"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/tokenize"])
def test_what_is_no_pass_through_needs_a_tokenizer(path):
    with pytest.raises(UnsupportedEndpointError, match="needs a tokenizer"):
        NEW.request("POST", path, (), b"{}", request_id="r")


def wire(call, *pieces):
    """Frames of the method that was called: JSON values or bytes, with (status, is_last) where they are not (None, False)."""
    way = call.transcoder.passthrough
    frames = []
    for piece in pieces:
        data, status, is_last = piece if isinstance(piece, tuple) else (piece, None, False)
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        event = BodyEvent(data=raw, http_status=status, is_last=is_last)
        frames.append(encode_frame(way.encode_response(event, call.path).SerializeToString()))
    return b"".join(frames)


def chunk(text="", index=0, finish=None, **more):
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}], **more}


LAST = (b"", None, True)
BODY = {
    "choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


# Requests


def test_every_endpoint_of_the_server_is_there_and_no_other():
    assert set(NEW.paths) == set(BODIES) == set(passthrough.PATHS)
    methods = {path: ask(path).path.rpartition("/")[2] for path in BODIES}
    assert methods[CHAT] == "ChatComplete"
    assert methods["/v1/rerank"] == methods["/rerank"] == "Rerank"
    assert methods["/v1/embeddings"] == "OpenAIEmbed"
    with pytest.raises(UnsupportedEndpointError, match="/v1/rerank"):
        NEW.request("POST", "/v1/responses", (), b"{}", request_id="r")
    with pytest.raises(UnsupportedEndpointError) as caught:
        Transcoder("vllm.inference", tokenizer=ByteTokenizer()).request("POST", "/v1/embeddings", (), b"{}", request_id="r")
    assert "is not supported" in caught.value.message


@pytest.mark.parametrize("path", BODIES)
def test_what_is_required_is_asked_for_here(path):
    for name in BODIES[path]:
        body = json.dumps({key: value for key, value in BODIES[path].items() if key != name}).encode()
        error = refused(MalformedRequestError, path=path, body=body)
        assert "Field required" in error.message
    for body in (b"", b"[]", b"{", b"\xff", b'{"messages":'):
        assert refused(MalformedRequestError, path=path, body=body).http_status == 400


def test_the_clients_own_bytes_are_sent():
    body = b'{ "messages":[{"role":"user","content":"h\\u00e9"}] ,\n "seed":5.0}'
    sent = NEW.adapter.snapshot.message("OpenAIRequest").FromString(ask(body=body).message)
    assert sent.json_body == body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_what_the_server_would_pass_over_is_refused_by_name(fields, param):
    assert refused(UnsupportedFieldError, **fields).param == param
    assert ask(**dict.fromkeys(fields)).dropped == (), "null asks for nothing"


def test_what_the_server_would_pass_over_is_reported_where_the_host_lets_it_go():
    host = Transcoder("sglang.runtime", unsupported="drop")
    call = ask(host=host, thinking_token_budget=5, prompt_logprobs=1, bad_words=[], frobnicate=1)
    assert call.dropped == ("frobnicate", "prompt_logprobs", "thinking_token_budget")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_zero_and_empty_may_ask_for_something(fields, param):
    assert refused(UnsupportedFieldError, **fields).param == param


def test_what_a_field_is_by_default_depends_on_the_endpoint():
    assert ask(add_special_tokens=False, bad_words=[], thinking_token_budget=-1, include_stop_str_in_output=False).dropped == ()
    assert ask("/v1/completions", add_special_tokens=True).dropped == ()
    with pytest.raises(UnsupportedFieldError):
        ask("/v1/completions", add_special_tokens=False)


def test_what_is_nothing_to_either_is_accepted():
    assert ask(add_generation_prompt=True, spaces_between_special_tokens=True, truncation_side=None).dropped == ()
    assert ask(frobnicate=1, user="u", store=True).dropped == ("frobnicate",)


def test_new_fields_are_known_by_the_release():
    assert ask(return_token_ids=True).dropped == ()
    assert refused(UnsupportedFieldError, host=OLD, return_token_ids=True).param == "return_token_ids"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 50, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, None),
    ],
)
def test_values_out_of_range_are_refused_here(fields, param):
    """Of the server they come back as INTERNAL and a line of Python."""
    assert refused(MalformedRequestError, **fields).param == param


def test_a_scheduler_is_told_what_there_is_to_know():
    told = ModelInfo(served_model_name="m", lora_adapters={"l": "x"})
    call = ask(told=told, model="m:l", stream=True, n=2, max_completion_tokens=7, temperature=0.5)
    inference = call.inference
    assert (inference.model, inference.lora_name, inference.stream) == ("m", "x", True)
    assert (inference.sampling.n, inference.sampling.max_tokens, inference.sampling.temperature) == (2, 7, 0.5)
    assert ask("/v1/completions").inference.prompt_text == "hi"
    for unknown in ("other", "m:other", "other:l"):
        assert refused(ModelNotFoundError, told=told, model=unknown).http_status == 404
    by_name_alone = refused(UnsupportedFieldError, told=told, model="l")  # SGLang would answer with the model itself
    assert (by_name_alone.param, "`m:l`" in by_name_alone.message) == ("model", True)


# Answers


def test_chunks_go_on_as_they_came_with_our_framing():
    call = ask(stream=True)
    raw = b'{"choices":[{"index":0,"delta":{"content":"a \\u00e9  b"},"finish_reason":null}],"x":1.50}'
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}
    answer = answer_to(call, [wire(call, raw, chunk(finish="stop"), usage, LAST)])
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.startswith(b"data: " + raw + b"\n\n")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.body.count(b"[DONE]") == 1
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)


def test_a_chunk_over_several_lines_is_one_event():
    call = ask(stream=True)
    answer = answer_to(call, [wire(call, json.dumps(chunk("a\nb", finish="stop"), indent=1).encode(), LAST)])
    assert answer.events[0]["choices"][0]["delta"]["content"] == "a\nb"
    assert len(answer.events) == 2


def test_the_last_chunk_may_carry_data():
    call = ask(stream=True)
    answer = answer_to(call, [wire(call, (chunk("a", finish="stop"), None, True))])
    assert (answer.error, answer.content()) == (None, "a")


def test_a_body_is_the_servers_own():
    call = ask()
    raw = json.dumps(BODY, indent=2).encode()
    answer = answer_to(call, [wire(call, (raw, 200, True))])
    assert (answer.status, answer.body) == (200, raw)
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize("path", [path for path in BODIES if path not in (CHAT, "/v1/completions")])
def test_other_kinds_have_one_answer_with_its_status(path):
    call = ask(path)
    body = b'[{"score":1}]' if path.endswith("rerank") else b'{"data":[]}'
    assert answer_to(call, [wire(call, (body, 200, True))]).body == body
    error = {"object": "error", "message": "boom", "code": 429}
    assert answer_to(call, [wire(call, (error, 429, True))]).status == 429
    assert answer_to(call, [wire(call, (b"<html>", 503, True))]).status == 503


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", CHAT])
def test_a_list_is_an_answer_of_a_ranking_only(path):
    call = ask(path)
    answer = answer_to(call, [wire(call, (b"[]", 200, True))])
    assert (answer.status, type(answer.error)) == (502, MalformedMessageError)


@pytest.mark.parametrize("error", [{"message": "boom", "type": "x", "code": 500}, "boom", {"code": "x"}, [], 0, False])
def test_an_error_in_mid_stream_is_an_error_event_and_no_end(error):
    call = ask(stream=True)
    answer = answer_to(call, [wire(call, chunk("a"), {"error": error}, LAST)])
    assert (answer.status, answer.content()) == (200, "a")
    assert answer.events[-1]["error"]["code"] == 500
    assert len(answer.events) == 2
    assert b"[DONE]" not in answer.body
    first = answer_to(call, [wire(call, {"error": error}, LAST)])
    assert first.status == 500
    numbered = answer_to(call, [wire(call, chunk("a"), {"error": {"message": "slow", "code": 429}})])
    assert (numbered.events[-1]["error"]["code"], numbered.events[-1]["error"]["message"]) == (429, "slow")


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_aborted_choice_is_an_error(reason):
    call = ask(stream=True)
    answer = answer_to(call, [wire(call, chunk("a"), chunk(finish=reason), LAST)])
    assert answer.events[-1]["error"]["code"] == 500
    unary = ask()
    body = {"choices": [{"index": 0, "finish_reason": reason}]}
    assert answer_to(unary, [wire(unary, (body, 200, True))]).status == 500


def test_a_stream_that_is_cut_short_is_truncated():
    call = ask(stream=True, n=2, temperature=1)
    finishes = [chunk("a", finish="stop"), chunk("b", 1, finish="stop")]
    for trailers in (OK_TRAILERS, None):  # what comes after the last message takes nothing back
        assert answer_to(call, [wire(call, *finishes, LAST)], trailers=trailers).error is None
    for pieces, trailers in (
        (finishes, OK_TRAILERS),  # the last message is missing
        ([finishes[0], LAST], OK_TRAILERS),  # a finish is missing
        ([], OK_TRAILERS),
    ):
        answer = answer_to(call, [wire(call, *pieces)], trailers=trailers)
        assert isinstance(answer.error, TruncatedResponseError)
        assert b"[DONE]" not in answer.body
        assert answer.status == (200 if pieces else 502)


@pytest.mark.parametrize(
    "pieces",
    [
        [chunk("a", finish="stop"), chunk("a", finish="stop")],
        [chunk("a", 7)],
        [chunk("a", -1)],
        [{"choices": [{"index": 0, "message": {"content": "whole"}, "finish_reason": "stop"}]}],
    ],
    ids=["finished twice", "beyond n", "negative", "a body in a stream"],
)
def test_a_stream_that_is_none_is_an_error(pieces):
    call = ask(stream=True, n=2, temperature=1)
    answer = answer_to(call, [wire(call, chunk("ok"), *pieces, LAST)])
    assert answer.error.http_status == 502
    assert b"ok" in answer.body
    assert b"[DONE]" not in answer.body


def test_text_that_came_without_its_finish_is_not_lost():
    call = ask(stream=True)
    answer = answer_to(call, [wire(call, chunk("a"), (json.dumps(chunk("last words")).encode(), None, True))])
    assert isinstance(answer.error, TruncatedResponseError)
    assert answer.content() == "alast words"


def test_a_second_body_is_an_error():
    call = ask()
    body = {"choices": [{"index": 0, "message": {"content": "hel"}, "finish_reason": "stop"}]}
    assert answer_to(call, [wire(call, body, (json.dumps(body).encode(), 200, True))]).status == 502
    piece = {"choices": [{"index": 0, "delta": {"content": "hel"}, "finish_reason": "stop"}]}
    assert answer_to(call, [wire(call, (json.dumps(piece).encode(), 200, True))]).status == 502


def test_a_body_that_is_none():
    call = ask()
    for pieces in (
        [LAST],
        [(b"{", None, True)],
        [(b"\xff", None, True)],
        [(b'{"a\x80":1}', None, True)],
        [(b"[" * 100_000, None, True)],
        [(b"null", None, True)],
    ):
        answer = answer_to(call, [wire(call, *pieces)])
        assert (answer.status, type(answer.error)) == (502, MalformedMessageError)


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_completions_of_several_prompts_have_their_choices_counted(prompt):
    call = ask("/v1/completions", prompt=prompt, n=2, temperature=1, stream=True)
    finishes = [chunk("a", index, finish="stop") for index in range(4)]
    assert answer_to(call, [wire(call, *finishes, LAST)]).error is None
    assert isinstance(answer_to(call, [wire(call, *finishes[:3], LAST)]).error, TruncatedResponseError)
    one = ask("/v1/completions", prompt=[1, 2, 3], stream=True)
    assert answer_to(one, [wire(one, *finishes[:1], LAST)]).error is None


# The laws, for what is passed through


@given(data=st.data(), stream=st.booleans(), faults=st.booleans())
def test_any_partition_gives_the_same_and_one_whole_answer(data, stream, faults):
    call = ask(stream=stream, host=data.draw(st.sampled_from([NEW, OLD])))
    pieces = [chunk("a"), chunk("b", finish="stop"), LAST] if stream else [(BODY, 200, True)]
    sent = wire(call, *pieces)
    if faults:
        sent = data.draw(damaged(sent))
    how = {"trailers": data.draw(st.sampled_from([OK_TRAILERS, None, (("grpc-status", "13"), ("grpc-message", "429: x"))]))}
    whole = answer_to(call, [sent], **how)
    assert answer_to(call, data.draw(partitions(sent)), **how).same == whole.same
    assert answer_to(call, single_bytes(sent), **how).same == whole.same
    if whole.headers["content-type"] == "application/json":
        assert (whole.error is None) == (whole.status == 200)
        assert whole.error is None or "error" in whole.json
    else:
        assert (whole.events[-1] == "[DONE]") == (whole.error is None)


@given(raw=st.binary(max_size=30), status=st.none() | st.integers(0, 600), is_last=st.booleans(), stream=st.booleans())
def test_any_bytes_of_the_server_become_an_answer(raw, status, is_last, stream):
    call = ask(stream=stream)
    answer = answer_to(call, [wire(call, (raw, status, is_last))])
    assert answer.error is not None, "no finish came"
    assert answer.status >= 400 or stream


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
KNOWN = sorted(set().union(*NEW.passthrough.fields.values()) | passthrough._VLLM_FIELDS)


@given(path=st.sampled_from(sorted(BODIES)), more=st.dictionaries(st.sampled_from(KNOWN), JSON, max_size=3))
def test_any_body_is_sent_as_it_is_or_refused(path, more):
    body = json.dumps(BODIES[path] | more).encode()
    try:
        call = ask(path, body=body)
    except RequestError:
        return
    assert call.transcoder.adapter.snapshot.message("OpenAIRequest").FromString(call.message).json_body == body


@pytest.mark.parametrize(
    "fields",
    [
        {"truncate_prompt_tokens": 5},
        {"embed_dtype": "float16"},
        {"endianness": "big"},
        {"normalize": False},
        {"padding": "max_length"},
        {"encoding_format": "bytes"},
    ],
)
def test_what_vllm_embeds_by_is_refused_where_sglang_passes_over_it(fields):
    body = json.dumps({"input": "a", **fields}).encode()
    with pytest.raises(UnsupportedFieldError) as caught:
        NEW.request("POST", "/v1/embeddings", (), body, request_id="r")
    assert caught.value.param == next(iter(fields))
    harmless = {
        "embed_dtype": "float32",
        "endianness": "little",
        "normalize": True,
        "add_special_tokens": True,
        "encoding_format": "base64",
    }
    assert not NEW.request("POST", "/v1/embeddings", (), json.dumps({"input": "a", **harmless}).encode(), request_id="r").dropped
