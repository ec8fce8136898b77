"""The text stage: what one choice gained, events -> deltas a client may see.

`Choice` makes text of token ids; `_text_choice` is for servers that send text. Each token is emitted once whatever the server repeats
(`_tally`), stop text and stop tokens are cut, and incomplete UTF-8 at the very end is dropped as vLLM's own server does. A delta which
by our own knowledge is the choice's last (stop token, stop string, max_tokens reached) waits for the finish that follows it at once, so
that finish_reason rides on the last text, as vLLM sends it, and nothing that must be cut has left already. Where the server knows no
stop strings, the choice ends here with the token that completes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from ._errors import Code, OutOfOrderError, UpstreamStatusError
from ._events import FinishEvent, InferenceRequest, TokenLogprob, TokensEvent
from ._logprob_texts import LogprobTexts, PromptToken, TextLogprob
from ._tally import Tally
from .text import BrokenToolCall, StopMatcher, ToolCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .adapters.base import Adapter
    from .text import Tokenizer

_NEVER = 1 << 62
# A server that goes on for so long after a stop token or max_tokens has not ended there; after a stop string, nothing more is kept.
_MAX_HELD_TOKENS = 4096


class Delta(msgspec.Struct, frozen=True):
    """What a client learns of one choice: text to append, and with the last one (finish_reason not None) how the choice ended.

    Where one says several things, they are in this order: `reasoning`, `text`, `tool_calls`. `broken` are calls to be taken back.
    `prompt` comes with the first and with the last, where its log probabilities were asked for.
    """

    index: int
    text: str
    token_ids: list[int] = []
    logprobs: tuple[TextLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    kv_transfer_params: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    broken: tuple[BrokenToolCall, ...] = ()
    prompt: tuple[PromptToken, ...] = ()


class _Held(msgspec.Struct):
    """Deltas that wait for their finish. `last` is the stop token that ended them, not yet decoded: it may have to be hidden."""

    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TextLogprob] = []
    last: list[int] = []


class AnyChoice(Tally):
    """What choices of both kinds share: log probabilities as text, the stop matcher, and how an end is told."""

    __slots__ = ("_eos_ids", "_include_stop", "_logprobs", "_matcher", "ended_here")

    def __init__(
        self,
        index: int,
        request: InferenceRequest,
        tokenizer: Tokenizer | None,
        adapter: Adapter,
        eos_token_ids: frozenset[int],
        stop_holdback: Literal["prefix", "window"],
    ) -> None:
        super().__init__(index, adapter.counts)
        params = request.sampling
        self.ended_here = False  # by a stop string that the server does not know
        self._logprobs = LogprobTexts(request, tokenizer) if params.logprobs is not None and tokenizer is not None else None
        self._include_stop = params.include_stop_str_in_output
        # vLLM's own server holds nothing back when the stop string is to be shown.
        holdback = "prefix" if self._include_stop else stop_holdback
        self._matcher = StopMatcher(params.stop, holdback=holdback) if params.stop and not adapter.sends_final_text else None
        # Ids which a server may name as what ended the choice although nobody asked for them.
        self._eos_ids = eos_token_ids.difference(params.stop_token_ids) if adapter.names_eos else frozenset()

    def show_ids(self) -> None:
        """Tell log probabilities with ids for texts, as `token_id:N`."""
        if self._logprobs is not None:
            self._logprobs.show_ids()

    def _has_matched(self) -> bool:
        return self._matcher is not None and self._matcher.matched is not None

    def _begin_finish(self, event: FinishEvent) -> tuple[str, str | int | None]:
        """The finish reason, and what matched. Raises OutOfOrderError on a second finish, UpstreamStatusError for an aborted choice."""
        if self.finished:
            raise OutOfOrderError(f"a second finish for choice {self.index}")
        if event.finish_reason in ("abort", "error"):
            raise UpstreamStatusError(Code.INTERNAL, f"choice {self.index} ended with finish_reason {event.finish_reason!r}")
        matched = event.matched_stop
        return event.finish_reason, None if matched in self._eos_ids else matched

    def _release(self, matcher: StopMatcher, stop: str | None, *, is_trimmed: bool = False) -> str:
        """The text that the matcher held, cut at the stop string that ended the choice. `is_trimmed` text came with the finish and has
        nothing of it left."""
        start = matcher.match_offset if stop is not None and stop == matcher.matched else None
        text = matcher.flush()
        if stop is None:
            return text
        if start is None:
            start = text.find(stop)
        if start >= 0:
            return text[: start + len(stop) if self._include_stop else start]
        if self._include_stop or is_trimmed:
            return text
        # Not there as a whole: the server has cut its last tokens, and what was held is the beginning of it; or its tokenizer differs
        # from ours, and text is kept rather than guessed away.
        held = next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
        return text[: len(text) - held]

    def _logprob_texts(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> tuple[TextLogprob, ...]:
        return self._logprobs.decode(token_ids, entries) if self._logprobs is not None else ()


class Choice(AnyChoice):
    """Progress of one of n choices whose text is made here, of the ids that the server sends."""

    __slots__ = ("_decoded", "_detokenizer", "_held", "_is_busy", "_matched_text", "_max_tokens", "_min_tokens", "_must_end", "_stop_ids")

    def __init__(
        self,
        index: int,
        request: InferenceRequest,
        tokenizer: Tokenizer,
        adapter: Adapter,
        *,
        eos_token_ids: frozenset[int],
        stop_holdback: Literal["prefix", "window"] = "prefix",
    ) -> None:
        super().__init__(index, request, tokenizer, adapter, eos_token_ids, stop_holdback)
        params = request.sampling
        self._decoded = 0
        self._detokenizer = tokenizer.detokenizer(
            request.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._min_tokens = params.min_tokens
        self._max_tokens = params.max_tokens or _NEVER
        self._stop_ids = eos_token_ids.union(params.stop_token_ids) if not params.ignore_eos else frozenset(params.stop_token_ids)
        self._held: _Held | None = None
        self._must_end = self._matcher is not None and not adapter.ends_at_stop_strings
        self._matched_text: str | None = None  # of the token just taken by `receive_plain`, which completed a stop string
        # Is there more to do than to decode and match?
        self._is_busy = self._logprobs is not None or (self._matcher is not None and self._min_tokens > 0)

    def receive_plain(self, token_ids: Sequence[int]) -> str | None:
        """The per-token path: the text of ids when the client gets nothing but text. None where `receive_tokens` has to decide."""
        completion_tokens = self.completion_tokens + len(token_ids)
        if self._is_busy or completion_tokens >= self._max_tokens or token_ids[-1] in self._stop_ids:
            return None
        matcher = self._matcher
        if matcher is None:
            self.completion_tokens = completion_tokens
            return self._detokenizer.decode(token_ids)
        if self._must_end and len(token_ids) > 1:
            return None  # the choice may end amid these
        text = matcher.feed(self._detokenizer.decode(token_ids))
        if matcher.matched is None:
            self.completion_tokens = completion_tokens
            return text
        self._is_busy = True
        if self._must_end:
            self._matched_text = text
            return None
        self.completion_tokens = completion_tokens
        self._held = _Held([text])
        return ""

    def receive_plain_total(self, token_ids: Sequence[int]) -> str | None:
        """Likewise for the ids of all messages so far."""
        new = token_ids[self._ids :]
        text = self.receive_plain(new) if new else None
        if text is not None:
            self._ids += len(new)
        return text

    def receive_tokens(self, event: TokensEvent) -> Delta | None:
        """What the client may see now; None when that is nothing new. Raises OutOfOrderError after the finish."""
        if self.ended_here:
            return None
        if self.finished:
            raise OutOfOrderError(f"tokens for choice {self.index} after its finish")
        token_ids, entries = self.take(event)
        return self._gain(token_ids, entries) if token_ids else None

    def receive_finish(self, event: FinishEvent) -> Delta | None:
        """The last delta; None when the choice had ended here already. Raises OutOfOrderError on a second finish, UpstreamStatusError
        when the server gave up on the choice."""
        if self.ended_here:
            return None
        reason, matched = self._begin_finish(event)
        unseen, entries = self.take(event)
        before = None
        if self._must_end and unseen:
            before = self._gain(unseen, entries)
            if self.finished:
                return before
            unseen, entries = [], ()
        self.finished = self._is_busy = True
        held = self._held or _Held()
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
        self.finish_reason = reason
        last = Delta(
            self.index,
            text,
            held.token_ids + unseen,
            (*held.logprobs, *self._logprob_texts(unseen, entries)),
            reason,
            matched if matched is not None else stop_text,
            event.kv_transfer_params,
        )
        return last if before is None else _joined(before, last)

    def abandon(self) -> Delta | None:
        """The text that was held back, when the response breaks off; None when there is none or the choice has finished."""
        if self.finished:
            return None
        held, self._held = self._held or _Held(), None
        text = "".join(held.texts)
        if self._matcher is not None:
            text += self._release(self._matcher, self._matcher.matched)
        return Delta(self.index, text, held.token_ids, tuple(held.logprobs)) if text or held.logprobs else None

    def _gain(self, token_ids: list[int], entries: Sequence[TokenLogprob]) -> Delta | None:
        """New tokens, which `take` has counted."""
        if self._must_end and len(token_ids) > 1:
            return self._gain_one_by_one(token_ids, entries)
        stopped = token_ids[-1] in self._stop_ids
        held = self._held
        if self._has_matched() and held is not None and len(held.token_ids) >= _MAX_HELD_TOKENS:
            return None  # long past the stop string: only the count matters
        if self._matched_text is not None:
            text, self._matched_text = self._matched_text, None
        else:
            text = (self._text(held.last) if held is not None else "") + self._text(token_ids[:-1] if stopped else token_ids)
        logprobs = self._logprob_texts(token_ids, entries)
        at_limit = self.completion_tokens - len(token_ids) < self._max_tokens <= self.completion_tokens
        if self._must_end and self._has_matched():
            return self._end(text, token_ids, logprobs)
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

    def _gain_one_by_one(self, token_ids: list[int], entries: Sequence[TokenLogprob]) -> Delta | None:
        """As if each token had come in a message of its own: what follows the one that completes a stop string does not count."""
        self.completion_tokens -= len(token_ids)
        gained = None
        place = 0
        for token_id in token_ids:
            self.completion_tokens += 1
            entry = entries[place : place + 1] if place < len(entries) and entries[place].token_id == token_id else ()
            place += len(entry)
            delta = self._gain([token_id], entry)
            if delta is not None:
                gained = delta if gained is None else _joined(gained, delta)
            if self.finished:
                break
        return gained

    def _end(self, text: str, token_ids: list[int], logprobs: tuple[TextLogprob, ...]) -> Delta:
        """The end of a choice by a stop string that its server does not know."""
        held, matcher = self._held or _Held(), self._matcher
        assert matcher is not None
        self.finished = self.ended_here = True
        self.finish_reason = "stop"
        text = "".join(held.texts) + text + self._release(matcher, matcher.matched)
        return Delta(self.index, text, held.token_ids + token_ids, (*held.logprobs, *logprobs), "stop", matcher.matched)

    def _text(self, token_ids: list[int]) -> str:
        """Decode, and pass the stop matcher. vLLM ignores a stop string that ends within the first min_tokens tokens."""
        if self._matcher is None:
            return self._detokenizer.decode(token_ids)
        unchecked = max(0, min(len(token_ids), self._min_tokens - self._decoded))
        self._decoded += len(token_ids)
        text = self._matcher.feed(self._detokenizer.decode(token_ids[:unchecked]), check=False) if unchecked else ""
        return text + self._matcher.feed(self._detokenizer.decode(token_ids[unchecked:]))


def _joined(first: Delta, second: Delta) -> Delta:
    """Two deltas of one choice as one."""
    return Delta(
        second.index,
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.logprobs + second.logprobs,
        second.finish_reason,
        second.stop_reason,
        second.kv_transfer_params,
    )
