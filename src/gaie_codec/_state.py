"""When what may happen: the one table of a response's states, in the manner of h11.

`TRANSITIONS[state][input]` is the next state; a pair that is absent is ERROR. How far each of n choices has come is data of the
response, not more states. `docs/design.md` prints this table.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """Where one response is."""

    AWAIT_HEADERS = enum.auto()
    AWAIT_MESSAGE = enum.auto()
    STREAMING = enum.auto()
    FINISHED = enum.auto()  # every choice has finished; only the status is missing
    CLOSED = enum.auto()  # complete, or ended by a status that says why not
    ERROR = enum.auto()


class Input(enum.Enum):
    """What can arrive. LAST_FINISH is the message after which every choice has finished; ENOUGH is a message with which, by our own
    knowledge, all that was asked for is there although the server goes on."""

    HEADERS = enum.auto()
    MESSAGE = enum.auto()
    LAST_FINISH = enum.auto()
    ENOUGH = enum.auto()
    STATUS_OK = enum.auto()
    STATUS_ERROR = enum.auto()


# STATUS_OK leads to CLOSED from FINISHED alone: grpc-status 0 without a finish for every choice is a truncated answer.
TRANSITIONS: Final[Mapping[State, Mapping[Input, State]]] = MappingProxyType(
    {
        State.AWAIT_HEADERS: MappingProxyType(
            {
                Input.HEADERS: State.AWAIT_MESSAGE,
                Input.STATUS_ERROR: State.CLOSED,
            }
        ),
        State.AWAIT_MESSAGE: MappingProxyType(
            {
                Input.MESSAGE: State.STREAMING,
                Input.LAST_FINISH: State.FINISHED,
                Input.ENOUGH: State.CLOSED,
                Input.STATUS_ERROR: State.CLOSED,
            }
        ),
        State.STREAMING: MappingProxyType(
            {
                Input.MESSAGE: State.STREAMING,
                Input.LAST_FINISH: State.FINISHED,
                Input.ENOUGH: State.CLOSED,
                Input.STATUS_ERROR: State.CLOSED,
            }
        ),
        State.FINISHED: MappingProxyType(
            {
                Input.STATUS_OK: State.CLOSED,
                Input.STATUS_ERROR: State.CLOSED,
            }
        ),
        State.CLOSED: MappingProxyType({}),
        State.ERROR: MappingProxyType({}),
    }
)


def next_state(state: State, received: Input) -> State:
    """The state after `received`; ERROR where the table has no entry."""
    return TRANSITIONS[state].get(received, State.ERROR)
