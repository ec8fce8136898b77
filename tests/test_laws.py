"""The laws of DESIGN section 9 that span the whole path, over every snapshot that has an adapter."""

from __future__ import annotations

import json
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaie_codec import (
    BodyChunk,
    Constraint,
    EndOfBody,
    FinishEvent,
    InferenceRequest,
    ModelInfo,
    RequestError,
    ResponseHead,
    SamplingParams,
    State,
    Transcoder,
    UnsupportedFieldError,
    UsageError,
    encode_error_response,
    encode_frame,
    snapshots,
)
from gaie_codec.adapters import DIALECTS
from gaie_codec.openai import chat
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import (
    CONVENTIONS,
    OK_TRAILERS,
    Answer,
    answer_to,
    damaged,
    events_of,
    frames_of,
    messages_of,
    partitions,
    scripts,
    single_bytes,
)

TOKENIZER = load_tokenizer("builtin")
ALL = [(dialect, name) for dialect in DIALECTS for name in snapshots.SNAPSHOTS[dialect]]
CHAT = "/v1/chat/completions"
EOS = 2

WORDS = TOKENIZER.encode("Hello world STOP now", add_special_tokens=False) + TOKENIZER.encode("\N{SAUROPOD}", add_special_tokens=False)
HELLO = WORDS[:4]
TOKEN_IDS = st.sampled_from(WORDS) | st.sampled_from([EOS, 1]) | st.integers(0, TOKENIZER.vocab_size + 5)
ENDINGS = st.sampled_from(
    [OK_TRAILERS, None, (), (("grpc-status", "14"), ("grpc-message", "gone")), (("grpc-status", "3"),), (("grpc-status", "x"),)]
)


def each_snapshot(law):
    """Hold the law over every snapshot. Together they get twice the examples of a single test: they share nearly all code."""
    if hasattr(law, "hypothesis"):
        law = settings(max_examples=max(10, 2 * settings().max_examples // len(ALL)))(law)
    return pytest.mark.parametrize("transcoder", [pytest.param(key, id="-".join(key)) for key in ALL], indirect=True)(law)


@cache
def transcoder_for(dialect, name, unsupported="reject"):
    return Transcoder(dialect, snapshot=name, tokenizer=TOKENIZER, unsupported=unsupported)


@pytest.fixture(scope="module")
def transcoder(request):
    return transcoder_for(*request.param)


@st.composite
def questions(draw, transcoder):
    """The fields of a chat request that its answer depends on, so far as the snapshot carries them."""
    carries = transcoder.adapter.carries
    fields = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "return_token_ids": st.booleans(),
                "stop": st.sampled_from(["STOP", ["o", " wor"], ["zzzz"]]),
                "max_tokens": st.integers(1, 12),
                "min_tokens": st.integers(0, 1),
                "stop_token_ids": st.just(WORDS[:1]),
                "skip_special_tokens": st.booleans(),
                "include_stop_str_in_output": st.booleans(),
                "ignore_eos": st.booleans(),
            },
        )
    )
    if "n" in carries:
        fields["n"] = draw(st.integers(1, 3))
    if "logprobs" in carries and draw(st.booleans()):
        fields |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 2))}
    return fields


def ask(transcoder, fields, *, stream, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields, **more}
    return transcoder.request("POST", CHAT, (), json.dumps(body).encode(), request_id="r")


@st.composite
def answers(draw, transcoder, fields, conventions=CONVENTIONS):
    """Events of a server that was asked this."""
    script = draw(
        scripts(
            token_ids=TOKEN_IDS,
            n=fields.get("n", 1),
            logprobs="logprobs" in transcoder.adapter.carries and draw(st.booleans()),
            matched_stops=("STOP", EOS),
            max_pieces=4,
        )
    )
    return events_of(script, draw(st.sampled_from(conventions)))


# 1: any partition of the bytes gives the same output


