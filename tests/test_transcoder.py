"""The whole path, case by case: the order of outputs, of errors, and who gets to know what."""

from __future__ import annotations

import json

import msgspec
import pytest

from gaie_codec import (
    BodyChunk,
    Code,
    EndOfBody,
    FinishEvent,
    FramingError,
    Limits,
    MalformedMessageError,
    MalformedRequestError,
    ModelInfo,
    ModelNotFoundError,
    OutOfOrderError,
    RequestTooLargeError,
    ResponseHead,
    State,
    TokensEvent,
    Transcoder,
    TruncatedResponseError,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    UsageError,
    encode_error_response,
    encode_frame,
)
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import OK_TRAILERS, answer_to, frames_of, messages_of

TOKENIZER = load_tokenizer("builtin")
TRANSCODER = Transcoder("vllm.engine", tokenizer=TOKENIZER)
OLD = Transcoder("vllm.engine", snapshot="intree-0.14.0", tokenizer=TOKENIZER)
CHAT = "/v1/chat/completions"
UNAVAILABLE = (("grpc-status", "14"), ("grpc-message", "worker-7 is%20gone"))


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


HELLO = ids("Hello world")
HEAD_OF_A_STREAM = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))


def body(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def call(transcoder=TRANSCODER, /, *, headers=(), **fields):
    return transcoder.request("POST", CHAT, headers, body(**fields), request_id="r1")


def chunk(text, index=0, **fields):
    return TokensEvent(index=index, token_ids=ids(text), **fields)


def end(index=0, reason="stop", **fields):
    return FinishEvent(index=index, finish_reason=reason, **fields)


def wire(*events):
    return frames_of(TRANSCODER.adapter, events)


def error_in(answer):
    """The error event at the end of a stream, once it is sure that none says [DONE]."""
    assert "[DONE]" not in answer.events
    assert [event for event in answer.events[:-1] if "error" in event] == []
    return answer.events[-1]["error"]


# Requests


def test_what_to_send():
    made = call(headers=[("TraceParent", "00-abc"), ("tracestate", "a=b"), ("authorization", "secret")], seed=7)
    assert made.path == "/vllm.grpc.engine.VllmEngine/Generate"
    assert made.metadata == (("traceparent", "00-abc"), ("tracestate", "a=b"))
    assert made.headers == (
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-accept-encoding", "identity,deflate,gzip"),
        *made.metadata,
    )
    assert made.frame == encode_frame(made.message)
    assert made.inference.trace_headers == dict(made.metadata)
    in_message = msgspec.structs.replace(made.inference, trace_headers={})  # the rest is metadata
    assert TRANSCODER.adapter.decode_request(TRANSCODER.adapter.request_type.FromString(made.message)) == in_message
    assert (made.inference.request_id, made.inference.sampling.seed) == ("chatcmpl-r1", 7)
    assert made.dropped == ()


@pytest.mark.parametrize("value", ["", "a\r\nb", "é", "\ud800"])
def test_trace_context_that_metadata_cannot_hold_is_left_out(value):
    assert call(headers={"traceparent": value}).metadata == ()


def test_a_clients_id_in_the_headers_wins():
    assert call(headers={"X-Request-Id": "mine"}, request_id="body").inference.request_id == "chatcmpl-mine"


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [("GET", CHAT, 405, "POST"), ("POST", "/", 404, ""), ("POST", "/v1/classify", 404, ""), ("POST", CHAT + "/", 404, "")],
)
def test_endpoints_that_there_are_not(method, path, status, allow):
    with pytest.raises(UnsupportedEndpointError) as caught:
        TRANSCODER.request(method, path, (), body(), request_id="r")
    assert caught.value.http_status == status
    assert status == 405 or all(known in str(caught.value) for known in (CHAT, "/tokenize", "/v1/messages/count_tokens"))
    headers = dict(encode_error_response(caught.value)[0].headers)
    assert headers.get("allow", "") == allow


