"""A small EPP that passes everything through and keeps all rules, and a hook through which it breaks any one of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from gaie_codec.ext_proc.messages import PROCESS_PATH, ProcessingRequest, ProcessingResponse

POOL = ("10.0.0.1:8000", "10.0.0.2:8000", "[fd00::1]:8000")
KEY = "x-gateway-destination-endpoint"
HEALTH = {"liveness": 1, "readiness": 1, "envoy.service.ext_proc.v3.ExternalProcessor": 1}


class Abort(Exception):
    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code


class Silent(Exception):
    """From now on nothing is answered."""


def header(name: str, value: str, action: int = 2) -> dict[str, Any]:
    return {"header": {"key": name, "raw_value": value.encode()}, "append_action": action}


def immediate(status: int) -> Any:
    return ProcessingResponse(immediate_response={"status": {"code": status}})


def body(side: str, data: bytes, *, end: bool) -> Any:
    streamed = {"body": data, "end_of_stream": end}
    return ProcessingResponse(**{f"{side}_body": {"response": {"body_mutation": {"streamed_response": streamed}}}})


class Stream:
    """One stream: `receive` takes a message and gives the answers to it."""

    def __init__(self, epp: GoodEpp) -> None:
        self.epp = epp
        self.request: Any = None
        self.subset: Any = None
        self.body = b""
        self.headers: dict[str, str] = {}
        self.is_over = False  # the request has gone on, or was refused
        self.large_end = 0

    def receive(self, message: Any) -> list[Any]:
        kind = message.WhichOneof("request")
        hint = message.metadata_context.filter_metadata
        if "envoy.lb.subset_hint" in hint:
            self.subset = hint["envoy.lb.subset_hint"][f"{KEY}-subset"]
        part = getattr(message, kind)
        return getattr(self, f"on_{kind}")(part)

    def on_request_headers(self, part: Any) -> list[Any]:
        self.headers = {header.key: header.raw_value.decode() for header in part.headers.headers}
        return self.go_on([]) if part.end_of_stream else []

    def on_request_body(self, part: Any) -> list[Any]:
        if self.is_over:
            return []  # end of stream, once more
        self.body += part.body
        return self.go_on(self.cut("request", self.body, end=True)) if part.end_of_stream else []

    def on_request_trailers(self, part: Any) -> list[Any]:
        return self.go_on([*self.cut("request", self.body, end=False), ProcessingResponse(request_trailers={})])

    def on_response_headers(self, part: Any) -> list[Any]:
        return [ProcessingResponse(response_headers={})]

    def on_response_body(self, part: Any) -> list[Any]:
        return self.cut("response", part.body, end=part.end_of_stream)

    def on_response_trailers(self, part: Any) -> list[Any]:
        return [ProcessingResponse(response_trailers={})]

    def go_on(self, bodies: list[Any]) -> list[Any]:
        self.is_over = True
        picked = self.eligible()
        if not picked:
            return [immediate(503)]
        answer = ProcessingResponse(request_headers={"response": {"header_mutation": {"set_headers": [header(KEY, picked[0])]}}})
        answer.dynamic_metadata.update({"envoy.lb": {KEY: picked[0]}})
        return [answer, *bodies]

    def eligible(self) -> list[str]:
        if self.subset is None:
            return list(self.epp.pool)
        asked = self.subset.split(",") if isinstance(self.subset, str) else list(self.subset)
        return [endpoint for endpoint in self.epp.pool if endpoint in asked]

    def cut(self, side: str, data: bytes, *, end: bool) -> list[Any]:
        starts = range(0, len(data), 62_000) or (range(1) if end else ())
        return [body(side, data[at : at + 62_000], end=end and at + 62_000 >= len(data)) for at in starts]


class GoodEpp(grpc.GenericRpcHandler):
    """`doctor` takes the stream, what came and the answers to it, and returns what is sent instead."""

    def __init__(
        self,
        doctor: Callable[[Stream, Any, list[Any]], list[Any]] | None = None,
        *,
        stream: type[Stream] = Stream,
        pool: tuple[str, ...] = POOL,
        health: Callable[[str], int | None] = HEALTH.get,
        path: str = PROCESS_PATH,
    ) -> None:
        self.doctor = doctor or (lambda stream, message, answers: answers)
        self.stream = stream
        self.pool = pool
        self.health = health
        self.path = path

    def service(self, details: Any) -> Any:
        if details.method == self.path:
            return grpc.stream_stream_rpc_method_handler(self.process)
        if details.method == "/grpc.health.v1.Health/Check":
            return grpc.unary_unary_rpc_method_handler(
                self.check,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            )
        return None

    async def process(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        stream = self.stream(self)
        with contextlib.suppress(Silent):
            async for data in requests:
                message = ProcessingRequest.FromString(data)
                try:
                    answers = self.doctor(stream, message, stream.receive(message))
                except Abort as abort:
                    await context.abort(abort.code, "doctored")
                for answer in answers:
                    if answer is None:
                        return
                    yield answer.SerializeToString()
                    if answer.HasField("immediate_response") and answer is answers[-1]:
                        return
            return
        async for _ in requests:
            pass

    async def check(self, request: Any, context: Any) -> Any:
        status = self.health(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)


@contextlib.asynccontextmanager
async def serving(epp: grpc.GenericRpcHandler, *, tls: tuple[bytes, bytes] | None = None) -> AsyncIterator[str]:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((epp,))
    credentials = grpc.ssl_server_credentials([tls]) if tls is not None else None
    port = server.add_secure_port("127.0.0.1:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        await asyncio.sleep(0)
