"""`Teller`: every convention of every snapshot tells the same answer, and `Tally` finds in it just what was generated."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaie_codec import FinishEvent, InferenceRequest, PromptEvent, SamplingParams, TokenLogprob, TokensEvent, adapters, snapshots
from gaie_codec._conventions import Teller
from gaie_codec._tally import Tally
from gaie_codec.adapters.base import Convention

ADAPTERS = [
    adapters.get(snapshot)
    for dialect, names in snapshots.SNAPSHOTS.items()
    for name in names
    if not (snapshot := snapshots.load(dialect, name)).refused
]
PYTHON, RUST = Convention(), Convention(counts="total", repeats="all")


def request(n: int = 1, *, stream: bool = True) -> InferenceRequest:
    return InferenceRequest(request_id="r", stream=stream, sampling=SamplingParams(n=n))


def gained(*token_ids: int, index: int = 0, text: str = "") -> TokensEvent:
    entries = tuple(TokenLogprob(token_id=token_id, logprob=-1.0) for token_id in token_ids)
    return TokensEvent(index=index, token_ids=list(token_ids), text=text, logprobs=entries, prompt_tokens=5)


END = FinishEvent(prompt_tokens=5)


def tell(convention: Convention, *, stream: bool = True, text: bool = False) -> list:
    teller = Teller(convention, request(stream=stream), sends_text=text)
    return [*teller.begin(5), *teller.gain(gained(7, 8, text="ab")), *teller.finish(END, last=gained(9, text="c"))]


def brief(events: list) -> list:
    return [
        (type(event).__name__, event.token_ids, event.completion_tokens) if not isinstance(event, PromptEvent) else "prompt"
        for event in events
    ]


def test_the_two_servicers():
    assert brief(tell(PYTHON)) == [("TokensEvent", [7, 8], 2), ("TokensEvent", [9], 1), ("FinishEvent", [9], 1)]
    assert brief(tell(RUST)) == [("TokensEvent", [7, 8], 2), ("TokensEvent", [9], 3), ("FinishEvent", [7, 8, 9], 3)]


def test_joined_and_cumulative():
    delta = Convention(joins_finish=True, announces_prompt=True, repeats="nothing")
    events = tell(delta, text=True)
    assert brief(events) == ["prompt", ("TokensEvent", [7, 8], 2), ("FinishEvent", [9], 3)]
    assert (events[1].text, events[2].text, events[2].is_delta) == ("ab", "c", True)
    assert [event.prompt_tokens for event in events] == [5, 0, 0]
    whole = Convention(counts="total", repeats="all", is_cumulative=True, joins_finish=True, names_choices=True)
    events = tell(whole, text=True)
    assert brief(events) == [("TokensEvent", [7, 8], 2), ("FinishEvent", [7, 8, 9], 3)]
    assert (events[1].text, events[1].is_delta, events[1].choice_id) == ("abc", False, "r")


def test_without_stream_a_choice_is_told_once():
    for convention in (PYTHON, RUST, Convention(joins_finish=True, announces_prompt=True)):
        (event,) = tell(convention, stream=False)
        assert brief([event]) == [("FinishEvent", [7, 8, 9], 3)]
        assert event.prompt_tokens == 5


def test_an_end_without_tokens_repeats_none():
    teller = Teller(PYTHON, request(), sends_text=False)
    teller.gain(gained(7))
    assert brief(teller.finish(END, last=TokensEvent())) == [("FinishEvent", [], 0)]
    teller = Teller(PYTHON, request(), sends_text=False)
    teller.gain(gained(7))
    assert brief(teller.finish(END)) == [("FinishEvent", [7], 1)], "the end of what came just before"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: str(adapter.snapshot))
@settings(max_examples=25)
@given(
    steps=st.lists(st.lists(st.integers(3, 50), max_size=3), max_size=6),
    has_last=st.booleans(),
    stream=st.booleans(),
)
def test_tally_inverts_teller(adapter, steps, has_last, stream):
    teller = Teller(adapter.convention, request(stream=stream), sends_text=adapter.sends_text)
    tally = Tally(0, adapter.counts)
    if not has_last and steps:
        steps = [*steps, []]
    events = list(teller.begin(5))
    for step in steps[:-1]:
        events += teller.gain(gained(*step))
    events += teller.finish(END, last=gained(*(steps[-1] if steps else [])))
    ids, entries = [], []
    for event in events:
        if not isinstance(event, PromptEvent):
            new, found = tally.take(event)
            ids += new
            entries += found
    generated = [token_id for step in steps for token_id in step]
    assert ids == generated
    assert [entry.token_id for entry in entries] == generated
    assert tally.completion_tokens == len(generated)
    assert sum(isinstance(event, FinishEvent) for event in events) == 1
