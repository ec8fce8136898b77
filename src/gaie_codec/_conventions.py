"""What is generated -> the events by which a server of one dialect would tell it: the inverse of `_tally`.

For whoever has to speak like a model server: the simulated one, and a gateway between two dialects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ._events import Event, FinishEvent, InferenceRequest, PromptEvent, PromptLogprob, TokenLogprob, TokensEvent

if TYPE_CHECKING:
    from .adapters.base import Convention


class _Told:
    """All that one choice has gained, and what of it came last."""

    __slots__ = ("is_told", "last", "logprobs", "text", "token_ids")

    def __init__(self, index: int) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.is_told = False  # anything of it, and with that of the prompt
        self.last = TokensEvent(index=index)

    def add(self, gained: TokensEvent) -> None:
        self.token_ids += gained.token_ids
        self.logprobs += gained.logprobs
        self.text += gained.text or ""
        self.last = gained

    def whole(self) -> TokensEvent:
        return msgspec.structs.replace(self.last, token_ids=self.token_ids[:], text=self.text, logprobs=tuple(self.logprobs))


class Teller:
    """Tells one answer. A request that asks for no stream is told each choice once, whole."""

    def __init__(self, convention: Convention, request: InferenceRequest, *, sends_text: bool) -> None:
        self._convention = convention
        self._streams = request.stream
        self._request_id = request.request_id
        self._n = request.sampling.n
        self._sends_text = sends_text
        self._announces = convention.announces_prompt and request.stream
        self._announced = False
        self._told: dict[int, _Told] = {}

    def begin(self, prompt_tokens: int, prompt_logprobs: tuple[PromptLogprob, ...] = ()) -> list[Event]:
        """What comes before all tokens. `gain` and `finish` say it where it was not said."""
        if self._announced or not self._announces:
            return []
        self._announced = True
        return [PromptEvent(prompt_tokens=prompt_tokens, prompt_logprobs=prompt_logprobs)]

    def gain(self, event: TokensEvent) -> list[Event]:
        """New tokens of a choice, as a delta: ids, text and log probabilities that nobody was told before."""
        told = self._add(event)
        if not self._streams:
            return []
        return [*self.begin(event.prompt_tokens, event.prompt_logprobs), self._shaped(event, told)]

    def finish(self, event: FinishEvent, *, last: TokensEvent | None = None) -> list[Event]:
        """The end of a choice, `event` without tokens of its own.

        `last` is what the choice gained with its end, and may be empty. None stands for what the last `gain` brought, where the
        convention repeats that.
        """
        told = self._told.setdefault(event.index, _Told(event.index))
        if last is not None:
            told.add(last)
        convention = self._convention
        if not self._streams:
            return [self._ended(event, told.whole(), told)]
        events = self.begin(event.prompt_tokens, event.prompt_logprobs)
        nothing = TokensEvent(index=event.index)
        if convention.joins_finish:
            return [*events, self._ended(event, told.whole() if convention.is_cumulative else last or nothing, told)]
        if last is not None and last.token_ids:
            events.append(self._shaped(last, told))
        repeated = {"last": told.last, "all": told.whole(), "nothing": nothing}[convention.repeats]
        return [*events, self._ended(event, repeated, told)]

    def _add(self, event: TokensEvent) -> _Told:
        told = self._told.setdefault(event.index, _Told(event.index))
        told.add(event)
        return told

    def _shaped(self, event: TokensEvent, told: _Told) -> TokensEvent:
        convention = self._convention
        said = told.whole() if convention.is_cumulative else event
        is_first, told.is_told = not told.is_told, True
        return msgspec.structs.replace(
            event,
            choice_id=self._choice_id(event.index),
            token_ids=said.token_ids,
            text=(said.text or "") if self._sends_text else None,
            logprobs=said.logprobs,
            prompt_logprobs=event.prompt_logprobs if (is_first or convention.is_cumulative) and not self._announces else (),
            is_cumulative=convention.is_cumulative,
            prompt_tokens=0 if self._announces else event.prompt_tokens,
            completion_tokens=len(told.token_ids if convention.counts == "total" else event.token_ids),
        )

    def _ended(self, event: FinishEvent, said: TokensEvent, told: _Told) -> FinishEvent:
        convention = self._convention
        counts_all = convention.counts == "total" or convention.joins_finish or not self._streams
        return msgspec.structs.replace(
            event,
            choice_id=self._choice_id(event.index),
            token_ids=said.token_ids,
            text=(said.text or "") if self._sends_text else None,
            logprobs=said.logprobs,
            prompt_logprobs=() if self._announces else event.prompt_logprobs,
            is_delta=convention.joins_finish and not convention.is_cumulative,
            prompt_tokens=0 if self._announces else event.prompt_tokens,
            completion_tokens=len(told.token_ids if counts_all else said.token_ids),
        )

    def _choice_id(self, index: int) -> str:
        if not self._convention.names_choices:
            return ""
        return self._request_id if self._n == 1 else f"{self._request_id}_{index}"
