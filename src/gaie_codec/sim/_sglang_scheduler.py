"""`sglang.grpc.scheduler.SglangScheduler`, for any snapshot of dialect `sglang.scheduler`: the smg servicers in front of SGLang.

Their scheduler has no tokenizer: stop strings end nothing. FlushCache and its like are not simulated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .. import CodecError, ErrorEvent, FinishEvent, MalformedRequestError, ModelInfo
from ._front import SGLANG, Event, Front, two_servicers
from ._services import Services, get_loads, get_tokenizer, server_info
from ._sglang import check_prompt

if TYPE_CHECKING:
    from ..adapters.base import Adapter, Convention
    from ._engine import Engine
    from ._script import Script

SERVICE = "sglang.grpc.scheduler.SglangScheduler"


class _Front(Front):
    habits = msgspec.structs.replace(SGLANG, knows_stops=False)

    def convention(self, script: Script) -> Convention:
        return two_servicers(self.adapter.convention, script)

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        if not self.request.request_id:
            raise MalformedRequestError("request_id is required")
        if not token_ids:
            raise MalformedRequestError("tokenized.input_ids is required: the Router tokenizes before it dispatches")
        check_prompt(token_ids, model)

    def refuse(self, error: CodecError) -> list[Event]:
        return self.fail(error, (), 0)

    def fail(self, error: CodecError, running: Sequence[int], sent: int) -> list[Event]:
        # Those of SGLang's own tree, 0.5.3 to 0.5.9, end with OK whatever happens.
        if self.adapter.snapshot.has_field("GenerateResponse", "error"):
            return [ErrorEvent(code=error.code, message=error.message)]
        raise error


def services(adapter: Adapter, engine: Engine) -> Services:
    """The one service."""
    snapshot = adapter.snapshot
    started = time.monotonic()
    has_envelope = snapshot.has_field("EmbedResponse", "error")

    def response(method: str) -> Any:
        return snapshot.method(SERVICE, method).response()

    async def generate(message: Any, context: Any) -> None:
        request = adapter.decode_request(message)

        async def send(event: Event) -> None:
            if isinstance(event, FinishEvent) and not request.stream:
                event = msgspec.structs.replace(event, index=0)
            answer: Any = adapter.encode_response(event)
            answer.request_id = request.request_id
            await context.write(answer)

        await engine.generate(request, _Front(adapter, request), send)

    async def embed(message: Any, _: Any) -> Any:
        assert adapter.embed is not None
        request = adapter.embed.decode_request(message)
        try:
            answer: Any = adapter.embed.encode_response(await engine.embed(request, check_prompt))
        except CodecError as error:
            if not has_envelope:
                raise
            answer = response("Embed")
            answer.error.message = error.message
        if has_envelope:
            answer.request_id = request.request_id
        return answer

    async def abort(message: Any, _: Any) -> Any:
        engine.abort([message.request_id])
        answer = response("Abort")
        answer.success = True
        return answer

    async def health_check(_message: Any, _: Any) -> Any:
        engine.check_health()
        answer = response("HealthCheck")
        answer.healthy = True
        answer.message = "healthy"
        return answer

    async def get_model_info(_message: Any, _: Any) -> Any:
        answer: Any = adapter.encode_model_info(engine.model)[adapter.info_paths[0]]
        answer.max_req_input_len = engine.model.max_model_len - 1
        return answer

    async def get_server_info(_message: Any, _: Any) -> Any:
        answer = server_info(adapter, engine, response("GetServerInfo"))
        answer.active_requests = len(engine.running)
        answer.uptime_seconds = time.monotonic() - started
        answer.server_type = "grpc"
        return answer

    async def list_loras(_message: Any, _: Any) -> Any:
        return adapter.encode_model_info(engine.model)[adapter.info_paths[1]]

    methods = {
        "Generate": generate,
        "Embed": embed,
        "Abort": abort,
        "HealthCheck": health_check,
        "GetModelInfo": get_model_info,
        "GetServerInfo": get_server_info,
        "GetLoads": get_loads(adapter, engine),
        "GetTokenizer": get_tokenizer(snapshot, SERVICE, engine.tokenizer_files),
        "ListLoadedLoRAAdapters": list_loras,
    }
    return Services(methods={SERVICE: methods}, has_health=True, has_reflection=True)
