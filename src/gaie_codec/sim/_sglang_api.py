"""`sglang.api.v1.SglangService`, for any snapshot of dialect `sglang.api`: SGLang's all-Rust server.

What is wrong with a request comes as an error item, and the status is OK. Its front end cuts a stop string from the newest tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .. import Code, CodecError, ErrorEvent, FinishEvent, InferenceRequest, MalformedRequestError, ModelInfo
from ._front import SGLANG, Event, Front, Step
from ._services import Services
from ._sglang import check_length, check_prompt, check_sampling

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ._engine import Engine

SERVICE = "sglang.api.v1.SglangService"
_FAILED = "validation failed: "


class _Front(Front):
    habits = msgspec.structs.replace(SGLANG, sends_text=True)

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        params = self.request.sampling
        if params.n != 1:
            raise MalformedRequestError(f"n must be 1 (parallel sampling is not supported), got {params.n}")
        check_sampling(params)
        check_prompt(token_ids, model)
        check_length(params, token_ids, model)

    def refuse(self, error: CodecError) -> list[Event]:
        return [ErrorEvent(code=error.code, message=_FAILED + error.message)]

    def fail(self, error: CodecError, running: Sequence[int], sent: int) -> list[Event]:
        return [ErrorEvent(code=error.code, message=error.message)]

    def abort(self, steps: Sequence[Step]) -> list[Event]:
        return [ErrorEvent(code=Code.CANCELLED, message="client disconnected")]


def services(adapter: Adapter, engine: Engine) -> Services:
    """The one service."""
    snapshot = adapter.snapshot

    def response(method: str) -> Any:
        return snapshot.method(SERVICE, method).response()

    def info(method: str) -> Any:
        return adapter.encode_model_info(engine.model)[f"/{SERVICE}/{method}"]

    async def generate(message: Any, context: Any) -> None:
        request: InferenceRequest = adapter.decode_request(message)
        if message.HasField("text") == message.HasField("input_ids"):
            raise MalformedRequestError(f"{_FAILED}exactly one of text and input_ids must be set")
        if request.prompt_text is None and not request.prompt_token_ids:
            raise MalformedRequestError(f"{_FAILED}input_ids cannot be empty")
        if request.lora_name and request.lora_name not in engine.model.lora_adapters:
            raise MalformedRequestError(f"{_FAILED}LoRA adapter {request.lora_name} is not loaded")

        async def send(event: Event) -> None:
            answer: Any = adapter.encode_response(event)
            if answer.HasField("frame"):
                answer.frame.meta_info.id = request.request_id
            if isinstance(event, FinishEvent) and isinstance(event.matched_stop, int) and snapshot.name == "0.5.22":
                # Counted, and among the log probabilities, but not among the ids.
                del answer.frame.output_ids.ids[-1:]
            await context.write(answer)

        await engine.generate(request, _Front(adapter, request), send)

    async def abort(message: Any, _: Any) -> Any:
        engine.abort(engine.running if message.abort_all else [message.rid])
        answer = response("Abort")
        answer.success = True
        return answer

    async def health_check(_message: Any, _: Any) -> Any:
        engine.check_health()
        answer = response("HealthCheck")
        answer.healthy = True
        return answer

    async def get_model_info(_message: Any, _: Any) -> Any:
        return info("GetModelInfo")

    async def get_server_info(_message: Any, _: Any) -> Any:
        answer = info("GetServerInfo")
        answer.version = engine.model.server_version or snapshot.name
        return answer

    async def list_models(_message: Any, _: Any) -> Any:
        return info("ListModels")

    async def detokenize(message: Any, _: Any) -> Any:
        answer = response("Detokenize")
        answer.text = engine.tokenizer.detokenizer(()).decode(message.tokens)
        return answer

    methods = {
        "Generate": generate,
        "Abort": abort,
        "HealthCheck": health_check,
        "GetModelInfo": get_model_info,
        "GetServerInfo": get_server_info,
        "ListModels": list_models,
        "Detokenize": detokenize,
    }
    return Services(methods={SERVICE: methods})
