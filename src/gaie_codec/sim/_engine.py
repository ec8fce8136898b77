"""The simulated engine behind every dialect: it takes requests in, sends the events of their answers, and notes what it saw."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from .. import Capacity, Code, CodecError, EmbeddingEvent, InferenceRequest, Loads, ModelInfo, RankLoads, SamplingParams
from ..text import Tokenizer
from ._answer import Answer
from ._front import Event, Front
from ._script import Script, take_script
from ._vectors import make_vector

_DEFAULT_NAME: Final = "sim-model"
_DEFAULT_MAX_MODEL_LEN: Final = 2048
_BLOCK_SIZE: Final = 16
_MAX_RUNNING: Final = 256
_FULL_CONTEXTS: Final = 8  # so many of the longest requests fill the cache


class StatusError(CodecError):
    """Ends a call with this status."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Engine:
    """Answers requests. `requests` are as received, `aborted` are the ids of those that were cancelled or aborted, both in order."""

    def __init__(self, tokenizer: Tokenizer, model: ModelInfo, script: Script, tokenizer_files: Mapping[str, bytes]) -> None:
        self.tokenizer = tokenizer
        self.tokenizer_files = tokenizer_files
        self.model = _filled(model, tokenizer)
        self.script = script
        self.requests: list[InferenceRequest] = []
        self.aborted: list[str] = []
        # By event, not by id: like vLLM's engine, which adds a suffix of its own, it takes an id that is running already.
        self._running: dict[asyncio.Event, str] = {}
        self._prompt_tokens: dict[asyncio.Event, int] = {}
        blocks = -(-self.model.max_model_len // _BLOCK_SIZE) * _FULL_CONTEXTS
        self.capacity = Capacity(
            block_size=_BLOCK_SIZE, num_blocks=blocks, max_running=_MAX_RUNNING, max_loras=len(self.model.lora_adapters)
        )

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests being answered, oldest first."""
        return tuple(self._running.values())

    @property
    def loads(self) -> Loads:
        """What runs now, on the one rank there is, and what the script says of queue and cache. The cache holds prompts only."""
        total = self.capacity.num_blocks * self.capacity.block_size
        used = sum(self._prompt_tokens.values())
        usage = min(used / total, 1.0) if self.script.kv_cache_usage is None else self.script.kv_cache_usage
        rank = RankLoads(
            running=len(self._running),
            waiting=self.script.waiting,
            kv_cache_usage=usage,
            used_tokens=round(usage * total),
            total_tokens=total,
            max_running=self.capacity.max_running,
        )
        return Loads(ranks=(rank,))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests as the server would. Ids that are not running are ignored, as in vLLM."""
        for asked in request_ids:
            for event, request_id in self._running.items():
                if request_id == asked and not event.is_set():
                    event.set()
                    self.aborted.append(request_id)

    def check_health(self) -> None:
        """The health check of servers that generate a token for it."""
        self.requests.append(
            InferenceRequest(request_id=f"HEALTH_CHECK_{len(self.requests)}", prompt_token_ids=[0], sampling=SamplingParams(max_tokens=1))
        )

    async def generate(self, request: InferenceRequest, front: Front, send: Callable[[Event], Awaitable[None]]) -> None:
        """Answer one request. Raises CodecError with the code and the message of the status to end with."""
        self.requests.append(request)
        abort = asyncio.Event()
        self._running[abort] = request.request_id
        try:
            await self._answer(request, front, send, abort)
        except asyncio.CancelledError:
            if not abort.is_set():
                self.aborted.append(request.request_id)
            raise
        finally:
            del self._running[abort]
            self._prompt_tokens.pop(abort, None)

    async def embed(self, request: InferenceRequest, check: Callable[[Sequence[int], ModelInfo], None]) -> EmbeddingEvent:
        """The vector of one prompt. Raises CodecError for what `check` refuses, and for the script's failure."""
        self.requests.append(request)
        token_ids = request.prompt_token_ids
        check(token_ids, self.model)
        _, taken = take_script(self.tokenizer.detokenizer((), skip_special_tokens=False).decode(token_ids))
        script = taken or self.script
        abort = asyncio.Event()
        self._running[abort] = request.request_id
        try:
            await _pause(script.delay_ms, abort)
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        finally:
            del self._running[abort]
        if script.error is not None:
            raise StatusError(Code[script.error.code], script.error.message)
        values = make_vector(token_ids)
        return EmbeddingEvent(values=values, dimensions=len(values), prompt_tokens=len(token_ids))

    async def _answer(
        self, request: InferenceRequest, front: Front, send: Callable[[Event], Awaitable[None]], abort: asyncio.Event
    ) -> None:
        try:
            answer, script, prompt_tokens = self._begin(request, front)
        except CodecError as error:
            for event in front.refuse(error):
                await send(event)
            return
        self._prompt_tokens[abort] = prompt_tokens
        for event in front.begin(script, prompt_tokens, answer.prompt_logprobs):
            await send(event)
        sent = 0
        while not answer.finished and not _is_due(script, sent):
            await _pause(answer.delay_ms, abort)
            events = front.abort(answer.abort()) if abort.is_set() else [event for step in answer.step() for event in front.tell(step)]
            for event in events:
                if _is_due(script, sent):
                    break
                await send(event)
                sent += 1
        if script.error is not None:
            for event in front.fail(StatusError(Code[script.error.code], script.error.message), answer.running, sent):
                await send(event)

    def _begin(self, request: InferenceRequest, front: Front) -> tuple[Answer, Script, int]:
        """The answer, the script that it follows, and the length of the prompt. Raises CodecError for what the server refuses."""
        token_ids = request.prompt_token_ids
        if request.prompt_text is not None:
            token_ids = self.tokenizer.encode(request.prompt_text, add_special_tokens=True)
        front.check(token_ids, self.model)
        prompt = self.tokenizer.detokenizer((), skip_special_tokens=False).decode(token_ids)
        prompt, taken = take_script(prompt)
        script = taken or self.script
        return Answer(request, prompt, token_ids, script, self.tokenizer, self.model, front.habits), script, len(token_ids)


def _is_due(script: Script, sent: int) -> bool:
    return script.error is not None and sent >= script.error.after


async def _pause(delay_ms: float, abort: asyncio.Event) -> None:
    if delay_ms > 0:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_ms / 1000):
                await abort.wait()


def _filled(model: ModelInfo, tokenizer: Tokenizer) -> ModelInfo:
    """The model with this package's defaults for what it leaves unknown."""
    name = model.served_model_name or model.model_path or _DEFAULT_NAME
    return msgspec.structs.replace(
        model,
        served_model_name=name,
        model_path=model.model_path or name,
        max_model_len=model.max_model_len or _DEFAULT_MAX_MODEL_LEN,
        vocab_size=model.vocab_size or tokenizer.vocab_size,
        # Chat models added their end of turn to the vocabulary after the end of text, so the highest id is the one to answer with.
        eos_token_ids=model.eos_token_ids or tuple(sorted(tokenizer.eos_token_ids, reverse=True)),
    )
