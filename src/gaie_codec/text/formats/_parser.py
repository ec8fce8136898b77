"""The OutputParser of one choice: reasoning, then content with calls in it, by the rows of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import OutputParser, Part
from ._arguments import Schemas
from ._harmony import harmony_parser
from ._json_calls import bare_arguments, json_calls
from ._layouts import BareArguments, HarmonyMessages, JsonCalls, Layout, NamedCalls, PythonCalls, TaggedCalls
from ._named_calls import named_calls
from ._python_calls import python_calls
from ._reader import MalformedCallError, Reader, Steps, markers_of
from ._reasoning import reasoning as reasoning_steps
from ._reasoning_table import ReasoningFormat
from ._tagged_calls import tagged_calls
from ._tool_table import ToolFormat, schema_layout
from ._writer import Writer


def make_parser(
    *,
    tools: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    begins_inside: bool = False,
    definitions: Sequence[Mapping[str, Any]] = (),
    parallel: bool = True,
    required: bool = False,
    forced: str = "",
) -> OutputParser:
    """A fresh parser for one choice.

    `begins_inside` is what `reasoning.begins_inside` said. `definitions` are the request's tools, whose schemas type the arguments
    of formats that write them as plain text. Without `parallel` only the first call is told. `required`, or `forced`, the name of
    the one function, say that `constrain` forced a call: where it does so by a JSON schema, the calls are that JSON.
    """
    layout = tools.layout if tools else None
    if isinstance(layout, HarmonyMessages) or (reasoning and reasoning.name == "harmony"):
        return harmony_parser(parallel=parallel)
    if (required or forced) and not (tools and tools.tag_style):
        layout = schema_layout(forced)
    return _Parser(layout, reasoning, begins_inside=begins_inside, definitions=definitions, parallel=parallel)


class _Parser:
    __slots__ = ("_reader", "_schemas", "_steps", "_writer")

    def __init__(
        self,
        layout: Layout | None,
        reasoning: ReasoningFormat | None,
        *,
        begins_inside: bool,
        definitions: Sequence[Mapping[str, Any]],
        parallel: bool,
    ) -> None:
        self._reader = Reader()
        self._writer = Writer(self._reader, parallel=parallel)
        self._schemas = Schemas(definitions)
        self._steps: Steps[None] | None = self._run(layout, reasoning, begins_inside=begins_inside)

    def feed(self, text: str) -> Sequence[Part]:
        run = self._reader.run
        if run is not None and run[1].isdisjoint(text):  # most text, in a third of the time
            part = self._writer.plain(run[0], text)
            if part is not None:
                return (part,)
        if text:
            self._reader.feed(text)
            self._advance()
        return self._writer.take()

    def finish(self) -> Sequence[Part]:
        self._reader.ended = True
        self._advance()
        return self._writer.take()

    def _advance(self) -> None:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None

    def _run(self, layout: Layout | None, reasoning: ReasoningFormat | None, *, begins_inside: bool) -> Steps[None]:
        if reasoning is not None:
            yield from reasoning_steps(self._reader, self._writer, reasoning, begins_inside=begins_inside)
        if layout is None:
            yield from self._reader.until(markers_of(), self._writer.content)
            return
        may_be_bare, closing = layout.is_bare, ""
        while True:
            if may_be_bare and (yield from self._bare()):
                marker = ""
            else:
                marker = yield from self._reader.until(markers_of(*layout.begins, closing), self._writer.content)
                if not marker:
                    return
                if marker == closing:
                    closing, may_be_bare = "", False
                    continue
                self._writer.begin_call(marker)
            is_whole = yield from self._calls(layout, marker)
            closing = layout.end if is_whole and layout.end and not (yield from self._reader.close(layout.end)) else ""
            may_be_bare = layout.is_bare and is_whole and not isinstance(layout, BareArguments)

    def _bare(self) -> Steps[bool]:
        """Begin a call if the next that is no white space is JSON."""
        space: list[str] = []
        yield from self._reader.skip_space(space.append)
        if (yield from self._reader.peek()) in ("{", "["):
            self._writer.begin_call("".join(space))
            return True
        self._writer.content("".join(space))
        return False

    def _calls(self, layout: Layout, marker: str) -> Steps[bool]:
        """The calls at this place. False if the last was none."""
        try:
            yield from self._layout(layout, marker)
        except MalformedCallError:
            if self._writer.is_told:
                marker = yield from self._reader.until(markers_of(layout.end, *layout.begins), _discard)
                if marker != layout.end:
                    self._reader.position -= len(marker)
            self._writer.give_up()
            return False
        yield from self._reader.skip_space(self._writer.content)
        return True

    def _layout(self, layout: Layout, marker: str) -> Steps[None]:
        """What reads calls of this layout, until text that is no call. Raises MalformedCallError."""
        reader, writer = self._reader, self._writer
        if isinstance(layout, JsonCalls):
            return json_calls(reader, writer, layout)
        if isinstance(layout, BareArguments):
            return bare_arguments(reader, writer, layout)
        if isinstance(layout, NamedCalls):
            return named_calls(reader, writer, layout, marker)
        if isinstance(layout, PythonCalls):
            return python_calls(reader, writer, layout)
        assert isinstance(layout, TaggedCalls)
        return tagged_calls(reader, writer, layout, marker, self._schemas)


def _discard(text: str) -> None:
    """The reader's record has it."""