@pytest.mark.parametrize(
    "make",
    [
        lambda: Transcoder("vllm.engine", tokenizer="builtin"),
        lambda: Limits(max_calls=0),
        lambda: Limits(max_message_bytes=-1),
        lambda: TRANSCODER.request("POST", CHAT, [(b"content-type", b"application/json")], b"{}", request_id="r"),
        lambda: TRANSCODER.request("POST", CHAT, {"content-type": None}, b"{}", request_id="r"),
        lambda: call().response(created=1).receive_trailers([(b"grpc-status", b"0")]),
        lambda: call().response(created=1).receive_status("0"),
    ],
)
def test_misuse_says_what_is_wrong(make):
    with pytest.raises(UsageError):
        make()


def test_a_status_may_be_a_bare_number():
    for number, code in ((8, Code.RESOURCE_EXHAUSTED), (99, Code.UNKNOWN)):
        assert call().response(created=1).receive_status(number, "x") == call().response(created=1).receive_status(code, "x")


def test_a_query_is_ignored():
    assert TRANSCODER.request("POST", CHAT + "?api-version=1", (), body(), request_id="r").message == call(request_id="r").message


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/json ;x"])
def test_json_is_json(content_type):
    assert call(headers={"Content-Type": content_type})


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "", "application/jsonl"])
def test_other_content_types_are_refused(content_type):
    with pytest.raises(MalformedRequestError, match="Media Type"):
        call(headers={"content-type": content_type})


def test_a_body_over_the_limit():
    def limited(size):
        return Transcoder("vllm.engine", tokenizer=TOKENIZER, limits=Limits(max_request_bytes=size))

    assert call(limited(len(body())))
    with pytest.raises(RequestTooLargeError) as caught:
        call(limited(len(body()) - 1))
    assert caught.value.http_status == 413


def test_text_that_protobuf_refuses_is_the_clients_fault():
    with pytest.raises(MalformedRequestError, match="not valid Unicode"):
        call(headers={"x-request-id": "\udc80"})


@pytest.mark.parametrize(("field", "value"), [("seed", 2**31), ("seed", -(2**31) - 1), ("max_tokens", 2**32)])
def test_numbers_that_the_wire_cannot_hold_are_refused_by_name(field, value):
    with pytest.raises(MalformedRequestError) as caught:
        call(**{field: value})
    assert caught.value.param == field
    assert str(value) in caught.value.message


@pytest.mark.parametrize(("field", "value"), [("bad_words", ["x"]), ("allowed_token_ids", [5]), ("priority", 1), ("cache_salt", "s")])
def test_fields_that_no_snapshot_carries_are_refused_or_dropped_and_reported(field, value):
    for transcoder in (TRANSCODER, OLD):
        with pytest.raises(UnsupportedFieldError) as caught:
            call(transcoder, **{field: value})
        assert caught.value.param == field
        assert transcoder.adapter.snapshot.name in caught.value.message
    dropping = Transcoder("vllm.engine", tokenizer=TOKENIZER, unsupported="drop")
    made = call(dropping, zeta=1, **{field: value})
    assert made.dropped == (field, "zeta")
    assert made.message == call(dropping).message


@pytest.mark.parametrize(("name", "value"), [("logprobs", True), ("kv_transfer_params", {"a": 1})])
def test_fields_that_only_the_new_snapshot_carries(name, value):
    assert call(**{name: value}).dropped == ()
    with pytest.raises(UnsupportedFieldError) as caught:
        call(OLD, **{name: value})
    assert caught.value.param == name


def test_usage_errors():
    for wrong in ({"tokenizer": None}, {"tokenizer": TOKENIZER, "unsupported": "ignore"}, {"tokenizer": TOKENIZER, "snapshot": "none"}):
        with pytest.raises(UsageError):
            Transcoder("vllm.engine", **wrong)
    with pytest.raises(UsageError):
        Transcoder("vllm.none", tokenizer=TOKENIZER)


@pytest.mark.parametrize("field", ["top_p", "repetition_penalty"])
def test_a_number_that_the_wires_floats_round_to_zero_does_not_become_the_default(field):
    try:
        message = call(**{field: 1e-50}).message
    except MalformedRequestError:
        return
    assert getattr(TRANSCODER.adapter.request_type.FromString(message).sampling_params, field) != 0


# A stream


