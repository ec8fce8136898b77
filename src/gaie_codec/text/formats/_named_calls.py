"""Calls written as a name between markers, and arguments as JSON."""

from __future__ import annotations

import re
from typing import Final

from ._json_calls import json_calls
from ._json_text import SpaceHolder, arguments
from ._layouts import JsonCalls, NamedCalls
from ._reader import MalformedCallError, Reader, Steps, markers_of
from ._writer import Writer, each_call

_ID: Final = re.compile(r"(?P<name>.+):\d+", re.DOTALL)
_JSON: Final = JsonCalls()


def named_calls(reader: Reader, writer: Writer, layout: NamedCalls, marker: str) -> Steps[None]:
    """The calls after a marker."""
    if layout.or_json:
        yield from reader.skip_space()
        if (yield from reader.peek()) in ("[", "{"):
            yield from json_calls(reader, writer, _JSON)
            return
    yield from each_call(reader, writer, layout.call, marker, lambda: _call(reader, writer, layout))


def _call(reader: Reader, writer: Writer, layout: NamedCalls) -> Steps[None]:
    name, call_id = yield from _header(reader, layout)
    if not name:
        raise MalformedCallError
    pieces = _First(writer, name, call_id)
    if layout.call:
        pieces("")
    yield from reader.skip_space()
    yield from arguments(reader, SpaceHolder(pieces))
    writer.end_call()
    if layout.fence:
        yield from reader.skip_space()
        yield from reader.close(layout.fence)
    if layout.call_end:
        yield from reader.skip_space()
        yield from reader.close(layout.call_end)


def _header(reader: Reader, layout: NamedCalls) -> Steps[tuple[str, str]]:
    markers = markers_of(*layout.name_ends)
    pieces: list[str] = []
    marker = yield from reader.within(markers, pieces.append)
    name, call_id = "".join(pieces), ""
    if layout.name_after:
        name = name.rpartition(layout.name_after)[2]
    if layout.id_after and marker == layout.id_after:
        pieces.clear()
        marker = yield from reader.within(markers, pieces.append)
        call_id = "".join(pieces).strip()
    if marker == "{":
        reader.position -= 1
    name = name.strip()
    if layout.name_has_id:
        match = _ID.fullmatch(name)
        name, call_id = (match["name"], name) if match else (name, "")
        name = name.removeprefix("functions.")
    return name, call_id


class _First:
    """Tells the name with the first piece."""

    __slots__ = ("_call_id", "_name", "_writer")

    def __init__(self, writer: Writer, name: str, call_id: str) -> None:
        self._writer, self._name, self._call_id = writer, name, call_id

    def __call__(self, text: str) -> None:
        self._writer.tell(text, name=self._name, call_id=self._call_id)
        self._name = self._call_id = ""
