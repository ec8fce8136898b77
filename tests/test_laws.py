"""The laws of DESIGN section 9 that span the whole path, over every snapshot that is spoken."""

from __future__ import annotations

import contextlib
import json
from functools import cache

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gaie_codec import (
    BodyChunk,
    Code,
    Constraint,
    EndOfBody,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    Media,
    ModelInfo,
    PromptEvent,
    PromptLogprob,
    RequestError,
    ResponseHead,
    SamplingParams,
    State,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    UnsupportedFieldError,
    UsageError,
    adapters,
    encode_error_response,
    encode_frame,
    snapshots,
)
from gaie_codec._fit import fit
from gaie_codec.adapters import DIALECTS
from gaie_codec.openai import chat
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import (
    OK_TRAILERS,
    Answer,
    Piece,
    Script,
    ScriptedChoice,
    answer_to_all,
    damaged,
    neighbours,
    partitions,
    scripts,
    single_bytes,
    streams_of,
    told,
)
from wire_fields import NOT_READ, NOT_WRITTEN, bases, has_path, leaves, unread, written

TOKENIZER = load_tokenizer("builtin")
ALL = [(dialect, name) for dialect in DIALECTS for name in snapshots.SNAPSHOTS[dialect] if not snapshots.load(dialect, name).refused]
CHAT = "/v1/chat/completions"
EOS = 2

WORDS = TOKENIZER.encode("Hello world STOP now", add_special_tokens=False) + TOKENIZER.encode("\N{SAUROPOD}", add_special_tokens=False)
HELLO = WORDS[:4]
TOKEN_IDS = st.sampled_from(WORDS) | st.sampled_from([EOS, 1]) | st.integers(0, TOKENIZER.vocab_size + 5)
ENDINGS = st.sampled_from(
    [OK_TRAILERS, None, (), (("grpc-status", "14"), ("grpc-message", "gone")), (("grpc-status", "3"),), (("grpc-status", "x"),)]
)


def each_snapshot(law):
    """Hold the law over every snapshot. Together they get the examples of four tests: they share nearly all code."""
    if hasattr(law, "hypothesis"):
        law = settings(max_examples=4 * settings().max_examples // len(ALL))(law)
    return pytest.mark.parametrize("transcoder", [pytest.param(key, id="-".join(key)) for key in ALL], indirect=True)(law)


@cache
def transcoder_for(dialect, name, unsupported="reject"):
    return Transcoder(dialect, snapshot=name, tokenizer=TOKENIZER, unsupported=unsupported, passthrough=False, model=model_for(dialect))


@cache
def model_for(dialect, **facts):
    # Some servers have to be told how much there is room for.
    needs_length = adapters.get(snapshots.load(dialect)).default_max_tokens is not None
    return ModelInfo(max_model_len=4096, **facts) if needs_length else ModelInfo(**facts)


@pytest.fixture(scope="module")
def transcoder(request):
    return transcoder_for(*request.param)


@st.composite
def questions(draw, transcoder):
    """The fields of a chat request that its answer depends on, so far as the snapshot carries them."""
    carries = transcoder.adapter.carries
    optional = {
        "return_token_ids": st.booleans(),
        "stop": st.sampled_from(["STOP", ["o", " wor"], ["zzzz"]]),
        "max_tokens": st.integers(1, 12),
        "min_tokens": st.integers(0, 1),
        "stop_token_ids": st.just(WORDS[:1]),
        "skip_special_tokens": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "n": st.integers(1, 3),
    }
    fields = draw(st.fixed_dictionaries({}, optional={name: made for name, made in optional.items() if name in carries or name == "n"}))
    if "logprobs" in carries and draw(st.booleans()):
        fields |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 2))}
    return fields


def ask(transcoder, fields, *, stream, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields, **more}
    return transcoder.request("POST", CHAT, (), json.dumps(body).encode(), request_id="r")


def scripts_for(fields, adapter):
    """What a server generates that was asked this. Log probabilities come now and then unasked, and stop strings are named whether they
    were generated or not; but not by servers that are told none, nor by those of text, which name what they cut (test_text_choice)."""
    named = ("STOP", EOS) if adapter.ends_at_stop_strings and not adapter.sends_text else (EOS,)
    return st.booleans().flatmap(
        lambda logprobs: scripts(
            token_ids=TOKEN_IDS,
            n=fields.get("n", 1),
            logprobs=logprobs or "logprobs" in fields,
            matched_stops=named,
            max_pieces=4,
        )
    )


