"""The parser stage: what becomes of the text of one choice, whoever parses it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec._choices import Delta
from gaie_codec._logprob_texts import TextLogprob
from gaie_codec._parts import OutputSettings, PartsStage, tool_call_id
from gaie_codec.text import BrokenToolCall, Content, Reasoning, ToolCall
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
MODEL = load_tokenizer(str(Path(__file__).parent / "golden" / "model"))  # the tags are tokens of it
EOS = 2


class ToyParser:
    """(reasoning) content [name|arguments]"""

    def __init__(self) -> None:
        self._state = "content"
        self._call = ""
        self._index = -1

    def feed(self, text):
        parts = []
        for character in text:
            if self._state == "content" and character in "([":
                self._state = {"(": "reasoning", "[": "name"}[character]
                self._call = ""
            elif self._state == "reasoning" and character == ")":
                self._state = "content"
            elif self._state == "name" and character == "|":
                self._index += 1
                parts.append(ToolCall(self._index, name=self._call))
                self._state = "arguments"
            elif self._state == "arguments" and character == "]":
                self._state = "content"
            else:
                self._call += character
                if self._state == "content":
                    parts.append(Content(character))
                elif self._state == "reasoning":
                    parts.append(Reasoning(character))
                elif self._state == "arguments":
                    parts.append(ToolCall(self._index, arguments=character))
        return parts

    def finish(self):
        if self._state == "arguments":
            return [BrokenToolCall(self._index, self._call)]
        return [Content(f"[{self._call}")] if self._state == "name" else []


def stage(tokenizer=TOKENIZER, **settings) -> PartsStage:
    settings.setdefault("make_parser", ToyParser)
    return PartsStage(0, OutputSettings(**settings), request_id="r", tokenizer=tokenizer, eos_token_ids=frozenset({EOS}))


def finish(text: str, reason: str = "stop", **fields) -> Delta:
    return Delta(0, text, finish_reason=reason, **fields)


def test_what_is_said_in_order_is_one_delta() -> None:
    (delta,) = stage().receive(Delta(0, "(why)text[f|{}]"))
    assert (delta.reasoning, delta.text) == ("why", "text")
    assert [(call.index, call.name, call.arguments) for call in delta.tool_calls] == [(0, "f", ""), (0, "", "{"), (0, "", "}")]


def test_what_is_not_in_order_keeps_its_order() -> None:
    deltas = stage().receive(Delta(0, "[f|1]text(why)"))
    assert [(bool(one.tool_calls), one.text, one.reasoning) for one in deltas] == [(True, "", ""), (False, "text", ""), (False, "", "why")]


def test_the_finish_rides_on_the_last_and_the_log_probabilities_on_the_first() -> None:
    logprobs = (TextLogprob("a", -1.0),)
    deltas = stage().receive(finish("[f|1]text", logprobs=logprobs, token_ids=[7], stop_reason="x", kv_transfer_params="{}"))
    assert [(one.logprobs, one.token_ids, one.finish_reason, one.stop_reason, one.kv_transfer_params) for one in deltas] == [
        (logprobs, [7], None, None, ""),
        ((), [], "tool_calls", "x", "{}"),
    ]


@pytest.mark.parametrize(
    ("text", "reason", "named", "expected"),
    [
        ("[f|1]", "stop", False, "tool_calls"),
        ("[f|1]", "stop", True, "stop"),
        ("[f|1]", "length", False, "length"),
        ("text", "stop", False, "stop"),
        ("[f|1", "stop", False, "stop"),  # nobody should run a call that is cut off
        ("[f|1][g|", "stop", False, "tool_calls"),
    ],
)
def test_finish_reason(text: str, reason: str, named: bool, expected: str) -> None:
    assert stage(finishes_with_tool_calls=not named).receive(finish(text, reason))[-1].finish_reason == expected


def test_nothing_said_still_carries_its_tokens() -> None:
    assert stage().receive(Delta(0, "(", token_ids=[5])) == [Delta(0, "", token_ids=[5])]


def test_hidden_reasoning_is_not_told() -> None:
    (delta,) = stage(hides_reasoning=True).receive(Delta(0, "(why)text"))
    assert (delta.reasoning, delta.text) == ("", "text")


def test_what_was_held_back_is_told_when_the_answer_breaks_off() -> None:
    parsed = stage()
    parsed.receive(Delta(0, "text[na"))
    assert [delta.text for delta in parsed.abandon()] == ["[na"]
    parsed = stage()
    parsed.receive(Delta(0, "[f|1"))
    assert parsed.abandon() == [], "the pieces are with the client"


def test_ids_of_calls() -> None:
    deltas = stage().receive(Delta(0, "[f|1][g|2]"))
    given_ids = [call.id for delta in deltas for call in delta.tool_calls if call.name]
    assert given_ids == [tool_call_id("openai", "r", 0, 0), tool_call_id("openai", "r", 0, 1)]
    assert all(re.fullmatch("chatcmpl-tool-[0-9a-f]{16}", one) for one in given_ids)
    assert re.fullmatch("[0-9a-zA-Z]{9}", tool_call_id("mistral", "r", 0, 0))
    assert (
        len(
            {
                tool_call_id(style, request, choice, call)
                for style in ("openai", "mistral")
                for request in "ab"
                for choice in (0, 1)
                for call in (0, 1)
            }
        )
        == 16
    )


def test_an_id_that_the_model_wrote_stays() -> None:
    class Parser(ToyParser):
        def feed(self, text):
            return [ToolCall(0, "f", "{}", id="functions.f:0")]

    (delta,) = stage(make_parser=Parser).receive(Delta(0, "x"))
    assert delta.tool_calls[0].id == "functions.f:0"


def test_a_parser_that_takes_ids_gets_ids() -> None:
    class Parser(ToyParser):
        def feed_ids(self, token_ids):
            return [Content(f"{token_ids}")]

    parsed = stage(make_parser=Parser)
    assert parsed.takes_ids
    assert parsed.receive(Delta(0, "text", token_ids=[4, 5]))[0].text == "[4, 5]"
    assert parsed.receive(Delta(0, "text"))[0].text == "text", "a server that sends no ids"


START, END = (MODEL.encode(tag, add_special_tokens=False) for tag in ("<think>", "</think>"))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("tags", ["both", "end", "none"])
def test_reasoning_tokens(inside: bool, tags: str) -> None:
    ids = [*(START if tags == "both" else []), 70, 71, *(END if tags != "none" else []), 72, EOS]
    expected = {"both": 2, "end": 2 * inside, "none": 3 * inside}[tags]
    whole = stage(MODEL, reasoning_start="<think>", reasoning_ends=("</think>", "<tool_call>"), begins_inside=inside)
    whole.count(ids)
    one_by_one = stage(MODEL, reasoning_start="<think>", reasoning_ends=("</think>", "<tool_call>"), begins_inside=inside)
    for token_id in ids:
        one_by_one.count([token_id])
    assert whole.reasoning_tokens == one_by_one.reasoning_tokens == expected


def test_reasoning_is_tokenized_where_its_tokens_are_not_known() -> None:
    parsed = stage(MODEL, reasoning_start="<think>", reasoning_ends=("</think>", "<tool_call>"))
    parsed.receive(Delta(0, "(Hello, world)text"))
    assert parsed.reasoning_tokens == sum(len(MODEL.encode(character, add_special_tokens=False)) for character in "Hello, world")
    parsed.receive(Delta(0, "", finish_reason="stop"))
    assert parsed.reasoning_tokens == len(MODEL.encode("Hello, world", add_special_tokens=False)), "at the end as a whole"


def test_reasoning_is_counted_by_ids_or_by_text_and_never_by_both() -> None:
    """The per-token path of servers that send text, sglang.api's, sees no ids; the first and the last message have them."""
    parsed = stage(MODEL, reasoning_start="<think>", reasoning_ends=("</think>", "<tool_call>"), begins_inside=True)
    parsed.receive(Delta(0, "(a", token_ids=MODEL.encode("a", add_special_tokens=False)))
    assert parsed.reasoning_tokens == 1
    parsed.counts_text = True
    parsed.feed("b")
    parsed.receive(Delta(0, "c)", token_ids=[*MODEL.encode("c", add_special_tokens=False), *END]))
    assert parsed.reasoning_tokens == 3


