"""Calls written in tags, with arguments as plain text."""

from __future__ import annotations

from typing import Final

from ._arguments import ArgumentsWriter, Schemas, is_text, typed
from ._json_text import decode
from ._layouts import TaggedCalls
from ._reader import MalformedCallError, Reader, Sink, Steps, markers_of
from ._writer import Writer, each_call

_SPACE_OR_MARKUP: Final = frozenset(' \t\r\n<{"')


def tagged_calls(reader: Reader, writer: Writer, layout: TaggedCalls, marker: str, schemas: Schemas) -> Steps[None]:
    """The calls after a marker."""
    yield from each_call(reader, writer, layout.call, marker, lambda: _call(reader, writer, layout, schemas))


def _call(reader: Reader, writer: Writer, layout: TaggedCalls, schemas: Schemas) -> Steps[None]:
    pieces: list[str] = []
    ends = (layout.name_end,) if layout.name_end else (layout.argument, layout.call_end)
    marker = yield from reader.within(markers_of(*ends), pieces.append)
    name = "".join(pieces).strip()
    if not name or not _SPACE_OR_MARKUP.isdisjoint(name):
        raise MalformedCallError
    call = ArgumentsWriter(writer, name)
    call.tell_name()
    if layout.name_end:
        marker = yield from _next(reader, layout)
    while marker != layout.call_end:
        yield from _argument(reader, call, layout, schemas, name)
        marker = yield from _next(reader, layout)
    call.end()


def _next(reader: Reader, layout: TaggedCalls) -> Steps[str]:
    yield from reader.skip_space()
    marker = yield from reader.skip_any(layout.argument, layout.call_end)
    if not marker:
        yield from reader.fail()
    return marker


def _argument(reader: Reader, call: ArgumentsWriter, layout: TaggedCalls, schemas: Schemas, function: str) -> Steps[None]:
    pieces: list[str] = []
    said = yield from reader.within(markers_of(*layout.argument_name_ends), pieces.append)
    key = "".join(pieces).strip()
    if layout.value:
        yield from reader.skip_space()
        yield from reader.expect(layout.value)
    call.key(key)
    types = schemas.types(function, key)
    if said in layout.texts or (said not in layout.others and is_text(types)):
        call.begin_text()
        yield from _value(reader, layout, call.text)
        call.end_text()
        return
    pieces.clear()
    yield from _value(reader, layout, pieces.append)
    text = "".join(pieces)
    if said in layout.others:
        decode(text)
        call.raw(text.strip())
    else:
        call.raw(typed(text, types))


def _value(reader: Reader, layout: TaggedCalls, sink: Sink) -> Steps[None]:
    """The text of a value. Models forget its end tag now and then: a line that begins with the next tag ends it as well."""
    late = ("\n" + layout.argument, "\n" + layout.call_end) if layout.trims else ()
    held = _LineEnd(sink)
    if layout.trims:
        yield from reader.skip("\n")
    marker = yield from reader.within(markers_of(layout.value_end, *late), held if layout.trims else sink)
    if marker in late:
        reader.position -= len(marker)


class _LineEnd:
    """Passes text on, but not one line end at its end."""

    __slots__ = ("_held", "_sink")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held = ""

    def __call__(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        if len(text) > len(self._held):
            self._sink(text[: len(text) - len(self._held)])