@st.composite
def answers(draw, transcoder, fields, call, **how):
    """The response bodies, one for each call, of a server that was asked this and tells it in a way of its dialect."""
    return streams_of(
        draw(scripts_for(fields, transcoder.adapter)),
        call,
        TOKENIZER,
        convention=draw(st.sampled_from(neighbours(transcoder.adapter))),
        joined=draw(st.booleans()),
        **how,
    )


def whole(streams):
    return [[stream] for stream in streams]


# 1: any partition of the bytes gives the same output


@each_snapshot
@given(data=st.data())
def test_any_partition_gives_the_same_answer(transcoder, data):
    fields = data.draw(questions(transcoder))
    call = ask(transcoder, fields, stream=data.draw(st.booleans()))
    streams = data.draw(answers(transcoder, fields, call))
    once = answer_to_all(call, whole(streams))
    assert once.error is None
    assert answer_to_all(call, [data.draw(partitions(stream)) for stream in streams]).same == once.same
    assert answer_to_all(call, [single_bytes(stream) for stream in streams]).same == once.same
    assert answer_to_all(call, [single_bytes(stream) for stream in streams], obeys_cancel=False).same == once.same


@each_snapshot
@given(data=st.data())
def test_any_partition_of_a_damaged_stream_gives_the_same_answer(transcoder, data):
    fields = data.draw(questions(transcoder))
    call = ask(transcoder, fields, stream=data.draw(st.booleans()))
    encoding = data.draw(st.sampled_from(["identity", "gzip"]))
    streams = [data.draw(damaged(stream)) for stream in data.draw(answers(transcoder, fields, call, encoding=encoding))]
    how = {"headers": {"grpc-encoding": encoding}, "trailers": data.draw(ENDINGS)}
    once = answer_to_all(call, whole(streams), **how)
    assert answer_to_all(call, [data.draw(partitions(stream)) for stream in streams], **how).same == once.same
    assert answer_to_all(call, [single_bytes(stream) for stream in streams], **how).same == once.same
    if len(streams) > 1:  # which of several calls fails first is another matter: there is one whole answer in any order
        pieces = [data.draw(partitions(stream)) for stream in streams]
        mixed = answer_to_all(call, pieces, order=data.draw(st.lists(st.integers(0, len(streams) - 1))), **how)
        assert (mixed.error is None) == (once.error is None)


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


MODELS = st.sampled_from([{}, {"max_model_len": 30, "served_model_name": "m", "default_sampling_params": {"top_k": 5}}])


def survives(transcoder, method, path, headers, body):
    """Answer a request that is accepted, or the error; anything but a RequestError gets through."""
    try:
        call = transcoder.request(method, path, headers, body, request_id="r")
    except RequestError as error:
        head, chunk, _ = encode_error_response(error)
    else:
        n = call.inference.sampling.n
        choice = ScriptedChoice(pieces=(Piece(token_ids=tuple(HELLO)),), finish_reason="length")
        answer = answer_to_all(call, whole(streams_of(Script(choices=(choice,) * n, turns=(*range(n), *range(n))), call, TOKENIZER)))
        assert answer.error is None
        assert answer.content() == "Hello world" or call.inference.sampling.stop
        return
    assert 400 <= head.status < 500
    assert json.loads(chunk.data)["error"]["code"] == head.status


@each_snapshot
@given(body=bodies(), facts=MODELS, unsupported=st.sampled_from(["reject", "drop"]))
def test_any_json_body_is_accepted_or_refused(transcoder, body, facts, unsupported):
    model = ModelInfo(**facts)
    host = Transcoder(transcoder.adapter, tokenizer=TOKENIZER, model=model, unsupported=unsupported, passthrough=False)
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
@given(data=st.data(), steps=st.lists(STEPS, max_size=8), fields=st.sampled_from([{}, {"n": 2}]), stream=st.booleans())
def test_whatever_the_server_sends_the_client_gets_one_whole_answer(transcoder, data, steps, fields, stream):
    call = ask(transcoder, fields, stream=stream)
    good = [
        [
            encode_frame(transcoder.adapter.encode_response(event).SerializeToString())
            for event in told(script, one, transcoder.adapter, TOKENIZER)
        ]
        for script in [data.draw(scripts_for(fields, transcoder.adapter))]
        for one in call.calls
    ]
    response = call.response(created=1)
    outputs = []
    places = range(len(call.calls))
    if data.draw(st.booleans()):
        for place in places:
            outputs += response.receive_headers(call=place)
    for step in steps:
        place = data.draw(st.sampled_from(places))
        match step:
            case ("headers", headers, status):
                outputs += response.receive_headers(headers, status=status, call=place)
            case ("data", received):
                outputs += response.receive_data(received, call=place)
            case ("message", received):
                outputs += response.receive_message(received, call=place)
            case ("good", number) if good[place]:
                outputs += response.receive_data(good[place][number % len(good[place])], call=place)
    for place in places:
        trailers = data.draw(st.none() | HEADERS)
        outputs += response.receive_eof(call=place) if trailers is None else response.receive_trailers(trailers, call=place)
    outputs = [output for output in outputs if isinstance(output, ResponseHead | BodyChunk | EndOfBody)]
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
    call = ask(transcoder, fields, stream=True, stream_options={"include_usage": True})
    streams = whole(data.draw(answers(transcoder, fields, call)))
    streamed = answer_to_all(call, streams)
    unary = answer_to_all(ask(transcoder, fields, stream=False), streams)
    assert fold(streamed) == unary.json
    assert streamed.usage == unary.usage
    assert all(choice["finish_reason"] for choice in unary.json["choices"])