@given(st.text("(a)[b|]", max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_any_cut_gives_the_same(text: str, cuts: list[int]) -> None:
    def fold(pieces: list[str]):
        parsed = stage()
        deltas = [delta for piece in pieces for delta in parsed.receive(Delta(0, piece))] + parsed.receive(finish(""))
        calls: dict[int, list[str]] = {}
        for delta in deltas:
            for call in delta.tool_calls:
                calls.setdefault(call.index, []).append(f"{call.id}{call.name}{call.arguments}")
        ordered = [msgspec.structs.asdict(delta) for delta in deltas]
        return (
            "".join(one["reasoning"] for one in ordered),
            "".join(one["text"] for one in ordered),
            {index: "".join(pieces) for index, pieces in calls.items()},
            deltas[-1].finish_reason,
            [one for delta in deltas for one in delta.broken],
        )

    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert fold([text[a:b] for a, b in pairwise(places)]) == fold([text])


def test_tokens_are_not_counted_twice_where_text_is() -> None:
    parsed = stage(MODEL, reasoning_start="<think>", reasoning_ends=("</think>", "<tool_call>"), begins_inside=True)
    parsed.counts_text = True
    parsed.receive(Delta(0, "(Hello)", token_ids=[70, 71, 72], finish_reason="stop"))
    assert parsed.reasoning_tokens == len(MODEL.encode("Hello", add_special_tokens=False))


def test_text_that_is_released_without_ids_was_counted_by_them() -> None:
    class Holding(ToyParser):
        def finish(self):
            return [Reasoning("<t")]

    parsed = stage(MODEL, make_parser=Holding, reasoning_start="<think>", reasoning_ends=("</think>",), begins_inside=True)
    parsed.receive(Delta(0, "", token_ids=[70, 71]))
    parsed.receive(Delta(0, "", finish_reason="length"))
    assert parsed.reasoning_tokens == 2
