"""The parser stage: text of one choice -> what of it is reasoning, content and tool calls, and how many tokens were reasoning.

A choice that is not parsed has no stage. Whoever encodes gets the same deltas either way.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from ._choices import Delta
from .text import BrokenToolCall, Content, OutputParser, Part, Reasoning, ToolCall

if TYPE_CHECKING:
    from .text import Tokenizer

_ALPHANUMERIC: Final = string.digits + string.ascii_letters
_ID_BYTES: Final = {"sglang": 12}
_MISTRAL_ID_LENGTH: Final = 9  # Mistral's chat templates refuse any other

IdStyle = Literal["openai", "mistral", "responses", "anthropic", "sglang"]

_ID_PREFIXES: Final = {"openai": "chatcmpl-tool-", "responses": "call_", "anthropic": "toolu_", "sglang": "call_"}


class OutputSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the choices of one request are parsed.

    Reasoning goes from the text `reasoning_start` to the first of `reasoning_ends`, by whose token ids its tokens are counted; there are no
    ends where nothing tells reasoning apart.
    """

    make_parser: Callable[[], OutputParser]
    id_style: IdStyle = "openai"
    reasoning_start: str = ""
    reasoning_ends: tuple[str, ...] = ()
    begins_inside: bool = False
    """The answer begins with reasoning, without a tag of its own."""
    hides_reasoning: bool = False
    finishes_with_tool_calls: bool = True
    """A finish by stop is told as `tool_calls` when there are any. Not so where the client named the function."""


def tool_call_id(style: IdStyle, request_id: str, choice: int, call: int) -> str:
    """The id of a call to which the model gave none: the same for the same place in the same request."""
    digest = hashlib.blake2b(f"{request_id}\0{choice}\0{call}".encode("utf-8", "replace"), digest_size=_ID_BYTES.get(style, 8))
    if style != "mistral":
        return f"{_ID_PREFIXES[style]}{digest.hexdigest()}"
    number, letters = int.from_bytes(digest.digest(), "big"), ""
    for _ in range(_MISTRAL_ID_LENGTH):
        number, digit = divmod(number, len(_ALPHANUMERIC))
        letters += _ALPHANUMERIC[digit]
    return letters


