"""The table of tool call formats: how models write calls, one row each, and the names that servers have for the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from ._layouts import BareArguments, HarmonyMessages, JsonCalls, Layout, NamedCalls, PythonCalls, TaggedCalls

IdStyle = Literal["openai", "mistral"]


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a family of models writes tool calls."""

    name: str
    aliases: tuple[str, ...] = ()  # what vLLM and SGLang call it besides
    layout: Layout
    template: str = ""  # a regular expression that the chat templates of such models match
    keeps_special_tokens: bool = False  # markers are special tokens, so the text must keep these: vLLM sends skip_special_tokens=False
    id_style: IdStyle = "openai"  # of calls to which the model gives none: chatcmpl-tool-<16 hex>, or 9 alphanumerics
    stop_token_ids: tuple[int, ...] = ()  # that end an answer besides the end token; vLLM has them of the model's generation config
    reads_reasoning: bool = False  # as well, since the calls are in no text of their own
    tag_style: str = ""  # of the structural tag that forces a call; without one a call is forced by a JSON schema, and is that JSON
    is_guess: bool = False

    def guessed(self, is_skipped: Callable[[str], bool]) -> ToolFormat:
        """The same where nobody says that the model writes so. `is_skipped` says whether a text is lost with special tokens."""
        texts = [text for value in msgspec.structs.astuple(self.layout) for text in ([value] if isinstance(value, str) else _texts(value))]
        keeps = self.keeps_special_tokens and any(map(is_skipped, filter(None, texts)))
        return msgspec.structs.replace(self, is_guess=True, keeps_special_tokens=keeps)


def _texts(value: object) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()


def _function_tags(begin: str, end: str) -> TaggedCalls:
    return TaggedCalls(
        begins=(begin, "<function="),
        end=end,
        call="<function=",
        name_end=">",
        argument="<parameter=",
        argument_name_ends=(">",),
        value_end="</parameter>",
        call_end="</function>",
        trims=True,
    )


def _dsml_tags(section: str) -> TaggedCalls:
    return TaggedCalls(
        begins=(f"<｜DSML｜{section}>", '<｜DSML｜invoke name="'),
        end=f"</｜DSML｜{section}>",
        call='<｜DSML｜invoke name="',
        name_end='">',
        argument='<｜DSML｜parameter name="',
        argument_name_ends=('" string="true">', '" string="false">'),
        texts=('" string="true">',),
        others=('" string="false">',),
        value_end="</｜DSML｜parameter>",
        call_end="</｜DSML｜invoke>",
    )


