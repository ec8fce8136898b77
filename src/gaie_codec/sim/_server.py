"""The simulated model server on a port: the dialect's services on raw message classes of one snapshot, with grpc.health.v1 and
reflection where the real server has them."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.descriptor_pool import DescriptorPool

from .. import CodecError, InferenceRequest, ModelInfo, UsageError, adapters, snapshots
from ..adapters.base import Adapter
from ..text import Tokenizer
from ..tokenizer_sources import load_tokenizer, read_files
from . import _sglang_api, _sglang_runtime, _sglang_scheduler, _vllm_engine, _vllm_inference
from ._engine import Engine
from ._script import Script
from ._services import Services

try:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection, reflection_pb2
except ModuleNotFoundError as error:
    raise ImportError(f"gaie_codec.sim needs the package of {error.name}: pip install gaie-codec[sim]", name=error.name) from error

_DIALECTS: Final[Mapping[str, Callable[[Adapter, Engine], Services]]] = MappingProxyType(
    {
        "vllm.engine": _vllm_engine.services,
        "vllm.inference": _vllm_inference.services,
        "sglang.scheduler": _sglang_scheduler.services,
        "sglang.runtime": _sglang_runtime.services,
        "sglang.api": _sglang_api.services,
    }
)
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # else a second server could take half of the connections in silence
)

_GRACE_S: Final = 0.1  # with none, gRPC ends idle connections as if by an error, and clients log it


class SimServer:
    """A model server of one dialect and snapshot (None: the newest) with a simulated engine. It can be started again after `stop`.

    `tokenizer` is one, or a source for `load_tokenizer`, whose files GetTokenizer then serves. `model` is what the server tells of
    itself and obeys; what it leaves unknown has defaults: "sim-model", 2048 tokens, the tokenizer's vocabulary and end tokens.
    `script` is for requests that bring none. Raises UsageError for what does not exist.
    """

    def __init__(
        self,
        dialect: str = "vllm.engine",
        *,
        snapshot: str | None = None,
        tokenizer: Tokenizer | str = "builtin",
        model: ModelInfo | None = None,
        script: Script | None = None,
    ) -> None:
        if dialect not in _DIALECTS:
            raise UsageError(f"no simulated server for dialect {dialect!r}; there are: {', '.join(_DIALECTS)}")
        self.adapter: Final = adapters.get(snapshots.load(dialect, snapshot))
        files: dict[str, bytes] = {}
        if isinstance(tokenizer, str):
            source, tokenizer = tokenizer, load_tokenizer(tokenizer)
            files = read_files(source)
        self._engine = Engine(tokenizer, model if model is not None else ModelInfo(), script if script is not None else Script(), files)
        self._server: Any = None
        self._health: Any = None

    @property
    def model(self) -> ModelInfo:
        """What the server tells of its model."""
        return self._engine.model

    @property
    def requests(self) -> list[InferenceRequest]:
        """All requests as received, oldest first."""
        return self._engine.requests

    @property
    def aborted(self) -> list[str]:
        """Ids of the requests whose call was cancelled, or which were aborted, in that order."""
        return self._engine.aborted

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests being answered, oldest first."""
        return self._engine.running

    async def start(self, address: str) -> int:
        """Listen on "HOST:PORT", where port 0 is any free one; returns the port. Raises UsageError if that is impossible."""
        if self._server is not None:
            raise UsageError("the server has been started")
        host, _, number = address.rpartition(":")
        if not host or not number.isdecimal() or int(number) > 65535:
            raise UsageError(f"listen {address}: not of the form HOST:PORT")
        snapshot = self.adapter.snapshot
        server = grpc.aio.server(options=_OPTIONS)
        services = _DIALECTS[self.adapter.dialect](self.adapter, self._engine)
        for service, methods in services.methods.items():
            handlers = {
                name: self._handler(service, name, method) for name, method in methods.items() if snapshot.has_method(service, name)
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._health = None
        if services.has_health:
            self._health = health.aio.HealthServicer()
            for service in snapshot.services:
                await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if services.has_reflection:
            described = (*snapshot.services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(described, server, pool=self._described_pool())
        try:
            port: int = server.add_insecure_port(address)
        except RuntimeError as error:
            await server.stop(None)
            raise UsageError(f"cannot listen on {address}: {error}") from error
        await server.start()
        self._server = server
        return port

    async def stop(self) -> None:
        """Cancel what runs and close the port."""
        server, self._server = self._server, None
        if server is not None:
            if self._health is not None:
                await self._health.enter_graceful_shutdown()
            await server.stop(_GRACE_S)

    def _handler(self, service: str, name: str, method: Callable[[Any, Any], Any]) -> Any:
        facts = self.adapter.snapshot.method(service, name)

        async def call(message: Any, context: Any) -> Any:
            try:
                return await method(message, context)
            except CodecError as error:
                await context.abort(grpc.StatusCode[error.code.name], error.message)

        handler = grpc.unary_stream_rpc_method_handler if facts.server_streaming else grpc.unary_unary_rpc_method_handler
        return handler(call, request_deserializer=facts.request.FromString, response_serializer=facts.response.SerializeToString)

    def _described_pool(self) -> DescriptorPool:
        """One pool for reflection: the snapshot's files, and those of the health and reflection services from the default pool."""
        pool = DescriptorPool()
        added: set[str] = set()

        def add(file: Any) -> None:
            if file.name not in added:
                added.add(file.name)
                for dependency in file.dependencies:
                    add(dependency)
                pool.AddSerializedFile(file.serialized_pb)

        snapshot = self.adapter.snapshot
        for service in snapshot.services:
            add(snapshot.pool.FindServiceByName(service).file)
        add(health_pb2.DESCRIPTOR)
        add(reflection_pb2.DESCRIPTOR)
        return pool


async def run(server: SimServer, address: str) -> None:
    """Serve until SIGTERM or SIGINT. Prints `ready grpc=HOST:PORT` on stdout when requests are accepted."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        port = await server.start(address)
        sys.stdout.write(f"ready grpc={address.rpartition(':')[0]}:{port}\n")
        sys.stdout.flush()
        await stopping.wait()
    finally:
        await server.stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