def test_a_stream_step_by_step():
    response = call(stream=True).response(created=17, id="chatcmpl-x")
    assert response.receive_headers({"content-type": "application/grpc"}) == ()
    assert response.state is State.AWAIT_MESSAGE

    head, first = response.receive_data(wire(chunk("Hello", prompt_tokens=9)))
    assert head == ResponseHead(200, HEAD_OF_A_STREAM)
    role, text = [json.loads(event.removeprefix("data: ")) for event in first.data.decode().split("\n\n")[:-1]]
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text == {
        "id": "chatcmpl-x",
        "object": "chat.completion.chunk",
        "created": 17,
        "model": "",
        "choices": [{"index": 0, "delta": {"content": "Hello"}, "logprobs": None, "finish_reason": None}],
    }
    (second,) = response.receive_data(wire(chunk(" world")))
    assert b'"content":" world"' in second.data
    assert response.receive_data(wire(TokensEvent())) == ()
    (last,) = response.receive_data(wire(end(token_ids=ids(" world"))))
    finish = json.loads(last.data[6:])
    assert finish["choices"][0] == {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert finish["system_fingerprint"] == "vllm.engine-smg-0.4.28"
    assert response.state is State.FINISHED
    assert not response.ended

    assert response.receive_trailers(OK_TRAILERS) == [BodyChunk(b"data: [DONE]\n\n"), EndOfBody()]
    assert response.ended
    assert response.state is State.CLOSED
    assert response.error is None
    assert (response.usage.prompt_tokens, response.usage.completion_tokens, response.usage.total_tokens) == (9, 4, 13)


def test_the_head_waits_for_a_message_that_says_something():
    response = call(stream=True).response(created=1)
    assert response.receive_headers() == ()
    assert response.receive_data(b"") == ()
    assert response.receive_data(encode_frame(b"")) == (), "an empty message is legal and says nothing"
    assert response.state is State.AWAIT_MESSAGE
    outputs = response.receive_data(wire(TokensEvent()))
    assert [type(output) for output in outputs] == [ResponseHead, BodyChunk]


def test_role_chunks_of_all_choices_come_first():
    answer = answer_to(call(stream=True, n=3), [wire(chunk("a", 2), chunk("b", 0), end(2), end(0), end(1, "length"))])
    choices = [event["choices"][0] for event in answer.events[:-1]]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in choices[:3])
    assert [choice["index"] for choice in choices[3:]] == [2, 0, 2, 0, 1]
    finishes = [(choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"]]
    assert finishes == [(2, "stop"), (0, "stop"), (1, "length")]
    assert answer.events[-1] == "[DONE]"


def test_interleaved_choices_keep_apart():
    stream = wire(chunk("Hel", 1), chunk("Good", 0), chunk("lo", 1), chunk("bye", 0), end(1), end(0))
    for stream_it in (True, False):
        answer = answer_to(call(stream=stream_it, n=2), [stream])
        assert [answer.content(0), answer.content(1)] == ["Goodbye", "Hello"]


def test_usage_in_a_stream():
    events = [wire(chunk("Hello", prompt_tokens=9, cached_tokens=4)), wire(chunk(" world")), wire(end(prompt_tokens=9))]
    asked = call(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = answer_to(asked, events).events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    assert all("usage" not in event for event in chunks)

    asked = call(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in answer_to(asked, events).events[:-1]]
    assert counts == [0, 3, 4, 4, 4]

    detailed = Transcoder("vllm.engine", tokenizer=TOKENIZER, prompt_tokens_details=True)
    assert answer_to(call(detailed), events).json["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_prompt_tokens_once_said_stay_said():
    answer = answer_to(call(), [wire(chunk("Hello", prompt_tokens=9), end(cached_tokens=4))])
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (9, 4)


def test_prompt_tokens_are_our_own_where_the_server_says_none():
    answer = answer_to(call(), [wire(end(token_ids=HELLO))])
    assert answer.usage.prompt_tokens == len(call().inference.prompt_token_ids) > 0


def test_the_finish_of_max_tokens_rides_on_the_last_text():
    answer = answer_to(call(stream=True, max_tokens=4), [wire(chunk("Hello"), chunk(" world"), end(reason="length"))])
    assert [event["choices"][0]["delta"]["content"] for event in answer.events[:-1]] == ["", "Hello", " world"]
    assert answer.events[-2]["choices"][0]["finish_reason"] == "length"


# A unary answer


def test_a_unary_answer():
    answer = answer_to(call(model="m", return_token_ids=True), [wire(end(token_ids=[*HELLO, 2], prompt_tokens=9))])
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": [*HELLO, 2],
            }
        ],
        "system_fingerprint": "vllm.engine-smg-0.4.28",
        "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
        "prompt_token_ids": call().inference.prompt_token_ids,
    }


def test_nothing_of_a_unary_answer_leaves_before_the_status():
    response = call().response(created=1)
    assert not response.receive_headers()
    assert not response.receive_data(wire(chunk("Hello"), end()))
    outputs = response.receive_trailers(OK_TRAILERS)
    assert [type(output) for output in outputs] == [ResponseHead, BodyChunk, EndOfBody]


# Errors before and after the first message


def both():
    return [call(stream=True), call(stream=False)]


@pytest.mark.parametrize("made", both(), ids=["stream", "unary"])
@pytest.mark.parametrize(
    ("code", "status", "message"),
    [(14, 503, "The model server is unavailable"), (3, 400, "worker-7 is gone"), (8, 429, "worker-7 is gone")],
)
def test_a_status_before_the_first_message_is_a_plain_answer(made, code, status, message):
    trailers = [("grpc-status", str(code)), ("grpc-message", "worker-7 is%20gone")]
    for answer in (answer_to(made, [], trailers=trailers), answer_to(made, [], headers=trailers, trailers=None)):
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
        assert (answer.json["error"]["message"], answer.json["error"]["code"]) == (message, status)
        assert answer.error.code is Code(code)
        assert "worker-7 is gone" in str(answer.error)


def test_a_status_after_the_first_message_is_an_event_without_done():
    answer = answer_to(call(stream=True), [wire(chunk("Hello"))], trailers=UNAVAILABLE)
    assert answer.status == 200
    assert answer.content() == "Hello"
    assert error_in(answer) == {"message": "The model server is unavailable", "type": "Service Unavailable", "param": None, "code": 503}


def test_a_status_after_the_first_message_of_a_unary_answer_is_a_plain_answer():
    answer = answer_to(call(), [wire(chunk("Hello"))], trailers=UNAVAILABLE)
    assert answer.status == 503
    assert "choices" not in answer.json


@pytest.mark.parametrize("made", both(), ids=["stream", "unary"])
@pytest.mark.parametrize("trailers", [UNAVAILABLE, (), None])
def test_an_answer_is_complete_with_its_last_finish_whatever_follows(made, trailers):
    answer = answer_to(made, [wire(chunk("Hello"), end())], trailers=trailers)
    assert (answer.status, answer.error) == (200, None)
    assert answer.body == answer_to(made, [wire(chunk("Hello"), end())]).body


@pytest.mark.parametrize("made", both(), ids=["stream", "unary"])
@pytest.mark.parametrize("events", [[], [chunk("Hello")]])
def test_ok_without_a_finish_is_truncation(made, events):
    answer = answer_to(made, [wire(*events)])
    assert isinstance(answer.error, TruncatedResponseError)
    if made.inference.stream and events:
        assert error_in(answer)["code"] == 502
    else:
        assert answer.status == 502
    assert "1 of 1 choices" in str(answer.error)


def test_one_choice_without_its_finish_is_truncation():
    answer = answer_to(call(stream=True, n=2), [wire(chunk("a", 0), chunk("b", 1), end(0))])
    assert isinstance(answer.error, TruncatedResponseError)
    assert error_in(answer)["code"] == 502
    assert "1 of 2 choices" in str(answer.error)


def test_an_end_inside_a_frame_is_truncation_even_with_status_ok():
    answer = answer_to(call(stream=True), [wire(chunk("Hello"), end()) + b"\0\0"])
    assert isinstance(answer.error, TruncatedResponseError)
    assert error_in(answer)["code"] == 502


@pytest.mark.parametrize("events", [[], [chunk("Hello")]])
def test_a_connection_that_ends_without_trailers_is_truncation(events):
    answer = answer_to(call(stream=True), [wire(*events)], trailers=None)
    assert isinstance(answer.error, TruncatedResponseError)
    assert (error_in(answer)["code"] if events else answer.status) == 502


def test_trailers_without_a_status_are_unknown():
    assert answer_to(call(), [wire(chunk("Hello"))], trailers=()).error.code is Code.UNKNOWN


def test_trailers_only_with_ok_is_truncation():
    answer = answer_to(call(), [], headers=OK_TRAILERS, trailers=None)
    assert (answer.status, type(answer.error)) == (502, TruncatedResponseError)


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (503, {"content-type": "text/html"}, 503),
        (404, {"content-type": "application/json"}, 501),
        (500, {}, 500),
        (200, {"content-type": "text/html"}, 502),
    ],
)
@pytest.mark.parametrize("made", both(), ids=["stream", "unary"])
def test_an_answer_from_something_that_is_not_grpc(made, status, headers, expected):
    answer = answer_to(made, [b"<html>down for maintenance</html>"], headers=headers, status=status, trailers=None)
    assert answer.status == expected
    assert "maintenance" not in answer.body.decode()


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([chunk("a"), end(), chunk("b")], "tokens for choice 0 after its finish"),
        ([chunk("a"), end(), end()], "a second finish for choice 0"),
        ([chunk("a"), chunk("b", 1)], "choice 1 of 1"),
        ([chunk("a"), chunk("b", 2**32 - 1)], "choice 4294967295 of 1"),
        ([chunk("a"), end(1)], "choice 1 of 1"),
    ],
)
def test_messages_that_have_no_place(events, words):
    streamed, unary = (answer_to(made, [wire(*events)]) for made in both())
    assert isinstance(streamed.error, OutOfOrderError)
    assert words in str(streamed.error)
    assert error_in(streamed)["code"] == 502
    assert (unary.status, type(unary.error)) == (502, OutOfOrderError)


