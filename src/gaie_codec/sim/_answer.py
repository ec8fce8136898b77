"""A request and a script -> what is generated, step by step. Pure: the engine waits, the front tells it as a server would.

Ends follow vLLM's `check_stop` (vllm/v1/core/sched/utils.py) and detokenizer, or SGLang's `Req.check_finished`: see `Habits`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final

from .. import FinishEvent, InferenceRequest, ModelInfo, PromptLogprob, TokenLogprob, TokensEvent
from ..text import StopMatcher, Tokenizer
from ._front import Habits, Step
from ._script import Script

# What separates the turns of the usual chat templates, and the role that begins a turn.
_TURN_MARKS: Final = re.compile(r"<[^<>\s]+>|\[/?INST\]")
_ROLE: Final = re.compile(r"\s*(?:system|user|assistant|model|tool)\s*(?:\n|$)")
_WORD: Final = re.compile(r"\w+(?:['-]\w+)*")
_WORDS_ECHOED: Final = 12
_BROKEN: Final = "\ufffd"
_UNARY_PUSH: Final = 50  # tokens that SGLang's scheduler collects for a request without `stream`


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
        habits: Habits,
    ) -> None:
        """`prompt` is the text of `prompt_token_ids`, without scripts."""
        self._script = script
        self._stream = request.stream
        self._prompt_tokens = len(prompt_token_ids)
        self.prompt_logprobs = _prompt_logprobs(request, prompt_token_ids, script, model)
        self._empty_chunks = script.empty_chunks if request.stream else 0
        self._choices = [
            _Choice(index, request, prompt, prompt_token_ids, script, tokenizer, model, habits) for index in range(request.sampling.n)
        ]
        self._is_first = True
        self._ended: list[Step] = []

    @property
    def running(self) -> list[int]:
        """The choices that have not ended."""
        return [choice.index for choice in self._choices if choice.finish_reason is None]

    @property
    def finished(self) -> bool:
        """Have all choices ended?"""
        return not self.running

    @property
    def delay_ms(self) -> float:
        """How long to wait before the next step."""
        first = self._script.first_delay_ms
        return first if self._is_first and first is not None else self._script.delay_ms

    def step(self) -> list[Step]:
        """Advance every choice. Without `stream` ends are told when all have ended, in the order of the choices."""
        self._is_first = False
        running = [choice for choice in self._choices if choice.finish_reason is None]
        if self._empty_chunks:
            self._empty_chunks -= 1
            return [Step(self._gained(choice)) for choice in running]
        for choice in running:
            choice.step()
        return self._steps_of(running)

    def abort(self) -> list[Step]:
        """End every choice that still runs."""
        running = [choice for choice in self._choices if choice.finish_reason is None]
        for choice in running:
            choice.abort()
        return self._steps_of(running)

    def _steps_of(self, choices: list[_Choice]) -> list[Step]:
        steps = []
        for choice in choices:
            is_end = choice.finish_reason is not None and self._script.complete
            if choice.delta or is_end:
                steps.append(Step(self._gained(choice), self._end(choice) if is_end else None))
        if self._stream:
            return steps
        self._ended += [step for step in steps if step.end is not None]
        told = [step for step in steps if step.end is None]
        return told + sorted(self._ended, key=lambda step: step.gained.index) if self.finished else told

    def _gained(self, choice: _Choice) -> TokensEvent:
        return TokensEvent(
            index=choice.index,
            token_ids=choice.delta,
            text=choice.text,
            logprobs=choice.logprobs(choice.delta),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._script.cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _end(self, choice: _Choice) -> FinishEvent:
        return FinishEvent(
            index=choice.index,
            finish_reason=choice.finish_reason or "",
            matched_stop=choice.matched_stop,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._script.cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )


class _Choice:
    """One choice as it is generated. `delta` and `text` are what it gained by the last step and nothing holds back."""

    def __init__(
        self,
        index: int,
        request: InferenceRequest,
        prompt: str,
        prompt_token_ids: Sequence[int],
        script: Script,
        tokenizer: Tokenizer,
        model: ModelInfo,
        habits: Habits,
    ) -> None:
        self.index = index
        self.delta: list[int] = []
        self.text: str | None = "" if habits.sends_text else None
        self.finish_reason: str | None = None
        self.matched_stop: str | int | None = None
        self._taken = 0
        self._habits = habits
        self._params = params = request.sampling
        self._streams = request.stream
        self._eos_token_ids = model.eos_token_ids
        self._vocab_size = model.vocab_size
        self._limit = model.max_model_len - len(prompt_token_ids)
        if params.max_tokens is not None:
            self._limit = min(self._limit, params.max_tokens)
        self._script = script
        stops = [stop for stop in params.stop if stop] if habits.knows_stops else []
        self._matcher = StopMatcher(stops) if stops else None
        self._ends_at_once = habits.knows_stops and "" in params.stop  # only SGLang takes an empty stop string
        self._detokenizer = tokenizer.detokenizer(
            prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._full_stop = tokenizer.encode(".", add_special_tokens=False)[:1]
        self._untold_ids: list[int] = []
        self._untold = ""
        self._told_end = ""  # of the text that was told, as much as a stop string may begin in
        self._last_piece = 0  # characters of the token that came last
        self._steps = self._scripted_steps(prompt, tokenizer)
        self._upcoming = next(self._steps, None)

    def step(self) -> None:
        """Generate the tokens of one step, up to the one that ends the choice."""
        token_ids, self._upcoming = self._upcoming, next(self._steps, None)
        if self._limit <= 0:
            self.finish_reason = "length"
        for token_id in token_ids or ():
            if self.finish_reason is not None:
                break
            self._untold_ids.append(token_id)
            self._taken += 1
            self._end_at(token_id)
        if self._upcoming is None and self.finish_reason is None:
            self.finish_reason = self._script.finish
        self._push()

    def abort(self) -> None:
        """End the choice where it is."""
        self.finish_reason = "abort"
        self._push()

    def logprobs(self, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """Made-up log probabilities, exact in a float32, if the request wants any."""
        wanted = self._params.logprobs
        if wanted is None:
            return ()
        entries = []
        for token_id in token_ids:
            value, top = _made_up(token_id, wanted, self._script, self._vocab_size)
            entries.append(TokenLogprob(token_id=token_id, logprob=value, top=top))
        return tuple(entries)

    def _end_at(self, token_id: int) -> None:
        """End the choice if this token, just added, is its last."""
        params = self._params
        by_token = False
        at_limit = self._taken >= self._limit
        if at_limit and self._habits.length_first:
            self.finish_reason = "length"
        elif self._taken >= params.min_tokens:
            if token_id in self._eos_token_ids and not params.ignore_eos:
                self.finish_reason, by_token = "stop", True
                self.matched_stop = token_id if self._habits.names_eos else None
            elif token_id in params.stop_token_ids:
                self.finish_reason, self.matched_stop, by_token = "stop", token_id, True
        if not by_token and at_limit:
            self.finish_reason = "length"
        # Text is looked at last and wins over vLLM's length. That of a stop token is not looked at, unless it is to be shown.
        if by_token and not params.include_stop_str_in_output:
            return
        if self._ends_at_once and self.finish_reason is None:
            self.finish_reason, self.matched_stop = "stop", ""
        if self._matcher is None and self.text is None:
            return
        piece = self._detokenizer.decode((token_id,))
        self._untold += piece
        self._last_piece = len(piece)
        if self._matcher is not None and not (self._habits.length_first and at_limit):
            self._matcher.feed(piece, check=self._taken > params.min_tokens)
            if self._matcher.matched is not None:
                self.finish_reason, self.matched_stop = "stop", self._matcher.matched

    def _push(self) -> None:
        """Give out what the last step brought, as far as nothing holds it back."""
        is_end = self.finish_reason is not None
        if self._habits.holds == "tokens" and not is_end and self._waits():
            self.delta, self.text = [], "" if self._habits.sends_text else None
            return
        self.delta, self._untold_ids = self._untold_ids, []
        if not self._habits.sends_text:
            self._untold = ""
            return
        text = self._untold
        if is_end:
            text = self._cut(text) if isinstance(self.matched_stop, str) else text + self._broken_end()
        elif self._habits.holds == "text" and self._matcher is not None and not self._params.include_stop_str_in_output:
            # vLLM's Rust front end counts in bytes.
            data, window = text.encode(), max(len(stop.encode()) for stop in self._params.stop) - 1
            text = data[: max(0, len(data) - window)].decode(errors="ignore")
        self._untold = self._untold[len(text) :]
        longest = max(map(len, self._params.stop), default=0)
        self._told_end = (self._told_end + text)[-longest:] if longest else ""
        self.text = text

    def _waits(self) -> bool:
        if not self._streams:
            return len(self._untold_ids) < _UNARY_PUSH
        return self._script.holds_stops and self._matcher is not None and bool(self._matcher.held)

    def _cut(self, text: str) -> str:
        """The text without the stop string that ends in the last token's piece. One that began in text already told stays."""
        stop = str(self.matched_stop)
        if not stop:
            return ""
        told = len(self._told_end)
        start = (self._told_end + text).find(stop, max(0, told + len(text) - self._last_piece - len(stop) + 1)) - told
        if self._params.include_stop_str_in_output:
            return text[: start + len(stop)]
        return text[:start] if start >= 0 else text

    def _broken_end(self) -> str:
        """U+FFFD for a character that will never be complete, as servers say it that send text."""
        begun = self._detokenizer.peek(self._full_stop[0]).partition(".")[0] if self._full_stop else ""
        return begun if _BROKEN in begun else ""

    def _scripted_steps(self, prompt: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
        script = self._script
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


def _made_up(token_id: int, wanted: int, script: Script, vocab_size: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    value = script.logprob if script.logprob is not None else -(token_id % 16) / 16
    # vLLM puts the token itself before the others, also when no others are asked for.
    return value, ((token_id, value), *(((token_id + place) % vocab_size, value - place) for place in range(1, wanted)))


def _prompt_logprobs(
    request: InferenceRequest, prompt_token_ids: Sequence[int], script: Script, model: ModelInfo
) -> tuple[PromptLogprob, ...]:
    """Likewise for the prompt, whose first token has none."""
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return ()
    entries = [PromptLogprob(token_id=token_id) for token_id in prompt_token_ids[:1]]
    for token_id in prompt_token_ids[1:]:
        value, top = _made_up(token_id, wanted, script, model.vocab_size)
        entries.append(PromptLogprob(token_id=token_id, logprob=value, rank=1, top=top))
    return tuple(entries)


def _friendly_text(prompt: str, index: int) -> str:
    """What to say when nothing is scripted: the last words of the last turn. Each choice says more than the one before."""
    turns = [_ROLE.sub("", turn, count=1) for turn in _TURN_MARKS.split(prompt)]
    words = next((words for turn in reversed(turns) if (words := _WORD.findall(turn))), [])
    text = f"Hello! You said: {' '.join(words[-_WORDS_ECHOED:])}." if words else "Hello! How can I help you?"
    return text + f" This is answer number {index + 1}." * index
