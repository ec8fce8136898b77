"""Reasoning before the answer: from a tag, or from the very beginning, to another tag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._reader import Reader, Steps, markers_of
from ._writer import Writer

if TYPE_CHECKING:
    from ._reasoning_table import ReasoningFormat


def reasoning(reader: Reader, writer: Writer, layout: ReasoningFormat, *, begins_inside: bool) -> Steps[None]:
    """Everything up to the answer; nothing if the text does not begin with reasoning."""
    space: list[str] = []
    if begins_inside or layout.opens:
        yield from reader.skip_space(space.append)
        is_tagged = yield from reader.skip(layout.start)
        if begins_inside and not is_tagged:
            writer.reasoning("".join(space))
        elif not is_tagged:
            writer.content("".join(space))
        begins_inside = begins_inside or is_tagged
    if begins_inside:
        marker = yield from reader.until(markers_of(layout.end, *layout.interrupts), writer.reasoning)
        if marker != layout.end:
            reader.position -= len(marker)  # the beginning of a call ends the reasoning, and is still to be read