def test_an_empty_message_after_the_finish_has_no_place_either():
    answer = answer_to(call(stream=True), [wire(chunk("a"), end()), encode_frame(b"")])
    assert isinstance(answer.error, OutOfOrderError)


def test_a_wrong_first_message_is_a_plain_answer():
    answer = answer_to(call(stream=True), [wire(chunk("a", 1))])
    assert (answer.status, type(answer.error)) == (502, OutOfOrderError)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (b"\x02\0\0\0\0", FramingError),
        (b"\0\xff\xff\xff\xff", FramingError),
        (b"\x01\0\0\0\x01x", MalformedMessageError),
        (encode_frame(b"\xff\xff"), MalformedMessageError),
        (encode_frame(b"\x0a\x02\x08"), MalformedMessageError),
    ],
)
@pytest.mark.parametrize("coalesced", [True, False])
def test_broken_bytes_end_the_answer_after_what_was_whole(damage, kind, coalesced):
    good = wire(chunk("Hello"))
    pieces = [good + damage] if coalesced else [good, damage]
    streamed, unary = (answer_to(made, [*pieces, wire(end())]) for made in both())
    assert (type(streamed.error), streamed.content()) == (kind, "Hello")
    assert error_in(streamed)["code"] == 502
    assert (type(unary.error), unary.status) == (kind, 502)
    assert answer_to(call(stream=True), [damage]).status == 502


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_server_that_gave_up_is_an_error_and_no_finish(reason):
    early = answer_to(call(stream=True), [wire(end(reason=reason))])
    assert early.status == 500
    late = answer_to(call(stream=True), [wire(chunk("Hello"), end(reason=reason))])
    assert (late.content(), error_in(late)["code"]) == ("Hello", 500)
    assert all(event["choices"][0]["finish_reason"] is None for event in late.events[:-1])


