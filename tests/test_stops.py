"""Stop strings: any partition of the text gives what one character at a time gives, and what a search of the whole text gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec._errors import UsageError
from gaie_codec.text import StopMatcher

Holdback = Literal["prefix", "window"]

# Two letters make overlaps, repeats and stop strings inside stop strings the normal case.
TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)
HOLDBACK = st.sampled_from(["prefix", "window"])
PIECES = st.lists(st.tuples(st.text("ab", max_size=5), st.booleans()), max_size=12)


def run(stops: Sequence[str], pieces: Sequence[tuple[str, bool]], holdback: Holdback) -> tuple[str, str | None, int, str]:
    matcher = StopMatcher(stops, holdback=holdback)
    emitted = "".join([matcher.feed(text, check=check) for text, check in pieces])
    return emitted, matcher.matched, matcher.match_offset, matcher.held


def naive(stops: Sequence[str], pieces: Sequence[tuple[str, bool]], holdback: Holdback) -> tuple[str, str | None, int, str]:
    """The definition, character by character, with a search of everything so far at each."""
    characters = [(char, check) for text, check in pieces for char in text]
    whole = "".join([char for char, _ in characters])
    out = 0
    for end in range(1, len(whole) + 1):
        seen = whole[:end]
        found = [stop for stop in stops if seen.endswith(stop)] if characters[end - 1][1] else []
        if found:
            stop = max(found, key=len)
            return whole[:out], stop, end - len(stop) - out, whole[out:]
        if holdback == "window":
            waiting = min(max(map(len, stops)) - 1, end)
        else:
            waiting = max(k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k]))
        out = end - waiting
    return whole[:out], None, 0, whole[out:]


@given(STOPS, PIECES, HOLDBACK)
@example(["abb", "b"], [("ab", True)], "prefix")  # held text from before the stop string that ends first
@example(["ab", "bab"], [("bab", True)], "prefix")  # the longer of two that end together
@example(["aa"], [("aa", False), ("a", True)], "prefix")  # begins unchecked, ends checked
@example(["ba", "a"], [("a", False), ("", True), ("ba", True)], "window")
def test_agrees_with_the_definition(stops: list[str], pieces: list[tuple[str, bool]], holdback: Holdback) -> None:
    assert run(stops, pieces, holdback) == naive(stops, pieces, holdback)


@given(STOPS, TEXT, st.data(), HOLDBACK)
def test_any_partition(stops: list[str], text: str, data: st.DataObject, holdback: Holdback) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = run(stops, [(text, True)], holdback)
    assert run(stops, [(piece, True) for piece in pieces], holdback) == whole
    emitted, matched, offset, held = whole
    assert emitted + held == text
    assert matched is None or held.startswith(matched, offset)


@given(STOPS, PIECES, HOLDBACK)
def test_flush_loses_nothing(stops: list[str], pieces: list[tuple[str, bool]], holdback: Holdback) -> None:
    matcher = StopMatcher(stops, holdback=holdback)
    emitted = "".join([matcher.feed(text, check=check) for text, check in pieces])
    held = matcher.held
    assert matcher.flush() == held
    assert emitted + held == "".join([text for text, _ in pieces])
    assert (matcher.held, matcher.flush()) == ("", "")


def test_no_stop_string_reaches_across_a_flush() -> None:
    matcher = StopMatcher(["ab"])
    assert (matcher.feed("xa"), matcher.flush(), matcher.feed("b"), matcher.matched) == ("x", "a", "b", None)


def test_prefix_holds_only_what_may_be_a_stop_string() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.feed(text) for text in ("one", " <", "b> ", "</e", "nd", "> more", "!")] == ["one", " ", "<b> ", "", "", "", ""]
    assert (matcher.matched, matcher.match_offset, matcher.held) == ("</end>", 0, "</end> more!")


def test_window_cuts_where_vllm_cuts() -> None:
    matcher = StopMatcher(["1234"], holdback="window")
    assert [matcher.feed(text) for text in ("ab", "cd", "e", "12", "34")] == ["", "a", "b", "cd", "e"]
    assert (matcher.matched, matcher.match_offset, matcher.held) == ("1234", 0, "1234")


@pytest.mark.parametrize("stops", [[], [""], ["a", ""]])
def test_refuses_no_and_empty_stop_strings(stops: list[str]) -> None:
    with pytest.raises(UsageError):
        StopMatcher(stops)


class CountedText(str):
    """A stop string that counts how often one of its characters is looked at."""

    looks = 0

    def __getitem__(self, key: object) -> str:
        CountedText.looks += 1
        return super().__getitem__(key)  # type: ignore[index]


@pytest.mark.parametrize("holdback", ["prefix", "window"])
@pytest.mark.parametrize("text", ["a" * 20_000, ("a" * 999 + "x") * 20, ("a" * 500 + "b") * 40])
def test_cost_is_linear(text: str, holdback: Holdback) -> None:
    """One character at a time, against a long stop string that almost matches everywhere."""
    CountedText.looks = 0
    matcher = StopMatcher([CountedText("a" * 10_000 + "b")], holdback=holdback)
    emitted = "".join([matcher.feed(char) for char in text])
    assert emitted + matcher.held == text
    assert CountedText.looks < 8 * len(text)


def test_a_stop_string_that_never_begins_costs_nothing() -> None:
    CountedText.looks = 0
    matcher = StopMatcher([CountedText("a" * 1_000_000)])
    assert matcher.feed("no such letter") == "no such letter"
    assert matcher.feed("") == ""
    assert CountedText.looks <= 2
