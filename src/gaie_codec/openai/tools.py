"""Tools of a chat request: what the client lets the model call, what the model is held to, and how its output is read.

The order of precedence of a constraint is vLLM's: a demanded tool call goes before `response_format`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from .._errors import MalformedRequestError
from .._events import Constraint, SamplingParams
from .._parts import OutputSettings
from ..text import formats
from .endpoint import Asked
from .fields import bool_field, range_error, type_error
from .flavors import FlavorName

_KINDS: Final = ("none", "auto", "required")
_USAGE: Final = '{"type": "function", "function": {"name": "my_function"}}'


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether tools may or must be called. `name` is the function that a client named, for which the kind is "named"."""

    kind: Literal["none", "auto", "required", "named"]
    name: str = ""

    @property
    def forces_call(self) -> bool:
        """Whether the client demands a call."""
        return self.kind in ("required", "named")


def decode_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool definitions, checked, as they came."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise type_error("tools", "list_type", "Input should be a valid list")
    if not value:
        raise range_error("tools", "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.")
    for place, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise type_error(f"tools.{place}.function", "missing", "Field required")
        if not isinstance(function.get("name"), str):
            raise type_error(f"tools.{place}.function.name", "missing", "Field required")
        if not isinstance(function.get("parameters"), dict | None):
            raise type_error(f"tools.{place}.function.parameters", "dict_type", "Input should be a valid dictionary")
    return value


def template_tools(tools: Sequence[Mapping[str, Any]] | None, flavor: FlavorName = "vllm") -> list[dict[str, Any]] | None:
    """Tools as the flavor's server hands them to a template, so that prompts are the same to the token. vLLM has type and function first,
    missing keys as explicit nulls, `strict` where it is said, and drops others; SGLang keeps the client's order, with `description` and
    `defer_loading` after it."""
    if tools is None:
        return None
    if flavor == "sglang":
        return [
            {"type": "function", "function": _as_sglang(tool["function"]), "defer_loading": tool.get("defer_loading")} for tool in tools
        ]
    return [{"type": "function", "function": _template_function(tool["function"])} for tool in tools]


def _template_function(function: Mapping[str, Any]) -> dict[str, Any]:
    dumped = {key: function.get(key) for key in ("name", "description", "parameters")}
    return dumped if function.get("strict") is None else dumped | {"strict": function["strict"]}


def _as_sglang(function: Mapping[str, Any]) -> dict[str, Any]:
    known = ("name", "description", "parameters", "strict")
    return {**{key: value for key, value in function.items() if key in known}, "description": function.get("description")}


def decode_tool_choice(fields: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
    """The choice; an absent one is "auto" when there are tools, and null is "none" (observed on vLLM 0.33)."""
    choice = fields.get("tool_choice", "auto" if tools else "none")
    if choice is None or choice == "none":
        return ToolChoice("none")
    if not tools:
        raise range_error("tool_choice", "When using `tool_choice`, `tools` must be set.")
    if isinstance(choice, str):
        if choice not in _KINDS:
            raise range_error(
                "tool_choice",
                'Invalid value for `tool_choice`! Only named tools, "none", "auto" or "required" are supported.',
            )
        return ToolChoice(choice)  # type: ignore[arg-type]
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict):
        given = ": `None`" if function is None else ""
        raise range_error("tool_choice.function", f"Invalid value for `function`{given} in `tool_choice`! Correct usage: `{_USAGE}`")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise range_error("tool_choice.function.name", f"Expected field `name` in `function` in `tool_choice`! Correct usage: `{_USAGE}`")
    if all(tool["function"]["name"] != name for tool in tools):
        raise range_error("tool_choice", "The tool specified in `tool_choice` does not match any of the specified `tools`")
    return ToolChoice("named", name)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What follows of tools and formats for a request: its constraint, None for that of its own, and how the answer is read."""

    output: OutputSettings | None = None
    constraint: Constraint | None = None
    keeps_special_tokens: bool = False
    is_told: bool = False
    """A parser was chosen, and is no guess."""
    thinks: bool = False
    hides_reasoning: bool = False
    stop_token_ids: tuple[int, ...] = ()


def sample_for(reading: Reading, params: SamplingParams, asked: Asked) -> SamplingParams:
    """The parameters with which the model writes what can be read."""
    constraint = reading.constraint
    if constraint is None and params.constraint is not None:
        held = formats.constrain_answer(asked.tool_format, asked.reasoning_format, params.constraint.kind, params.constraint.value)
        constraint = params.constraint if held is None else Constraint(kind=held[0], value=held[1])
    stops = params.stop_token_ids if params.ignore_eos else tuple(dict.fromkeys((*params.stop_token_ids, *reading.stop_token_ids)))
    return msgspec.structs.replace(
        params,
        skip_special_tokens=params.skip_special_tokens and not reading.keeps_special_tokens,
        constraint=constraint,
        stop_token_ids=stops,
        grammar_from_first_token=constraint is not None and reading.hides_reasoning,
    )


def decode_reading(
    fields: Mapping[str, Any],
    asked: Asked,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: ToolChoice,
    prompt_text: str,
    template_kwargs: Mapping[str, Any],
) -> Reading:
    """How the answer to this prompt is read. Raises MalformedRequestError for tools that nothing here can tell from text."""
    tool_format, reasoning = asked.tool_format, asked.reasoning_format
    parallel = bool_field(fields, "parallel_tool_calls", True)
    hides_reasoning = not bool_field(fields, "include_reasoning", True)
    if choice.kind == "auto" and tool_format is None:
        raise MalformedRequestError('"auto" tool choice requires a tool-call parser: --tool-call-parser, or one that the server tells of')
    called = tools if choice.kind != "none" else None
    begins_inside = reasoning is not None and reasoning.begins_inside(prompt_text, template_kwargs)
    constraint = None
    if called:
        tag = formats.constrain(tool_format, called, choice.kind, choice.name)
        constraint = tag and Constraint(kind=tag[0], value=tag[1])
    if not called and reasoning is None and not (tool_format is not None and tool_format.reads_reasoning):
        return Reading(hides_reasoning=hides_reasoning)
    output = OutputSettings(
        make_parser=lambda: formats.make_parser(
            tools=tool_format if called or reasoning is None else None,
            reasoning=reasoning,
            begins_inside=begins_inside,
            definitions=called or (),
            parallel=parallel,
            required=choice.kind == "required",
            forced=choice.name,
        ),
        id_style=asked.flavor.id_style or (tool_format.id_style if tool_format is not None else "openai"),
        reasoning_start=reasoning.start if reasoning is not None else "",
        reasoning_ends=(reasoning.end, *reasoning.interrupts) if reasoning is not None else (),
        begins_inside=begins_inside,
        hides_reasoning=hides_reasoning,
        finishes_with_tool_calls=choice.kind != "named",
    )
    keeps = (reasoning is not None and reasoning.keeps_special_tokens) or (
        called is not None and tool_format is not None and tool_format.keeps_special_tokens
    )
    is_told = any(one is not None and not one.is_guess for one in (reasoning, tool_format if called else None))
    stops = [one.stop_token_ids for one in (tool_format, reasoning) if one is not None]
    return Reading(
        output=output,
        constraint=constraint,
        keeps_special_tokens=keeps,
        is_told=is_told,
        thinks=begins_inside,
        hides_reasoning=hides_reasoning,
        stop_token_ids=max(stops, key=len, default=()),
    )