@pytest.mark.parametrize(
    ("fields", "events"), [({"max_tokens": 4}, [chunk("Hello world")]), ({"stop": "world!"}, [chunk("Hello"), chunk(" world")])]
)
def test_text_that_was_held_back_comes_before_the_error(fields, events):
    answer = answer_to(call(stream=True, **fields), [wire(*events)], trailers=UNAVAILABLE)
    assert answer.content() == "Hello world"
    assert error_in(answer)["code"] == 503


def test_headers_twice_and_data_before_headers_are_out_of_order():
    response = call().response(created=1)
    response.receive_headers()
    assert response.receive_headers()[0].status == 502
    assert isinstance(response.error, OutOfOrderError)

    response = call().response(created=1)
    assert response.receive_data(wire(chunk("a")))[0].status == 502
    assert isinstance(response.error, OutOfOrderError)


def test_after_the_end_nothing_more_is_taken():
    response = call().response(created=1)
    response.receive_headers()
    response.receive_data(wire(end()))
    response.receive_trailers(OK_TRAILERS)
    again = [
        lambda: response.receive_headers(),
        lambda: response.receive_data(b""),
        lambda: response.receive_message(b""),
        lambda: response.receive_trailers(OK_TRAILERS),
        lambda: response.receive_status(Code.OK),
        lambda: response.receive_eof(),
    ]
    for misuse in again:
        with pytest.raises(UsageError):
            misuse()


