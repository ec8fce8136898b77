"""What a parser found out, as Parts: joined where adjacent, and with the bookkeeping of calls."""

from __future__ import annotations

from collections.abc import Callable

from .. import BrokenToolCall, Content, Part, Reasoning, ToolCall
from ._reader import SPACE, MalformedCallError, Reader, Sink, Steps


class Writer:
    """Collects the parts of one choice.

    White space after a call is held: it is dropped at the end and before another call. A call is begun, told in pieces, and
    either done or given up; giving up tells its raw text, as content if nothing was told of it yet.
    """

    __slots__ = ("_after_call", "_content_sink", "_entries", "_index", "_parallel", "_reader", "_reasoning_sink", "_space", "is_told")

    def __init__(self, reader: Reader, *, parallel: bool) -> None:
        self._reader = reader
        self._parallel = parallel
        # Kind, call index, name, id, texts: joined once when taken, since one feed may bring very many pieces.
        self._entries: list[tuple[type[Part], int, str, str, list[str]]] = []
        self._index = 0  # of the call that is, or will be, told
        self._after_call = False  # only white space since the last call
        self._space: list[str] = []
        self.is_told = False  # something of the current call
        self._content_sink, self._reasoning_sink = self.content, self.reasoning

    def take(self) -> list[Part]:
        """The parts since the last time."""
        parts = [_part(*entry) for entry in self._entries]
        self._entries.clear()
        return parts

    def plain(self, sink: Sink, text: str) -> Part | None:
        """What the sink would make of this text alone; None where it depends on more."""
        if not text or self._entries:
            return None
        if sink == self._reasoning_sink:
            return Reasoning(text)
        return Content(text) if sink == self._content_sink and not self._after_call else None

    def reasoning(self, text: str) -> None:
        """Text of the reasoning."""
        self._add(Reasoning, text)

    def content(self, text: str) -> None:
        """Text of the answer."""
        if self._after_call:
            if not text.strip(SPACE):
                self._space.append(text)
                return
            text = "".join((*self._space, text))
            self._after_call = False
            self._space.clear()
        self._add(Content, text)

    def begin_call(self, beginning: str) -> None:
        """A call begins; `beginning` is what was consumed of it already."""
        self._reader.record(beginning)
        self.is_told = False

    @property
    def has_begun(self) -> bool:
        """Is there a current call?"""
        return self._reader.is_recording

    def tell(self, arguments: str = "", *, name: str = "", call_id: str = "") -> None:
        """A piece of the current call. The name comes first."""
        self.is_told = True
        if self._parallel or not self._index:
            last = self._entries[-1] if self._entries else None
            if last and last[0] is ToolCall and last[1] == self._index:
                last[4].append(arguments)
            else:
                self._entries.append((ToolCall, self._index, name, call_id, [arguments]))

    def end_call(self) -> None:
        """The current call is whole."""
        self._reader.recorded()
        self._after_call = True
        self._next_call()

    def give_up(self) -> None:
        """The current call is none. What was told cannot be taken back."""
        text = self._reader.recorded()
        if not self.is_told:
            self.content(text)
            return
        if self._parallel or not self._index:
            self._entries.append((BrokenToolCall, self._index, "", "", [text]))
        self._after_call = False
        self._next_call()

    def _next_call(self) -> None:
        self._index += 1
        self.is_told = False
        self._space.clear()

    def _add(self, kind: type[Part], text: str) -> None:
        last = self._entries[-1] if self._entries else None
        if last and last[0] is kind:
            last[4].append(text)
        elif text:
            self._entries.append((kind, 0, "", "", [text]))


def _part(kind: type[Part], index: int, name: str, call_id: str, texts: list[str]) -> Part:
    text = "".join(texts)
    if kind is ToolCall:
        return ToolCall(index, name, text, call_id)
    if kind is BrokenToolCall:
        return BrokenToolCall(index, text)
    return Reasoning(text) if kind is Reasoning else Content(text)


def each_call(reader: Reader, writer: Writer, begin: str, marker: str, read: Callable[[], Steps[None]]) -> Steps[None]:
    """Read the calls behind a marker: one, or where calls have a beginning of their own as many as begin so, one after the other."""
    is_begun = not begin or marker == begin
    while True:
        if not is_begun:
            yield from reader.skip_space()
            if not (yield from reader.skip(begin)):
                if writer.has_begun:
                    raise MalformedCallError
                return
            if not writer.has_begun:
                writer.begin_call(begin)
        yield from read()
        if not begin:
            return
        is_begun = False
