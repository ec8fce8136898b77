"""The simulated engine behind every dialect: it takes requests in, sends the events of their answers, and notes what it saw."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec

from .. import Code, CodecError, InferenceRequest, MalformedRequestError, ModelInfo
from ..text import Tokenizer
from ._answer import Answer, Event
from ._script import Script, take_script

_DEFAULT_NAME: Final = "sim-model"
_DEFAULT_MAX_MODEL_LEN: Final = 2048
# vLLM's own limits: `--max-logprobs` and VLLM_MAX_N_SEQUENCES.
_MAX_LOGPROBS: Final = 20
_MAX_N: Final = 16384


class StatusError(CodecError):
    """Ends a call with this status."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Engine:
    """Answers requests. `requests` are as received, `aborted` are the ids of those that were cancelled or aborted, both in order."""

    def __init__(self, tokenizer: Tokenizer, model: ModelInfo, script: Script) -> None:
        self.tokenizer = tokenizer
        self.model = _filled(model, tokenizer)
        self.script = script
        self.requests: list[InferenceRequest] = []
        self.aborted: list[str] = []
        # By event, not by id: like vLLM's engine, which adds a suffix of its own, it takes an id that is running already.
        self._running: dict[asyncio.Event, str] = {}

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests being answered, oldest first."""
        return tuple(self._running.values())

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests with finish_reason "abort". Ids that are not running are ignored, as in vLLM."""
        for asked in request_ids:
            for event, request_id in self._running.items():
                if request_id == asked and not event.is_set():
                    event.set()
                    self.aborted.append(request_id)

    async def generate(self, request: InferenceRequest, send: Callable[[Event], Awaitable[None]]) -> None:
        """Answer one request. Raises CodecError with the code and the message of the status to end with."""
        self.requests.append(request)
        abort = asyncio.Event()
        self._running[abort] = request.request_id
        try:
            await self._answer(request, send, abort)
        except asyncio.CancelledError:
            if not abort.is_set():
                self.aborted.append(request.request_id)
            raise
        finally:
            del self._running[abort]

    async def _answer(self, request: InferenceRequest, send: Callable[[Event], Awaitable[None]], abort: asyncio.Event) -> None:
        token_ids = request.prompt_token_ids
        if request.prompt_text is not None:
            token_ids = self.tokenizer.encode(request.prompt_text, add_special_tokens=True)
        self._check(request, token_ids)
        prompt = self.tokenizer.detokenizer((), skip_special_tokens=False).decode(token_ids)
        prompt, script = take_script(prompt)
        script = script or self.script
        answer = Answer(request, prompt, token_ids, script, self.tokenizer, self.model)
        sent = 0
        while not answer.finished:
            _fail_if_due(script, sent)
            await _pause(answer.delay_ms, abort)
            for event in answer.abort() if abort.is_set() else answer.step():
                _fail_if_due(script, sent)
                await send(event)
                sent += 1
        if script.error is not None:
            raise StatusError(Code[script.error.code], script.error.message)

    def _check(self, request: InferenceRequest, token_ids: list[int]) -> None:
        """Refuse what vLLM refuses. Raises MalformedRequestError."""
        model, params = self.model, request.sampling
        if not token_ids:
            raise MalformedRequestError("The decoder prompt cannot be empty")
        if len(token_ids) >= model.max_model_len:
            raise MalformedRequestError(
                f"The decoder prompt (length {len(token_ids)}) is longer than the maximum model length of {model.max_model_len}."
            )
        if max(token_ids) >= model.vocab_size:
            raise MalformedRequestError(f"Token id {max(token_ids)} is out of vocabulary")
        if params.max_tokens is not None and params.max_tokens < max(1, params.min_tokens):
            raise MalformedRequestError(f"max_tokens must be at least 1 and min_tokens, got {params.max_tokens}.")
        if params.n > _MAX_N:
            raise MalformedRequestError(f"n must be at most {_MAX_N}, got {params.n}.")
        if params.logprobs is not None and not 0 <= params.logprobs <= _MAX_LOGPROBS:
            raise MalformedRequestError(f"logprobs must be between 0 and {_MAX_LOGPROBS}, got {params.logprobs}.")
        if "" in params.stop:
            raise MalformedRequestError("stop cannot contain an empty string.")


def _fail_if_due(script: Script, sent: int) -> None:
    if script.error is not None and sent >= script.error.after:
        raise StatusError(Code[script.error.code], script.error.message)


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