def test_data_that_follows_an_error_is_ignored():
    response = call(stream=True).response(created=1)
    response.receive_headers()
    assert response.receive_data(b"\x02\0\0\0\0")
    assert response.ended
    error = response.error
    assert response.receive_data(wire(chunk("a"))) == ()
    assert response.receive_message(b"\xff") == ()
    assert response.receive_headers() == ()
    assert response.receive_trailers(OK_TRAILERS) == ()
    assert response.error is error


# Hosts with a gRPC library, and compression


def test_messages_without_frames_and_a_decoded_status():
    events = [chunk("Hello"), chunk(" world"), end()]
    made = call(stream=True)
    assert answer_to(made, messages_of(TRANSCODER.adapter, events), framed=False).same == answer_to(made, [wire(*events)]).same

    for code, trailers in ((Code.OK, OK_TRAILERS), (Code.UNAVAILABLE, (("grpc-status", "14"), ("grpc-message", "x")))):
        response = made.response(created=1700000000)
        response.receive_headers()
        outputs = [*response.receive_data(wire(*events)), *response.receive_status(code, "x")]
        data = b"".join(output.data for output in outputs if isinstance(output, BodyChunk))
        assert data == answer_to(made, [wire(*events)], trailers=trailers).body


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_messages(encoding):
    events = [chunk("Hello"), chunk(" world"), end()]
    packed = frames_of(TRANSCODER.adapter, events, encoding=encoding)
    answer = answer_to(call(stream=True), [packed], headers={"Grpc-Encoding": encoding})
    assert answer.same == answer_to(call(stream=True), [wire(*events)]).same
    assert isinstance(answer_to(call(stream=True), [packed]).error, MalformedMessageError)


def test_a_message_over_the_limit():
    small = Transcoder("vllm.engine", tokenizer=TOKENIZER, limits=Limits(max_message_bytes=4))
    answer = answer_to(call(small), [wire(end(token_ids=HELLO))])
    assert (answer.status, type(answer.error)) == (502, FramingError)


# Odds and ends of the wire


@pytest.mark.parametrize("stream", [True, False])
def test_kv_transfer_params_are_handed_on(stream):
    answer = answer_to(call(stream=stream), [wire(end(kv_transfer_params='{"a":[1]}'))])
    body = answer.events[-2] if stream else answer.json
    assert body["kv_transfer_params"] == {"a": [1]}


def test_kv_transfer_params_may_be_spread_over_lines():
    answer = answer_to(call(stream=True), [wire(chunk("a"), end(kv_transfer_params='{\n  "a": 1\n}'))])
    assert answer.events[-2]["kv_transfer_params"] == {"a": 1}


def test_the_old_snapshot_end_to_end():
    made = call(OLD, stream=True, stop=["world"])
    answer = answer_to(made, [frames_of(OLD.adapter, [chunk("Hello"), chunk(" world now"), end()])])
    assert answer.content() == "Hello "
    assert answer.events[-2]["choices"][0]["stop_reason"] == "world"


def test_the_servers_own_eos_counts():
    special = ids("!")[0]
    transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=ModelInfo(eos_token_ids=(special,)))
    assert answer_to(call(transcoder), [wire(chunk("Hello!"), end())]).content() == "Hello"
    assert answer_to(call(), [wire(chunk("Hello!"), end())]).content() == "Hello!"


