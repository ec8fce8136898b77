"""Deltas -> a message: the events that SDKs want, and a body that is their fold."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import (
    BodyChunk,
    Code,
    CodecError,
    FinishEvent,
    SSEDecoder,
    TokensEvent,
    Transcoder,
    UpstreamStatusError,
    Usage,
    encode_error_response,
)
from gaie_codec._choices import Delta
from gaie_codec._conventions import Teller
from gaie_codec.anthropic.messages import MessageOptions
from gaie_codec.anthropic.messages_response import make_encoder
from gaie_codec.openai.endpoint import ResponseMeta
from gaie_codec.text import BrokenToolCall, ToolCall
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
TRANSCODERS = {
    dialect: Transcoder(dialect, tokenizer=TOKENIZER, tool_call_parser="hermes", reasoning_parser="qwen3")
    for dialect in ("vllm.engine", "vllm.inference", "sglang.api")
}
USAGE = Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=3)


def encoder(stream: bool, **meta):
    options = MessageOptions(id="msg_r", model="m", stream=stream)
    made = make_encoder(options, ResponseMeta(id="msg_r", created=1, **meta))
    return made, made.open(range(1), [[1]], Usage(prompt_tokens=10))


def events_of(data: bytes) -> list[dict]:
    events = []
    for event in SSEDecoder().receive_data(data):
        value = json.loads(event.data)
        assert value["type"] == event.event, "the name of an event is its type"
        events.append(value)
    return events


def stream(*deltas: Delta, usage: Usage = USAGE, **meta) -> list[dict]:
    made, data = encoder(True, **meta)
    data += b"".join([made.delta(delta, None) for delta in deltas])
    return events_of(data + made.close(usage))


def unary(*deltas: Delta, usage: Usage = USAGE, **meta) -> dict:
    made, data = encoder(False, **meta)
    assert data + b"".join([made.delta(delta, None) for delta in deltas]) == b""
    return json.loads(made.close(usage))


def say(text: str = "", **fields) -> Delta:
    return Delta(0, text, **fields)


def call(index: int = 0, arguments: str = "", **fields) -> Delta:
    return say(tool_calls=(ToolCall(index, arguments=arguments, **fields),))


def fold(events: list[dict], broken: dict[int, str]) -> dict:
    """What a client that puts events together gets. `broken` has the calls, by their number, that are none and what they are instead."""
    first, *events, last = events
    assert (first["type"], last) == ("message_start", {"type": "message_stop"})
    body = first["message"]
    ended: set[int] = set()
    arguments: dict[int, str] = {}
    for event in events:
        kind = event["type"]
        if kind == "content_block_start":
            assert event["index"] == len(body["content"]), "blocks come one after the other"
            assert len(ended) == event["index"], "a block begins when those before have ended"
            body["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            delta, block = event["delta"], body["content"][event["index"]]
            assert event["index"] not in ended
            if delta["type"] == "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
            else:
                key = delta["type"].removesuffix("_delta")
                block[key] += delta[key]
        elif kind == "content_block_stop":
            ended.add(event["index"])
        else:
            assert kind == "message_delta"
            body |= event["delta"]
            body["usage"] |= event["usage"]
    assert len(ended) == len(body["content"])
    calls, content = 0, []
    for place, block in enumerate(body["content"]):
        if block["type"] == "tool_use":
            text = arguments.get(place, "{}")
            block["input"] = json.loads(text) if is_json(text) else text
            if calls in broken:
                block = {"type": "text", "text": broken[calls]}
            calls += 1
        if broken and content and block["type"] == content[-1]["type"] == "text":
            content[-1]["text"] += block["text"]
        else:
            content.append(block)
    return body | {"content": content}


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


ARGUMENTS = st.sampled_from(["", "{}", '{"a": 1}', '{"a": [1, {"b": "é"}]}', "[1]", '{"a"', "nonsense", '"text"', "12"])
OPS = st.one_of(
    st.tuples(st.just("text"), st.text(min_size=1, max_size=4)),
    st.tuples(st.just("reasoning"), st.text(min_size=1, max_size=4)),
    st.tuples(st.just("call"), ARGUMENTS, st.integers(0, 3)),
    st.tuples(st.just("break"), st.text(min_size=1, max_size=4)),
)
FINISHES = st.tuples(st.sampled_from(["stop", "length", "tool_calls", "repetition"]), st.none() | st.just("STOP") | st.just(7))


def deltas_of(ops, finish) -> tuple[list[Delta], dict[int, str]]:
    deltas, broken, calls = [], {}, 0
    for op in ops:
        if op[0] == "text":
            deltas.append(say(op[1]))
        elif op[0] == "reasoning":
            deltas.append(say(reasoning=op[1]))
        elif op[0] == "call":
            cut = min(op[2], len(op[1]))
            pieces = [ToolCall(calls, name="f", id=f"i{calls}", arguments=op[1][:cut])]
            pieces += [ToolCall(calls, arguments=op[1][cut:])] if op[1][cut:] else []
            deltas.append(say(tool_calls=tuple(pieces)))
            calls += 1
        elif calls and calls - 1 not in broken:
            broken[calls - 1] = op[1]
            deltas.append(say(broken=(BrokenToolCall(calls - 1, op[1]),)))
    return [*deltas, say(finish_reason=finish[0], stop_reason=finish[1])], broken


@given(ops=st.lists(OPS, max_size=8), finish=FINISHES, details=st.booleans(), data=st.data())
@example(ops=[], finish=("stop", None), details=False, data=None)
@example(ops=[("call", '{"a": 1}', 2), ("text", "after")], finish=("tool_calls", None), details=True, data=None)
@example(ops=[("text", "a"), ("call", '{"a', 2), ("break", "x"), ("text", "b")], finish=("stop", None), details=False, data=None)
def test_the_body_is_the_fold_of_the_events(ops, finish, details, data) -> None:
    deltas, broken = deltas_of(ops, finish)
    body = unary(*deltas, prompt_tokens_details=details)
    made, sent = encoder(True, prompt_tokens_details=details)
    for delta in deltas:  # by the per-token path or not
        if data is None or not delta.text or data.draw(st.booleans()):
            sent += made.delta(delta, None)
        else:
            sent += made.text(0, delta.text)
    assert fold(events_of(sent + made.close(USAGE)), broken) == body
    assert body["content"], "clients look at the first block"


WRITTEN = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_call>\n", '{"name": "f", "arguments": {"a": 1}}', "\n</tool_call>", "Hi ", "\n", "é"]),
    max_size=12,
)


@pytest.mark.parametrize("dialect", ["vllm.engine", "vllm.inference", "sglang.api"])
@given(pieces=WRITTEN, finish=st.sampled_from(["stop", "length"]))
def test_whatever_a_model_writes_stream_and_body_agree(dialect, pieces, finish) -> None:
    text = "".join(pieces)
    (_, streamed), (_, whole) = (answer(dialect, text, finish, stream=stream) for stream in (True, False))
    body = json.loads(whole)
    folded = fold(events_of(streamed), {})
    live = {block["id"] for block in body["content"] if block["type"] == "tool_use"}
    broken = [block for block in folded["content"] if block["type"] == "tool_use" and block["id"] not in live]
    for kind in ("thinking", "tool_use"):
        assert [block for block in folded["content"] if block["type"] == kind and block not in broken] == [
            block for block in body["content"] if block["type"] == kind
        ]
    assert {**folded, "content": 0} == {**body, "content": 0}
    if not broken:
        assert folded == body


def answer(dialect: str, text: str, finish: str, *, stream: bool) -> tuple[int, bytes]:
    """Through all of it, from the server's frames on."""
    transcoder = TRANSCODERS[dialect]
    fields = {"model": "m", "max_tokens": 1000, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    fields["tools"] = [{"name": "f", "input_schema": {}}]
    call = transcoder.request("POST", "/v1/messages", (), json.dumps(fields).encode(), request_id="r")
    adapter = transcoder.adapter
    teller = Teller(adapter.convention, call.calls[0].inference, sends_text=adapter.sends_text)
    events, detokenizer = [], TOKENIZER.detokenizer(())
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        events += teller.gain(TokensEvent(token_ids=[token], text=detokenizer.decode([token]), prompt_tokens=5))
    events += teller.finish(FinishEvent(finish_reason=finish, prompt_tokens=5), last=TokensEvent(text=""))
    response = call.response(created=1)
    outputs = [*response.receive_headers()]
    for event in events:
        outputs += response.receive_message(adapter.encode_response(event).SerializeToString())
    outputs += response.receive_status(0)
    assert response.error is None
    return outputs[0].status, b"".join(out.data for out in outputs if isinstance(out, BodyChunk))


def test_a_text() -> None:
    assert stream(say("He"), say("y", finish_reason="stop")) == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_r",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 10, "output_tokens": 0},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "He"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "y"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"input_tokens": 10, "output_tokens": 4},
        },
        {"type": "message_stop"},
    ]


