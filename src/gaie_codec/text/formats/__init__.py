"""How models write reasoning and tool calls into their text, as a table of formats, and the parser that reads them back.

`choose_tool_format` and `choose_reasoning_format` find a model's rows, `make_parser` makes the OutputParser of one choice from
them, `constrain` is what makes a model server force a call, and `constrain_answer` what a constraint becomes where the answer is only
a part of the output. docs/parsers.md has the table.
"""

from ._choice import choose_reasoning_format, choose_tool_format
from ._parser import make_parser
from ._reasoning_table import REASONING_FORMATS, ReasoningFormat
from ._structural_tags import constrain, constrain_answer
from ._tool_table import TOOL_FORMATS, ToolFormat

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "ReasoningFormat",
    "ToolFormat",
    "choose_reasoning_format",
    "choose_tool_format",
    "constrain",
    "constrain_answer",
    "make_parser",
]