class PartsStage:
    """Of one choice. `reasoning_tokens` are those so far.

    They are counted by ids between the tags. Where there are no ids, or a tag is no token, the text of the reasoning is tokenized: as it
    comes, and once more at the end as a whole, since pieces take more tokens. A parser that takes ids counts them itself. It gets the text
    all the same where `has_stops`: that is cut at stop strings, and ids are not. There another one counts.
    """

    __slots__ = (
        "_begun",
        "_broken",
        "_counted_texts",
        "_counter",
        "_ends",
        "_eos_ids",
        "_feed_ids",
        "_has_ids",
        "_inside",
        "_parser",
        "_request_id",
        "_settings",
        "_start",
        "_text_tokens",
        "_tokenizer",
        "counts_text",
        "index",
        "needs_ids",
        "reasoning_tokens",
        "takes_ids",
    )

    def __init__(
        self,
        index: int,
        settings: OutputSettings,
        *,
        request_id: str,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        has_stops: bool = False,
    ) -> None:
        self.index = index
        self.reasoning_tokens = 0
        self._settings = settings
        self._parser = settings.make_parser()
        self._feed_ids: Any = getattr(self._parser, "feed_ids", None) if not has_stops else None
        self.takes_ids = self._feed_ids is not None
        self._counter: Any = settings.make_parser() if has_stops and hasattr(self._parser, "feed_ids") else None
        self.needs_ids = self.takes_ids or self._counter is not None
        self._request_id = request_id
        self._eos_ids = eos_token_ids
        self._begun = self._broken = 0  # tool calls
        self._tokenizer = tokenizer if settings.reasoning_ends else None
        self._start, self._ends = _tag_ids(settings, tokenizer)
        self.counts_text = not self._ends
        self._has_ids = False
        self._inside = settings.begins_inside
        self._counted_texts: list[str] = []
        self._text_tokens = 0  # of these, piece by piece

    def count(self, token_ids: Sequence[int]) -> None:
        """Count those of these tokens that are reasoning; tags are not."""
        if not token_ids:
            return
        self._has_ids = True
        if self._counter is not None:
            self._counter.feed_ids(token_ids)
            self.reasoning_tokens = self._counter.reasoning_tokens
            return
        start, ends = self._start, self._ends
        if not ends or not (self._inside or start in token_ids):
            return
        for token_id in token_ids:
            if token_id in ends:
                self._inside = False
            elif token_id == start:
                self._inside = True
            elif self._inside and token_id not in self._eos_ids:
                self.reasoning_tokens += 1

    def feed(self, text: str) -> Sequence[Part]:
        """The parts that more text makes certain, calls with their ids."""
        return self._complete(self._parser.feed(text)) if text else ()

    def delta(self, parts: Sequence[Part]) -> list[Delta]:
        """Parts as deltas: as few as keep their order."""
        return [_delta(self.index, group) for group in _groups(parts)]

    def receive(self, delta: Delta) -> list[Delta]:
        """What the delta is made of. The last one has its finish; without any text it is a delta of its own."""
        token_ids = delta.token_ids
        counts_text = self.counts_text
        if not counts_text:
            self.count(token_ids)
            self.counts_text = not self._has_ids  # text that is released without ids had some before
        takes_ids = self.takes_ids and bool(token_ids)
        if takes_ids:
            self.counts_text = False
            parts = [*self._complete(self._feed_ids(token_ids))]
            self.reasoning_tokens = getattr(self._parser, "reasoning_tokens", self.reasoning_tokens)
        else:
            parts = [*self.feed(delta.text)]
        reason = delta.finish_reason
        if reason is not None:
            parts += self._complete(self._parser.finish())
            self._count_whole_text()
            if reason == "stop" and self._begun > self._broken and self._settings.finishes_with_tool_calls:
                reason = "tool_calls"
        self.counts_text = counts_text
        deltas = self.delta(parts) or [Delta(self.index, "")]
        deltas[0] = msgspec.structs.replace(deltas[0], token_ids=token_ids, logprobs=delta.logprobs)
        if reason is not None:
            deltas[-1] = msgspec.structs.replace(
                deltas[-1], finish_reason=reason, stop_reason=delta.stop_reason, kv_transfer_params=delta.kv_transfer_params
            )
        return deltas

    def abandon(self) -> list[Delta]:
        """The text that was held back, when the response breaks off."""
        return self.delta([part for part in self._complete(self._parser.finish()) if not isinstance(part, BrokenToolCall)])

    def _count_whole_text(self) -> None:
        texts = self._counted_texts
        if len(texts) > 1 and self._tokenizer is not None:
            tokens = len(self._tokenizer.encode("".join(texts), add_special_tokens=False))
            self.reasoning_tokens += tokens - self._text_tokens
            self._text_tokens = tokens
        texts.clear()

    def _complete(self, parts: Sequence[Part]) -> Sequence[Part]:
        if len(parts) == 1 and type(parts[0]) is Content:  # most are
            return parts
        completed: list[Part] = []
        for part in parts:
            if isinstance(part, Reasoning):
                if self.counts_text and self._tokenizer is not None:
                    self._counted_texts.append(part.text)
                    tokens = len(self._tokenizer.encode(part.text, add_special_tokens=False))
                    self._text_tokens += tokens
                    self.reasoning_tokens += tokens
                if self._settings.hides_reasoning:
                    continue
            elif isinstance(part, ToolCall):
                if part.name and part.index >= self._begun:
                    self._begun = part.index + 1
                    if not part.id:
                        own_id = tool_call_id(self._settings.id_style, self._request_id, self.index, part.index)
                        part = msgspec.structs.replace(part, id=own_id)
            elif isinstance(part, BrokenToolCall):
                self._broken += 1
            completed.append(part)
        return completed


def _tag_ids(settings: OutputSettings, tokenizer: Tokenizer | None) -> tuple[int | None, frozenset[int]]:
    """The ids of the start and the ends; none where the first end is not a single token."""
    if not settings.reasoning_ends or tokenizer is None:
        return None, frozenset()
    start, *ends = (tokenizer.encode(tag, add_special_tokens=False) for tag in (settings.reasoning_start, *settings.reasoning_ends))
    if len(ends[0]) != 1:
        return None, frozenset()
    return start[0] if len(start) == 1 else None, frozenset(end[0] for end in ends if len(end) == 1)


_RANKS: Final = {Reasoning: 0, Content: 1, ToolCall: 2, BrokenToolCall: 3}


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts, cut where one comes that a delta has before what is there already."""
    groups: list[list[Part]] = []
    rank = len(_RANKS)
    for part in parts:
        if _RANKS[type(part)] < rank:
            groups.append([])
        rank = _RANKS[type(part)]
        groups[-1].append(part)
    return groups


def _delta(index: int, parts: Sequence[Part]) -> Delta:
    return Delta(
        index,
        "".join([part.text for part in parts if isinstance(part, Content)]),
        reasoning="".join([part.text for part in parts if isinstance(part, Reasoning)]),
        tool_calls=tuple(part for part in parts if isinstance(part, ToolCall)),
        broken=tuple(part for part in parts if isinstance(part, BrokenToolCall)),
    )
