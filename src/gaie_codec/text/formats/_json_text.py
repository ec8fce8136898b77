"""JSON inside running text: values passed on as they are written, and checked once they are whole.

The one pass over the characters only follows strings and brackets, so a long argument costs its length once, and not again with
every token as parsing what has come so far would (jiter's partial mode included). The check is the standard library's decoder.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from ._reader import SPACE, MalformedCallError, Reader, Sink, Steps

_STRUCTURE: Final = re.compile(r'["{}\[\]]')
_STRING_END: Final = re.compile(r'["\\]')
_SCALAR_END: Final = re.compile(r"[,:;{}\[\]\s\"<]")


def decode(text: str) -> Any:
    """The value of a JSON text; numbers stay text. Raises MalformedCallError."""
    try:
        return json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        raise MalformedCallError from None


def dump(value: object) -> str:
    """JSON text as Python's json writes it, which is how vLLM does, with other scripts as they are."""
    return json.dumps(value, ensure_ascii=False)


def string(reader: Reader) -> Steps[str]:
    """A JSON string's value."""
    pieces: list[str] = []
    if (yield from reader.peek()) != '"':
        yield from reader.fail()
    yield from _scan(reader, pieces.append)
    value: str = decode("".join(pieces))
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which is no text
        raise MalformedCallError from None
    return value


def container(reader: Reader, sink: Sink) -> Steps[None]:
    """An object or array, as it is written. Raises MalformedCallError at its end if it is no JSON."""
    pieces: list[str] = []

    def both(text: str) -> None:
        pieces.append(text)
        sink(text)

    yield from _scan(reader, both)
    decode("".join(pieces))


def value(reader: Reader) -> Steps[str]:
    """Any value, as it is written."""
    pieces: list[str] = []
    if (yield from reader.peek()) in '{["':
        yield from _scan(reader, pieces.append)
    else:
        while True:
            match = _SCALAR_END.search(reader.text, reader.position)
            end = match.start() if match else len(reader.text)
            pieces.append(reader.text[reader.position : end])
            reader.position = end
            if match:
                break
            yield from reader.more()
    text = "".join(pieces)
    decode(text)
    return text


def arguments(reader: Reader, sink: Sink) -> Steps[None]:
    """The arguments of a call: an object, or what models write in its place, null or a string that holds the object."""
    first = yield from reader.peek()
    if first == "{":
        yield from container(reader, sink)
        return
    text = yield from value(reader)
    decoded = decode(text)
    if decoded is None:
        sink("{}")
    elif isinstance(decoded, str) and first == '"' and isinstance(decode(decoded), dict):
        # Half of a surrogate pair was an escape, and can be nothing else.
        sink(decoded.strip(SPACE).encode(errors="backslashreplace").decode())
    else:
        raise MalformedCallError


def _scan(reader: Reader, sink: Sink) -> Steps[None]:
    """One string, object or array, from its first character to its last."""
    depth = 0
    in_string = escaped = False
    while True:
        text, start = reader.text, reader.position
        place = start
        if escaped and place < len(text):
            place, escaped = place + 1, False
        while place < len(text):
            match = (_STRING_END if in_string else _STRUCTURE).search(text, place)
            if match is None:
                place = len(text)
                break
            place = match.end()
            char = text[place - 1]
            if char == "\\":
                if place == len(text):
                    escaped = True
                place = min(place + 1, len(text))
            elif char == '"':
                in_string = not in_string
            else:
                depth += 1 if char in "{[" else -1
            if not in_string and depth <= 0:
                sink(text[start:place])
                reader.position = place
                return
        if place > start:
            sink(text[start:place])
        reader.position = place
        yield from reader.more()


class SpaceHolder:
    """Passes text on, and white space at its end only with what follows, as vLLM does for arguments."""

    __slots__ = ("_held", "_sink")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held: list[str] = []

    def __call__(self, text: str) -> None:
        """The next piece; the last one ends with something else."""
        shown = text.rstrip(SPACE)
        if shown:
            self._sink("".join((*self._held, shown)))
            self._held.clear()
        if len(shown) < len(text):
            self._held.append(text[len(shown) :])


class Rewriter:
    """Passes an object on as Python's json would write it: one space after commas and colons, no escape that is not needed.

    Numbers stay as they are written.
    """

    __slots__ = ("_held", "_in_string", "_sink")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._in_string = False
        self._held = ""  # an escape that is not whole yet

    def __call__(self, text: str) -> None:
        """The next piece of the object."""
        text, self._held = self._held + text, ""
        out: list[str] = []
        place = 0
        while place < len(text):
            match = (_STRING_END if self._in_string else _REWRITTEN).search(text, place)
            if match is None:
                out.append(text[place:])
                break
            out.append(text[place : match.start()])
            place, found = match.end(), match.group()
            if found == "\\":
                escape = _ESCAPE.match(text, match.start())
                if escape is None and len(text) - match.start() < _LONGEST_ESCAPE:
                    self._held = text[match.start() :]
                    break
                out.append(_unescape(escape.group() if escape else found))
                place = escape.end() if escape else place
            elif found == '"':
                self._in_string = not self._in_string
                out.append(found)
            elif found in ",:":
                out.append(found + " ")
        if any(out):
            self._sink("".join(out))


def rewritten(text: str) -> str:
    """A whole object or array as the Rewriter passes it on."""
    pieces: list[str] = []
    Rewriter(pieces.append)(text)
    return "".join(pieces)


_REWRITTEN: Final = re.compile(r'[",:]|[ \t\r\n]+')
# A pair of surrogates, a character that needs none, a half of a pair (only once what follows it is known), anything else.
_ESCAPE: Final = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\])|(?=\\[^u])|(?=\\u.{4}))|u(?![dD][89abAB])[0-9a-fA-F]{4}|[^u])",
    re.DOTALL,
)
_LONGEST_ESCAPE: Final = 12


def _unescape(escape: str) -> str:
    try:
        text = dump(json.loads(f'"{escape}"'))[1:-1]
        text.encode()
    except ValueError:  # no escape, or half of a surrogate pair, which is no text
        return escape
    return text
