"""How models write tool calls and reasoning: a table of formats, and the parsers for them."""
# ruff: noqa: ARG001

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from .. import OutputParser


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How tool calls are written."""

    name: str
    keeps_special_tokens: bool = False
    id_style: Literal["openai", "mistral"] = "openai"


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How reasoning is written."""

    name: str
    start: str
    end: str
    keeps_special_tokens: bool = False

    def begins_inside(self, prompt_text: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the answer begins with reasoning, without a tag of its own."""
        return False


def choose_tool_format(option: str, told: str, template: str) -> ToolFormat | None:
    """The format of that name; for "auto" what the server told, else what the chat template shows."""
    return None


def choose_reasoning_format(option: str, told: str, template: str) -> ReasoningFormat | None:
    """The format of that name; for "auto" what the server told, else what the chat template shows."""
    return None


def constrain(
    tool_format: ToolFormat | None, tools: Sequence[Mapping[str, Any]], kind: str, name: str, *, parallel: bool
) -> tuple[Literal["structural_tag", "json_schema"], str] | None:
    """What the output is held to for a tool choice of this kind; None for nothing."""
    return None


def make_parser(
    *,
    tools: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    begins_inside: bool,
    definitions: Sequence[Mapping[str, Any]],
    parallel: bool,
    forced: str = "",
) -> OutputParser:
    """The parser of one choice."""
    raise NotImplementedError
