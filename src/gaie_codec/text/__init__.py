"""Text for token ids, token ids for text, and what text says: what the rest of the library asks of a tokenizer, and of a parser.

Only the protocols, the parts of an output and the stop matcher are here, so that the core needs neither tokenizers nor jinja2.
`text.huggingface` is the implementation for `tokenizer.json` models, anything else that has these methods will do; `text.archive` reads
what GetTokenizer streams. `text.formats` has the parsers, `text.harmony` and `text.harmony_prompts` are for gpt-oss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from ._stops import StopMatcher

__all__ = ["BrokenToolCall", "Content", "Detokenizer", "OutputParser", "Part", "Reasoning", "StopMatcher", "Tokenizer", "ToolCall"]

NO_TEMPLATE_KWARGS: Final[Mapping[str, Any]] = MappingProxyType({})


class Content(msgspec.Struct, frozen=True):
    """Text of the answer itself."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text that the model thought before it answered."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A piece of one tool call. The first piece has the name, and the id where the model writes one; `arguments` is JSON text to append."""

    index: int  # of the call in its choice
    name: str = ""
    arguments: str = ""
    id: str = ""


class BrokenToolCall(msgspec.Struct, frozen=True):
    """A tool call whose pieces were told already turned out to be none: cut off, or malformed. `text` is all that the model wrote of it.

    A stream cannot take the pieces back; a whole body has the text as content instead.
    """

    index: int
    text: str


Part: TypeAlias = Content | Reasoning | ToolCall | BrokenToolCall


class OutputParser(Protocol):
    """Tells reasoning, content and tool calls of one choice apart. Pieces cut anywhere give the same parts, joined."""

    def feed(self, text: str) -> Sequence[Part]:
        """What more text makes certain, in order; adjacent parts are of different kinds or calls."""
        ...

    def finish(self) -> Sequence[Part]:
        """What was held back, after the last text."""
        ...


class Detokenizer(Protocol):
    """Turns the token ids of one choice into text, piece by piece. Ids outside the vocabulary add nothing."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text these ids add: "" while a character is incomplete.

        What is still incomplete at the end is never returned; vLLM drops it as well.
        """
        ...

    def peek(self, token_id: int) -> str:
        """What `decode([token_id])` would return now, without changing state: for the alternatives in `top_logprobs`."""
        ...


class Tokenizer(Protocol):
    """One model's tokenizer and chat template. Safe to share between requests; what has state is the Detokenizer.

    It may also have `chat_template`, the template's source, which shows how the model writes tool calls and reasoning, and
    `max_token_chars`, how many characters a token stands for at most. One that has `encode_chat`, with the arguments of `render_chat`,
    makes the prompt's token ids itself; it gets the arguments of tool calls as text, as they came.
    """

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size-1."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a choice by itself."""
        ...

    @property
    def accepts_content_parts(self) -> bool:
        """Does the chat template loop over a message's content? Then parts are passed as a list, else joined to a string."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Raises MalformedRequestError for text that is not Unicode (lone surrogates)."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = NO_TEMPLATE_KWARGS,
    ) -> str:
        """The prompt text of a chat, to be encoded without special tokens. Raises MalformedRequestError."""
        ...

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh Detokenizer for one choice that follows this prompt."""
        ...
