"""The few shapes in which models write tool calls. A row of the table is one of these with its own markers.

`begins` are the markers that calls begin with, `end` is the one after them, which may be missing; where `is_bare`, calls need no marker
at the beginning of the answer, or right after other calls.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class JsonCalls(msgspec.Struct, frozen=True, kw_only=True):
    """`{"name": ..., "arguments": {...}}` for each call, or an array of such objects."""

    begins: tuple[str, ...] = ()
    end: str = ""
    is_bare: bool = False
    separator: str = ""  # between objects that are in no array
    rewrites: bool = False  # vLLM writes the arguments anew rather than passing them on


class BareArguments(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing but the arguments of one call, whose name is known."""

    name: str
    begins: tuple[str, ...] = ()
    end: str = ""
    is_bare: bool = True


class NamedCalls(msgspec.Struct, frozen=True, kw_only=True):
    """The name, a marker, and the arguments as JSON."""

    begins: tuple[str, ...]
    end: str = ""
    is_bare: bool = False
    call: str = ""  # begins each call; one of `begins` as well. "" where the marker that was found begins one
    name_after: str = ""  # what comes before it is a type
    name_ends: tuple[str, ...]
    id_after: str = ""  # one of `name_ends`: what comes between it and the next of them is the call's id
    name_has_id: bool = False  # functions.NAME:INDEX, which is the id as well
    fence: str = ""  # after the arguments
    call_end: str = ""
    or_json: bool = False  # older models of the family write JsonCalls after the same marker


class TaggedCalls(msgspec.Struct, frozen=True, kw_only=True):
    """The name and each argument in tags of their own; values are plain text, whose type is the schema's."""

    begins: tuple[str, ...]
    end: str = ""
    is_bare: bool = False
    call: str = ""  # before the name; "" where the marker that was found is
    name_end: str = ""  # "" where the name ends with the first argument
    argument: str  # before an argument's name
    argument_name_ends: tuple[str, ...]
    texts: tuple[str, ...] = ()  # those of them that say that the value is text
    others: tuple[str, ...] = ()  # and those that say that it is JSON
    value: str = ""  # before the value, where it is not the end of the name
    value_end: str
    call_end: str
    trims: bool = False  # the line ends around a value are markup


class PythonCalls(msgspec.Struct, frozen=True, kw_only=True):
    """`[name(key=value, ...), ...]` with Python's literals, or after a marker also calls without brackets."""

    begins: tuple[str, ...] = ()
    end: str = ""
    is_bare: bool = False


class HarmonyMessages(msgspec.Struct, frozen=True, kw_only=True):
    """Messages on channels, reasoning and calls alike, which `text.harmony` reads."""

    begins: tuple[str, ...] = ()
    end: str = ""
    is_bare: bool = False


Layout: TypeAlias = JsonCalls | BareArguments | NamedCalls | TaggedCalls | PythonCalls | HarmonyMessages
