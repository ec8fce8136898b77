"""What makes a model server constrain an answer to tool calls: xgrammar's structural tag, or else a JSON schema.

The texts are those that vLLM sends, with every default written out, so that a server's cache of compiled grammars serves both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ._table import ToolFormat

_Json = dict[str, Any]


def constrain(
    tool_format: ToolFormat | None, tools: Sequence[Mapping[str, Any]], kind: str, name: str = ""
) -> tuple[Literal["structural_tag", "json_schema"], str] | None:
    """What the output is held to for a tool choice of this kind ("auto", "required", or "named"); None for nothing."""
    choice = f"function:{name}" if kind == "named" else kind
    tag = structural_tag(tool_format, tools, choice) if tool_format else ""
    if tag:
        return "structural_tag", tag
    schema = "" if tool_format and tool_format.tag_style else json_schema(tools, choice)
    return ("json_schema", schema) if schema else None


def structural_tag(tools: ToolFormat, definitions: Sequence[Mapping[str, Any]], choice: str) -> str:
    """The JSON text of a structural tag, or "" where nothing is to be constrained or the format has none.

    `choice` is "auto", "required", or "function:NAME". With "auto" only tools that are `strict` ask for it, and the arguments of
    other tools stay free, as in vLLM.
    """
    functions = _functions(definitions, choice)
    if not tools.tag_style or not functions or (choice == "auto" and not any(function.get("strict") is True for function in functions)):
        return ""
    tags = [tag for function in functions for tag in _hermes_tags(function)]
    if choice == "auto":
        chosen: _Json = {
            "type": "triggered_tags",
            "triggers": ["<tool_call>"],
            "tags": tags,
            "at_least_one": False,
            "stop_after_first": False,
            "excludes": [],
        }
    else:
        chosen = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": "",
            "at_least_one": True,
            "stop_after_first": choice != "required",
        }
    return json.dumps({"type": "structural_tag", "format": chosen})


def json_schema(definitions: Sequence[Mapping[str, Any]], choice: str) -> str:
    """The JSON schema that forces calls where there is no structural tag: an array of calls, or a named function's arguments."""
    functions = _functions(definitions, choice)
    if choice == "auto" or not functions:
        return ""
    if choice != "required":
        return json.dumps(_parameters(functions[0]))
    shared: _Json = {}
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
    schema: _Json = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": items}}
    return json.dumps(schema | ({"$defs": shared} if shared else {}))


def _functions(definitions: Sequence[Mapping[str, Any]], choice: str) -> list[Mapping[str, Any]]:
    functions = [definition.get("function") or {} for definition in definitions]
    if choice in ("auto", "required"):
        return functions
    return [function for function in functions if function.get("name") == choice.removeprefix("function:")][:1]


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}}


def _arguments(function: Mapping[str, Any], style: str = "json") -> _Json:
    parameters = function.get("parameters") if function.get("strict") is True else None
    return {
        "type": "json_schema",
        "json_schema": True if parameters is None else parameters,
        "style": style,
        "any_order": False,
        "max_whitespace_cnt": None,
        "excludes": [],
    }


def _tag(begin: str, content: _Json, end: str) -> _Json:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _hermes_tags(function: Mapping[str, Any]) -> list[_Json]:
    beginning = f'{{"name": "{function.get("name")}", "arguments": '
    return [_tag(f"<tool_call>{line}{beginning}", _arguments(function), f"}}{line}</tool_call>") for line in ("\n", "")]
