"""A tokenizer without files: one token for each byte of UTF-8, and one more for the end."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from .. import MalformedRequestError

END: Final = 256
_NO_KWARGS: Final[Mapping[str, Any]] = MappingProxyType({})


class _Bytes:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(token_id for token_id in token_ids if 0 <= token_id < END))

    def peek(self, token_id: int) -> str:
        state = self._decoder.getstate()
        text = self.decode([token_id])
        self._decoder.setstate(state)
        return text


class ByteTokenizer:
    """A `Tokenizer` for tests: bytes are tokens, 256 ends a choice, the chat template is `role: content` lines."""

    vocab_size = END + 1
    eos_token_ids = frozenset({END})
    accepts_content_parts = False

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError:
            raise MalformedRequestError("the text is not valid Unicode") from None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = _NO_KWARGS,
    ) -> str:
        lines = "".join(f"{message['role']}: {message.get('content') or ''}\n" for message in messages)
        return lines + "assistant: " * add_generation_prompt

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> _Bytes:
        return _Bytes()
