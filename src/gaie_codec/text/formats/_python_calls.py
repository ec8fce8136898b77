"""Calls written as Python: `[name(key=value, ...), ...]`. Values are literals, read without running anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from ._arguments import ArgumentsWriter
from ._json_text import decode
from ._layouts import PythonCalls
from ._reader import MalformedCallError, Reader, Steps, markers_of
from ._writer import Writer

_DEEPEST: Final = 64
_WORD_END: Final = re.compile(r"[^\w.+\-]")
_NAME: Final = re.compile(r"[^\W\d][\w.\-]*")
_WORDS: Final = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER: Final = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""} | {
    char: char for char in "\\'\""
}
_CODES: Final = {"x": 2, "u": 4, "U": 8}  # hexadecimal digits


def python_calls(reader: Reader, writer: Writer, layout: PythonCalls) -> Steps[None]:
    """The calls at this place; without brackets they are one after the other."""
    yield from reader.skip_space()
    in_list = yield from reader.skip("[")
    if not (in_list or layout.begins):
        raise MalformedCallError
    while True:
        yield from reader.skip_space()
        yield from _call(reader, writer)
        yield from reader.skip_space()
        if in_list:
            if not (yield from reader.skip(",")):
                yield from reader.skip("]")
                return
            yield from reader.skip_space()
            if (yield from reader.skip("]")):
                return
            writer.begin_call(", ")
        elif layout.is_bare or not _NAME.match((yield from reader.peek()) or " "):
            return
        else:
            writer.begin_call("\n")


def _call(reader: Reader, writer: Writer) -> Steps[None]:
    call = ArgumentsWriter(writer, (yield from _name(reader)))
    yield from reader.expect("(")
    yield from reader.skip_space()
    while not (yield from reader.skip(")")):
        key = yield from _name(reader)
        yield from reader.skip_space()
        yield from reader.expect("=")
        yield from reader.skip_space()
        call.key(key)
        yield from _value(reader, call, 0)
        yield from _comma(reader, ")")
    call.end()


def _name(reader: Reader) -> Steps[str]:
    name = yield from _word(reader)
    if not _NAME.fullmatch(name):
        yield from reader.fail()
    return name


def _word(reader: Reader) -> Steps[str]:
    """A name or number, up to what is part of neither. The end of the text is no end of it."""
    pieces: list[str] = []
    while True:
        match = _WORD_END.search(reader.text, reader.position)
        end = match.start() if match else len(reader.text)
        pieces.append(reader.text[reader.position : end])
        reader.position = end
        if match:
            return "".join(pieces)
        yield from reader.more()


def _comma(reader: Reader, end: str) -> Steps[None]:
    """A comma, or what ends the list, which is left."""
    yield from reader.skip_space()
    if (yield from reader.skip(",")):
        yield from reader.skip_space()
    elif (yield from reader.peek()) != end:
        yield from reader.fail()


def _value(reader: Reader, call: ArgumentsWriter, depth: int) -> Steps[None]:
    char = yield from reader.peek()
    if depth > _DEEPEST:
        raise MalformedCallError
    if char and char in "\"'":
        call.begin_text()
        yield from _string(reader, call.text)
        call.end_text()
    elif char and char in "[({":
        yield from _container(reader, call, depth)
    else:
        call.raw(_plain((yield from _word(reader))))


def _container(reader: Reader, call: ArgumentsWriter, depth: int) -> Steps[None]:
    begin = yield from reader.skip_any("[", "(", "{")
    end = {"[": "]", "(": ")", "{": "}"}[begin]
    call.raw("{" if begin == "{" else "[")
    yield from reader.skip_space()
    is_first = True
    while not (yield from reader.skip(end)):
        if not is_first:
            call.raw(", ")
        is_first = False
        if begin == "{":
            if (yield from reader.peek()) not in ('"', "'"):
                yield from reader.fail()
            yield from _value(reader, call, depth + 1)
            yield from reader.skip_space()
            yield from reader.expect(":")
            yield from reader.skip_space()
            call.raw(": ")
        yield from _value(reader, call, depth + 1)
        yield from _comma(reader, end)
    call.raw("}" if begin == "{" else "]")


def _plain(word: str) -> str:
    """JSON for a name of a constant, or a number."""
    if word in _WORDS:
        return _WORDS[word]
    if not _NUMBER.fullmatch(word):
        raise MalformedCallError
    number = word.replace("_", "").removeprefix("+")
    sign = "-" if number.startswith("-") else ""
    whole, dot, fraction = number.removeprefix("-").partition(".")
    if dot:
        digits = re.match(r"\d*", fraction)
        fraction = fraction if digits and digits.group() else f"0{fraction}"
        number = f"{whole or '0'}.{fraction}"
        number = sign + number
    decode(number)
    return number


def _string(reader: Reader, sink: Callable[[str], object]) -> Steps[None]:
    quote = yield from reader.skip_any('"', "'")
    markers = markers_of(quote, "\\", "\n")
    while True:
        marker = yield from reader.within(markers, sink)
        if marker == quote:
            return
        if marker == "\n":
            raise MalformedCallError
        char = yield from _take(reader)
        if char in _CODES:
            digits = ""
            for _ in range(_CODES[char]):
                digits += yield from _take(reader)
            sink(_character(digits))
        else:
            sink(_ESCAPES.get(char, f"\\{char}"))


def _take(reader: Reader) -> Steps[str]:
    char = yield from reader.peek()
    if not char:
        raise MalformedCallError
    reader.position += 1
    return char


def _character(digits: str) -> str:
    try:
        character = chr(int(digits, 16))
        character.encode()
    except (ValueError, OverflowError):  # no such character, or half of a surrogate pair
        raise MalformedCallError from None
    return character