def fold_sglang(answer: Answer) -> dict[int, dict]:
    """What a client gets of each choice in SGLang's flavor, in the form of a unary body's."""
    choices = {}
    for chunk in answer.events[:-1]:
        for part in chunk["choices"]:
            delta, choice = part["delta"], choices.setdefault(part["index"], {"logprobs": [], "token_ids": [], "content": ""})
            assert "finish_reason" not in choice, "more after the end"
            assert ("role" in delta) == (choice.get("role") is None), "the role comes first, and once"
            choice["role"] = "assistant"
            choice["content"] += delta.get("content") or ""
            choice["logprobs"] += (part["logprobs"] or {}).get("content", [])
            choice["token_ids"] += part.get("token_ids", [])
            if part["finish_reason"] is not None:
                choice |= {"finish_reason": part["finish_reason"], "matched_stop": part["matched_stop"]}
    return choices


@each_snapshot
@given(data=st.data())
def test_folding_the_stream_gives_the_unary_body_in_sglangs_flavor(transcoder, data):
    flavored = Transcoder(transcoder.adapter, tokenizer=TOKENIZER, model=transcoder.model, passthrough=False, flavor="sglang")
    fields = data.draw(questions(transcoder))
    call = ask(flavored, fields, stream=True, stream_options={"include_usage": True})
    streams = whole(data.draw(answers(flavored, fields, call)))
    streamed = answer_to_all(call, streams)
    unary = answer_to_all(ask(flavored, fields, stream=False), streams)
    assert streamed.usage == unary.usage
    assert streamed.events[-2]["usage"] == unary.json["usage"]
    assert fold_sglang(streamed) == {
        choice["index"]: {
            **{key: choice["message"][key] for key in ("role", "content")},
            **{key: choice[key] for key in ("finish_reason", "matched_stop")},
            "logprobs": (choice["logprobs"] or {}).get("content", []),
            "token_ids": choice.get("token_ids", []),
        }
        for choice in unary.json["choices"]
    }


@each_snapshot
@given(data=st.data())
def test_every_convention_gives_the_same_unary_body(transcoder, data):
    adapter, fields = transcoder.adapter, data.draw(questions(transcoder))
    script = data.draw(scripts_for(fields, transcoder.adapter))
    if adapter.sends_text and not adapter.ends_at_stop_strings:
        # Text does not tell which of a message's tokens completes a stop string, so it depends on the messages how many tokens count.
        fields.pop("stop", None)
    # An end with the first token is EOS, and has no text of its own.
    assume(not (adapter.echoes_prompt and any(len(choice.token_ids) == 1 for choice in script.choices)))
    call = ask(transcoder, fields, stream=False)
    tellings = [
        {"convention": one, "joined": joined, "streams": True} for one in neighbours(transcoder.adapter) for joined in (True, False)
    ]
    if call.calls[0].choices == 1 or not transcoder.adapter.streams_several:
        tellings.append({"streams": False})
    first, *others = [answer_to_all(call, whole(streams_of(script, call, TOKENIZER, **how))) for how in tellings]
    for other in others:
        if adapter.convention.names_choices:  # choices have no index there: their order is that in which they first came
            assert (other.status, other.usage, unordered(other)) == (first.status, first.usage, unordered(first))
        else:
            assert other.same == first.same