@each_snapshot
@given(data=st.data())
def test_any_partition_gives_the_same_answer(transcoder, data):
    fields = data.draw(questions(transcoder))
    call = ask(transcoder, fields, stream=data.draw(st.booleans()))
    stream = frames_of(transcoder.adapter, data.draw(answers(transcoder, fields)))
    whole = answer_to(call, [stream])
    assert whole.error is None
    assert answer_to(call, data.draw(partitions(stream))).same == whole.same
    assert answer_to(call, single_bytes(stream)).same == whole.same


@each_snapshot
@given(data=st.data())
def test_any_partition_of_a_damaged_stream_gives_the_same_answer(transcoder, data):
    fields = data.draw(questions(transcoder))
    call = ask(transcoder, fields, stream=data.draw(st.booleans()))
    encoding = data.draw(st.sampled_from(["identity", "gzip"]))
    stream = data.draw(damaged(frames_of(transcoder.adapter, data.draw(answers(transcoder, fields)), encoding=encoding)))
    how = {"headers": {"grpc-encoding": encoding}, "trailers": data.draw(ENDINGS)}
    whole = answer_to(call, [stream], **how)
    assert answer_to(call, data.draw(partitions(stream)), **how).same == whole.same
    assert answer_to(call, single_bytes(stream), **how).same == whole.same


# 3: arbitrary input at every public door raises only CodecError


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 5, 2**31, 2**32, 2**63, 2**64, -(2**64), 0.5, 1e308, -1e308, 1e-320])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["", "true", "5", "nan", "-inf", "1e999", "none", "auto", "text", "json_object", "json_schema", "\0", "{}", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name", "a", "function", "5"]), inner, max_size=3),
    max_leaves=6,
)
NESTED = {
    "response_format": st.fixed_dictionaries({"type": JSON}, optional={"json_schema": JSON, "format": JSON}),
    "structured_outputs": st.dictionaries(st.sampled_from("json regex choice grammar json_object structural_tag".split()), JSON),
    "stream_options": st.dictionaries(st.sampled_from(["include_usage", "continuous_usage_stats"]), JSON),
    "logit_bias": st.dictionaries(st.sampled_from(["5", " 6", "x", "-1", "1_0", "99999999999"]), JSON, max_size=2),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["messages", "raise_exception", "range", "self", "a", ""]), JSON, max_size=2),
    "tools": st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": JSON}, optional={"parameters": JSON})})),
    "tool_choice": st.just("none"),
}
TOOL_CALLS = st.lists(st.fixed_dictionaries({"function": st.dictionaries(st.sampled_from(["name", "arguments"]), JSON)}) | JSON, max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "", 5])},
        optional={
            "content": st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
            | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "refusal", "image_url"]), "text": JSON}) | JSON, max_size=2)
            | JSON,
            "tool_calls": TOOL_CALLS,
            "reasoning": JSON,
            "name": JSON,
        },
    ),
    max_size=3,
)
KNOWN = sorted((chat.READ | chat.ADVISORY | set(chat.REFUSED) | {"unknown"}) - {"messages", "n"})


@st.composite
def bodies(draw):
    """Chat requests, nearly right: a few fields at a time, so that one fault does not hide the others."""
    body = {"messages": draw(st.just([{"role": "user", "content": "x"}]) | MESSAGES | JSON)}
    body["n"] = draw(st.sampled_from([1, 1, 1, 2, "3", 0, -1, None, 2.5]))
    for name in draw(st.lists(st.sampled_from(KNOWN), max_size=4, unique=True)):
        body[name] = draw(NESTED.get(name, JSON) | JSON)
    return body


MODELS = st.sampled_from([ModelInfo(), ModelInfo(max_model_len=30, served_model_name="m", default_sampling_params={"top_k": 5})])


