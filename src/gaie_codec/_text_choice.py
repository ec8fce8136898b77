"""The text stage for servers that send text: events -> deltas, with what may become a stop string held back where the server does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ._choices import AnyChoice, Delta
from ._errors import MalformedMessageError, OutOfOrderError
from ._events import FinishEvent, InferenceRequest, TokensEvent

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .text import Tokenizer


class TextChoice(AnyChoice):
    """Progress of one of n choices whose text the server makes.

    Text that the server may still shorten, or in which it looks for no stop strings, passes the stop matcher, so that no part of a stop
    string leaves; text that is final goes out as it comes.
    """

    __slots__ = ("_echoes_prompt", "_emitted", "_is_cumulative", "_is_plain", "_min_tokens", "_must_end", "_seen")

    def __init__(
        self,
        index: int,
        request: InferenceRequest,
        tokenizer: Tokenizer | None,
        adapter: Adapter,
        *,
        eos_token_ids: frozenset[int],
        stop_holdback: Literal["prefix", "window"] = "prefix",
    ) -> None:
        super().__init__(index, request, tokenizer, adapter, eos_token_ids, stop_holdback)
        self._seen = 0  # characters of cumulative text
        self._emitted = 0  # characters that the client has
        self._is_cumulative = adapter.convention.is_cumulative
        self._echoes_prompt = adapter.echoes_prompt
        self._must_end = self._matcher is not None and not adapter.ends_at_stop_strings
        self._min_tokens = request.sampling.min_tokens if self._must_end else 0
        self._is_plain = self._logprobs is None and not self._must_end

    def receive_plain(self, text: str, tokens: int) -> str | None:
        """The per-token path: the piece and its tokens, or all text and tokens so far. None where `receive_tokens` has to decide."""
        if not self._is_plain or self.finished:
            return None
        if self._is_cumulative:
            if len(text) < self._seen:
                return None
            text, self._seen = text[self._seen :], max(len(text), self._seen)
            self.completion_tokens = max(tokens, self.completion_tokens)
        else:
            self.completion_tokens += tokens
        if self._matcher is not None:
            text = self._matcher.feed(text)
        self._emitted += len(text)
        return text

    def receive_tokens(self, event: TokensEvent) -> Delta | None:
        """What the client may see now; None when that is nothing new. Raises OutOfOrderError after the finish."""
        if self.ended_here:
            return None
        if self.finished:
            raise OutOfOrderError(f"tokens for choice {self.index} after its finish")
        token_ids, entries = self.take(event)
        if event.is_cumulative and len(event.text or "") < self._seen:
            raise MalformedMessageError(f"choice {self.index} has less text than before")
        text = self._new_text(event.text or "", is_cumulative=event.is_cumulative)
        matcher = self._matcher
        if matcher is not None:
            text = matcher.feed(text, check=self.completion_tokens > self._min_tokens)
        self._emitted += len(text)
        logprobs = self._logprob_texts(token_ids, entries)
        if matcher is not None and self._must_end and matcher.matched is not None:
            self.finished = self.ended_here = True
            self.finish_reason = "stop"
            return Delta(self.index, text + self._release(matcher, matcher.matched), token_ids, logprobs, "stop", matcher.matched)
        return Delta(self.index, text, token_ids, logprobs) if text or token_ids else None

    def receive_finish(self, event: FinishEvent) -> Delta | None:
        """The last delta; None when the choice had ended here already. Raises OutOfOrderError on a second finish, UpstreamStatusError
        when the server gave up on the choice."""
        if self.ended_here:
            return None
        reason, matched = self._begin_finish(event)
        self.finished = True
        token_ids, entries = self.take(event)
        whole = None if event.is_delta else event.text
        is_shortened = whole is not None and len(whole) < self._seen
        text = "" if is_shortened else self._new_text(event.text or "", is_cumulative=whole is not None)
        ended_at_once = reason == "stop" and not isinstance(matched, str) and self.completion_tokens == 1
        if self._echoes_prompt and ended_at_once and not (self._include_stop and matched is not None):
            text = ""
        stop_text = matched if isinstance(matched, str) else None
        if self._matcher is not None:
            # A server that trims does so in what came last; text that looks like the beginning of a stop string is then just text.
            is_trimmed = bool(text)
            text = self._matcher.feed(text, check=self.completion_tokens > self._min_tokens)
            if stop_text is None and self._matcher.matched is not None:
                reason, matched, stop_text = "stop", None, self._matcher.matched
            held = self._release(self._matcher, stop_text, is_trimmed=is_trimmed)
            text = whole[self._emitted :] if whole is not None and is_shortened else text + held
        self.finish_reason = reason
        return Delta(
            self.index,
            text,
            token_ids,
            self._logprob_texts(token_ids, entries),
            reason,
            matched if matched is not None else stop_text,
            event.kv_transfer_params,
        )

    def abandon(self) -> Delta | None:
        """The text that was held back, when the response breaks off; None when there is none or the choice has finished."""
        if self.finished or self._matcher is None:
            return None
        text = self._release(self._matcher, self._matcher.matched)
        return Delta(self.index, text) if text else None

    def _new_text(self, text: str, *, is_cumulative: bool) -> str:
        if not is_cumulative:
            return text
        new, self._seen = text[self._seen :], max(len(text), self._seen)
        return new
