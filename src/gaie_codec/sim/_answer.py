"""A request and a script -> the events of one answer, step by step. Pure: the engine waits, and sends.

Ends and counts follow vLLM: `check_stop` in vllm/v1/core/sched/utils.py for tokens and lengths, vllm/v1/engine/detokenizer.py for stop
strings, and the servicer of smg-grpc-servicer for what a Complete repeats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final, TypeAlias

from .. import FinishEvent, InferenceRequest, ModelInfo, TokenLogprob, TokensEvent
from ..text import StopMatcher, Tokenizer
from ._script import Script

Event: TypeAlias = TokensEvent | FinishEvent

# What separates the turns of the usual chat templates, and the role that begins a turn.
_TURN_MARKS: Final = re.compile(r"<[^<>\s]+>|\[/?INST\]")
_ROLE: Final = re.compile(r"\s*(?:system|user|assistant|model|tool)\s*(?:\n|$)")
_WORD: Final = re.compile(r"\w+(?:['-]\w+)*")
_WORDS_ECHOED: Final = 12


class Answer:
    """The answer to one request: `step` until `finished`, or `abort`."""

    def __init__(
        self,
        request: InferenceRequest,
        prompt: str,
        prompt_token_ids: Sequence[int],
        script: Script,
        tokenizer: Tokenizer,
        model: ModelInfo,
    ) -> None:
        """`prompt` is the text of `prompt_token_ids`, without scripts."""
        self._script = script
        self._stream = request.stream
        self._prompt_tokens = len(prompt_token_ids)
        self._empty_chunks = script.empty_chunks if request.stream else 0
        self._choices = [_Choice(index, request, prompt, prompt_token_ids, script, tokenizer, model) for index in range(request.sampling.n)]
        self._is_first = True

    @property
    def finished(self) -> bool:
        """Have all choices ended?"""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def delay_ms(self) -> float:
        """How long to wait before the next step."""
        first = self._script.first_delay_ms
        return first if self._is_first and first is not None else self._script.delay_ms

    def step(self) -> list[Event]:
        """Advance every choice, and return what to send: without `stream` nothing until all have finished."""
        self._is_first = False
        running = [choice for choice in self._choices if choice.finish_reason is None]
        if self._empty_chunks:
            self._empty_chunks -= 1
            return [self._chunk(choice) for choice in running]
        events: list[Event] = []
        for choice in running:
            choice.step()
            if self._stream and choice.delta:
                events.append(self._chunk(choice))
            if self._stream and choice.finish_reason is not None:
                events.extend(self._complete(choice))
        return events if self._stream else self._completes_of_all()

    def abort(self) -> list[Event]:
        """End every choice that still runs, and return what to send."""
        running = [choice for choice in self._choices if choice.finish_reason is None]
        for choice in running:
            choice.delta, choice.finish_reason = [], "abort"
        return [event for choice in running for event in self._complete(choice)] if self._stream else self._completes_of_all()

    def _completes_of_all(self) -> list[Event]:
        return [event for choice in self._choices for event in self._complete(choice)] if self.finished else []

    def _chunk(self, choice: _Choice) -> TokensEvent:
        return TokensEvent(
            index=choice.index,
            token_ids=choice.delta,
            logprobs=choice.logprobs(choice.delta),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(choice.delta if self._script.counts == "delta" else choice.token_ids),
            cached_tokens=self._script.cached_tokens,
        )

    def _complete(self, choice: _Choice) -> list[FinishEvent]:
        if not self._script.complete:
            return []
        repeated = choice.delta if self._stream and self._script.counts == "delta" else choice.token_ids
        return [
            FinishEvent(
                index=choice.index,
                token_ids=repeated,
                logprobs=choice.logprobs(repeated),
                finish_reason=choice.finish_reason or "",
                matched_stop=choice.matched_stop,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=len(repeated),
                cached_tokens=self._script.cached_tokens,
            )
        ]


class _Choice:
    """One choice as it is generated: all its tokens so far, those of the last step, and how it ended."""

    def __init__(
        self,
        index: int,
        request: InferenceRequest,
        prompt: str,
        prompt_token_ids: Sequence[int],
        script: Script,
        tokenizer: Tokenizer,
        model: ModelInfo,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.delta: list[int] = []
        self.finish_reason: str | None = None
        self.matched_stop: str | int | None = None
        self._params = params = request.sampling
        self._eos_token_ids = model.eos_token_ids
        self._vocab_size = model.vocab_size
        self._limit = model.max_model_len - len(prompt_token_ids)
        if params.max_tokens is not None:
            self._limit = min(self._limit, params.max_tokens)
        self._logprob = script.logprob
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._detokenizer = tokenizer.detokenizer(
            prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._scripted_reason = script.finish
        self._steps = self._scripted_steps(script, prompt, tokenizer)
        self._upcoming = next(self._steps, None)

    def step(self) -> None:
        """Generate the tokens of one step, up to the one that ends the choice."""
        self.delta = []
        token_ids, self._upcoming = self._upcoming, next(self._steps, None)
        for token_id in token_ids or ():
            self.delta.append(token_id)
            self.token_ids.append(token_id)
            self._end_at(token_id)
            if self.finish_reason is not None:
                return
        if self._upcoming is None:
            self.finish_reason = self._scripted_reason

    def logprobs(self, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """Made-up log probabilities, exact in a float32, if the request wants any."""
        wanted = self._params.logprobs
        if wanted is None:
            return ()
        entries = []
        for token_id in token_ids:
            value = self._logprob if self._logprob is not None else -(token_id % 16) / 16
            # vLLM puts the sampled token before the others, also when no others are asked for.
            top = tuple(((token_id + place) % self._vocab_size, value - place) for place in range(1, wanted))
            entries.append(TokenLogprob(token_id=token_id, logprob=value, top=((token_id, value), *top)))
        return tuple(entries)

    def _end_at(self, token_id: int) -> None:
        """End the choice if this token, just added, is its last."""
        params, taken = self._params, len(self.token_ids)
        by_token = False
        if taken >= params.min_tokens:
            if token_id in self._eos_token_ids and not params.ignore_eos:
                self.finish_reason, by_token = "stop", True
            elif token_id in params.stop_token_ids:
                self.finish_reason, self.matched_stop, by_token = "stop", token_id, True
        if not by_token and taken >= self._limit:
            self.finish_reason = "length"
        # Text is looked at last and wins over the length. The text of a stop token is not looked at, unless it is to be shown.
        if self._matcher is not None and (not by_token or params.include_stop_str_in_output):
            self._matcher.feed(self._detokenizer.decode((token_id,)), check=taken > params.min_tokens)
            if self._matcher.matched is not None:
                self.finish_reason, self.matched_stop = "stop", self._matcher.matched

    def _scripted_steps(self, script: Script, prompt: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
        if script.tokens is not None:
            yield from script.tokens
            return
        if isinstance(script.text, list):
            text = script.text[self.index % len(script.text)]
        else:
            text = _friendly_text(prompt, self.index) if script.text is None else script.text
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        eos = list(self._eos_token_ids[:1])
        # As long as min_tokens or ignore_eos forbid an end, the text comes again.
        for times in count(1):
            for start in range(0, len(token_ids), script.step):
                yield token_ids[start : start + script.step]
            if script.finish != "stop" or not (token_ids or eos):
                return
            if self._params.ignore_eos or not token_ids or times * len(token_ids) >= self._params.min_tokens:
                if eos:
                    yield eos
                elif not self._params.ignore_eos:
                    return


def _friendly_text(prompt: str, index: int) -> str:
    """What to say when nothing is scripted: the last words of the last turn. Each choice says more than the one before."""
    turns = [_ROLE.sub("", turn, count=1) for turn in _TURN_MARKS.split(prompt)]
    words = next((words for turn in reversed(turns) if (words := _WORD.findall(turn))), [])
    text = f"Hello! You said: {' '.join(words[-_WORDS_ECHOED:])}." if words else "Hello! How can I help you?"
    return text + f" This is answer number {index + 1}." * index