def test_thinking_text_and_calls() -> None:
    deltas = [
        say(reasoning="hm"),
        say("Let me see.", reasoning="?"),
        say(tool_calls=(ToolCall(0, name="f", id="a", arguments='{"x": 1'), ToolCall(0, arguments="}"), ToolCall(1, name="g", id="b"))),
        say(finish_reason="tool_calls"),
    ]
    body = unary(*deltas)
    signature = body["content"][0].pop("signature")
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm?"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "b", "name": "g", "input": {}},
    ]
    assert body["stop_reason"] == "tool_use"
    kinds = [(event["type"], event.get("delta", {}).get("type"), event.get("index")) for event in stream(*deltas)][1:-2]
    assert kinds == [
        ("content_block_start", None, 0),
        ("content_block_delta", "thinking_delta", 0),
        ("content_block_delta", "thinking_delta", 0),
        ("content_block_delta", "signature_delta", 0),
        ("content_block_stop", None, 0),
        ("content_block_start", None, 1),
        ("content_block_delta", "text_delta", 1),
        ("content_block_stop", None, 1),
        ("content_block_start", None, 2),
        ("content_block_delta", "input_json_delta", 2),
        ("content_block_delta", "input_json_delta", 2),
        ("content_block_stop", None, 2),
        ("content_block_start", None, 3),
        ("content_block_stop", None, 3),
    ]
    assert len(signature) == 32
    assert unary(*deltas)["content"][0]["signature"] == signature, "the same for the same request"


