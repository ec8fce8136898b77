"""What a shim asks a model server besides generation: its model, its tokenizer, and whether it is well."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError, Message

from .. import Code, CodecError, MalformedMessageError, ModelInfo, UpstreamStatusError, UsageError
from ..text.archive import TokenizerArchive

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from .connection import Upstream

_OPTIONAL_TIMEOUT_S: Final = 2.0
_HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
_SERVING: Final = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


async def fetch_model_info(upstream: Upstream, adapter: Adapter, *, timeout_s: float = 5.0) -> ModelInfo:
    """What the server says of its model. Raises UpstreamStatusError and MalformedMessageError of the first question if none is answered.

    What it does not answer stays unknown: some answers need more than the server was started with (LoRA), some the engine.
    """
    if not adapter.info_paths:
        await check_health(upstream, adapter, timeout_s=timeout_s)
        return adapter.decode_model_info({})

    async def ask(path: str, limit_s: float) -> Any:
        return _decode(adapter, path, await upstream.unary(path, b"", timeout_s=limit_s))

    limits_s = [timeout_s] + [min(timeout_s, _OPTIONAL_TIMEOUT_S)] * (len(adapter.info_paths) - 1)
    told = await asyncio.gather(*map(ask, adapter.info_paths, limits_s), return_exceptions=True)
    answers = {path: answer for path, answer in zip(adapter.info_paths, told, strict=True) if not isinstance(answer, BaseException)}
    for fault in told:
        if isinstance(fault, BaseException) and (not answers or not isinstance(fault, CodecError)):
            raise fault
    return adapter.decode_model_info(answers)


async def fetch_tokenizer(upstream: Upstream, adapter: Adapter, *, timeout_s: float = 60.0) -> dict[str, bytes]:
    """The server's tokenizer files by name, checked.

    Raises UsageError where the snapshot has no GetTokenizer, UpstreamStatusError (UNIMPLEMENTED from a server that has none, a code of
    the server's own where it finds no files) and MalformedMessageError.
    """
    path = adapter.tokenizer_path
    if path is None:
        raise UsageError(f"{adapter.snapshot} has no GetTokenizer")
    archive = TokenizerArchive()
    call = upstream.stream(path, b"", timeout_s=timeout_s)
    try:
        while (answer := await call.read()) is not None:
            chunk = _decode(adapter, path, answer)
            archive.receive(chunk.data, chunk.sha256)
        code, details = await call.status()
    finally:
        call.cancel()
    if code is not Code.OK:
        raise UpstreamStatusError(code, details)
    return archive.files()


async def check_health(upstream: Upstream, adapter: Adapter, *, timeout_s: float = 2.0) -> None:
    """Return when the server is well. Raises UpstreamStatusError with UNAVAILABLE, or the error of asking.

    The dialect's own HealthCheck tells whether the engine lives, where grpc.health.v1 only tells that a process does and many servers
    have no such service; where a HealthCheck would generate a token (SGLang's), it is not asked. A server that has neither, and says so, is
    well as far as one can know.
    """
    path = adapter.health_path
    if path is not None:
        try:
            answer = await upstream.unary(path, b"", timeout_s=timeout_s)
        except UpstreamStatusError as error:
            if error.code is not Code.UNIMPLEMENTED:
                raise
        else:
            if not getattr(_decode(adapter, path, answer), "healthy", True):
                raise UpstreamStatusError(Code.UNAVAILABLE, "the model server says that it is not healthy")
            return
    try:
        is_well = await upstream.unary(_HEALTH_CHECK, b"", timeout_s=timeout_s) == _SERVING
    except UpstreamStatusError as error:
        if error.code is not Code.UNIMPLEMENTED:
            raise
        is_well = True
    if not is_well:
        raise UpstreamStatusError(Code.UNAVAILABLE, "the model server says that it is not healthy")


def _decode(adapter: Adapter, path: str, answer: bytes) -> Any:
    message: type[Message] = adapter.snapshot.method_at(path).response
    try:
        return message.FromString(answer)
    except DecodeError:
        raise MalformedMessageError(f"{path}: {len(answer)} bytes that are no {message.DESCRIPTOR.full_name}") from None