def test_the_window_holds_as_much_back_as_vllm():
    windowed = Transcoder("vllm.engine", tokenizer=TOKENIZER, stop_holdback="window")
    stream = wire(chunk("Hello"), chunk(" world"), end(reason="length"))
    texts = [event["choices"][0]["delta"]["content"] for event in answer_to(call(windowed, stream=True, stop="zzzz"), [stream]).events[:-1]]
    assert texts == ["", "He", "llo wo", "rld"]
    texts = [event["choices"][0]["delta"]["content"] for event in answer_to(call(stream=True, stop="zzzz"), [stream]).events[:-1]]
    assert texts == ["", "Hello", " world", ""]


def test_logprobs_in_the_answer():
    message = TRANSCODER.adapter.response_type()
    message.complete.output_ids.extend(HELLO[:1])
    message.complete.output_logprobs.token_ids.extend(HELLO[:1])
    message.complete.output_logprobs.token_logprobs.append(-0.5)
    message.complete.output_logprobs.top_logprobs.add(token_ids=HELLO[:2], values=[-0.5, float("-inf")])
    answer = answer_to(call(logprobs=True, top_logprobs=2), [encode_frame(message.SerializeToString())])
    assert answer.json["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "H",
                "logprob": -0.5,
                "bytes": [72],
                "top_logprobs": [
                    {"token": "H", "logprob": -0.5, "bytes": [72]},
                    {"token": "ell", "logprob": -9999.0, "bytes": [101, 108, 108]},
                ],
            }
        ]
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logprob_is_a_number(value):
    message = TRANSCODER.adapter.response_type()
    message.complete.output_ids.extend(HELLO[:1])
    message.complete.output_logprobs.token_ids.extend(HELLO[:1])
    message.complete.output_logprobs.token_logprobs.append(value)
    answer = answer_to(call(logprobs=True), [encode_frame(message.SerializeToString())])
    assert answer.error is not None or isinstance(answer.json["choices"][0]["logprobs"]["content"][0]["logprob"], float)


@pytest.mark.parametrize("end", [lambda response: response.receive_trailers(()), lambda response: response.receive_eof()])
def test_a_trailers_only_answer_ends_in_either_way(end):
    response = call(stream=True).response(created=1)
    assert response.receive_headers([("content-type", "application/grpc"), ("grpc-status", "5"), ("grpc-message", "gone")]) == ()
    head, body, _ = end(response)
    assert head.status == 404
    assert json.loads(body.data)["error"]["message"] == "gone"


def test_a_message_without_its_frame_has_the_same_limit():
    transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, limits=Limits(max_message_bytes=10))
    response = call(transcoder).response(created=1)
    response.receive_headers()
    assert response.receive_message(bytes(11))[0].status == 502
    assert "over the limit of 10" in str(response.error)


def test_a_compressed_body_is_refused_by_name():
    with pytest.raises(MalformedRequestError) as caught:
        TRANSCODER.request("POST", "/v1/chat/completions", {"content-encoding": "gzip"}, b"{}", request_id="r")
    assert caught.value.param == "content-encoding"


def test_the_host_may_take_a_request_for_another_model_and_the_client_does_not_see_it():
    model = ModelInfo(served_model_name="llama", lora_adapters={"french": "7"})
    transcoder = Transcoder("vllm.inference", tokenizer=TOKENIZER, model=model)
    asked = body(model="alias")
    with pytest.raises(ModelNotFoundError, match="`alias`"):
        transcoder.request("POST", CHAT, (), asked, request_id="1")
    call = transcoder.request("POST", CHAT, (), asked, request_id="1", model="french")
    assert (call.inference.model, call.inference.lora_name) == ("llama", "7")
    events = [TokensEvent(text="Hi", token_ids=ids("Hi")), FinishEvent(finish_reason="stop")]
    answer = answer_to(call, [frames_of(transcoder.adapter, events)])
    assert json.loads(answer.body)["model"] == "alias"
    with pytest.raises(ModelNotFoundError, match="`german`"):
        transcoder.request("POST", CHAT, (), asked, request_id="1", model="german")


def test_a_body_that_is_passed_on_as_it_is_keeps_its_model():
    transcoder = Transcoder("sglang.runtime")
    asked = body(model="alias")
    assert transcoder.request("POST", CHAT, (), asked, request_id="1", model="alias").is_passthrough
    with pytest.raises(UnsupportedFieldError) as caught:
        transcoder.request("POST", CHAT, (), asked, request_id="1", model="other")
    assert caught.value.param == "model"
