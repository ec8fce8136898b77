"""The few shapes in which models write tool calls. A row of the table is one of these with its own markers."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class JsonCalls(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON object with name and arguments for each call, or an array of them."""

    begins: tuple[str, ...] = ()  # markers before it
    end: str = ""  # marker after it
    is_bare: bool = False  # needs no marker where the answer, or what follows a call, begins
    separator: str = ""  # between objects that are in no array
    rewrites: bool = False  # vLLM writes the arguments anew rather than passing them on


class BareArguments(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing but the arguments of a call whose name is known."""

    name: str
    begins: tuple[str, ...] = ()
    end: str = ""
    is_bare: bool = True


Layout: TypeAlias = JsonCalls | BareArguments
