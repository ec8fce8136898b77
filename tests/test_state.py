"""Law 7: the table of states is total, and says what the protocol says."""

from __future__ import annotations

import itertools

import pytest

from gaie_codec import State
from gaie_codec._state import TRANSITIONS, Input, next_state

WORKING = {State.AWAIT_HEADERS, State.AWAIT_MESSAGE, State.STREAMING, State.FINISHED}


@pytest.mark.parametrize(("state", "received"), list(itertools.product(State, Input)))
def test_every_pair_has_a_next_state(state, received):
    after = next_state(state, received)
    assert after is TRANSITIONS[state].get(received, State.ERROR)
    assert after in State


def test_the_table_names_every_state_and_nothing_leads_to_an_explicit_error():
    assert set(TRANSITIONS) == set(State)
    assert all(after is not State.ERROR for row in TRANSITIONS.values() for after in row.values())


def test_ends_are_final():
    for state in set(State) - WORKING:
        assert not TRANSITIONS[state]


def test_success_goes_through_the_last_finish_or_ends_by_our_own_knowledge():
    before_closed = {(state, received) for state, row in TRANSITIONS.items() for received, after in row.items() if after is State.CLOSED}
    enough = {(state, Input.ENOUGH) for state in (State.AWAIT_MESSAGE, State.STREAMING)}
    assert {pair for pair in before_closed if pair[1] is not Input.STATUS_ERROR} == {(State.FINISHED, Input.STATUS_OK), *enough}
    assert {state for state, received in before_closed if received is Input.STATUS_ERROR} == WORKING, "a server may give up at any time"


def test_every_state_can_be_reached():
    reached, found = {State.AWAIT_HEADERS}, 0
    while found != len(reached):
        found = len(reached)
        reached |= {next_state(state, received) for state in reached for received in Input}
    assert reached == set(State)


@pytest.mark.parametrize(
    ("inputs", "end"),
    [
        ("HEADERS MESSAGE MESSAGE LAST_FINISH STATUS_OK", State.CLOSED),
        ("HEADERS LAST_FINISH STATUS_OK", State.CLOSED),
        ("HEADERS MESSAGE ENOUGH", State.CLOSED),
        ("HEADERS ENOUGH STATUS_OK", State.ERROR),
        ("HEADERS LAST_FINISH ENOUGH", State.ERROR),
        ("HEADERS LAST_FINISH STATUS_ERROR", State.CLOSED),
        ("STATUS_ERROR", State.CLOSED),
        ("HEADERS STATUS_OK", State.ERROR),
        ("HEADERS MESSAGE STATUS_OK", State.ERROR),
        ("HEADERS LAST_FINISH MESSAGE", State.ERROR),
        ("HEADERS LAST_FINISH LAST_FINISH", State.ERROR),
        ("MESSAGE", State.ERROR),
        ("HEADERS HEADERS", State.ERROR),
        ("HEADERS LAST_FINISH STATUS_OK STATUS_OK", State.ERROR),
    ],
)
def test_whole_lives(inputs, end):
    state = State.AWAIT_HEADERS
    for name in inputs.split():
        state = next_state(state, Input[name])
    assert state is end


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        TRANSITIONS[State.CLOSED][Input.MESSAGE] = State.STREAMING