@pytest.mark.parametrize(
    ("finish", "stop", "arguments", "reason", "sequence"),
    [
        ("stop", None, None, "end_turn", None),
        ("stop", 7, None, "end_turn", None),
        ("stop", "X", None, "stop_sequence", "X"),
        ("length", None, None, "max_tokens", None),
        ("length", "X", "{}", "max_tokens", None),
        ("tool_calls", None, "{}", "tool_use", None),
        ("stop", None, "{}", "tool_use", None),
        ("tool_calls", "X", "{}", "tool_use", None),
        ("tool_calls", "X", '{"a', "stop_sequence", "X"),
        ("tool_calls", None, '{"a', "tool_use", None),
        ("repetition", None, None, None, None),
    ],
)
def test_why_it_ended(finish, stop, arguments, reason, sequence) -> None:
    calls = [call(arguments=arguments, name="f", id="i")] if arguments else []
    body = unary(*calls, say(finish_reason=finish, stop_reason=stop))
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


def test_a_call_that_is_none_is_text_in_a_body_and_asks_for_nothing_in_a_stream() -> None:
    deltas = [
        say("a"),
        call(name="f", id="i", arguments='{"x'),
        say(broken=(BrokenToolCall(0, '<call>{"x'),)),
        say("b", finish_reason="stop"),
    ]
    body = unary(*deltas)
    assert body["content"] == [{"type": "text", "text": 'a<call>{"xb'}]
    assert body["stop_reason"] == stream(*deltas)[-2]["delta"]["stop_reason"] == "end_turn"


def test_arguments_that_are_no_json_are_kept_as_text() -> None:
    assert unary(call(name="f", id="i", arguments="{'a'}"), say(finish_reason="stop"))["content"][0]["input"] == "{'a'}"
    assert unary(call(name="f", id="i", arguments="[" * 5000), say(finish_reason="stop"))["content"][0]["input"] == "[" * 5000
    large = '{"n": 12345678901234567890123}'
    made, _ = encoder(False)
    made.delta(call(name="f", id="i", arguments=large), None)
    assert large.encode() in made.close(USAGE), "as the model wrote it"


def test_tokens_from_the_cache_are_counted_apart_where_they_are_shown() -> None:
    usage = {"input_tokens": 7, "output_tokens": 4, "cache_read_input_tokens": 3}
    assert unary(say("x", finish_reason="stop"), prompt_tokens_details=True)["usage"] == usage
    assert stream(say("x", finish_reason="stop"), prompt_tokens_details=True)[-2]["usage"] == usage


def test_an_error_amid_the_stream_ends_the_block() -> None:
    made, data = encoder(True)
    data += made.reasoning(0, "hm")
    *_, signed, stopped, last = events_of(data + made.error(UpstreamStatusError(Code.UNAVAILABLE, "gone")))
    assert (signed["delta"]["type"], stopped["type"]) == ("signature_delta", "content_block_stop")
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "The model server is unavailable"}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "api_error"),
    ],
)
def test_errors_have_the_form_of_their_path(status, kind) -> None:
    error = CodecError("what is wrong\ud800")
    error.http_status = status
    for path in ("/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens", "/v1/messages/batches"):
        head, body, _ = encode_error_response(error, path)
        assert head.status == status
        assert json.loads(body.data) == {"type": "error", "error": {"type": kind, "message": "what is wrong?"}}
    for path in ("", "/v1/chat/completions", "/v1/messagesX"):
        assert json.loads(encode_error_response(error, path)[1].data)["error"]["code"] == status
