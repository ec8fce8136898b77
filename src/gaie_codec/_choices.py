"""The text stage: what one choice gained, events -> deltas a client may see.

Here the conventions of the servers meet and end: each token is emitted once whatever Complete repeats, tokens are counted from ids, stop
text and stop tokens are cut, and incomplete UTF-8 at the very end is dropped as vLLM's own server does. A delta which by our own
knowledge is the choice's last (stop token, stop string, max_tokens reached) waits for the finish that follows it at once, so that
finish_reason rides on the last text, as vLLM sends it, and nothing that must be cut has left already.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec

from ._errors import Code, OutOfOrderError, UpstreamStatusError
from ._events import FinishEvent, InferenceRequest, TokenLogprob, TokensEvent
from .text import StopMatcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .text import Tokenizer

_NEVER = 1 << 62
# A server that goes on for so long after a stop token or max_tokens has not ended there; after a stop string, nothing more is kept.
_MAX_HELD_TOKENS = 4096
_MIN_LOGPROB = -9999.0


def _finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN; vLLM writes -9999 for a token that cannot come."""
    return logprob if _MIN_LOGPROB < logprob < math.inf else _MIN_LOGPROB


class TextLogprob(msgspec.Struct, frozen=True):
    """A token as text with its log probability. A piece of a character has empty text; the piece that completes it has all of it."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Delta(msgspec.Struct, frozen=True):
    """What a client learns of one choice: text to append, and with the last one (finish_reason not None) how the choice ended."""

    index: int
    text: str
    token_ids: list[int] = []
    logprobs: tuple[TextLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    kv_transfer_params: str = ""


class _Held(msgspec.Struct):
    """Deltas that wait for their finish. `last` is the stop token that ended them, not yet decoded: it may have to be hidden."""

    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TextLogprob] = []
    last: list[int] = []


class Choice:
    """Progress of one of n choices."""

    __slots__ = (
        "_decoded",
        "_detokenizer",
        "_held",
        "_include_stop",
        "_is_busy",
        "_logprobs",
        "_matcher",
        "_max_tokens",
        "_min_tokens",
        "_stop_ids",
        "_top",
        "completion_tokens",
        "finished",
        "index",
    )

    def __init__(
        self,
        index: int,
        request: InferenceRequest,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        stop_holdback: Literal["prefix", "window"] = "prefix",
    ) -> None:
        params = request.sampling
        self.index = index
        self.finished = False
        self.completion_tokens = 0
        self._decoded = 0
        self._detokenizer = tokenizer.detokenizer(
            request.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        wants_logprobs = params.logprobs is not None
        self._top = params.logprobs or 0
        self._logprobs = tokenizer.detokenizer(request.prompt_token_ids, skip_special_tokens=False) if wants_logprobs else None
        self._include_stop = params.include_stop_str_in_output
        # vLLM's own server holds nothing back when the stop string is to be shown.
        holdback = "prefix" if self._include_stop else stop_holdback
        self._matcher = StopMatcher(params.stop, holdback=holdback) if params.stop else None
        self._min_tokens = params.min_tokens
        self._max_tokens = params.max_tokens or _NEVER
        self._stop_ids = eos_token_ids.union(params.stop_token_ids) if not params.ignore_eos else frozenset(params.stop_token_ids)
        self._held: _Held | None = None
        # Is there more to do than to decode and match?
        self._is_busy = wants_logprobs or (self._matcher is not None and self._min_tokens > 0)

    def receive_plain(self, token_ids: list[int]) -> str | None:
        """The per-token path: the text of ids when the client gets nothing but text. None where `receive_tokens` has to decide."""
        completion_tokens = self.completion_tokens + len(token_ids)
        if self._is_busy or completion_tokens >= self._max_tokens or token_ids[-1] in self._stop_ids:
            return None
        self.completion_tokens = completion_tokens
        matcher = self._matcher
        if matcher is None:
            return self._detokenizer.decode(token_ids)
        text = matcher.feed(self._detokenizer.decode(token_ids))
        if matcher.matched is None:
            return text
        self._held = _Held([text])
        self._is_busy = True
        return ""

    def receive_tokens(self, event: TokensEvent) -> Delta | None:
        """What the client may see now; None when that is nothing new. Raises OutOfOrderError after the finish."""
        if self.finished:
            raise OutOfOrderError(f"tokens for choice {self.index} after its finish")
        token_ids = event.token_ids
        if not token_ids:
            return None
        self.completion_tokens += len(token_ids)
        stopped = token_ids[-1] in self._stop_ids
        held = self._held
        if self._has_matched() and held is not None and len(held.token_ids) >= _MAX_HELD_TOKENS:
            return None  # long past the stop string: only the count matters
        text = (self._text(held.last) if held is not None else "") + self._text(token_ids[:-1] if stopped else token_ids)
        logprobs = self._logprob_texts(token_ids, event.logprobs)
        at_limit = self.completion_tokens - len(token_ids) < self._max_tokens <= self.completion_tokens
        if self._has_matched() or ((stopped or at_limit) and (held is None or len(held.token_ids) < _MAX_HELD_TOKENS)):
            if held is None:
                held = self._held = _Held()
                self._is_busy = True  # for good: it hardly ever goes on from here
            held.texts.append(text)
            held.token_ids += token_ids
            held.logprobs += logprobs
            held.last = token_ids[-1:] if stopped else []
            return None
        if held is None:
            return Delta(self.index, text, token_ids, logprobs)
        # What more tokens follow was not the last after all: it goes before them.
        self._held = None
        if stopped:
            text += self._text(token_ids[-1:])
        return Delta(self.index, "".join([*held.texts, text]), held.token_ids + token_ids, (*held.logprobs, *logprobs))

    def receive_finish(self, event: FinishEvent) -> Delta:
        """The last delta. Raises OutOfOrderError on a second finish, UpstreamStatusError when the server gave up on the choice."""
        if self.finished:
            raise OutOfOrderError(f"a second finish for choice {self.index}")
        if event.finish_reason in ("abort", "error"):
            raise UpstreamStatusError(Code.INTERNAL, f"choice {self.index} ended with finish_reason {event.finish_reason!r}")
        self.finished = self._is_busy = True
        # Chunks brought `completion_tokens` ids. A server repeats some of them here (its last delta) or all; only ids beyond are new.
        unseen = event.token_ids[self.completion_tokens :]
        unseen_logprobs = event.logprobs[-len(unseen) :] if unseen else ()
        self.completion_tokens += len(unseen)
        held = self._held or _Held()
        reason, matched = event.finish_reason, event.matched_stop
        undecoded = held.last + unseen
        ended_by_token = reason == "stop" and bool(undecoded) and undecoded[-1] in self._stop_ids
        if ended_by_token and not self._include_stop:
            undecoded = undecoded[:-1]
        text = "".join(held.texts) + self._text(undecoded)
        stop_text = matched if isinstance(matched, str) else None
        if self._matcher is not None:
            # The server decides which of several stop strings it was. Where it names none, or has passed over one, ours counts.
            if stop_text is None and self._matcher.matched is not None:
                reason, matched, stop_text = "stop", None, self._matcher.matched
            text += self._release(self._matcher, stop_text)
        return Delta(
            self.index,
            text,
            held.token_ids + unseen,
            (*held.logprobs, *self._logprob_texts(unseen, unseen_logprobs)),
            reason,
            matched if matched is not None else stop_text,
            event.kv_transfer_params,
        )

    def abandon(self) -> Delta | None:
        """The text that was held back, when the response breaks off; None when there is none or the choice has finished."""
        if self.finished:
            return None
        held, self._held = self._held or _Held(), None
        text = "".join(held.texts)
        if self._matcher is not None:
            text += self._release(self._matcher, self._matcher.matched)
        return Delta(self.index, text, held.token_ids, tuple(held.logprobs)) if text or held.logprobs else None

    def _has_matched(self) -> bool:
        return self._matcher is not None and self._matcher.matched is not None

    def _text(self, token_ids: list[int]) -> str:
        """Decode, and pass the stop matcher. vLLM ignores a stop string that ends within the first min_tokens tokens."""
        if self._matcher is None:
            return self._detokenizer.decode(token_ids)
        unchecked = max(0, min(len(token_ids), self._min_tokens - self._decoded))
        self._decoded += len(token_ids)
        text = self._matcher.feed(self._detokenizer.decode(token_ids[:unchecked]), check=False) if unchecked else ""
        return text + self._matcher.feed(self._detokenizer.decode(token_ids[unchecked:]))

    def _release(self, matcher: StopMatcher, stop: str | None) -> str:
        """The text that the matcher held, cut at the stop string that ended the choice."""
        start = matcher.match_offset if stop is not None and stop == matcher.matched else None
        text = matcher.flush()
        if stop is None:
            return text
        if start is None:
            start = text.find(stop)
        # Not there: the server's tokenizer differs from ours. Text is kept rather than guessed away.
        return text if start < 0 else text[: start + len(stop) if self._include_stop else start]

    def _logprob_texts(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> tuple[TextLogprob, ...]:
        """Entries as text. Servers skip entries now and then, so they are aligned by token id, never by position."""
        detokenizer = self._logprobs
        if detokenizer is None:
            return ()
        texts = []
        place = 0
        for token_id in token_ids:
            if place < len(entries) and entries[place].token_id == token_id:
                entry = entries[place]
                place += 1
                top = tuple((detokenizer.peek(other), _finite(value)) for other, value in entry.top[: self._top])
                texts.append(TextLogprob(detokenizer.decode((token_id,)), _finite(entry.logprob), top))
            else:
                detokenizer.decode((token_id,))
        return tuple(texts)