# From the most telling template to the least: the first that matches is taken.
_TOOL_ROWS: Final = (
    ToolFormat(
        name="harmony",
        aliases=("openai", "gpt-oss", "gpt_oss"),
        layout=HarmonyMessages(),
        stop_token_ids=(200012,),  # <|call|>
        reads_reasoning=True,
        template=r"<\|channel\|>analysis",
        keeps_special_tokens=True,
        tag_style="harmony",
    ),
    ToolFormat(
        name="kimi_k2",
        layout=NamedCalls(
            begins=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
            end="<|tool_calls_section_end|>",
            call="<|tool_call_begin|>",
            name_ends=("<|tool_call_argument_begin|>",),
            name_has_id=True,
            call_end="<|tool_call_end|>",
        ),
        template=r"<\|tool_calls_section_begin\|>",
        keeps_special_tokens=True,
        tag_style="kimi",
    ),
    ToolFormat(
        name="deepseek_v4",
        aliases=("deepseekv4",),
        layout=_dsml_tags("tool_calls"),
        template="<｜DSML｜tool_calls>",
    ),
    ToolFormat(
        name="deepseek_v32",
        aliases=("deepseekv32",),
        layout=_dsml_tags("function_calls"),
        template="｜DSML｜",
        tag_style="deepseek_v3_2",
    ),
    ToolFormat(
        name="deepseek_v3",
        aliases=("deepseekv3",),
        layout=NamedCalls(
            begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
            end="<｜tool▁calls▁end｜>",
            call="<｜tool▁call▁begin｜>",
            name_after="<｜tool▁sep｜>",
            name_ends=("\n```json",),
            fence="```",
            call_end="<｜tool▁call▁end｜>",
        ),
        template=r"(?s)<｜tool▁calls▁begin｜>.*```json",
        tag_style="deepseek_r1",
    ),
    ToolFormat(
        name="deepseek_v31",
        aliases=("deepseekv31",),
        layout=NamedCalls(
            begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
            end="<｜tool▁calls▁end｜>",
            call="<｜tool▁call▁begin｜>",
            name_ends=("<｜tool▁sep｜>",),
            call_end="<｜tool▁call▁end｜>",
        ),
        template="<｜tool▁calls▁begin｜>",
        tag_style="deepseek_v3_1",
    ),
    ToolFormat(
        name="mistral",
        layout=NamedCalls(
            begins=("[TOOL_CALLS]",),
            name_ends=("[ARGS]", "[CALL_ID]", "{"),
            id_after="[CALL_ID]",
            or_json=True,
        ),
        template=r"\[TOOL_CALLS\]",
        keeps_special_tokens=True,
        id_style="mistral",
    ),
    ToolFormat(
        name="minimax_m2",
        aliases=("minimax-m2",),
        layout=TaggedCalls(
            begins=("<minimax:tool_call>",),
            end="</minimax:tool_call>",
            call='<invoke name="',
            name_end='">',
            argument='<parameter name="',
            argument_name_ends=('">',),
            value_end="</parameter>",
            call_end="</invoke>",
        ),
        template="<minimax:tool_call>",
        keeps_special_tokens=True,
        tag_style="minimax",
    ),
    ToolFormat(
        name="glm45",
        aliases=("glm47", "glm"),
        layout=TaggedCalls(
            begins=("<tool_call>",),
            argument="<arg_key>",
            argument_name_ends=("</arg_key>",),
            value="<arg_value>",
            value_end="</arg_value>",
            call_end="</tool_call>",
        ),
        template="<arg_key>",
        keeps_special_tokens=True,
        tag_style="glm_4_7",
    ),
    ToolFormat(
        name="seed_oss",
        layout=_function_tags("<seed:tool_call>", "</seed:tool_call>"),
        template="<seed:tool_call>",
        keeps_special_tokens=True,
    ),
    ToolFormat(
        name="qwen3_coder",
        aliases=("qwen3_xml", "mimo"),
        layout=_function_tags("<tool_call>", "</tool_call>"),
        template="<function=",
        keeps_special_tokens=True,
        tag_style="qwen_3_coder",
    ),
    ToolFormat(
        name="llama4_pythonic",
        aliases=("llama4",),
        layout=PythonCalls(begins=("<|python_start|>",), end="<|python_end|>", is_bare=True),
        template=r"<\|python_start\|>",
    ),
    ToolFormat(
        name="llama3_json",
        aliases=("llama3", "llama4_json"),
        layout=JsonCalls(begins=("<|python_tag|>",), is_bare=True, separator=";", rewrites=True),
        tag_style="llama",
        template=r"<\|python_tag\|>|\"name\": function name, \"parameters\"",
    ),
    ToolFormat(
        name="olmo3",
        layout=PythonCalls(begins=("<function_calls>",), end="</function_calls>"),
        template="<function_calls>",
    ),
    ToolFormat(
        name="lfm2",
        layout=PythonCalls(begins=("<|tool_call_start|>",), end="<|tool_call_end|>"),
        template=r"<\|tool_call_start\|>",
        keeps_special_tokens=True,
    ),
    ToolFormat(
        name="granite",
        layout=JsonCalls(begins=("<|tool_call|>",)),
        template=r"<\|tool_call\|>",
        keeps_special_tokens=True,
    ),
    ToolFormat(
        name="internlm",
        layout=JsonCalls(begins=("<|action_start|><|plugin|>",), end="<|action_end|>"),
        template=r"<\|plugin\|>",
        keeps_special_tokens=True,
    ),
    ToolFormat(
        name="jamba",
        layout=JsonCalls(begins=("<tool_calls>",), end="</tool_calls>"),
        template="<tool_calls>",
        keeps_special_tokens=True,
    ),
    ToolFormat(
        name="longcat",
        layout=JsonCalls(begins=("<longcat_tool_call>",), end="</longcat_tool_call>"),
        template="<longcat_tool_call>",
        keeps_special_tokens=True,
    ),
    ToolFormat(
        name="phi4_mini_json",
        layout=JsonCalls(begins=("functools",)),
        template=r"functools\[",
    ),
    ToolFormat(
        name="pythonic",
        layout=PythonCalls(is_bare=True),
        template=r"\[func_name1\(",
    ),
    ToolFormat(
        name="hermes",
        aliases=("qwen", "qwen25", "qwen2.5", "qwen3", "granite4"),
        layout=JsonCalls(begins=("<tool_call>",), end="</tool_call>"),
        template="<tool_call>",
        keeps_special_tokens=True,
        tag_style="hermes",
    ),
)

# What calls look like that a JSON schema forces, where the format has no structural tag.
SCHEMA_CALLS: Final = JsonCalls(is_bare=True)


def schema_layout(name: str) -> Layout:
    """The layout of calls that a JSON schema forces: of the named function, or of any with "" for a name."""
    return BareArguments(name=name) if name else SCHEMA_CALLS


TOOL_FORMATS: Final[Mapping[str, ToolFormat]] = MappingProxyType({name: row for row in _TOOL_ROWS for name in (row.name, *row.aliases)})
