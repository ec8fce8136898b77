"""`sglang.runtime.v1.SglangService`, for any snapshot of dialect `sglang.runtime`: the gRPC server beside SGLang's Python front end.

Whatever a handler raises becomes INTERNAL with its text. The methods that take OpenAI JSON are in `_sglang_openai`; TextEmbed, Classify
and the control of caches and weights are not simulated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from .. import Code, CodecError, ErrorEvent, InferenceRequest, Loads, MalformedRequestError, ModelInfo
from .._errors import server_status_from_code
from ._engine import StatusError
from ._front import SGLANG, Event, Front, Habits, Step
from ._services import Services
from ._sglang import check_length, check_prompt, check_sampling
from ._sglang_openai import openai_methods

if TYPE_CHECKING:
    from ..adapters.base import Adapter, Convention
    from ._engine import Engine
    from ._script import Script

SERVICE = "sglang.runtime.v1.SglangService"


class _Front(Front):
    habits: Habits = msgspec.structs.replace(SGLANG, sends_text=True)

    def convention(self, script: Script) -> Convention:
        is_incremental = script.counts == "delta"  # --incremental-streaming-output
        return msgspec.structs.replace(self.adapter.convention, is_cumulative=not is_incremental)

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        check_sampling(self.request.sampling)
        check_prompt(token_ids, model)
        check_length(self.request.sampling, token_ids, model)

    def refuse(self, error: CodecError) -> Sequence[Event]:
        raise exception(error)

    def fail(self, error: CodecError, running: Sequence[int], sent: int) -> Sequence[Event]:
        if not sent or not self.request.stream:
            raise exception(error)
        # The scheduler aborts a request under way: its last message says so.
        return [ErrorEvent(code=error.code, message=error.message, index=index) for index in running]

    def abort(self, steps: Sequence[Step]) -> Sequence[Event]:
        raise StatusError(Code.CANCELLED, f"Request aborted: {self.request.request_id}")


def exception(error: CodecError) -> StatusError:
    """What becomes of an exception: a ValueError has only its text, an HTTPException its status before it."""
    text = error.message if error.code is Code.INVALID_ARGUMENT else f"{server_status_from_code(error.code)}: {error.message}"
    return StatusError(Code.INTERNAL, text)


class _Ended(Exception):
    """The stream is over, whatever the engine still does."""


class _Messages:
    """Events of one call as messages of its method."""

    def __init__(self, adapter: Adapter, request: InferenceRequest, response_type: Any, *, sends_text: bool) -> None:
        self._adapter = adapter
        self._response_type = response_type
        self._sends_text = sends_text
        self._running = request.sampling.n
        # 0.5.16 takes the end of the first choice for the end of all.
        self._ends_early = adapter.snapshot.name == "0.5.16"
        self.has_ended = False

    def encode(self, event: Event) -> Any:
        is_text = "output_ids" not in self._response_type.DESCRIPTOR.fields_by_name
        if isinstance(event, ErrorEvent):
            message: Any = self._response_type()
            reason = {"type": "abort", "message": event.message, "status_code": server_status_from_code(event.code)}
            message.meta_info["finish_reason"] = msgspec.json.encode(reason).decode()
            message.finished = True
        else:
            text = event.text  # type: ignore[union-attr]
            message = self._adapter.encode_response(event if is_text else msgspec.structs.replace(event, text=None))
            if not is_text and self._sends_text:
                message.text = text
        if message.finished:
            self._running -= 1
            self.has_ended = self._ends_early or not self._running
            message.finished = self.has_ended
        return message


def services(adapter: Adapter, engine: Engine) -> Services:
    """The one service."""
    snapshot = adapter.snapshot
    has_return_text = snapshot.has_field("GenerateRequest", "return_text")

    def response(method: str) -> Any:
        return snapshot.method(SERVICE, method).response()

    def info(method: str) -> Any:
        answer: Any = adapter.encode_model_info(engine.model)[f"/{SERVICE}/{method}"]
        if method == "GetServerInfo" and adapter.encode_capacity is not None:
            size: Any = adapter.encode_capacity(engine.capacity)
            answer.json_info = msgspec.json.encode(msgspec.json.decode(answer.json_info) | msgspec.json.decode(size.json_info)).decode()
        return answer

    def generation(method: str) -> Any:
        response_type = snapshot.method(SERVICE, method).response

        async def generate(message: Any, context: Any) -> None:
            request: InferenceRequest = adapter.decode_request(message)
            if message.sampling_params.HasField("json_schema") and has_guided(message):
                raise MalformedRequestError("legacy json_schema/regex cannot be combined with guided_decoding")
            messages = _Messages(adapter, request, response_type, sends_text=has_return_text and getattr(message, "return_text", False))
            held: list[Any] = []  # an answer that is not streamed comes when nothing can go wrong any more
            never_ends = snapshot.name == "0.5.16" and request.sampling.n > 1 and not request.stream

            async def send(event: Event) -> None:
                if never_ends:
                    await asyncio.Event().wait()
                message = messages.encode(event)
                if not request.stream:
                    held.append(message)
                    return
                await context.write(message)
                if messages.has_ended:
                    raise _Ended

            with suppress(_Ended):
                await engine.generate(request, _Front(adapter, request), send)
            if not messages.has_ended:
                held.append(response_type(finished=True))
            for message in held:
                await context.write(message)

        return generate

    def has_guided(message: Any) -> bool:
        names = message.sampling_params.DESCRIPTOR.fields_by_name
        return "guided_decoding" in names and message.sampling_params.HasField("guided_decoding")

    async def embed(message: Any, _: Any) -> Any:
        assert adapter.embed is not None
        try:
            return adapter.embed.encode_response(await engine.embed(adapter.embed.decode_request(message), check_prompt))
        except CodecError as error:
            raise exception(error) from error

    async def abort(message: Any, _: Any) -> Any:
        engine.abort(engine.running if message.abort_all else [message.rid])
        answer = response("Abort")
        answer.success = True
        return answer

    async def health_check(_message: Any, _: Any) -> Any:
        answer = response("HealthCheck")
        answer.healthy = True
        return answer

    async def get_model_info(_message: Any, _: Any) -> Any:
        return info("GetModelInfo")

    async def get_server_info(_message: Any, _: Any) -> Any:
        return info("GetServerInfo")

    async def list_models(_message: Any, _: Any) -> Any:
        return info("ListModels")

    async def watch_engine_state(_message: Any, context: Any) -> None:
        state = response("WatchEngineState")
        state.instance_id = state.revision = 1
        state.healthy = True
        state.model_info.CopyFrom(info("GetModelInfo"))
        state.server_info.CopyFrom(info("GetServerInfo"))
        await context.write(state)
        await asyncio.Event().wait()

    async def get_load(message: Any, _: Any) -> Any:
        assert adapter.encode_loads is not None
        is_another = message.HasField("dp_rank") and message.dp_rank != 0
        return adapter.encode_loads(Loads() if is_another else engine.loads)

    async def tokenize(message: Any, _: Any) -> Any:
        answer = response("Tokenize")
        adds = message.add_special_tokens if message.HasField("add_special_tokens") else True
        answer.tokens.extend(engine.tokenizer.encode(message.text, add_special_tokens=adds))
        answer.count = len(answer.tokens)
        answer.max_model_len = engine.model.max_model_len
        answer.input_text = message.text
        return answer

    async def detokenize(message: Any, _: Any) -> Any:
        if min(message.tokens, default=0) < 0:
            raise MalformedRequestError("Detokenize tokens must be non-negative")
        answer = response("Detokenize")
        answer.text = engine.tokenizer.detokenizer(()).decode(message.tokens)
        return answer

    methods = {
        "Generate": generation("Generate"),
        "TextGenerate": generation("TextGenerate"),
        "Embed": embed,
        "Abort": abort,
        "HealthCheck": health_check,
        "GetModelInfo": get_model_info,
        "GetServerInfo": get_server_info,
        "ListModels": list_models,
        "WatchEngineState": watch_engine_state,
        "GetLoad": get_load,
        "Tokenize": tokenize,
        "Detokenize": detokenize,
        **openai_methods(adapter, engine),
    }
    return Services(methods={SERVICE: methods})
