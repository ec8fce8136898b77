"""The methods of `vllm.grpc.engine.VllmEngine`, for any snapshot of dialect `vllm.engine`.

What a snapshot lacks, and what is not simulated (Embed, GetLoads, FlushCache, ...), is UNIMPLEMENTED.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .. import Code
from ..adapters.base import Adapter
from ._answer import Event
from ._engine import Engine, StatusError
from ._tokenizer_files import chunks, encode_archive

SERVICE = "vllm.grpc.engine.VllmEngine"


def methods(adapter: Adapter, engine: Engine, tokenizer_files: Mapping[str, bytes]) -> dict[str, Any]:
    """Coroutines `(request, context)` by method name. They raise CodecError to end with its code."""
    snapshot = adapter.snapshot
    started = time.monotonic()

    def response(method: str) -> Any:
        return snapshot.method(SERVICE, method).response()

    async def generate(message: Any, context: Any) -> None:
        async def send(event: Event) -> None:
            await context.write(adapter.encode_response(event))

        await engine.generate(adapter.decode_request(message), send)

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
        answer = response("GetServerInfo")
        answer.active_requests = len(engine.running)
        answer.uptime_seconds = time.monotonic() - started
        answer.server_type = "vllm-grpc"
        return answer

    async def get_tokenizer(_message: Any, context: Any) -> None:
        if not tokenizer_files:
            raise StatusError(Code.FAILED_PRECONDITION, "the model has no tokenizer directory")
        for data, sha256 in chunks(encode_archive(tokenizer_files)):
            chunk = response("GetTokenizer")
            chunk.data = data
            chunk.sha256 = sha256
            await context.write(chunk)

    return {
        "Generate": generate,
        "Abort": abort,
        "HealthCheck": health_check,
        "GetModelInfo": get_model_info,
        "GetServerInfo": get_server_info,
        "GetTokenizer": get_tokenizer,
    }