def survives(transcoder, method, path, headers, body):
    """Answer a request that is accepted, or the error; anything but a RequestError gets through."""
    try:
        call = transcoder.request(method, path, headers, body, request_id="r")
    except RequestError as error:
        head, chunk, _ = encode_error_response(error)
    else:
        finishes = [FinishEvent(index=index, token_ids=HELLO, finish_reason="length") for index in range(call.inference.sampling.n)]
        answer = answer_to(call, [frames_of(transcoder.adapter, finishes)])
        assert answer.error is None
        assert answer.content() == "Hello world"
        return
    assert 400 <= head.status < 500
    assert json.loads(chunk.data)["error"]["code"] == head.status


@each_snapshot
@given(body=bodies(), model=MODELS, unsupported=st.sampled_from(["reject", "drop"]))
def test_any_json_body_is_accepted_or_refused(transcoder, body, model, unsupported):
    dialect, name = transcoder.adapter.dialect, transcoder.adapter.snapshot.name
    host = Transcoder(dialect, snapshot=name, tokenizer=TOKENIZER, model=model, unsupported=unsupported)
    survives(host, "POST", CHAT, (), json.dumps(body).encode())


@given(
    body=st.binary(max_size=40) | st.binary(max_size=20).map(lambda noise: b'{"messages":[{"role":"user","content":"x"}]' + noise),
    method=st.sampled_from(["POST", "POST", "GET", "", "post"]),
    path=st.sampled_from([CHAT, CHAT, CHAT + "?a", "", "/", "*"]) | st.text(max_size=5),
    headers=st.lists(st.tuples(st.sampled_from(["content-type", "X-Request-Id", "traceparent", "x"]), st.text(max_size=10)), max_size=3),
)
def test_any_bytes_and_headers_are_accepted_or_refused(body, method, path, headers):
    survives(transcoder_for(*ALL[-1]), method, path, headers, body)


@given(data=st.data())
def test_a_damaged_request_is_accepted_or_refused(data):
    body = {"messages": [{"role": "user", "content": "naïve"}], "stop": ["a"], "logit_bias": {"5": 1.5}, "stream": False, "seed": 7}
    survives(transcoder_for(*ALL[-1]), "POST", CHAT, (), data.draw(damaged(json.dumps(body, ensure_ascii=False).encode())))


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["grpc-status", "grpc-message", "grpc-encoding", "content-type", "Grpc-Status", "x"]),
        st.sampled_from(["0", "14", "3", "99", "", "gzip", "identity", "application/grpc", "text/html", "%zz%41"])
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    max_size=3,
)
STEPS = st.one_of(
    st.tuples(st.just("headers"), HEADERS, st.sampled_from([200, 200, 200, 503, 404, 0])),
    st.tuples(st.just("data"), st.binary(max_size=20) | st.binary(max_size=12).map(encode_frame)),
    st.tuples(st.just("message"), st.binary(max_size=20)),
    st.tuples(st.just("good"), st.integers(0, 20)),
)


@each_snapshot
@given(data=st.data(), steps=st.lists(STEPS, max_size=8), stream=st.booleans(), trailers=st.none() | HEADERS)
def test_whatever_the_server_sends_the_client_gets_one_whole_answer(transcoder, data, steps, stream, trailers):
    good = [encode_frame(message) for message in messages_of(transcoder.adapter, data.draw(answers(transcoder, {})))]
    response = ask(transcoder, {}, stream=stream).response(created=1)
    outputs = []
    if data.draw(st.booleans()):
        outputs += response.receive_headers()
    for step in steps:
        match step:
            case ("headers", headers, status):
                outputs += response.receive_headers(headers, status=status)
            case ("data", received):
                outputs += response.receive_data(received)
            case ("message", received):
                outputs += response.receive_message(received)
            case ("good", place):
                outputs += response.receive_data(good[place % len(good)])
    outputs += response.receive_eof() if trailers is None else response.receive_trailers(trailers)
    kinds = [type(output) for output in outputs]
    assert [kind for kind in kinds if kind is not BodyChunk] == [ResponseHead, EndOfBody]
    assert kinds[0] is ResponseHead
    assert kinds[-1] is EndOfBody
    assert response.ended
    assert (response.error is None) == (outputs[0].status == 200 and b"[DONE]" in outputs[-2].data if stream else outputs[0].status == 200)
    assert response.state in (State.CLOSED, State.ERROR)
    with pytest.raises(UsageError):
        response.receive_eof()


