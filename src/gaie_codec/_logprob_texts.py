"""Log probabilities of the output by token id -> the same with texts, in the order of the tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._events import InferenceRequest, TokenLogprob
    from .text import Detokenizer, Tokenizer

_MIN_LOGPROB: Final = -9999.0


class TextLogprob(msgspec.Struct, frozen=True):
    """A token as text with its log probability. A piece of a character has empty text; the piece that completes it has all of it."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class PromptToken(msgspec.Struct, frozen=True, gc=False):
    """A token of the prompt as text, with its log probability if it has one, its rank (0 where it is unknown), and the likeliest at its
    place as (token id, text, log probability, rank)."""

    token_id: int
    token: str
    logprob: float | None = None
    rank: int = 0
    top: tuple[tuple[int, str, float, int], ...] = ()


def finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN; vLLM writes -9999 for a token that cannot come."""
    return logprob if _MIN_LOGPROB < logprob < math.inf else _MIN_LOGPROB


class LogprobTexts:
    """The log probabilities of one choice, as many as the request asked for."""

    __slots__ = ("_detokenizer", "_selected", "_top")

    def __init__(self, request: InferenceRequest, tokenizer: Tokenizer) -> None:
        self._top = request.sampling.logprobs or 0
        self._selected = request.sampling.logprob_token_ids
        self._detokenizer: Detokenizer = tokenizer.detokenizer(request.prompt_token_ids, skip_special_tokens=False)

    def show_ids(self) -> None:
        """Tell ids for texts from here on, as `token_id:N`."""
        self._detokenizer = _TokenIds()

    def decode(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> tuple[TextLogprob, ...]:
        """Those of the next tokens. Servers skip entries now and then, so they are aligned by token id, never by position."""
        detokenizer = self._detokenizer
        texts = []
        place = 0
        for token_id in token_ids:
            if place < len(entries) and entries[place].token_id == token_id:
                entry = entries[place]
                place += 1
                shown = self._selection(entry) if self._selected else entry.top[: self._top]
                top = tuple((detokenizer.peek(other), finite(value)) for other, value in shown)
                texts.append(TextLogprob(detokenizer.decode((token_id,)), finite(entry.logprob), top))
            else:
                detokenizer.decode((token_id,))
        return tuple(texts)

    def _selection(self, entry: TokenLogprob) -> Sequence[tuple[int, float]]:
        """The sampled token, and those that were selected, as vLLM shows them instead of the likeliest."""
        told = dict(entry.selected or entry.top)
        others = [(other, told[other]) for other in self._selected if other in told and other != entry.token_id]
        return [(entry.token_id, entry.logprob), *others]


class _TokenIds:
    """A Detokenizer by whose texts clients find the ids."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join([token_id_text(token_id) for token_id in token_ids])

    def peek(self, token_id: int) -> str:
        return token_id_text(token_id)


def token_id_text(token_id: int) -> str:
    """What stands for the text of a token where the client wants its id."""
    return f"token_id:{token_id}"