def unordered(answer):
    choices = [json.dumps({**choice, "index": 0}) for choice in answer.json["choices"]]
    return sorted(choices), {**answer.json, "choices": []}


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
    "kv_transfer_params": '{"a":1}',
    "session_id": "s",
    "thinks": True,
    "media": (Media(kind="image", url="https://host/a"),),
    "trace_headers": {"traceparent": "x"},
    "return_token_ids": True,
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
    "logprobs": 2,
    "prompt_logprobs": 2,
    "logprob_token_ids": (5,),
    "seed": 0,
    "include_stop_str_in_output": True,
    "logit_bias": {5: 0.5},
    "bad_words": ("x",),
    "bad_words_token_ids": ((5, 6), (7,)),
    "grammar_from_first_token": True,
    "thinking_token_budget": 5,
    "stream_interval": 5,
    "ec_transfer_params": '{"a":1}',
    "watermarking": True,
    "allowed_token_ids": (5,),
    "constraint.json_schema": Constraint(kind="json_schema", value="{}"),
    "constraint.regex": Constraint(kind="regex", value="a"),
    "constraint.grammar": Constraint(kind="grammar", value="a"),
    "constraint.structural_tag": Constraint(kind="structural_tag", value="{}"),
    "constraint.json_object": Constraint(kind="json_object"),
    "constraint.choice": Constraint(kind="choice", value=("a",)),
}
PUBLIC_NAMES = {
    "data_parallel_rank": "x-data-parallel-rank",
    "lora_name": "model",
    "media": "messages",
    "prompt_text": "prompt",
    "constraint": "response_format",
    "bad_words_token_ids": "bad_words",
    "grammar_from_first_token": "include_reasoning",
}
ADVISORY = {"session_id"}  # accepted and reported, whatever the host chose
# Of these, several calls are made instead; the rest of the list needs no field of the wire, as `Adapter.emulates` says.
BY_CALLS = {"n"}


def test_every_neutral_field_has_an_example():
    fields = {name.split(".")[0] for name in ASKED}
    assert fields == (set(InferenceRequest.__struct_fields__) | set(SamplingParams.__struct_fields__)) - {"request_id", "sampling"}
    kinds = msgspec.inspect.type_info(Constraint).fields[0].type.values
    assert {name.split(".")[1] for name in ASKED if "." in name} == set(kinds)


def asking_for(adapter, name):
    """A request that asks for nothing but this, and one that asks for nothing."""
    params = SamplingParams(max_tokens=7 if adapter.default_max_tokens is not None else None)
    plain = InferenceRequest(request_id="r", sampling=params)
    field = name.split(".")[0]
    if field in SamplingParams.__struct_fields__:
        return msgspec.structs.replace(plain, sampling=msgspec.structs.replace(params, **{field: ASKED[name]})), plain
    return msgspec.structs.replace(plain, **{field: ASKED[name]}), plain


def on_the_wire(adapter, request):
    """All that the server is told: the method, the metadata and the message."""
    return adapter.path_for(request), adapter.encode_metadata(request), adapter.encode_request(request).SerializeToString()


@each_snapshot
def test_every_neutral_field_reaches_the_wire_or_is_refused_by_name(transcoder):
    adapter = transcoder.adapter
    for name in ASKED:
        asking, plain = asking_for(adapter, name)
        field = name.split(".")[0]
        if name in adapter.carries or name in BY_CALLS:
            assert fit(adapter, asking, drops=False) == (asking, ())
            if name in adapter.sends:
                assert on_the_wire(adapter, asking) != on_the_wire(adapter, plain), name
                read = adapter.decode_request(adapter.encode_request(asking))
                where = read.sampling if field in SamplingParams.__struct_fields__ else read
                assert getattr(where, field) == ASKED[name], name
            continue
        public = PUBLIC_NAMES.get(field, field)
        if name in ADVISORY:
            assert fit(adapter, asking, drops=False) == (plain, (public,))
            continue
        with pytest.raises(UnsupportedFieldError) as caught:
            fit(adapter, asking, drops=False)
        assert caught.value.param == public
        assert public in caught.value.message
        assert fit(adapter, asking, drops=True) == (plain, (public,))