# 4: folding the stream gives exactly the unary body


def fold(answer: Answer) -> dict:
    """What a client that puts a stream together gets, in the form of a unary body."""
    *chunks, last, done = answer.events
    assert done == "[DONE]"
    labels = {key: last[key] for key in ("id", "created", "model", "object")}
    body = labels | {"object": labels["object"].removesuffix(".chunk")}
    choices = {}
    for chunk in chunks:
        assert {key: chunk[key] for key in labels} == labels
        for part in chunk["choices"]:
            message = {"content": "", "refusal": None}
            choice = choices.setdefault(
                part["index"], {"index": part["index"], "message": message, "logprobs": None, "finish_reason": None}
            )
            delta = part["delta"]
            choice["message"] |= {"role": delta["role"]} if "role" in delta else {}
            choice["message"]["content"] += delta["content"]
            if part["logprobs"] is not None:
                known = choice["logprobs"] or {"content": []}
                choice["logprobs"] = {"content": known["content"] + part["logprobs"]["content"]}
            if "token_ids" in part:
                choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
            if part["finish_reason"] is not None:
                assert choice["finish_reason"] is None, "a second finish"
                choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
        body |= {key: chunk[key] for key in ("prompt_token_ids", "kv_transfer_params") if key in chunk}
    body["choices"] = [choices[index] for index in sorted(choices)]
    return body | {"usage": last["usage"], "system_fingerprint": last["system_fingerprint"]}


@each_snapshot
@given(data=st.data())
def test_folding_the_stream_gives_the_unary_body(transcoder, data):
    fields = data.draw(questions(transcoder))
    stream = frames_of(transcoder.adapter, data.draw(answers(transcoder, fields)))
    streamed = answer_to(ask(transcoder, fields, stream=True, stream_options={"include_usage": True}), [stream])
    unary = answer_to(ask(transcoder, fields, stream=False), [stream])
    assert fold(streamed) == unary.json
    assert streamed.usage == unary.usage
    assert all(choice["finish_reason"] for choice in unary.json["choices"])


@each_snapshot
@given(data=st.data())
def test_every_convention_gives_the_same_unary_body(transcoder, data):
    fields = data.draw(questions(transcoder))
    script = data.draw(scripts(token_ids=TOKEN_IDS, n=fields.get("n", 1), max_pieces=4))
    call = ask(transcoder, fields, stream=False)
    bodies = {answer_to(call, [frames_of(transcoder.adapter, events_of(script, convention))]).body for convention in CONVENTIONS}
    assert len(bodies) == 1


# 5: every neutral field reaches the wire, or is refused by name, or dropped and reported


ASKED = {
    "model": "m",
    "prompt_token_ids": [1, 2],
    "prompt_text": "p",
    "stream": True,
    "priority": 1,
    "cache_salt": "s",
    "lora_name": "l",
    "data_parallel_rank": 1,
    "kv_transfer_params": "{}",
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "max_tokens": 5,
    "min_tokens": 5,
    "stop": ("s",),
    "stop_token_ids": (5,),
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "ignore_eos": True,
    "n": 2,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "seed": 0,
    "include_stop_str_in_output": True,
    "logit_bias": {5: 0.5},
    "bad_words": ("x",),
    "allowed_token_ids": (5,),
    "constraint.json_schema": Constraint(kind="json_schema", value="{}"),
    "constraint.regex": Constraint(kind="regex", value="a"),
    "constraint.grammar": Constraint(kind="grammar", value="a"),
    "constraint.structural_tag": Constraint(kind="structural_tag", value="{}"),
    "constraint.json_object": Constraint(kind="json_object"),
    "constraint.choice": Constraint(kind="choice", value=("a",)),
}
# Carried without a field of the wire: the address that the call goes to serves one model.
NOT_A_FIELD = {"model"}


