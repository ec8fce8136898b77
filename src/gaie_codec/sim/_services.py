"""What a dialect's module offers to the server, and what several of them answer alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from .. import Code
from ._engine import StatusError
from ._tokenizer_files import chunks, encode_archive

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..snapshots import Snapshot
    from ._engine import Engine

Method: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
"""A coroutine of `(request, context)`. It raises CodecError to end with its code."""


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """Methods by name, by service. What a snapshot lacks, and what is not simulated, is UNIMPLEMENTED."""

    methods: Mapping[str, Mapping[str, Method]]
    has_health: bool = False
    """Whether the real server has grpc.health.v1."""
    has_reflection: bool = False


def get_tokenizer(snapshot: Snapshot, service: str, tokenizer_files: Mapping[str, bytes]) -> Method:
    """The GetTokenizer of the smg servicers."""

    async def call(_message: Any, context: Any) -> None:
        if not tokenizer_files:
            raise StatusError(Code.FAILED_PRECONDITION, "the model has no tokenizer directory")
        for data, sha256 in chunks(encode_archive(tokenizer_files)):
            chunk: Any = snapshot.method(service, "GetTokenizer").response()
            chunk.data = data
            chunk.sha256 = sha256
            await context.write(chunk)

    return call


def get_loads(adapter: Adapter, engine: Engine) -> Method:
    """The GetLoads of the smg servicers."""

    async def call(_message: Any, _context: Any) -> Any:
        if adapter.encode_loads is None:
            raise StatusError(Code.UNIMPLEMENTED, "no GetLoads in this release")
        answer: Any = adapter.encode_loads(engine.loads)
        answer.timestamp = datetime.now(UTC).isoformat()
        return answer

    return call


def server_info(adapter: Adapter, engine: Engine, empty: Any) -> Any:
    """The answer that tells of the server's size, or the empty one where the snapshot's tells nothing of it."""
    answer = empty if adapter.encode_capacity is None else adapter.encode_capacity(engine.capacity)
    told = adapter.encode_model_info(engine.model)
    path = next((path for path in told if path.endswith("/GetServerInfo")), None)
    if path is not None:
        answer.MergeFrom(told[path])
    return answer
