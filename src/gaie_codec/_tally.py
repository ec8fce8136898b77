"""What one choice has gained: events of any convention -> what is new in them, and how many tokens that makes.

Here the conventions of the servers end. Chunks may bring what is new or everything so far, a finish may repeat the last of it, all or
nothing, and counts may be of the message or of the choice. Ids say best what is new; where a server sends none, its counts do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ._errors import MalformedMessageError
from ._events import FinishEvent, TokenLogprob, TokensEvent

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tally:
    """One of n choices. `completion_tokens` are those so far, each counted once."""

    __slots__ = ("_counts", "_entries", "_ids", "completion_tokens", "finish_reason", "finished", "index")

    def __init__(self, index: int, counts: Literal["ids", "delta", "total"]) -> None:
        self.index = index
        self.finished = False
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self._ids = 0  # ids seen, where a server may leave them out
        self._entries = 0  # log probabilities seen
        self._counts = counts

    def take(self, event: TokensEvent | FinishEvent) -> tuple[list[int], Sequence[TokenLogprob]]:
        """Count the event; its new ids and log probabilities. Raises MalformedMessageError where what was said is taken back."""
        token_ids, entries = event.token_ids, event.logprobs
        counts, is_tokens = self._counts, isinstance(event, TokensEvent)
        repeats = event.is_cumulative if isinstance(event, TokensEvent) else not event.is_delta
        if repeats:
            if is_tokens and len(token_ids) < self._ids:
                raise MalformedMessageError(f"choice {self.index} has fewer tokens than before")
            token_ids = token_ids[self.completion_tokens if counts == "ids" else self._ids :]
            entries = entries[self._entries :]
        self._entries += len(entries)
        if counts == "ids":
            self.completion_tokens += len(token_ids)
            return token_ids, entries
        self._ids += len(token_ids)
        if counts == "total":
            self.completion_tokens = max(self.completion_tokens, self._ids, event.completion_tokens)
        elif is_tokens:
            self.completion_tokens += event.completion_tokens or len(token_ids)
        else:  # the finish knows the total
            self.completion_tokens = max(self.completion_tokens, event.completion_tokens, self._ids)
        return token_ids, entries