def test_every_neutral_field_has_an_example():
    fields = {name.split(".")[0] for name in ASKED}
    assert fields == (set(InferenceRequest.__struct_fields__) | set(SamplingParams.__struct_fields__)) - {"request_id", "sampling"}
    kinds = msgspec.inspect.type_info(Constraint).fields[0].type.values
    assert {name.split(".")[1] for name in ASKED if "." in name} == set(kinds)


@pytest.mark.parametrize("name", ASKED)
@each_snapshot
def test_every_neutral_field_reaches_the_wire_or_is_refused_by_name(transcoder, name):
    plain = InferenceRequest(request_id="r")
    field, adapter = name.split(".")[0], transcoder.adapter
    if field in SamplingParams.__struct_fields__:
        asking = msgspec.structs.replace(plain, sampling=SamplingParams(**{field: ASKED[name]}))
    else:
        asking = msgspec.structs.replace(plain, **{field: ASKED[name]})
    if name in adapter.carries:
        assert transcoder._fit(asking) == (asking, ())
        sent = adapter.encode_request(asking)
        if name not in NOT_A_FIELD:
            assert sent.SerializeToString() != adapter.encode_request(plain).SerializeToString()
            assert adapter.decode_request(sent) == asking
        return
    with pytest.raises(UnsupportedFieldError) as caught:
        transcoder._fit(asking)
    public = "response_format" if field == "constraint" else field
    assert caught.value.param == public
    assert public in caught.value.message
    dropping = transcoder_for(adapter.dialect, adapter.snapshot.name, "drop")
    assert dropping._fit(asking) == (plain, (public,))


# 6: exactly one finish per choice and one ending per stream


@each_snapshot
@given(data=st.data())
def test_one_finish_per_choice_and_one_ending(transcoder, data):
    fields = data.draw(questions(transcoder))
    stream = frames_of(transcoder.adapter, data.draw(answers(transcoder, fields)))
    if data.draw(st.booleans()):
        stream = data.draw(damaged(stream))
    answer = answer_to(ask(transcoder, fields, stream=True), [stream], trailers=data.draw(ENDINGS))
    if answer.headers["content-type"] == "application/json":
        assert answer.status >= 400
        assert set(answer.json) == {"error"}
        return
    *chunks, last = answer.events
    finishes = [part["index"] for chunk in chunks for part in chunk["choices"] if part["finish_reason"] is not None]
    assert len(finishes) == len(set(finishes))
    if answer.error is None:
        assert last == "[DONE]"
        assert sorted(finishes) == list(range(fields.get("n", 1)))
    else:
        assert set(last) == {"error"}
    assert answer.body.count(b"data: [DONE]\n\n") == (answer.error is None)


# 8: purity


@each_snapshot
@given(data=st.data())
def test_same_input_same_bytes_and_inputs_unchanged(transcoder, data):
    fields = data.draw(questions(transcoder))
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": data.draw(st.booleans()), **fields}
    raw = json.dumps(body).encode()
    headers = [("Content-Type", "application/json"), ("traceparent", "x")]
    calls = [transcoder.request("POST", CHAT, headers, raw, request_id="r") for _ in range(2)]
    assert calls[0].frame == calls[1].frame
    assert (calls[0].metadata, calls[0].inference, calls[0].dropped) == (calls[1].metadata, calls[1].inference, calls[1].dropped)
    assert headers == [("Content-Type", "application/json"), ("traceparent", "x")]
    before = msgspec.json.encode(calls[0].inference), calls[0].message

    stream = frames_of(transcoder.adapter, data.draw(answers(transcoder, fields)))
    trailers = data.draw(ENDINGS)
    first = answer_to(calls[0], [stream], trailers=trailers)
    assert answer_to(calls[0], [stream], trailers=trailers).same == first.same, "a call may be answered again, as after a retry"
    assert answer_to(calls[1], [stream], trailers=trailers).same == first.same
    assert (msgspec.json.encode(calls[0].inference), calls[0].message) == before
