"""Log probabilities of a prompt by token id -> the same with texts, to go along with the deltas of its choices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ._choices import Delta
from ._events import PromptLogprob
from ._logprob_texts import PromptToken, finite

if TYPE_CHECKING:
    from ._events import InferenceRequest
    from ._reader import CallReader
    from .text import Tokenizer


class PromptTexts:
    """The tokens of one call's prompt. The first delta of each choice brings them, and the last; so does a stream that shows the prompt
    first, and so does a whole body, whose server may tell them as late as with its last message."""

    __slots__ = ("_entries", "_reader", "_request", "_tokenizer", "_tokens", "_told")

    def __init__(self, request: InferenceRequest, reader: CallReader, tokenizer: Tokenizer) -> None:
        self._request = request
        self._reader = reader
        self._tokenizer = tokenizer
        self._told: set[int] = set()
        self._entries: Sequence[PromptLogprob] | None = None
        self._tokens: tuple[PromptToken, ...] = ()

    def attach(self, delta: Delta) -> Delta:
        """The delta, with the prompt where it belongs."""
        if delta.finish_reason is None and delta.index in self._told:
            return delta
        self._told.add(delta.index)
        entries = self._reader.prompt_logprobs
        if entries is not self._entries:
            self._entries = entries
            self._tokens = self._decode(entries)
        return msgspec.structs.replace(delta, prompt=self._tokens)

    def _decode(self, entries: Sequence[PromptLogprob]) -> tuple[PromptToken, ...]:
        detokenizer = self._tokenizer.detokenizer((), skip_special_tokens=False)
        most = self._request.sampling.prompt_logprobs or 0
        tokens = []
        for entry in self._aligned(entries):
            values = sorted([value for _, value in entry.top])
            # The place in the list is the rank; equals have that of the last of them, as in vLLM.
            top = tuple(
                [
                    (other, detokenizer.peek(other), finite(value), len(values) - bisect_left(values, value))
                    for other, value in entry.top[:most]
                ]
            )
            text = detokenizer.decode((entry.token_id,))
            logprob = entry.logprob if entry.logprob is None else finite(entry.logprob)
            tokens.append(PromptToken(entry.token_id, text, logprob, entry.rank, top))
        return tuple(tokens)

    def _aligned(self, entries: Sequence[PromptLogprob]) -> Sequence[PromptLogprob]:
        """An entry for each token of the prompt: servers may tell of its end alone, of its beginning, or of nothing."""
        token_ids = self._request.prompt_token_ids
        count = len(entries)
        if count >= len(token_ids):  # more where media stand for tokens
            return entries
        start = len(token_ids) - count
        if [entry.token_id for entry in entries] != token_ids[start:]:
            start = 0
        untold = [PromptLogprob(token_id=token_id) for token_id in token_ids]
        return [*untold[:start], *entries, *untold[start + count :]]
