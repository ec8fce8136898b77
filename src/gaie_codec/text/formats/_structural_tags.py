"""What makes a model server constrain an answer to tool calls: xgrammar's structural tag, or else a JSON schema.

The texts are what vLLM would send (observed for hermes), so that a server's cache of grammars serves both. A style is how one family's
calls look to the grammar; its name is xgrammar's (`builtin_structural_tag`) or vLLM's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from ._harmony import answer_tag, call_tag
from ._reasoning_table import ReasoningFormat
from ._tag_formats import Json, constant, in_a_row, in_text, json_of, json_text, sequence, structural_tag, tag
from ._tool_table import ToolFormat

_THINK: Final = ("<think>", "</think>")


class _Style(msgspec.Struct, frozen=True, kw_only=True):
    """`{}` stands for the function's name."""

    calls: tuple[tuple[str, str], ...]  # what is before the arguments and after them; several where models write it in several ways
    arguments: str = "json"  # how they are written
    numbered: str = ""  # after the name a number, then this, then the arguments
    trigger: str = ""  # text that begins calls, with "auto"; that of the section, if there is one
    section: tuple[str, str] = ("", "")  # around all calls
    before_section: str = ""  # where a call is forced
    joins_section: bool = False  # the section is a tag of its own, rather than a sequence of its marker, calls and its end
    separator: str = ""
    excludes: tuple[str, ...] = _THINK  # from the text around calls
    repeats: bool = True  # calls follow one another with nothing between; otherwise with text


_DEEPSEEK: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_STYLES: Final[Mapping[str, _Style]] = {
    "hermes": _Style(
        calls=(
            ('<tool_call>\n{{"name": "{}", "arguments": ', "}\n</tool_call>"),
            ('<tool_call>{{"name": "{}", "arguments": ', "}</tool_call>"),
        ),
        trigger="<tool_call>",
        excludes=(),
    ),
    "llama": _Style(calls=(('{{"name": "{}", "parameters": ', "}"),), trigger='{"name": ', repeats=False),
    "kimi": _Style(
        calls=(("<|tool_call_begin|>functions.{}:", "<|tool_call_end|>"),),
        numbered="<|tool_call_argument_begin|>",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        excludes=(*_THINK, "<|tool_call_begin|>"),
    ),
    "deepseek_r1": _Style(
        calls=(("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n", "\n```<｜tool▁call▁end｜>"),),
        section=_DEEPSEEK,
        joins_section=True,
        separator="\n",
    ),
    "deepseek_v3_1": _Style(
        calls=(("<｜tool▁call▁begin｜>{}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),),
        section=_DEEPSEEK,
        joins_section=True,
    ),
    "deepseek_v3_2": _Style(
        calls=(('<｜DSML｜invoke name="{}">\n', "</｜DSML｜invoke>\n"),),
        arguments="deepseek_xml",
        trigger="<｜DSML｜function_calls>",
        section=("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
        before_section="\n\n",
    ),
    "qwen_3_coder": _Style(
        calls=(("<tool_call>\n<function={}>\n", "\n</function>\n</tool_call>"),),
        arguments="qwen_xml",
        trigger="<tool_call>\n<function=",
        repeats=False,
    ),
    "minimax": _Style(
        calls=(('<invoke name="{}">\n', "</invoke>\n"),),
        arguments="minimax_xml",
        trigger="<minimax:tool_call>",
        section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
        before_section="\n",
    ),
    "glm_4_7": _Style(
        calls=(("<tool_call>{}", "</tool_call>"),),
        arguments="glm_xml",
        trigger="<tool_call>",
        excludes=(*_THINK, "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        repeats=False,
    ),
}


def constrain(
    tool_format: ToolFormat | None, tools: Sequence[Mapping[str, Any]], kind: str, name: str = ""
) -> tuple[Literal["structural_tag", "json_schema"], str] | None:
    """What the output is held to for a tool choice of this kind ("auto", "required", or "named"); None for nothing.

    With "auto" only tools that are `strict` ask for it, and the arguments of other tools stay free, as in vLLM. Raises
    MalformedRequestError for schemas that cannot be sent.
    """
    functions = [tool.get("function") or {} for tool in tools]
    if kind == "named":
        functions = [function for function in functions if function.get("name") == name][:1]
    if not functions:
        return None
    if tool_format and tool_format.tag_style:
        if kind == "auto" and not any(function.get("strict") is True for function in functions):
            return None
        if tool_format.tag_style == "harmony":
            return "structural_tag", call_tag([(str(function.get("name")), _arguments(function)) for function in functions], kind)
        return "structural_tag", structural_tag(_format(_STYLES[tool_format.tag_style], functions, kind))
    return None if kind == "auto" else ("json_schema", json_text(_parameters(functions[0]) if kind == "named" else _calls(functions)))


def constrain_answer(
    tool_format: ToolFormat | None, reasoning_format: ReasoningFormat | None, kind: str, value: str | Sequence[str]
) -> tuple[Literal["structural_tag"], str] | None:
    """What to hold the output to so that the answer in it matches a constraint of this kind; None for the constraint itself.

    Raises MalformedRequestError for a constraint that has to be read for that, and cannot.
    """
    if any(row is not None and row.name == "harmony" for row in (tool_format, reasoning_format)):
        return "structural_tag", answer_tag(kind, value)
    return None


def _format(style: _Style, functions: Sequence[Mapping[str, Any]], kind: str) -> Json:
    tags = [_call_tag(style, function, call) for function in functions for call in style.calls]
    begin, end = style.section
    if kind == "auto":
        if begin:
            tags = [tag(begin, in_a_row(tags, style.separator), end)]
        return _in_text(style, tags, at_least_one=False)
    is_named = kind == "named"
    if not begin:
        if style.repeats:
            return in_a_row(tags, style.separator, stop_after_first=is_named)
        return tags[0] if is_named else _in_text(style, tags, at_least_one=True)
    if style.joins_section:
        if is_named:
            return tags[0] | {"begin": begin + tags[0]["begin"], "end": tags[0]["end"] + end}
        return tag(begin, in_a_row(tags, style.separator), end)
    calls = tags[0] if is_named else in_a_row(tags, style.separator)
    return sequence(constant(style.before_section + begin), calls, constant(end))


def _call_tag(style: _Style, function: Mapping[str, Any], call: tuple[str, str]) -> Json:
    content = _arguments(function, style.arguments)
    if style.numbered:
        content = sequence({"type": "regex", "pattern": r"\d+", "excludes": []}, constant(style.numbered), content)
    return tag(call[0].format(function.get("name")), content, call[1])


def _arguments(function: Mapping[str, Any], written: str = "json") -> Json:
    parameters = function.get("parameters") if function.get("strict") is True else None
    return json_of(True if parameters is None else parameters, written)


def _in_text(style: _Style, tags: Sequence[Json], *, at_least_one: bool) -> Json:
    return in_text([style.trigger or style.section[0]], tags, at_least_one=at_least_one, excludes=style.excludes)


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}}


def _calls(functions: Sequence[Mapping[str, Any]]) -> Json:
    """The schema of an array of calls."""
    shared: Json = {}
    items = []
    for function in functions:
        parameters = _parameters(function)
        if "$defs" in parameters:  # references point to the root
            shared |= parameters["$defs"]
            parameters = {key: value for key, value in parameters.items() if key != "$defs"}
        items.append(
            {
                "properties": {"name": {"type": "string", "enum": [function.get("name")]}, "parameters": parameters},
                "required": ["name", "parameters"],
            }
        )
    schema: Json = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": items}}
    return schema | ({"$defs": shared} if shared else {})
