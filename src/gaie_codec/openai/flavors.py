"""Whose OpenAI server is imitated: vLLM's, or SGLang's. What it means for requests is here, SGLang's answers are in `sglang_response`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from .._parts import IdStyle

FlavorName = Literal["vllm", "sglang"]


class Flavor(msgspec.Struct, frozen=True, kw_only=True):
    """What differs before an answer is there."""

    name: FlavorName
    prefixes_ids: bool = True
    """Ids of answers, and of the calls for them, tell the endpoint: `chatcmpl-`, `cmpl-`."""
    checks_model: bool = True
    """A model that is not served is refused; else any name goes."""
    fills_max_tokens: bool = True
    """An absent `max_tokens` is sent as what the context has room for."""
    shows_uncallable_tools: bool = True
    """With `tool_choice` "none" the prompt still has the tools."""
    max_stop_strings: int = 4
    id_style: IdStyle | None = None
    """Of tool calls to which the model gave no id; None for that of the format."""


FLAVORS: Final[Mapping[str, Flavor]] = MappingProxyType(
    {
        flavor.name: flavor
        for flavor in (
            Flavor(name="vllm"),
            Flavor(
                name="sglang",
                prefixes_ids=False,
                checks_model=False,
                fills_max_tokens=False,
                shows_uncallable_tools=False,
                max_stop_strings=32,
                id_style="sglang",
            ),
        )
    }
)
VLLM: Final = FLAVORS["vllm"]

# SGLang's names for what vLLM's server has too.
_RENAMED: Final = MappingProxyType({"rid": "request_id", "no_stop_trim": "include_stop_str_in_output"})
_CONSTRAINTS: Final = MappingProxyType({"regex": "regex", "ebnf": "grammar"})


def renamed(fields: dict[str, Any], flavor: Flavor) -> dict[str, Any]:
    """The fields of a request by the names that they have in vLLM's API, which win where both are there."""
    if flavor.name == "vllm":
        return fields
    told = {_RENAMED.get(name, name): value for name, value in fields.items() if _RENAMED.get(name) not in fields}
    for name, kind in _CONSTRAINTS.items():
        if told.get(name) is not None and told.get("structured_outputs") is None:
            told["structured_outputs"] = {kind: told.pop(name)}
    return told