@pytest.mark.parametrize("kind", ["request", "response"])
@each_snapshot
def test_every_field_of_the_wire_is_read_or_listed(transcoder, kind):
    adapter = transcoder.adapter
    for path in adapter.generate_paths:
        method = adapter.snapshot.method_at(path)
        message_type, decode = (method.request, adapter.decode_request) if kind == "request" else (method.response, adapter.decode_response)
        listed = {
            path
            for pattern, paths in NOT_READ[adapter.dialect].items()
            if message_type.DESCRIPTOR.name in pattern.split()
            for path in paths
            if has_path(message_type.DESCRIPTOR, path)
        }
        assert set(unread(bases(message_type), decode)) == listed, message_type.DESCRIPTOR.name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_listed_field_exists(dialect):
    spoken = [snapshots.load(*key) for key in ALL if key[0] == dialect]
    for lists in (NOT_READ, NOT_WRITTEN):
        for pattern, paths in lists[dialect].items():
            for path, reason in paths.items():
                assert reason
                assert any(has_path(one.message(name).DESCRIPTOR, path) for one in spoken for name in pattern.split()), (pattern, path)


def examples_of(adapter):
    """Requests that together ask for everything, and events that together say everything."""
    requests = []
    for name in ASKED:
        if name not in adapter.carries:
            continue
        asking, _ = asking_for(adapter, name)
        requests.append(asking)
        if name == "media":
            everything = [
                Media(kind=kind, url=url, detail="low", uuid="u") for kind in ("image", "video", "audio") for url in ("data:x", "http://x")
            ]
            requests.append(msgspec.structs.replace(asking, media=tuple(everything)))
        elif "prompt_text" in adapter.carries:
            requests.append(msgspec.structs.replace(asking, prompt_text="p"))
    entry = TokenLogprob(token_id=1, logprob=0.5, top=((1, 0.5),), selected=((2, 0.5),) if "logprob_token_ids" in adapter.carries else ())
    known = PromptLogprob(token_id=1, logprob=0.5, rank=1, top=((1, 0.5),))
    said = {"index": 1, "choice_id": "a", "token_ids": [1], "logprobs": (entry,), "prompt_logprobs": (known,)}
    said |= {f"{what}_tokens": 5 for what in ("prompt", "completion", "cached", "reasoning")}
    events = [
        PromptEvent(prompt_tokens=5, prompt_logprobs=(known,)),
        ErrorEvent(code=Code.UNAVAILABLE, message="m", index=1),
        *(TokensEvent(**said, text=text) for text in (None, "t")),
        *(FinishEvent(**said, text=text, matched_stop=stop, kv_transfer_params='{"a":1}') for text in (None, "t") for stop in (5, "s")),
        *(FinishEvent(**said, finish_reason=reason) for reason in ("length", "abort", "repetition")),
    ]
    return requests, events


@each_snapshot
def test_every_field_that_is_read_is_written(transcoder):
    adapter = transcoder.adapter
    requests, events = examples_of(adapter)
    messages = [adapter.encode_request(request) for request in requests]
    for event in events:
        with contextlib.suppress(UsageError):
            messages.append(adapter.encode_response(event))
    sent = {}
    for message in messages:
        sent.setdefault(message.DESCRIPTOR, set()).update(written(message))
    for descriptor, paths in sent.items():
        unread_here, unwritten = (
            {path for pattern, listed in lists[adapter.dialect].items() if descriptor.name in pattern.split() for path in listed}
            for lists in (NOT_READ, NOT_WRITTEN)
        )
        if "logprobs" not in adapter.carries:
            unwritten |= {"sampling_params.logprobs", "sampling_params.prompt_logprobs"}  # where no answer would show them
        if "logprob_token_ids" not in adapter.carries:
            unwritten.add("token_ids_logprob")  # likewise
        if "stop" not in adapter.sends:
            unwritten.add("stopping.stop_strings")  # where a server would not live through them
        missing = leaves(descriptor, unread_here | unwritten) - paths
        assert not missing, descriptor.name
        assert not paths & unwritten, descriptor.name


# 6: exactly one finish per choice and one ending per stream


@each_snapshot
@given(data=st.data())
def test_one_finish_per_choice_and_one_ending(transcoder, data):
    fields = data.draw(questions(transcoder))
    call = ask(transcoder, fields, stream=True)
    streams = data.draw(answers(transcoder, fields, call))
    if data.draw(st.booleans()):
        streams = [data.draw(damaged(stream)) for stream in streams]
    order = data.draw(st.lists(st.integers(0, len(streams) - 1), max_size=40))
    answer = answer_to_all(call, [data.draw(partitions(stream)) for stream in streams], order=order, trailers=data.draw(ENDINGS))
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


# Several calls for one request

SEVERAL = [key for key in ALL if "n" not in transcoder_for(*key).adapter.carries]


