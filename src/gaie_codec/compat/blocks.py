"""Headings, sentences and tables, as plain text of a bounded width or as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Final, TypeAlias

import msgspec

WIDTH: Final = 100
_MARKDOWN_WIDTH: Final = 135
_GAP: Final = 2
_MIN_COLUMN: Final = 12


class Heading(msgspec.Struct, frozen=True):
    """A title; level 1 is the document's."""

    text: str
    level: int = 2


class Text(msgspec.Struct, frozen=True):
    """A paragraph."""

    text: str


class Command(msgspec.Struct, frozen=True):
    """Something to type."""

    text: str


class Table(msgspec.Struct, frozen=True):
    """Cells with a header row; never empty."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block: TypeAlias = Heading | Text | Command | Table


def as_markdown(blocks: Iterable[Block]) -> str:
    """Blocks as Markdown."""
    lines: list[str] = []
    previous: Block | None = None
    for block in blocks:
        if lines and not (isinstance(block, Command) and isinstance(previous, Command)):
            lines.append("")
        if isinstance(block, Heading):
            lines.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            lines += textwrap.wrap(block.text, _MARKDOWN_WIDTH, break_long_words=False, break_on_hyphens=False)
        elif isinstance(block, Command):
            lines.append(f"    {block.text}")
        else:
            lines.append(_markdown_row(block.headers))
            lines.append("|" + "---|" * len(block.headers))
            lines += [_markdown_row(row) for row in block.rows]
        previous = block
    return "\n".join(lines) + "\n"


def as_text(blocks: Iterable[Block], width: int = WIDTH) -> str:
    """Blocks as plain text of at most `width` columns."""
    lines: list[str] = []
    previous: Block | None = None
    for block in blocks:
        if lines and not (isinstance(block, Command) and isinstance(previous, Command)):
            lines.append("")
        if isinstance(block, Heading):
            lines += [*textwrap.wrap(block.text, width), ("=" if block.level < 3 else "-") * min(len(block.text), width)]
        elif isinstance(block, Text):
            lines += textwrap.wrap(block.text, width)
        elif isinstance(block, Command):
            lines += textwrap.wrap(block.text, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
        else:
            lines += _text_table(block, width)
        previous = block
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _text_table(table: Table, width: int) -> list[str]:
    cells = [table.headers, *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.headers))]
    # The widest column gives way first, so that short ones stay on one line.
    while sum(widths) + _GAP * (len(widths) - 1) > width and max(widths) > _MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for number, row in enumerate(cells):
        wrapped = [textwrap.wrap(cell, size, break_on_hyphens=False) or [""] for cell, size in zip(row, widths, strict=True)]
        for place in range(max(len(column) for column in wrapped)):
            parts = [(column[place] if place < len(column) else "").ljust(size) for column, size in zip(wrapped, widths, strict=True)]
            lines.append((" " * _GAP).join(parts).rstrip())
        if number == 0:
            lines.append((" " * _GAP).join("-" * size for size in widths))
    return lines
