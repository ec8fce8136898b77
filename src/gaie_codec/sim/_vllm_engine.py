"""`vllm.grpc.engine.VllmEngine`, for any snapshot of dialect `vllm.engine`: the smg servicers in front of vLLM.

FlushCache and its like are not simulated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from .. import MalformedRequestError, ModelInfo
from ._front import Event, Front, check_prompt, two_servicers
from ._services import Services, get_loads, get_tokenizer, server_info

if TYPE_CHECKING:
    from ..adapters.base import Adapter, Convention
    from ._engine import Engine
    from ._script import Script

SERVICE = "vllm.grpc.engine.VllmEngine"
# vLLM's own limits: `--max-logprobs` and VLLM_MAX_N_SEQUENCES.
_MAX_LOGPROBS: Final = 20
_MAX_N: Final = 16384


class _Front(Front):
    def convention(self, script: Script) -> Convention:
        return two_servicers(self.adapter.convention, script)

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        params = self.request.sampling
        check_prompt(token_ids, model)
        if params.max_tokens is not None and params.max_tokens < max(1, params.min_tokens):
            raise MalformedRequestError(f"max_tokens must be at least 1 and min_tokens, got {params.max_tokens}.")
        if params.n > _MAX_N:
            raise MalformedRequestError(f"n must be at most {_MAX_N}, got {params.n}.")
        if params.logprobs is not None and not 0 <= params.logprobs <= _MAX_LOGPROBS:
            raise MalformedRequestError(f"logprobs must be between 0 and {_MAX_LOGPROBS}, got {params.logprobs}.")
        if "" in params.stop:
            raise MalformedRequestError("stop cannot contain an empty string.")


def services(adapter: Adapter, engine: Engine) -> Services:
    """The one service."""
    snapshot = adapter.snapshot
    started = time.monotonic()

    def response(method: str) -> Any:
        return snapshot.method(SERVICE, method).response()

    async def generate(message: Any, context: Any) -> None:
        async def send(event: Event) -> None:
            await context.write(adapter.encode_response(event))

        request = adapter.decode_request(message)
        await engine.generate(request, _Front(adapter, request), send)

    async def embed(message: Any, _: Any) -> Any:
        assert adapter.embed is not None
        return adapter.embed.encode_response(await engine.embed(adapter.embed.decode_request(message), check_prompt))

    async def abort(message: Any, _: Any) -> Any:
        engine.abort(message.request_ids)
        return response("Abort")

    async def health_check(_message: Any, _: Any) -> Any:
        answer = response("HealthCheck")
        answer.healthy = True
        answer.message = "Health"
        return answer

    async def get_model_info(_message: Any, _: Any) -> Any:
        return adapter.encode_model_info(engine.model)[adapter.info_paths[0]]

    async def get_server_info(_message: Any, _: Any) -> Any:
        answer = server_info(adapter, engine, response("GetServerInfo"))
        answer.active_requests = len(engine.running)
        answer.uptime_seconds = time.monotonic() - started
        answer.server_type = "vllm-grpc"
        return answer

    methods = {
        "Generate": generate,
        "Embed": embed,
        "Abort": abort,
        "HealthCheck": health_check,
        "GetModelInfo": get_model_info,
        "GetServerInfo": get_server_info,
        "GetLoads": get_loads(adapter, engine),
        "GetTokenizer": get_tokenizer(snapshot, SERVICE, engine.tokenizer_files),
    }
    return Services(methods={SERVICE: methods}, has_health=True, has_reflection=True)
