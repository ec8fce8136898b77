"""Deltas -> a text completion: what of `chat_response` is different for it."""

from __future__ import annotations

from typing import Any

from .._choices import Delta
from .._events import Usage
from . import chat_response
from .chat import ChatOptions
from .endpoint import ResponseMeta


class StreamEncoder(chat_response.StreamEncoder):
    """Server-sent events, without role chunks. The first chunk of a choice has the ids of its prompt when they were asked for."""

    object_name = "text_completion"
    before_text = b'"text":'
    after_text = b""

    def opening(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        per_prompt = len(indexes) // len(prompt_token_ids)
        asked = self._options.return_token_ids
        self._prompts = {index: prompt_token_ids[index // per_prompt] for index in indexes} if asked else {}
        return b""

    def part(self, delta: Delta) -> dict[str, Any]:
        prompt = self._prompts.pop(delta.index, None)
        return {"text": delta.text} if prompt is None else {"text": delta.text, "prompt_token_ids": prompt}


class UnaryEncoder(chat_response.UnaryEncoder):
    """One JSON body."""

    object_name = "text_completion"

    def part(self, index: int, text: str) -> dict[str, Any]:
        if not self._options.return_token_ids:
            return {"text": text}
        return {"text": text, "prompt_token_ids": self._prompts[index * len(self._prompts) // len(self._texts)]}

    def prompt_part(self, prompts: list[list[int]]) -> dict[str, Any]:
        return {}


def make_encoder(options: ChatOptions, meta: ResponseMeta) -> StreamEncoder | UnaryEncoder:
    """What the options ask for."""
    return StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)
