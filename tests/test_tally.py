"""What is new in an event, and how many tokens that makes, whatever the server repeats and counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import FinishEvent, InferenceRequest, SamplingParams, TokenLogprob, TokensEvent, adapters, snapshots
from gaie_codec._conventions import Teller
from gaie_codec._tally import Tally
from gaie_codec.adapters import DIALECTS
from strategies import neighbours

ADAPTERS = {dialect: adapters.get(snapshots.load(dialect)) for dialect in DIALECTS}


def entry(token_id):
    return TokenLogprob(token_id=token_id, logprob=-0.5)


def entries(*token_ids):
    return tuple(entry(token_id) for token_id in token_ids)


def run(tally, *events):
    """What is new in each of the events, and the count after it."""
    return [(*tally.take(event), tally.completion_tokens) for event in events]


@pytest.mark.parametrize("dialect", DIALECTS)
@given(pieces=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=5), data=st.data())
def test_every_convention_gives_each_token_once(dialect, pieces, data):
    adapter = ADAPTERS[dialect]
    convention = data.draw(st.sampled_from(neighbours(adapter)))
    request = InferenceRequest(request_id="r", stream=data.draw(st.booleans()), sampling=SamplingParams(logprobs=0))
    teller = Teller(convention, request, sends_text=adapter.sends_text)
    told = [TokensEvent(token_ids=piece, logprobs=entries(*piece), text="x") for piece in pieces]
    last = told.pop() if told and data.draw(st.booleans()) else None
    events = [event for piece in told for event in teller.gain(piece)] + teller.finish(FinishEvent(), last=last)
    tally = Tally(0, adapter.counts)
    seen = [tally.take(event) for event in events if isinstance(event, TokensEvent | FinishEvent)]
    everything = [token for piece in pieces for token in piece]
    assert [token for new, _ in seen for token in new] == everything
    assert [one.token_id for _, new in seen for one in new] == everything
    assert tally.completion_tokens == len(everything)


def test_a_finish_repeats_the_last_all_or_nothing():
    for repeated in ([3], [1, 2, 3], []):
        tally = Tally(0, "ids")
        new = run(tally, *(TokensEvent(token_ids=[token]) for token in (1, 2, 3)), FinishEvent(token_ids=repeated))
        assert [ids for ids, _, _ in new] == [[1], [2], [3], []]
        assert [count for _, _, count in new] == [1, 2, 3, 3]
    assert run(Tally(0, "ids"), TokensEvent(token_ids=[1]), FinishEvent(token_ids=[1, 2]))[-1] == ([2], (), 2)
    assert run(Tally(0, "ids"), TokensEvent(token_ids=[1]), FinishEvent(token_ids=[2], is_delta=True))[-1] == ([2], (), 2)


def test_counts_of_messages_add_up_and_counts_of_the_choice_do_not():
    deltas = [
        TokensEvent(text="a", completion_tokens=2),
        TokensEvent(text="", completion_tokens=0),
        TokensEvent(text="b", completion_tokens=1),
    ]
    assert [count for _, _, count in run(Tally(0, "delta"), *deltas, FinishEvent(is_delta=True, completion_tokens=4))] == [2, 2, 3, 4]
    totals = [TokensEvent(text="a", is_cumulative=True, completion_tokens=count) for count in (2, 2, 3)]
    assert [count for _, _, count in run(Tally(0, "total"), *totals, FinishEvent(completion_tokens=4))] == [2, 2, 3, 4]
    assert run(Tally(0, "total"), TokensEvent(completion_tokens=5), TokensEvent(completion_tokens=3))[-1][2] == 5, "never fewer"


def test_ids_count_where_some_messages_leave_them_out():
    assert (
        run(Tally(0, "delta"), TokensEvent(token_ids=[1, 2], completion_tokens=2), FinishEvent(is_delta=True, completion_tokens=2))[-1][2]
        == 2
    )
    assert run(Tally(0, "total"), TokensEvent(token_ids=[1, 2], is_cumulative=True, completion_tokens=2))[-1] == ([1, 2], (), 2)


def test_log_probabilities_go_with_the_tokens_that_are_new():
    new = run(
        Tally(0, "total"),
        TokensEvent(token_ids=[1], logprobs=entries(1), is_cumulative=True, completion_tokens=1),
        TokensEvent(token_ids=[1, 2], logprobs=entries(1, 2), is_cumulative=True, completion_tokens=2),
        TokensEvent(token_ids=[1, 2], logprobs=entries(1, 2), is_cumulative=True, completion_tokens=2),
        FinishEvent(token_ids=[1, 2, 3], logprobs=entries(1, 2, 3), completion_tokens=3),
    )
    assert [one for _, one, _ in new] == [entries(1), entries(2), (), entries(3)]
