"""`/v1/responses`, the answer: which events come in which order, and that the stream, folded, is the body."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import (
    BodyChunk,
    BodyEvent,
    Code,
    EndOfBody,
    FinishEvent,
    ModelInfo,
    ResponseHead,
    SSEDecoder,
    TokensEvent,
    Transcoder,
    UpstreamStatusError,
    Usage,
    UsageError,
)
from gaie_codec._choices import Delta
from gaie_codec._logprob_texts import TextLogprob
from gaie_codec.openai.endpoint import ResponseMeta
from gaie_codec.openai.responses import ResponsesOptions
from gaie_codec.openai.responses_response import make_encoder
from gaie_codec.testing import ByteTokenizer
from gaie_codec.text import BrokenToolCall, ToolCall

META = ResponseMeta(id="resp_1", created=7)
USAGE = Usage(prompt_tokens=5, completion_tokens=4, cached_tokens=2, reasoning_tokens=1)
LOGPROB = TextLogprob("a", -0.5, (("a", -0.5), ("b", -1.5)))


def encoder(*, stream, **options):
    made = make_encoder(ResponsesOptions(id="resp_1", model="m", stream=stream, **options), META)
    first = made.open(range(1), [[1]], Usage())
    return made, first


def feed(made, deltas):
    """As `Response` does: text and reasoning alone go the short way, unless chunks say more."""
    parts = []
    for delta in deltas:
        alone = delta.finish_reason is None and not (delta.tool_calls or delta.broken or delta.logprobs or made.is_detailed)
        if alone and delta.text and not delta.reasoning:
            parts.append(made.text(0, delta.text))
        elif alone and delta.reasoning and not delta.text:
            parts.append(made.reasoning(0, delta.reasoning))
        else:
            parts.append(made.delta(delta, None))
    return b"".join(parts)


def streamed(deltas, **options):
    """The events, each checked for its name and its number."""
    made, first = encoder(stream=True, **options)
    data = first + feed(made, deltas) + made.close(USAGE)
    return read(data)


def read(data):
    decoder = SSEDecoder()
    told = list(decoder.receive_data(data))
    decoder.receive_eof()
    events = [json.loads(one.data) for one in told]
    assert [one.event for one in told] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def unary(deltas, **options):
    made, first = encoder(stream=False, **options)
    assert first == feed(made, deltas) == b""
    return json.loads(made.close(USAGE))


def fold(events):
    """What a client knows that reads the events of items alone: by place the item as it ended, without calls that were taken back."""
    items, texts = {}, {}
    for event in events:
        kind, place = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert place == len(items)
            items[place] = event["item"]
            texts[place] = ""
            assert event["item"]["status"] == "in_progress"
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[place]["id"]
            texts[place] += event["delta"]
        elif kind.endswith((".text.done", "_text.done")):
            assert event["text"] == texts[place]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == texts[place]
        elif kind == "response.output_item.done":
            item = items[place] = event["item"]
            whole = item["arguments"] if item["type"] == "function_call" else "".join(part["text"] for part in item["content"])
            assert whole == texts[place]
    assert all(item["status"] != "in_progress" for item in items.values()), "every item ends"
    return [item for item in items.values() if item["type"] != "function_call" or item["status"] != "incomplete"]


def finish(reason="stop", **fields):
    return Delta(0, fields.pop("text", ""), finish_reason=reason, **fields)


def kinds(events):
    return [event["type"].removeprefix("response.") for event in events]


def test_text() -> None:
    events = streamed([Delta(0, "Hel"), Delta(0, "lo"), finish(text="!")])
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo", "!"]
    assert events[0]["response"] == events[1]["response"]
    assert (events[0]["response"]["status"], events[0]["response"]["output"], events[0]["response"]["usage"]) == ("in_progress", [], None)
    (item,) = events[-1]["response"]["output"]
    assert item["content"] == [{"annotations": [], "text": "Hello!", "type": "output_text", "logprobs": None}]
    assert item["id"].startswith("msg_")
    assert item == events[-2]["item"]


def test_reasoning_text_and_calls() -> None:
    deltas = [
        Delta(0, "", reasoning="hm"),
        Delta(0, "", reasoning="m"),
        Delta(0, "\n\n"),
        Delta(0, "", tool_calls=(ToolCall(0, "f", "", "call_a"),)),
        Delta(0, "", tool_calls=(ToolCall(0, "", "{}"), ToolCall(1, "g", "[", "call_b"))),
        Delta(0, "", tool_calls=(ToolCall(1, "", "]"),)),
        finish("tool_calls"),
    ]
    events = streamed(deltas, shows_empty=False)
    assert kinds(events)[2:-1] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ], "white space between reasoning and call is no message"
    reasoning, first, second = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"text": "hmm", "type": "reasoning_text"}]
    assert (first["name"], first["call_id"], first["arguments"], first["status"]) == ("f", "call_a", "{}", "completed")
    assert (second["name"], second["call_id"], second["arguments"]) == ("g", "call_b", "[]")
    assert len({item["id"] for item in events[-1]["response"]["output"]}) == 3
    assert [item["id"][:3] for item in events[-1]["response"]["output"]] == ["rs_", "fc_", "fc_"]


def test_what_all_of_the_answer_is_white_space_is_a_message() -> None:
    assert [item["content"][0]["text"] for item in unary([Delta(0, "\n"), finish()])["output"]] == ["\n"]
    assert [item["content"][0]["text"] for item in unary([Delta(0, "\n"), Delta(0, "x\n"), finish()])["output"]] == ["\nx\n"]


@pytest.mark.parametrize("shows_empty", [False, True])
def test_an_answer_of_nothing(shows_empty: bool) -> None:
    events = streamed([finish()], shows_empty=shows_empty)
    output = events[-1]["response"]["output"]
    assert [item["content"] for item in output] == ([[]] if shows_empty else []), "as vLLM without and with a parser"
    assert fold(events) == output


@pytest.mark.parametrize("was_done", [False, True])
def test_a_call_that_is_none_is_a_message(was_done: bool) -> None:
    first = ToolCall(0, "f", '{"a', "call_a")
    calls = (first, ToolCall(1, "g", "{}", "call_b")) if was_done else (first,)
    deltas = [Delta(0, "", tool_calls=calls), finish(broken=(BrokenToolCall(0, '<f>{"a'),))]
    events = streamed(deltas, shows_empty=False)
    ended = [event["item"] for event in events if event["type"] == "response.output_item.done" and event["output_index"] == 0]
    assert [item["status"] for item in ended] == (["completed", "incomplete"] if was_done else ["incomplete"])
    body = unary(deltas, shows_empty=False)
    assert [item["type"] for item in body["output"]] == [*(["function_call"] if was_done else []), "message"]
    assert body["output"][-1]["content"][0]["text"] == '<f>{"a'
    assert events[-1]["response"] == body
    assert fold(events) == body["output"]


@pytest.mark.parametrize(("reason", "told"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_incomplete(reason: str, told: str) -> None:
    deltas = [Delta(0, "", reasoning="hm"), Delta(0, "a"), finish(reason)]
    events = streamed(deltas)
    assert events[-1]["type"] == "response.incomplete"
    body = unary(deltas)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": told})
    assert [item["status"] for item in body["output"]] == ["completed", "incomplete"]
    assert unary([Delta(0, "a"), finish("repetition")])["status"] == "completed"


@pytest.mark.parametrize(("arguments", "status"), [("{}", "completed"), ("{", "incomplete"), ("[" * 5000, "incomplete")])
def test_a_call_at_the_limit(arguments: str, status: str) -> None:
    body = unary([Delta(0, "", tool_calls=(ToolCall(0, "f", arguments, "c"),)), finish("length")], shows_empty=False)
    assert (body["status"], body["output"][0]["status"]) == ("incomplete", status)


def test_usage_and_transfer_params() -> None:
    body = unary([finish(text="a", kv_transfer_params='{"a":\n1}')])
    assert body["kv_transfer_params"] == {"a": 1}
    usage = body["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (5, 4, 9)
    assert (usage["input_tokens_details"]["cached_tokens"], usage["output_tokens_details"]["reasoning_tokens"]) == (2, 1)
    streamed([finish(text="a", kv_transfer_params='{"a":\n1}')])


def test_log_probabilities_are_those_of_the_text() -> None:
    def entry(token):
        return (TextLogprob(token, -0.5, (("b", -1.5),)),)

    deltas = [
        Delta(0, "", reasoning="hm", logprobs=entry("hm")),
        Delta(0, "", logprobs=entry("held")),
        Delta(0, "text", logprobs=entry("text")),
        finish(logprobs=entry("end")),
    ]
    events = streamed(deltas, logprobs=True, shows_empty=False)
    by_delta = [[one["token"] for one in event["logprobs"]] for event in events if event["type"] == "response.output_text.delta"]
    assert by_delta == [["held", "text"], ["end"]]
    body = unary(deltas, logprobs=True, shows_empty=False)
    logprobs = body["output"][1]["content"][0]["logprobs"]
    assert [one["token"] for one in logprobs] == ["held", "text", "end"]
    assert logprobs[1] == {
        "token": "text",
        "bytes": list(b"text"),
        "logprob": -0.5,
        "top_logprobs": [{"token": "b", "bytes": [98], "logprob": -1.5}],
    }
    assert events[-1]["response"] == body
    after_a_call = [Delta(0, "", tool_calls=(ToolCall(0, "f", "{}", "c"),), logprobs=entry("f")), finish(logprobs=entry("end"))]
    assert [item["type"] for item in unary(after_a_call, logprobs=True, shows_empty=False)["output"]] == ["function_call"]
    nothing = unary([finish(logprobs=entry("end"))], logprobs=True, shows_empty=False)
    assert [one["token"] for one in nothing["output"][0]["content"][0]["logprobs"]] == ["end"]


def test_an_error_amid_the_stream() -> None:
    made, first = encoder(stream=True)
    data = first + feed(made, [Delta(0, "Hel")]) + made.error(UpstreamStatusError(Code.RESOURCE_EXHAUSTED, "too many"))
    *_, failed, error = read(data)
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "rate_limit_exceeded", "message": "too many"}
    assert [(item["status"], item["content"][0]["text"]) for item in failed["response"]["output"]] == [("incomplete", "Hel")]
    assert error["type"] == "error"
    assert (error["code"], error["message"], error["param"]) == ("rate_limit_exceeded", "too many", None)
    assert error["error"]["code"] == 429
    assert b"completed" not in data


def test_a_body_that_is_passed_through_is_a_bug() -> None:
    for stream in (False, True):
        with pytest.raises(UsageError):
            encoder(stream=stream)[0].body(BodyEvent(data=b""))


def test_ids_are_the_same_for_the_same_response() -> None:
    deltas = [Delta(0, "a", reasoning="b"), finish()]
    assert streamed(deltas) == streamed(deltas)
    assert unary(deltas) == streamed(deltas)[-1]["response"]


TEXTS = st.sampled_from(["", "a", " ", "\n", "b c", "é🌍"])
LOGPROBS = st.lists(st.just(LOGPROB), max_size=2).map(tuple)
BROKEN = st.lists(st.builds(BrokenToolCall, st.integers(0, 3), TEXTS), max_size=2).map(tuple)


@st.composite
def deltas(draw):
    """Of any kinds in any order: several calls whose pieces may be mixed, calls taken back, content after calls."""
    begun: set[int] = set()
    numbers = count()
    made = []
    for _ in range(draw(st.integers(0, 6))):
        calls = []
        for index in draw(st.lists(st.integers(0, 3), max_size=2)):
            name = "" if index in begun else "f"
            begun.add(index)
            calls.append(ToolCall(index, name, draw(st.sampled_from(["", "{", "}"])), f"call_{next(numbers)}" if name else ""))
        broken = draw(BROKEN)
        begun -= {one.index for one in broken}
        made.append(Delta(0, draw(TEXTS), logprobs=draw(LOGPROBS), reasoning=draw(TEXTS), tool_calls=tuple(calls), broken=broken))
    last = finish(draw(st.sampled_from(["stop", "length", "tool_calls", "content_filter", "odd"])), text=draw(TEXTS), broken=draw(BROKEN))
    return [*made, last]


@given(deltas(), st.booleans(), st.booleans())
@example([Delta(0, "", tool_calls=(ToolCall(0, "f", "", "c"),)), finish("length", text=" ")], False, True)
def test_the_stream_folded_is_the_body(deltas, logprobs: bool, shows_empty: bool) -> None:
    options = {"logprobs": logprobs, "shows_empty": shows_empty}
    events = streamed(deltas, **options)
    body = unary(deltas, **options)
    assert events[-1]["response"] == body
    # Only when the limit cut a call that the parser lets stand, the body has one that is incomplete.
    cut = [item for item in body["output"] if item["type"] == "function_call" and item["status"] == "incomplete"]
    assert len(cut) <= (body["status"] == "incomplete")
    assert fold(events) == [item for item in body["output"] if item not in cut]
    said = "".join(part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"])
    asked = "".join(delta.text + "".join(one.text for one in delta.broken) for delta in deltas)
    assert "".join(said.split()) == "".join(asked.split()), "nothing but white space is left out"
    thought = "".join(part["text"] for item in body["output"] if item["type"] == "reasoning" for part in item["content"])
    assert thought == "".join(delta.reasoning for delta in deltas)


def test_through_the_transcoder() -> None:
    """The head waits for the first message; bytes, not deltas."""
    transcoder = Transcoder("vllm.engine", tokenizer=ByteTokenizer(), model=ModelInfo(max_model_len=100))
    bodies = {}
    for stream in (False, True):
        request = json.dumps({"input": "Hi", "stream": stream, "max_output_tokens": 9}).encode()
        response = transcoder.request("POST", "/v1/responses", {}, request, request_id="r").response(created=7)
        assert not response.receive_headers()
        events = [TokensEvent(token_ids=[token_id], completion_tokens=1) for token_id in b"hi!"] if stream else []
        ids = [33] if stream else [*b"hi!"]  # the last message repeats
        events.append(FinishEvent(token_ids=ids, finish_reason="stop", prompt_tokens=2, completion_tokens=len(ids)))
        outputs = [
            out for event in events for out in response.receive_message(transcoder.adapter.encode_response(event).SerializeToString())
        ]
        outputs += response.receive_trailers({"grpc-status": "0"})
        head, *chunks, end = outputs
        assert isinstance(head, ResponseHead)
        assert isinstance(end, EndOfBody)
        assert ("content-type", "text/event-stream; charset=utf-8" if stream else "application/json") in head.headers
        data = b"".join(chunk.data for chunk in chunks if isinstance(chunk, BodyChunk))
        bodies[stream] = read(data)[-1]["response"] if stream else json.loads(data)
    assert bodies[True] == bodies[False]
    assert bodies[True]["output"][0]["content"][0]["text"] == "hi!"
    assert bodies[True]["max_output_tokens"] == 9
