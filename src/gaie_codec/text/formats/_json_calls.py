"""Calls written as JSON objects with a name and arguments."""

from __future__ import annotations

from typing import Final

from ._json_text import Rewriter, SpaceHolder, arguments, string, value
from ._layouts import BareArguments, JsonCalls
from ._reader import MalformedCallError, Reader, Sink, Steps
from ._writer import Writer

_ARGUMENTS: Final = ("arguments", "parameters")
# What models write besides; in text without a marker any other key means that it is no call.
_KNOWN: Final = ("type", "id", "function")


def json_calls(reader: Reader, writer: Writer, layout: JsonCalls) -> Steps[None]:
    """The objects after a marker, or at the place of one."""
    yield from reader.skip_space()
    in_array = yield from reader.skip("[")
    while True:
        yield from reader.skip_space()
        yield from _call(reader, writer, layout)
        yield from reader.skip_space()
        separator = "," if in_array else layout.separator
        if not separator or not (yield from reader.skip(separator)):
            break
        writer.begin_call(separator)
        yield from reader.skip_space()
        if not in_array and not (yield from reader.peek()):
            reader.recorded()
            return
    if in_array:
        yield from reader.skip("]")


def bare_arguments(reader: Reader, writer: Writer, layout: BareArguments) -> Steps[None]:
    """The arguments of the one call there can be."""
    if (yield from reader.peek()) != "{":
        raise MalformedCallError
    writer.tell(name=layout.name)
    yield from arguments(reader, writer.tell)
    writer.end_call()


def _call(reader: Reader, writer: Writer, layout: JsonCalls) -> Steps[None]:
    yield from reader.expect("{")
    name, is_named, has_arguments = "", False, False
    early: list[str] = []  # arguments that come before the name
    sink: Sink = early.append
    yield from reader.skip_space()
    while True:
        key = yield from string(reader)
        yield from reader.skip_space()
        yield from reader.expect(":")
        yield from reader.skip_space()
        if key == "name" and not name:
            name = yield from string(reader)
            if not name:
                raise MalformedCallError
            if not layout.is_bare or has_arguments:
                writer.tell("".join(early), name=name)
                is_named, sink = True, writer.tell
        elif key in _ARGUMENTS and not has_arguments:
            if name and not is_named:
                writer.tell(name=name)
                is_named, sink = True, writer.tell
            yield from arguments(reader, Rewriter(sink) if layout.rewrites else SpaceHolder(sink))
            has_arguments = True
        elif layout.is_bare and key not in _KNOWN:
            raise MalformedCallError
        else:
            yield from value(reader)
        yield from reader.skip_space()
        if (yield from reader.skip("}")):
            break
        yield from reader.expect(",")
        yield from reader.skip_space()
    if not name or (layout.is_bare and not has_arguments):
        raise MalformedCallError
    if not is_named or not has_arguments:
        writer.tell("" if has_arguments else "{}", name="" if is_named else name)
    writer.end_call()
