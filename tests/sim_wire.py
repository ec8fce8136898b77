"""A simulated server asked over real gRPC with raw messages of its own snapshot."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc

from gaie_codec.sim import SimServer
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
EOS = 2
FOREVER = 3_600_000


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def scripted(script: dict[str, Any] | None = None, text: str = "Tell me") -> str:
    return text if script is None else f"{text} [[sim {json.dumps(script)}]]"


class Wire:
    """Calls of one server, by path or by the name of a method of its generating service."""

    def __init__(self, server: SimServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.snapshot = server.adapter.snapshot
        self.service = server.adapter.generate_path.split("/")[1]
        self._channel = channel

    def message(self, name: str, **fields: Any) -> Any:
        return self.snapshot.message(name)(**fields)

    def call(self, method: str, request: Any = None, **options: Any) -> Any:
        path = method if method.startswith("/") else f"/{self.service}/{method}"
        facts = self.snapshot.method_at(path)
        make = self._channel.unary_stream if facts.server_streaming else self._channel.unary_unary
        ask = make(path, request_serializer=facts.request.SerializeToString, response_deserializer=facts.response.FromString)
        return ask(request if request is not None else facts.request(), **options)

    async def all(self, method: str, request: Any = None, **options: Any) -> tuple[list[Any], str, str]:
        """The messages, the name of the status, and its details."""
        call = self.call(method, request, **options)
        messages: list[Any] = []
        try:
            if hasattr(call, "read"):
                async for message in call:
                    messages.append(message)  # one by one: those before an error count too
            else:
                messages.append(await call)
        except grpc.aio.AioRpcError as error:
            return messages, error.code().name, error.details() or ""
        return messages, "OK", ""

    async def one(self, method: str, request: Any = None) -> Any:
        messages, code, details = await self.all(method, request)
        assert code == "OK", details
        (message,) = messages
        return message


def play(dialect: str, snapshot: str | None, scene: Any, **options: Any) -> Any:
    """What `scene(wire)` returns, against a fresh server in a fresh event loop."""

    async def main() -> Any:
        server = SimServer(dialect, snapshot=snapshot, **{"tokenizer": TOKENIZER, **options})
        port = await server.start("127.0.0.1:0")
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await scene(Wire(server, channel))
        finally:
            await server.stop()

    return asyncio.run(main())


def ask(dialect: str, snapshot: str | None, method: str, make: Any, **options: Any) -> tuple[list[Any], str, str]:
    """The answer to the request that `make(wire)` gives."""
    return play(dialect, snapshot, lambda wire: wire.all(method, make(wire)), **options)


async def until(claim: Any) -> None:
    async with asyncio.timeout(30):
        while not claim():
            await asyncio.sleep(0.001)


async def cancelled(wire: Wire, method: str, request: Any) -> None:
    """Make a call, cancel it when it runs, and see that the server noted it."""
    before = len(wire.server.aborted)
    call = wire.call(method, request)
    await until(lambda: wire.server.running)
    call.cancel()
    await until(lambda: len(wire.server.aborted) > before and not wire.server.running)


async def has_side_services(wire: Wire) -> tuple[bool, bool]:
    """Whether there is grpc.health.v1, and reflection."""
    found = []
    for path, is_stream in (
        ("/grpc.health.v1.Health/Check", False),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
    ):
        channel = wire._channel
        try:
            if is_stream:
                [_ async for _ in channel.stream_stream(path)(iter([b""]))]
            else:
                await channel.unary_unary(path)(b"")
        except grpc.aio.AioRpcError as error:
            found.append(error.code() is not grpc.StatusCode.UNIMPLEMENTED)
        else:
            found.append(True)
    return found[0], found[1]
