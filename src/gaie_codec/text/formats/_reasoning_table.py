"""The table of reasoning formats: how models tell what they think from what they answer, one row each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

# What chat templates write between turns.
_TURN: Final = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS)\]|</s>|\[/?SYSTEM_PROMPT\]")


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a family of models tells what it thinks from what it answers."""

    name: str
    aliases: tuple[str, ...] = ()
    start: str = "<think>"
    end: str = "</think>"
    interrupts: tuple[str, ...] = ()  # markers of calls, which end the reasoning as the end tag does
    starts: Literal["inside", "outside"] = "inside"  # where an answer begins if neither the prompt's end nor a toggle tells
    toggles: tuple[str, ...] = ()  # template variables that turn reasoning on and off; `starts` is what holds without them
    opens: bool = False  # a start tag where the answer begins opens reasoning even where it was not expected
    template: str = ""
    keeps_special_tokens: bool = False
    stop_token_ids: tuple[int, ...] = ()
    is_guess: bool = False

    def guessed(self, is_skipped: Callable[[str], bool]) -> ReasoningFormat:
        """The same where nobody says that the model writes so: what is not tagged is no reasoning."""
        keeps = self.keeps_special_tokens and any(map(is_skipped, (self.start, self.end)))
        return msgspec.structs.replace(self, is_guess=True, keeps_special_tokens=keeps, starts="outside", toggles=(), opens=True)

    def begins_inside(self, prompt_text: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Is the beginning of the answer reasoning, even without a start tag?

        The last tag in the turn that the prompt leaves open decides, else the template variables, else what such models do by default.
        """
        start, end = prompt_text.rfind(self.start), prompt_text.rfind(self.end)
        if max(start, end) >= 0:
            after = start + len(self.start) if start > end else end + len(self.end)
            if not _TURN.search(prompt_text, after):
                return start > end
        told = [template_kwargs[name] for name in self.toggles if template_kwargs.get(name) is not None]
        return any(told) if told else self.starts == "inside"


# From the most telling template to the least: the first that matches is taken.
_REASONING_ROWS: Final = (
    ReasoningFormat(
        name="harmony",
        aliases=("openai_gptoss", "gpt-oss", "gpt_oss", "openai"),
        start="<|channel|>analysis<|message|>",
        end="<|end|>",
        starts="outside",
        template=r"<\|channel\|>analysis",
        stop_token_ids=(200012,),  # <|call|>
        keeps_special_tokens=True,
    ),
    ReasoningFormat(
        name="mistral",
        start="[THINK]",
        end="[/THINK]",
        interrupts=("[TOOL_CALLS]",),
        starts="outside",
        opens=True,
        template=r"\[THINK\]",
        keeps_special_tokens=True,
    ),
    ReasoningFormat(
        name="seed_oss",
        start="<seed:think>",
        end="</seed:think>",
        interrupts=("<seed:tool_call>",),
        template="<seed:think>",
        keeps_special_tokens=True,
    ),
    ReasoningFormat(
        name="kimi",
        start="◁think▷",
        end="◁/think▷",
        starts="outside",
        opens=True,
        template="◁think▷",
    ),
    ReasoningFormat(
        name="kimi_k2",
        interrupts=("<|tool_calls_section_begin|>",),
        toggles=("thinking", "enable_thinking"),
        template=r"(?s)<\|tool_calls_section_begin\|>.*</?think>|</?think>.*<\|tool_calls_section_begin\|>",
        keeps_special_tokens=True,
    ),
    ReasoningFormat(
        name="minimax_m2",
        aliases=("minimax", "minimax-m2", "minimax_m2_append_think", "minimax-append-think"),
        template="(?s)<minimax:tool_call>.*</think>|</think>.*<minimax:tool_call>",
    ),
    ReasoningFormat(
        name="glm45",
        aliases=("glm47", "glm4", "glm"),
        interrupts=("<tool_call>",),
        toggles=("thinking", "enable_thinking"),
        template=r"(?s)\[gMASK\].*</?think>",
        keeps_special_tokens=True,
    ),
    ReasoningFormat(
        name="deepseek_v3",
        aliases=("deepseek-v3", "deepseek_v31", "deepseek-v31", "deepseek_v4", "deepseek-v4"),
        starts="outside",
        toggles=("thinking", "enable_thinking"),
        opens=True,
        template=r"(?s)\bthinking\b.*<｜Assistant｜>.*</think>",
    ),
    ReasoningFormat(
        name="qwen3",
        aliases=("mimo", "interns1"),
        interrupts=("<tool_call>",),
        toggles=("enable_thinking",),
        template="(?s)enable_thinking.*</?think>|</?think>.*enable_thinking",
        keeps_special_tokens=True,
    ),
    ReasoningFormat(
        name="nemotron_v3",
        aliases=("nemotron_3",),
        interrupts=("<tool_call>",),
        toggles=("enable_thinking",),
        keeps_special_tokens=True,
    ),
    ReasoningFormat(name="holo2", toggles=("thinking", "enable_thinking")),
    ReasoningFormat(
        name="deepseek_r1",
        aliases=("deepseek-r1", "qwen3-thinking", "olmo3", "step3", "step3p5", "think"),
        template=r"(?s)<｜Assistant｜>.*</?think>|assistant[^{}]*<think>",
    ),
)

REASONING_FORMATS: Final[Mapping[str, ReasoningFormat]] = MappingProxyType(
    {name: row for row in _REASONING_ROWS for name in (row.name, *row.aliases)}
)
