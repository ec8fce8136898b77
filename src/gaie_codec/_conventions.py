"""What is generated -> the events by which a server of one dialect would tell it: the inverse of `_tally`.

For whoever has to speak like a model server: the simulated one, and a gateway between two dialects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ._events import Event, FinishEvent, InferenceRequest, PromptEvent, TokensEvent

if TYPE_CHECKING:
    from .adapters.base import Convention


class _Told:
    """All that one choice has gained, and whether its end was told."""

    __slots__ = ("last", "logprobs", "text", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: tuple = ()  # type: ignore[type-arg]
        self.text = ""
        self.last: TokensEvent = TokensEvent()


class Teller:
    """Tells one answer. `streams` is whether the request asked for a stream; else every choice is told once, whole."""

    def __init__(self, convention: Convention, request: InferenceRequest, *, sends_text: bool) -> None:
        self._convention = convention
        self._streams = request.stream
        self._request_id = request.request_id
        self._n = request.sampling.n
        self._sends_text = sends_text
        self._announced = False
        self._told: dict[int, _Told] = {}

    def gain(self, event: TokensEvent) -> list[Event]:
        """New tokens of a choice, as a delta: ids, text and log probabilities that nobody was told before."""
        told = self._add(event)
        if not self._streams:
            return []
        return [*self._announce(event), self._shaped(event, told)]

    def finish(self, event: FinishEvent, *, last: TokensEvent | None = None) -> list[Event]:
        """The end of a choice, `event` without tokens of its own; `last` are tokens that came with it."""
        told = self._told.setdefault(event.index, _Told())
        if last is not None:
            told = self._add(last)
        convention = self._convention
        events: list[Event] = []
        if not self._streams:
            return [*self._announce(event, joined=True), self._ended(event, told, whole=True)]
        events += self._announce(event)
        if convention.joins_finish:
            return [*events, self._ended(event, told, whole=convention.is_cumulative, own=last or TokensEvent(index=event.index))]
        if last is not None and last.token_ids:
            events.append(self._shaped(last, told))
        repeated = told.last if convention.repeats == "last" else None
        return [*events, self._ended(event, told, whole=convention.repeats == "all", own=repeated or TokensEvent(index=event.index))]

    def _add(self, event: TokensEvent) -> _Told:
        told = self._told.setdefault(event.index, _Told())
        told.token_ids += event.token_ids
        told.logprobs += event.logprobs
        told.text += event.text or ""
        told.last = event
        return told

    def _announce(self, event: TokensEvent | FinishEvent, *, joined: bool = False) -> list[Event]:
        if not self._convention.announces_prompt or self._announced:
            return []
        self._announced = True
        # A unary answer says it in the same message.
        return [] if joined else [PromptEvent(prompt_tokens=event.prompt_tokens)]

    def _shaped(self, event: TokensEvent, told: _Told) -> TokensEvent:
        convention = self._convention
        counted = told.token_ids if convention.counts == "total" else event.token_ids
        whole = told if convention.is_cumulative else event
        return msgspec.structs.replace(
            event,
            choice_id=self._choice_id(event.index),
            token_ids=list(whole.token_ids),
            text=(whole.text or "") if self._sends_text else None,
            logprobs=whole.logprobs,
            is_cumulative=convention.is_cumulative,
            prompt_tokens=0 if convention.announces_prompt else event.prompt_tokens,
            completion_tokens=len(counted),
        )

    def _ended(self, event: FinishEvent, told: _Told, *, whole: bool, own: TokensEvent | None = None) -> FinishEvent:
        convention = self._convention
        token_ids, text, logprobs = told.token_ids, told.text, told.logprobs
        if not whole and own is not None:
            token_ids, text, logprobs = own.token_ids, own.text or "", own.logprobs
        is_total = convention.counts == "total" or convention.joins_finish
        return msgspec.structs.replace(
            event,
            choice_id=self._choice_id(event.index),
            token_ids=list(token_ids),
            text=text if self._sends_text else None,
            logprobs=logprobs,
            is_delta=convention.joins_finish and not convention.is_cumulative,
            prompt_tokens=0 if convention.announces_prompt and self._streams else event.prompt_tokens,
            completion_tokens=len(told.token_ids) if is_total or whole else len(token_ids),
        )

    def _choice_id(self, index: int) -> str:
        if not self._convention.names_choices:
            return ""
        return self._request_id if self._n == 1 else f"{self._request_id}_{index}"
