"""Text that arrives in pieces, read by generators as if it were whole.

A format's grammar is a generator that asks the reader for literals, strings and runs of text, and is suspended where the answer
depends on text that has not come yet. What it does then depends on the text alone and never on where pieces were cut, and only a
literal that may be continued is held: long runs go out as they come, so that the cost is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
Sink: TypeAlias = Callable[[str], object]

SPACE: Final = " \t\r\n"
_NO_SPACE: Final = re.compile(r"[^ \t\r\n]")


class MalformedCallError(Exception):
    """The text is no tool call after all, or ended within one. Never leaves this package."""


class Markers:
    """Literals to find in running text; none may be the beginning of another."""

    __slots__ = ("_markers", "_pattern", "starts")

    def __init__(self, markers: tuple[str, ...]) -> None:
        self._markers = markers
        self.starts = frozenset(marker[0] for marker in markers)
        self._pattern = re.compile("|".join(map(re.escape, markers)) or r"(?!)")

    def find(self, text: str, start: int) -> tuple[int, str]:
        """Where text stops to be certain, and the marker that begins there, or "" if one may begin there or the text just ends."""
        held = self._held_from(text, start)
        match = self._pattern.search(text, start)
        if match and match.start() < held:
            return match.start(), match.group()
        return held, ""

    def _held_from(self, text: str, start: int) -> int:
        """The earliest place from where the rest of the text may be the beginning of a marker, or its end."""
        held = len(text)
        for marker in self._markers:
            place = text.find(marker[0], max(start, len(text) - len(marker) + 1))
            while 0 <= place < held:
                if marker.startswith(text[place:]):
                    held = place
                place = text.find(marker[0], place + 1)
        return held


@lru_cache(maxsize=512)
def markers_of(*markers: str) -> Markers:
    """The Markers of these literals; empty ones are left out."""
    return Markers(tuple(dict.fromkeys(filter(None, markers))))


class Reader:
    """The text of one choice: what has come and is not yet consumed, and optionally a record of what was consumed."""

    __slots__ = ("_record", "_recorded_to", "ended", "position", "run", "text")

    def __init__(self) -> None:
        self.text = ""
        self.position = 0  # of what comes next, in `text`
        self.ended = False  # no more text will come
        # Of running text with nothing held: where it goes, and the characters that it goes there without.
        self.run: tuple[Sink, frozenset[str]] | None = None
        self._record: list[str] | None = None
        self._recorded_to = 0  # place in `text`

    def feed(self, text: str) -> None:
        """More text. What was consumed is let go."""
        self._keep()
        self.text = self.text[self.position :] + text
        self.position = self._recorded_to = 0

    def record(self, beginning: str) -> None:
        """Record what is consumed from here on; `beginning` is what was consumed of it already."""
        self._record = [beginning]
        self._recorded_to = self.position

    @property
    def is_recording(self) -> bool:
        """Is there a record?"""
        return self._record is not None

    def recorded(self) -> str:
        """End the record."""
        self._keep()
        text, self._record = "".join(self._record or ()), None
        return text

    def _keep(self) -> None:
        if self._record is not None:
            self._record.append(self.text[self._recorded_to : self.position])
            self._recorded_to = self.position

    def peek(self) -> Steps[str]:
        """The next character, or "" at the end."""
        while self.position >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.position]

    def more(self) -> Steps[None]:
        """Wait for text after all that has come; raises MalformedCallError if there is none."""
        length = len(self.text) - self.position
        while len(self.text) - self.position <= length:
            if self.ended:
                self.position = len(self.text)
                raise MalformedCallError
            yield

    def skip(self, literal: str) -> Steps[bool]:
        """Consume the literal if it comes next."""
        while not self.text.startswith(literal, self.position):
            if self.ended or not literal.startswith(self.text[self.position : self.position + len(literal)]):
                return False
            yield
        self.position += len(literal)
        return True

    def skip_any(self, *literals: str) -> Steps[str]:
        """Consume the literal that comes next and give it, or "". None may be the beginning of another."""
        for literal in literals:
            if (yield from self.skip(literal)):
                return literal
        return ""

    def close(self, literal: str) -> Steps[bool]:
        """Consume the literal if it comes next, or what there is of it at the end."""
        if (yield from self.skip(literal)):
            return True
        if self.ended and literal.startswith(self.text[self.position :]):
            self.position = len(self.text)
            return True
        return False

    def expect(self, literal: str) -> Steps[None]:
        """Consume the literal; raises MalformedCallError if something else comes next."""
        if not (yield from self.skip(literal)):
            yield from self.fail()

    def fail(self) -> Steps[None]:
        """Raise MalformedCallError; at the end of the text all the rest belongs to what is malformed."""
        if self.ended:
            self.position = len(self.text)
        raise MalformedCallError
        yield

    def skip_space(self, sink: Sink | None = None) -> Steps[None]:
        """Consume white space."""
        while True:
            match = _NO_SPACE.search(self.text, self.position)
            end = match.start() if match else len(self.text)
            if sink and end > self.position:
                sink(self.text[self.position : end])
            self.position = end
            if match or self.ended:
                return
            yield

    def until(self, markers: Markers, sink: Sink) -> Steps[str]:
        """Give text to the sink, as soon as it is certain, up to one of the markers. Consumes that and returns it, "" at the end."""
        while True:
            end, marker = markers.find(self.text, self.position)
            if self.ended and not marker:
                end = len(self.text)
            if end > self.position:
                sink(self.text[self.position : end])
            self.position = end + len(marker)
            if marker or self.ended:
                return marker
            if self.position == len(self.text):
                self.run = sink, markers.starts
            yield
            self.run = None

    def within(self, markers: Markers, sink: Sink) -> Steps[str]:
        """The same within a call, where the end of the text is a MalformedCallError."""
        marker = yield from self.until(markers, sink)
        if not marker:
            raise MalformedCallError
        return marker