@pytest.mark.parametrize("transcoder", [pytest.param(key, id="-".join(key)) for key in SEVERAL], indirect=True)
@settings(max_examples=max(10, 2 * settings().max_examples // len(SEVERAL)))
@given(data=st.data())
def test_the_order_in_which_calls_bring_their_pieces_changes_no_choice(transcoder, data):
    fields = data.draw(questions(transcoder)) | {"n": data.draw(st.integers(2, 3))}
    script = data.draw(scripts_for(fields, transcoder.adapter))
    calls = [ask(transcoder, fields, stream=stream) for stream in (True, False)]
    pieces = [single_bytes(stream) for stream in streams_of(script, calls[0], TOKENIZER)]
    order = data.draw(st.lists(st.integers(0, fields["n"] - 1), max_size=60)) * 20
    obeys = data.draw(st.booleans())
    streamed, unary = (answer_to_all(call, pieces) for call in calls)
    mixed, mixed_unary = (answer_to_all(call, pieces, order=order, obeys_cancel=obeys) for call in calls)
    assert streamed.error is mixed.error is None
    assert mixed_unary.same == unary.same
    assert mixed.usage == streamed.usage == unary.usage
    for index in range(fields["n"]):
        assert chunks_of(mixed, index) == chunks_of(streamed, index)
    assert unary.usage.prompt_tokens == (script.prompt_tokens or len(calls[0].inference.prompt_token_ids)), "the prompt counts once"


def chunks_of(answer, index):
    """All that a client is told of one choice, piece by piece."""
    return [part for chunk in answer.events[:-1] for part in chunk["choices"] if part["index"] == index]


@pytest.mark.parametrize("transcoder", [pytest.param(key, id="-".join(key)) for key in SEVERAL[-2:]], indirect=True)
@given(data=st.data())
def test_several_calls_answer_as_one_call_with_several_choices_does(transcoder, data):
    """A server that knows `n` and one that does not, asked the same and generating the same, give a client the same."""
    fields = data.draw(questions(transcoder)) | {"n": data.draw(st.integers(1, 3))}
    for name in ("return_token_ids", "logprobs", "top_logprobs", "stop", "include_stop_str_in_output", "skip_special_tokens"):
        fields.pop(name, None)
    script = data.draw(scripts_for(fields, transcoder.adapter))
    bodies = []
    for host in (transcoder, transcoder_for("vllm.engine", "smg-0.4.28")):
        call = ask(host, fields, stream=False)
        answer = answer_to_all(call, whole(streams_of(script, call, TOKENIZER)))
        assert answer.error is None
        body = answer.json
        bodies.append([(choice["index"], choice["finish_reason"]) for choice in body["choices"]] + [body["usage"]])
    assert bodies[0] == bodies[1]


# 8: purity


@each_snapshot
@given(data=st.data())
def test_same_input_same_bytes_and_inputs_unchanged(transcoder, data):
    fields = data.draw(questions(transcoder))
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": data.draw(st.booleans()), **fields}
    if "logit_bias" in transcoder.adapter.carries:
        body["logit_bias"] = {str(token_id): 1.0 for token_id in range(9)}
    raw = json.dumps(body).encode()
    headers = [("Content-Type", "application/json"), ("traceparent", "x"), ("tracestate", "y")]
    calls = [transcoder.request("POST", CHAT, headers, raw, request_id="r") for _ in range(2)]
    assert calls[0].calls == calls[1].calls
    for one in calls[0].calls:
        # Maps of protobuf have another order in every process, unless they are sorted.
        message = transcoder.adapter.snapshot.method_at(one.path).request.FromString(one.message)
        assert one.message == message.SerializeToString(deterministic=True)
    assert (calls[0].inference, calls[0].dropped) == (calls[1].inference, calls[1].dropped)
    assert headers == [("Content-Type", "application/json"), ("traceparent", "x"), ("tracestate", "y")]
    before = msgspec.json.encode([one.inference for one in calls[0].calls]), [one.message for one in calls[0].calls]

    streams = whole(data.draw(answers(transcoder, fields, calls[0])))
    trailers = data.draw(ENDINGS)
    first = answer_to_all(calls[0], streams, trailers=trailers)
    assert answer_to_all(calls[0], streams, trailers=trailers).same == first.same, "a call may be answered again, as after a retry"
    assert answer_to_all(calls[1], streams, trailers=trailers).same == first.same
    assert (msgspec.json.encode([one.inference for one in calls[0].calls]), [one.message for one in calls[0].calls]) == before
