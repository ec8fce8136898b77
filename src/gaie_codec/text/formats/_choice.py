"""Which format a model's answers have: what the operator says, else what the server says, else what the chat template shows.

What a template shows is a guess, which must not spoil the answers of a model that writes no such thing: text is then taken for reasoning
only behind its start tag, and special tokens are kept in the text only if the format is written in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from ..._errors import UsageError
from ._harmony import harmony_parser
from ._reasoning_table import REASONING_FORMATS, ReasoningFormat
from ._tool_table import TOOL_FORMATS, ToolFormat

F = TypeVar("F", ToolFormat, ReasoningFormat)


def choose_tool_format(option: str, told: str, template: str, is_skipped: Callable[[str], bool]) -> ToolFormat | None:
    """The format of tool calls, or None.

    `option` is "auto", "none" or a name; `told` is the server's `tool_call_parser`, "" or a name that need not be known here;
    `template` is the chat template's source. `is_skipped` says whether a text is lost where special tokens are skipped. Raises UsageError
    for an unknown option, and for a format whose library is not installed.
    """
    return _choose(TOOL_FORMATS, option, told, template, is_skipped, "tool_call_parser")


def choose_reasoning_format(option: str, told: str, template: str, is_skipped: Callable[[str], bool]) -> ReasoningFormat | None:
    """The format of reasoning, or None, in the same way."""
    return _choose(REASONING_FORMATS, option, told, template, is_skipped, "reasoning_parser")


def _choose(formats: Mapping[str, F], option: str, told: str, template: str, is_skipped: Callable[[str], bool], what: str) -> F | None:
    row = _find(formats, option, told, template, is_skipped, what)
    if row is not None and row.name == "harmony":
        harmony_parser()  # loads the library, or says that it is missing, before any request comes
    return row


def _find(formats: Mapping[str, F], option: str, told: str, template: str, is_skipped: Callable[[str], bool], what: str) -> F | None:
    if option == "none":
        return None
    if option != "auto":
        if option not in formats:
            raise UsageError(f"{what} is {option!r}, not auto, none, or one of {', '.join(sorted(formats))}")
        return formats[option]
    if told in formats:
        return formats[told]
    shown = next((row for row in dict.fromkeys(formats.values()) if row.template and re.search(row.template, template)), None)
    # Nothing but gpt-oss is asked in harmony, and it answers in nothing else.
    return shown if shown is None or shown.name == "harmony" else shown.guessed(is_skipped)
