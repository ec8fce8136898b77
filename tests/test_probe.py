"""`probe` against real servers: the simulated one, generic ones made of every snapshot's own classes, and ports with none behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import click
import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from gaie_codec import Code, CodecError, FramingError, ModelInfo, UpstreamStatusError, UsageError
from gaie_codec.adapters.base import Adapter
from gaie_codec.asgi import server as asgi_server
from gaie_codec.cli._commands import cli
from gaie_codec.probe import ProbeReport, _connection, probe
from gaie_codec.probe._dialects import KNOWN
from gaie_codec.probe._schemas import _files, match_version
from gaie_codec.sim import SimServer
from gaie_codec.snapshots import SNAPSHOTS, Snapshot, load
from gaie_codec.tokenizer_sources import load_tokenizer
from gaie_codec.upstream import Upstream, discovery, transcoders

TOKENIZER = load_tokenizer("builtin")
EVERY = [(dialect, name) for dialect, names in SNAPSHOTS.items() for name in names]
LIMIT_S = 20.0  # of a probe that is to succeed, however slow the machine

# What acts on a server or on its engine, whatever it is sent.
ACTS = {"Abort", "FlushCache", "StartProfile", "StopProfile", "Shutdown", "LoadLora", "UnloadLora", "Sleep", "WakeUp", "Embed", "Tokenize"}
GENERATES = {"Generate", "GenerateStream", "TextGenerate", "ChatComplete", "Complete"}


def filled(cls: type[Message], depth: int = 0) -> Message:
    """Every field set, three levels deep: the newest server that this schema can be."""
    message = cls()
    for field in message.DESCRIPTOR.fields:
        target: Any = getattr(message, field.name)
        is_repeated = not isinstance(target, Message | str | bytes | int | float)
        if field.message_type is not None:
            if depth < 2 and not field.message_type.GetOptions().map_entry and field.message_type.file.package != "google.protobuf":
                part = filled(GetMessageClass(field.message_type), depth + 1)
                target.add().CopyFrom(part) if is_repeated else target.CopyFrom(part)
            continue
        value: Any = {field.CPPTYPE_STRING: "{}", field.CPPTYPE_BOOL: True}.get(field.cpp_type, 1)
        value = b"x" if field.type == field.TYPE_BYTES else value
        target.append(value) if is_repeated else setattr(message, field.name, value)
    return message


class ModelServer(grpc.GenericRpcHandler):
    """Raw answers by path: bytes, a status to end with, or a function of the request. Calls are noted."""

    def __init__(self, answers: dict[str, Any], otherwise: grpc.StatusCode | None = None) -> None:
        self.answers = answers
        self.called: list[str] = []
        self._otherwise = otherwise

    def service(self, details: Any) -> Any:
        path = details.method
        self.called.append(path)
        answer = self.answers.get(path, self._otherwise)
        if answer is None:
            return None

        async def call(request: bytes, context: Any) -> AsyncIterator[bytes]:
            made = answer(request) if callable(answer) else answer
            if isinstance(made, tuple):
                await context.abort(*made)
            if isinstance(made, grpc.StatusCode):
                await context.abort(made, "Method not implemented!" if made is grpc.StatusCode.UNIMPLEMENTED else "no")
            yield made

        return grpc.unary_stream_rpc_method_handler(call)


def schema_server(snapshot: Snapshot, fill: Callable[[type[Message]], Message] = lambda cls: cls(), **changes: Any) -> ModelServer:
    """A server of a snapshot, which decodes before it calls. `changes` are answers by method, made of the class or ready."""
    answers: dict[str, Any] = {}
    for service in snapshot.services:
        for name in snapshot.pool.FindServiceByName(service).methods_by_name:
            method = snapshot.method(service, name)
            change = changes.get(name, fill)

            def answer(request: bytes, method: Any = method, change: Any = change) -> Any:
                try:
                    method.request.FromString(request)
                except DecodeError:
                    return grpc.StatusCode.INTERNAL, "failed to decode Protobuf message"
                made = change(method.response) if callable(change) else change
                return made.SerializeToString() if isinstance(made, Message) else made

            answers[method.path] = answer
    return ModelServer(answers)


@contextlib.asynccontextmanager
async def running(handler: ModelServer, services: Iterable[str] = (), pool: DescriptorPool | None = None) -> AsyncIterator[str]:
    """HOST:PORT of a server. With `services` it has reflection of them, from `pool`."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    if services:
        reflection.enable_server_reflection(tuple(services), server, pool=pool)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def ask(target: str, timeout_s: float = LIMIT_S) -> ProbeReport:
    upstream = Upstream(target)
    try:
        return await probe(upstream, timeout_s=timeout_s)
    finally:
        await upstream.close()


def probed(handler: ModelServer, services: Iterable[str] = (), pool: DescriptorPool | None = None) -> ProbeReport:
    async def main() -> ProbeReport:
        async with running(handler, services, pool) as target:
            return await ask(target)

    return asyncio.run(main())


def place(dialect: str, name: str) -> int:
    return SNAPSHOTS[dialect].index(name)


class TestReflection:
    @pytest.mark.parametrize("name", SNAPSHOTS["vllm.engine"])
    def test_sim(self, name: str) -> None:
        async def main() -> ProbeReport:
            server = SimServer("vllm.engine", snapshot=name, model=ModelInfo(served_model_name="tiny", max_model_len=77))
            port = await server.start("127.0.0.1:0")
            try:
                return await ask(f"grpc://127.0.0.1:{port}")
            finally:
                await server.stop()

        report = asyncio.run(main())
        assert (report.dialect, report.snapshot, report.match, report.basis) == ("vllm.engine", name, "exact", "reflection")
        assert (report.max_model_len, report.health, report.reflection) == (77, "serving", "v1alpha")
        assert report.model == "tiny"
        assert report.has_tokenizer_stream == (name != "intree-0.14.0")
        assert report.has_adapter
        assert report.cannot_say is not None
        missing = {entry.field for entry in report.cannot_say}
        assert ("n" in missing) == (name == "intree-0.14.0")

    @pytest.mark.parametrize(("dialect", "name"), EVERY)
    def test_every_snapshot_is_named(self, dialect: str, name: str) -> None:
        snapshot = load(dialect, name)
        handler = schema_server(snapshot)
        report = probed(handler, snapshot.services, snapshot.pool)
        assert (report.dialect, report.snapshot, report.match) == (dialect, name, "exact")
        assert report.refused == snapshot.refused
        assert bool(report.refused) == (name == "intree-0.5.3")

    def test_v1_with_one_file_at_a_time(self) -> None:
        """As tonic's: only v1, no dependencies in an answer, and no well-known files at all."""
        snapshot = load("sglang.scheduler", "smg-0.4.28")
        files = {file.name: file for file in _files(snapshot)}
        main = next(file.name for file in files.values() if file.service)

        def reflect(request: bytes) -> bytes:
            asked = reflection_pb2.ServerReflectionRequest.FromString(request)
            reply = reflection_pb2.ServerReflectionResponse(original_request=asked)
            name = main if asked.HasField("file_containing_symbol") else asked.file_by_filename
            if asked.HasField("list_services"):
                reply.list_services_response.service.add(name=snapshot.services[0])
            elif name in files and not name.startswith("google/"):
                reply.file_descriptor_response.file_descriptor_proto.append(files[name].SerializeToString())
            else:
                reply.error_response.error_code = 5
            return reply.SerializeToString()

        handler = schema_server(snapshot)
        handler.answers["/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"] = reflect
        report = probed(handler)
        assert (report.snapshot, report.match, report.reflection) == ("smg-0.4.28", "exact", "v1")

    def test_broken_reflection_leaves_the_methods(self) -> None:
        snapshot = load("vllm.engine")
        handler = schema_server(snapshot)
        path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        for broken in (b"\xff", b"", reflection_pb2.ServerReflectionResponse(valid_host="x").SerializeToString()):
            handler.answers[path] = broken
            report = probed(handler)
            assert (report.dialect, report.match, report.reflection) == ("vllm.engine", "floor", "")

        def lists_only(request: bytes) -> Any:
            reply = reflection_pb2.ServerReflectionResponse()
            reply.list_services_response.service.add(name=snapshot.services[0])
            return reply.SerializeToString()

        handler.answers[path] = lists_only
        report = probed(handler)
        assert (report.dialect, report.match, report.reflection) == ("vllm.engine", "floor", "v1")


def doctored(dialect: str, name: str, change: Callable[[FileDescriptorProto], None]) -> Snapshot:
    """A snapshot whose main file was changed."""
    files = _files(load(dialect, name))
    for file in files:
        if file.service:
            change(file)
    ordered: list[FileDescriptorProto] = []
    while len(ordered) < len(files):
        known = {file.name for file in ordered}
        ordered += [file for file in files if file.name not in known and known.issuperset(file.dependency)]
    return Snapshot(dialect, f"{name}+", [file.SerializeToString() for file in ordered])


def message_of(file: FileDescriptorProto, name: str) -> Any:
    return next(message for message in file.message_type if message.name == name)


def add_field(file: FileDescriptorProto, message: str, name: str, number: int) -> None:
    message_of(file, message).field.add(name=name, number=number, type=9, label=1)


def drop(elements: Any, *names: str) -> None:
    kept = [element for element in elements if element.name not in names]
    del elements[:]
    elements.extend(kept)


class TestUnknownSchemas:
    def test_newer(self) -> None:
        snapshot = doctored("vllm.engine", "smg-0.4.28", lambda file: add_field(file, "GenerateRequest", "magic", 99))
        report = probed(schema_server(snapshot), snapshot.services, snapshot.pool)
        assert (report.dialect, report.snapshot, report.match) == ("vllm.engine", "smg-0.4.28", "newer")
        assert report.reason == "newer than smg-0.4.28: 1 field unknown: GenerateRequest.magic=99"
        assert report.unknown == ("GenerateRequest.magic=99",)

    def test_between(self) -> None:
        def change(file: FileDescriptorProto) -> None:
            drop(message_of(file, "GetServerInfoResponse").field, "data_parallel_size")

        snapshot = doctored("vllm.engine", "smg-0.4.11", change)
        report = probed(schema_server(snapshot), snapshot.services, snapshot.pool)
        assert (report.snapshot, report.match) == ("smg-0.4.8", "between")
        assert report.reason.startswith("between smg-0.4.8 and smg-0.4.11: ")
        assert report.reason.endswith("smg-0.4.11 has besides GetServerInfoResponse.data_parallel_size=9")

    def test_published_but_no_snapshot(self) -> None:
        """V9, smg-grpc-proto 0.4.10, is V10 without two fields."""

        def change(file: FileDescriptorProto) -> None:
            drop(message_of(file, "GenerateRequest").field, "data_parallel_rank")
            drop(message_of(file, "GetServerInfoResponse").field, "data_parallel_size")
            message_of(file, "GenerateRequest").oneof_decl.pop()

        snapshot = doctored("vllm.engine", "smg-0.4.11", change)
        report = probed(schema_server(snapshot), snapshot.services, snapshot.pool)
        assert report.releases == ("smg-grpc-proto-0.4.10",)
        assert report.reason.startswith("the schema of smg-grpc-proto-0.4.10, between smg-0.4.8 and smg-0.4.11: ")
        # What V9 shows on the wire, GetLoads and kv_engine_id, is new in 0.4.11 as snapshots go. It is not newer than 0.4.8 in all.
        assert probed(schema_server(snapshot, filled)).snapshot == "smg-0.4.8"

    def test_between_without_a_contradiction(self) -> None:
        """S9 is S10 without one field, and contradicts S7, the snapshot before: that would garble images."""
        snapshot = doctored(
            "sglang.scheduler", "smg-0.4.4", lambda file: drop(message_of(file, "GetServerInfoResponse").field, "max_total_num_tokens")
        )
        report = probed(schema_server(snapshot), snapshot.services, snapshot.pool)
        assert (report.snapshot, report.match, report.releases[0]) == ("smg-0.4.4", "near", "smg-grpc-proto-0.4.2")
        assert report.reason.endswith("of which it lacks or has otherwise: GetServerInfoResponse.max_total_num_tokens=10")

    def test_contradicting(self) -> None:
        def change(file: FileDescriptorProto) -> None:
            message_of(file, "AbortRequest").field[0].type = 12

        snapshot = doctored("vllm.engine", "smg-0.4.28", change)
        report = probed(schema_server(snapshot), snapshot.services, snapshot.pool)
        assert (report.snapshot, report.match) == ("smg-0.4.28", "near")
        assert "AbortRequest.request_ids=1" in report.reason

    def test_unknown_field_on_the_wire(self) -> None:
        snapshot = doctored("vllm.engine", "smg-0.4.28", lambda file: add_field(file, "GetServerInfoResponse", "magic", 99))
        report = probed(schema_server(snapshot, filled))
        assert (report.snapshot, report.match, report.unknown) == ("smg-0.4.28", "newer", ("GetServerInfoResponse.99",))


class TestWithoutReflection:
    @pytest.mark.parametrize("fill", [filled, lambda cls: cls()], ids=["filled", "empty"])
    @pytest.mark.parametrize(("dialect", "name"), EVERY)
    def test_floor_is_never_above_the_truth(self, dialect: str, name: str, fill: Any) -> None:
        handler = schema_server(load(dialect, name), fill)
        if name == "intree-0.5.3":  # it has no method that may be asked
            report = probed(handler)
            assert report.dialect == ""
            return
        report = probed(handler)
        assert report.dialect == dialect
        assert report.match == "floor"
        assert place(dialect, report.snapshot) <= place(dialect, name)
        told = ("vllm.engine smg-0.4.28", "vllm.engine smg-0.4.13", "sglang.scheduler smg-0.4.14", "vllm.inference 0.33.0")
        if fill is filled and f"{dialect} {name}" in told:
            assert report.snapshot == name

    def test_registered_with_health_only(self) -> None:
        snapshot = load("sglang.scheduler", "intree-0.5.3")

        async def main() -> tuple[ProbeReport, ProbeReport]:
            server = grpc.aio.server()
            servicer = health.aio.HealthServicer()
            await servicer.set(snapshot.services[0], health_pb2.HealthCheckResponse.NOT_SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            try:
                first = await ask(f"127.0.0.1:{port}")
                await servicer.set("gaie_codec.probe.Nothing", health_pb2.HealthCheckResponse.SERVING)
                return first, await ask(f"127.0.0.1:{port}")
            finally:
                await server.stop(None)

        report, gullible = asyncio.run(main())
        assert (report.dialect, report.snapshot, report.health) == ("sglang.scheduler", "intree-0.5.3", "not serving")
        assert report.refused
        assert gullible.dialect == "", "health that says the same of everything tells nothing"

    def test_declared_but_not_implemented(self) -> None:
        """grpcio's servicers say of a method in their schema that it is not implemented, of another that it was not found."""
        handler = schema_server(load("sglang.scheduler", "smg-0.4.14"), ListLoadedLoRAAdapters=grpc.StatusCode.UNIMPLEMENTED)
        assert probed(handler).snapshot == "smg-0.4.14"

    def test_failing_methods_are_there(self) -> None:
        # A servicer that is newer than its proto: upstream's known bad pairs.
        handler = schema_server(load("vllm.engine", "smg-0.4.4"), GetModelInfo=grpc.StatusCode.UNKNOWN)
        report = probed(handler)
        assert report.dialect == "vllm.engine"
        assert report.answers["/vllm.grpc.engine.VllmEngine/GetModelInfo"] == "UNKNOWN"
        assert report.model == ""

    def test_answers_that_do_not_fit(self) -> None:
        report = probed(schema_server(load("vllm.engine"), GetModelInfo=b"\xff\xff"))
        assert report.dialect == "vllm.engine"
        assert report.notes == ("GetModelInfo answers with 2 bytes that do not fit the schema",)


class TestEngineVersions:
    @pytest.mark.parametrize(
        ("version", "snapshot", "match"),
        [
            ("0.33.0", "0.33.0", "exact"),
            ("0.27.0", "0.27.1", "exact"),
            ("0.34.0", "0.33.0", "newer"),
            ("0.33.0rc1", "0.32.0", "floor"),
            ("0.33.1.dev7+gabc", "0.33.0", "newer"),
            ("nightly", "0.27.1", "floor"),
        ],
    )
    def test_vllm(self, version: str, snapshot: str, match: str) -> None:
        def server_info(cls: Any) -> Any:
            return cls(engine_version=version, max_model_len=4096)

        handler = schema_server(
            load("vllm.inference", "0.27.1"),
            GetServerInfo=server_info,
            GetModelInfo=lambda cls: cls(model_id="org/m", served_model_name="m", served_model_aliases=["a"]),
        )
        report = probed(handler)
        assert (report.dialect, report.snapshot, report.match) == ("vllm.inference", snapshot, match)
        assert (report.engine_version, report.model, report.aliases, report.max_model_len) == (version, "m", ("a",), 4096)
        assert report.services == ("vllm.Control",)

    def test_vllm_before_control(self) -> None:
        handler = schema_server(load("vllm.inference", "0.26.0"))
        report = probed(handler)
        assert (report.dialect, report.snapshot, report.match) == ("vllm.inference", "0.25.1", "floor")
        assert report.answers["/vllm.Generate/Generate"] == "INTERNAL", "it was refused, not run"

    def test_schema_newer_than_the_version(self) -> None:
        newest = load("vllm.inference")
        report = probed(schema_server(newest, GetServerInfo=lambda cls: cls(engine_version="0.31.0", proto_version="0.6.0")))
        assert (report.snapshot, report.basis, report.proto_version) == ("0.33.0", "methods and fields", "0.6.0")

    def test_sglang_runtime(self) -> None:
        handler = schema_server(
            load("sglang.runtime", "0.5.19"),
            GetServerInfo=lambda cls: cls(json_info=json.dumps({"version": "0.5.18", "tokenizer_path": "/t"})),
            GetModelInfo=lambda cls: cls(model_path="/m", json_info=json.dumps({"served_model_name": "m"})),
            ListModels=lambda cls: cls(models=[{"id": "m", "max_model_len": 9}, {"id": "lora"}]),
            HealthCheck=lambda cls: cls(healthy=True),
        )
        report = probed(handler)
        assert (report.dialect, report.snapshot, report.match, report.basis) == ("sglang.runtime", "0.5.19", "exact", "engine version")
        assert (report.model, report.aliases, report.max_model_len, report.tokenizer_path) == ("m", ("lora",), 9, "/t")
        assert (report.health, report.health_basis) == ("serving", "HealthCheck")

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 5}', "[" * 5000])
    def test_sglang_runtime_that_says_nothing(self, text: str) -> None:
        handler = schema_server(load("sglang.runtime", "0.5.22"), GetServerInfo=lambda cls: cls(json_info=text))
        report = probed(handler)
        assert (report.dialect, report.snapshot, report.match) == ("sglang.runtime", "0.5.20", "floor")

    def test_sglang_api(self) -> None:
        handler = schema_server(
            load("sglang.api", "0.5.22"),
            GetServerInfo=lambda cls: cls(version="0.5.22", max_context_length=5, served_model_name="m"),
        )
        report = probed(handler)
        assert (report.dialect, report.snapshot, report.match) == ("sglang.api", "0.5.22", "exact")
        assert (report.max_model_len, report.health) == (5, "unknown")
        assert "generates a token" in report.health_basis

    def test_in_the_engines_tree(self) -> None:
        handler = schema_server(load("sglang.scheduler", "intree-0.5.8"), GetServerInfo=lambda cls: cls(sglang_version="0.5.8.post1"))
        report = probed(handler)
        assert (report.snapshot, report.match, report.basis) == ("intree-0.5.8", "exact", "engine version")

    def test_release_that_does_not_decide(self) -> None:
        handler = schema_server(load("vllm.engine", "smg-0.4.13"), GetLoads=lambda cls: cls(version="0.25.0"))
        report = probed(handler)
        assert (report.engine_version, report.match) == ("0.25.0", "floor")
        assert any("0.4.14 (snapshot smg-0.4.13)" in note for note in report.notes)

    @pytest.mark.parametrize("version", ["", "x", "1", "0.1.0", "0.0.0rc1", "9" * 5000 + ".1.1"])
    def test_versions_of_nothing(self, version: str) -> None:
        found = match_version("vllm.inference", "vllm", version)
        assert found is None or found.match == "newer"


class TestQuestions:
    def test_table_has_no_method_that_acts(self) -> None:
        for known in KNOWN.values():
            assert not {path.rpartition("/")[2] for path in (*known.asks_all, *known.asks_recognized)} & (ACTS | GENERATES)
            newest = load(known.dialect)
            for path in (*known.asks_all, *known.asks_recognized, known.tokenizer, known.health):
                if path:
                    _, service, method = path.split("/")
                    assert newest.has_method(service, method), "a name that no server has asks nothing"

    @pytest.mark.parametrize(("dialect", "name"), EVERY)
    def test_nothing_acts_and_nothing_generates(self, dialect: str, name: str) -> None:
        snapshot = load(dialect, name)
        handler = schema_server(snapshot)
        requests: dict[str, bytes] = {}

        def noting(path: str, answer: Any) -> Any:
            def call(request: bytes) -> Any:
                requests[path] = request
                return answer(request)

            return call

        handler.answers = {path: noting(path, answer) for path, answer in handler.answers.items()}
        probed(handler)
        for path, request in requests.items():
            service, method = path.split("/")[1:]
            assert method not in ACTS
            costly = {"sglang.grpc.scheduler.SglangScheduler", "sglang.api.v1.SglangService"}
            assert method != "HealthCheck" or service not in costly, "it generates a token"
            if method in GENERATES or method == "WatchEngineState":
                with pytest.raises(DecodeError):
                    snapshot.method(service, method).request.FromString(request)
            else:
                assert request == b""

    def test_tokenizer_stream_is_left_after_its_first_chunk(self) -> None:
        snapshot = load("vllm.engine")
        left = asyncio.Event()

        class Endless(ModelServer):
            def service(self, details: Any) -> Any:
                if not details.method.endswith("/GetTokenizer"):
                    return super().service(details)

                async def call(request: bytes, context: Any) -> AsyncIterator[bytes]:
                    try:
                        while True:
                            yield snapshot.method("VllmEngine", "GetTokenizer").response(data=b"x" * 65536).SerializeToString()
                    finally:
                        left.set()

                return grpc.unary_stream_rpc_method_handler(call)

        async def main() -> ProbeReport:
            async with running(Endless(schema_server(snapshot).answers)) as target:
                report = await ask(target)
                async with asyncio.timeout(LIMIT_S):
                    await left.wait()
                return report

        assert asyncio.run(main()).has_tokenizer_stream


class TestNoModelServer:
    def test_foreign_service(self) -> None:
        report = probed(ModelServer({"/acme.Shop/Buy": b""}))
        assert (report.dialect, report.match) == ("", "unknown")
        assert "none of the services" in report.reason

    def test_foreign_service_with_reflection(self) -> None:
        pool = DescriptorPool()
        file = FileDescriptorProto(name="shop.proto", package="acme", syntax="proto3")
        file.message_type.add(name="Nothing")
        file.service.add(name="Shop").method.add(name="Buy", input_type=".acme.Nothing", output_type=".acme.Nothing")
        pool.Add(file)
        report = probed(ModelServer({}), ["acme.Shop"], pool)
        assert (report.dialect, report.services) == ("", ("acme.Shop",))

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (grpc.StatusCode.UNAUTHENTICATED, "credentials"),
            (grpc.StatusCode.PERMISSION_DENIED, "credentials"),
            (grpc.StatusCode.INTERNAL, "INTERNAL to everything"),
            (b"", "OK to everything"),
        ],
    )
    def test_the_same_to_everything(self, answer: Any, said: str) -> None:
        report = probed(ModelServer({}, otherwise=answer))
        assert report.dialect == ""
        assert said in report.reason

    def test_web_server_on_http_2(self) -> None:
        """404 to every call, as a frame: HEADERS with HPACK's entry for `:status: 404`, the stream's end."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(24)
            writer.write(SETTINGS)
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == 4 and not head[4]:
                    writer.write(b"\x00\x00\x00\x04\x01" + bytes(4))
                elif head[3] == 1:
                    writer.write(b"\x00\x00\x01\x01\x05" + head[5:] + b"\x8d")

        async def main() -> ProbeReport:
            async with listening(serve) as target:
                return await ask(target)

        report = asyncio.run(main())
        assert report.dialect == ""
        assert "HTTP/2, but not gRPC" in report.reason

    def test_perhaps_still_starting(self) -> None:
        starting = grpc.StatusCode.UNAVAILABLE
        handler = schema_server(load("vllm.engine"), GetModelInfo=starting, GetServerInfo=starting)
        with pytest.raises(UpstreamStatusError, match=r"answers, but not to /vllm.grpc.engine.VllmEngine/GetModelInfo") as caught:
            probed(handler)
        assert caught.value.code is Code.UNAVAILABLE

    def test_another_that_only_reflection_lists(self) -> None:
        """Listed, but every call fails: its schema is known all the same."""
        snapshot = load("vllm.engine", "smg-0.4.13")
        report = probed(ModelServer({}), snapshot.services, snapshot.pool)
        assert (report.dialect, report.snapshot, report.match, report.model) == ("vllm.engine", "smg-0.4.13", "exact", "")


@contextlib.asynccontextmanager
async def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[str]:
    """HOST:PORT of a TCP server, none of whose connections outlives it."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await serve(reader, writer)
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def tcp(answer: bytes | None, *, hang_up: bool = True) -> Any:
    """A TCP server that says one thing; None for never a word."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if answer is not None:
            writer.write(answer)
        if not hang_up:
            await asyncio.Event().wait()

    return listening(serve)


SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
HTTP_1 = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
PYTHON_HTTP = b"<!DOCTYPE HTML>\n<html>"  # what http.server answers to HTTP/2


def failure(answer: bytes | None, timeout_s: float, **options: Any) -> CodecError:
    async def main() -> CodecError:
        async with tcp(answer, **options) as target:
            started = time.monotonic()
            with pytest.raises(CodecError) as caught:
                await ask(target, timeout_s)
            assert time.monotonic() - started < timeout_s + 2
            assert target in str(caught.value)
            assert "\n" not in str(caught.value)
            return caught.value

    return asyncio.run(main())


class TestNothingThere:
    def test_refused(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            target = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UpstreamStatusError, match="connection refused") as caught:
            asyncio.run(ask(target))
        assert caught.value.code is Code.UNAVAILABLE

    def test_silent(self) -> None:
        error = failure(None, 1.0, hang_up=False)
        assert "accepts connections, but says nothing" in str(error)
        assert error.code is Code.DEADLINE_EXCEEDED

    def test_hangs_up(self) -> None:
        assert "closes them without a word" in str(failure(None, LIMIT_S))

    def test_http_1(self) -> None:
        error = failure(HTTP_1, LIMIT_S)
        assert isinstance(error, FramingError)
        assert "speaks HTTP/1" in str(error)

    def test_http_1_that_stays_open(self) -> None:
        assert "speaks HTTP/1" in str(failure(HTTP_1, LIMIT_S, hang_up=False))

    @pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"-ERR\r\n", b"\x00" * 9, SETTINGS[:5]])
    def test_other_protocols(self, answer: bytes) -> None:
        assert "neither in HTTP/2" in str(failure(answer, LIMIT_S))

    def test_http_server_of_python(self) -> None:
        """It answers HTTP/2 in the form of HTTP/0.9, which tells nothing; so it is asked in HTTP/1 as well."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(PYTHON_HTTP if (await reader.read(3)) == b"PRI" else HTTP_1)

        async def main() -> None:
            async with listening(serve) as target:
                with pytest.raises(FramingError, match="speaks HTTP/1"):
                    await ask(target)

        asyncio.run(main())

    @pytest.mark.parametrize("record", [b"\x15\x03\x03\x00\x02\x02\x28", b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03"])
    def test_tls(self, record: bytes) -> None:
        error = failure(record, LIMIT_S)
        assert isinstance(error, FramingError)
        assert "speaks TLS" in str(error)

    def test_tls_by_openssl(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # it has no certificate, but it says so in TLS

        def serve(listener: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        context.wrap_socket(connection, server_side=True)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=serve, args=(listener,))
            thread.start()
            try:
                with pytest.raises(FramingError, match="speaks TLS"):
                    asyncio.run(ask(f"127.0.0.1:{listener.getsockname()[1]}"))
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    def test_http_2_that_answers_no_call(self) -> None:
        error = failure(SETTINGS, 1.5, hang_up=False)
        assert error.code is Code.DEADLINE_EXCEEDED
        assert "speaks HTTP/2, but answered no call" in str(error)

    def test_methods_that_hang(self) -> None:
        """A server that swallows one question still gets the others, and in time."""
        snapshot = load("vllm.engine")

        class Swallows(ModelServer):
            def service(self, details: Any) -> Any:
                if not details.method.endswith(("/GetServerInfo", "ServerReflectionInfo")):
                    return super().service(details)

                async def call(request: bytes, context: Any) -> AsyncIterator[bytes]:
                    await asyncio.Event().wait()
                    yield b""

                return grpc.unary_stream_rpc_method_handler(call)

        async def main() -> ProbeReport:
            async with running(Swallows(schema_server(snapshot).answers)) as target:
                return await ask(target, 2.0)

        started = time.monotonic()
        report = asyncio.run(main())
        assert time.monotonic() - started < 4
        assert (report.dialect, report.match) == ("vllm.engine", "floor")
        assert report.notes == ("no answer in time from GetServerInfo",)

    @pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 70])
    def test_unresolvable(self, host: str) -> None:
        with pytest.raises(UpstreamStatusError, match=r"cannot be resolved|no connection in"):
            asyncio.run(ask(f"{host}:1", 5.0))

    def test_resolver_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        never = threading.Event()
        with monkeypatch.context() as patch:
            patch.setattr(_connection.socket, "getaddrinfo", lambda *_, **__: never.wait(LIMIT_S) and [])
            started = time.monotonic()
            with pytest.raises(UpstreamStatusError, match=r"no connection in 0\.\d+ s"):
                asyncio.run(ask("somewhere:1", 0.3))
            assert time.monotonic() - started < 3
        never.set()

    @pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
    def test_timeouts_of_no_length(self, timeout_s: float) -> None:
        with pytest.raises(UsageError, match="timeout"):
            asyncio.run(ask("127.0.0.1:1", timeout_s))


class TestCommandLine:
    def run(self, *arguments: str) -> Any:
        return cli.main(["probe", *arguments], standalone_mode=False)

    def run_against(self, handler: ModelServer, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[Any, str]:
        async def main() -> Any:
            async with running(handler) as target:
                return await asyncio.to_thread(self.run, f"grpc://{target}", *options)

        return asyncio.run(main()), capsys.readouterr().out

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        handler = schema_server(load("vllm.engine"), GetModelInfo=lambda cls: cls(served_model_name="m\x1b[2J\n"))
        status, shown = self.run_against(handler, capsys)
        assert not status
        rows = dict(line.split(maxsplit=1) for line in shown.splitlines())
        assert rows["dialect"] == "vllm.engine"
        assert rows["snapshot"].endswith("(floor, by methods and fields)")
        assert rows["model"] == r"m\x1b[2J\n", "a server's words must not reach the terminal as commands"
        assert "cannot say" in shown

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, shown = self.run_against(schema_server(load("sglang.api")), capsys, "--format", "json")
        assert not status
        report = json.loads(shown)
        assert (report["dialect"], report["has_adapter"], report["unknown"]) == ("sglang.api", report["cannot_say"] is not None, [])

    @pytest.mark.parametrize("form", ["table", "json"])
    def test_no_model_server(self, capsys: pytest.CaptureFixture[str], form: str) -> None:
        status, shown = self.run_against(ModelServer({}), capsys, "--format", form)
        assert status == 1
        assert "none of the services" in shown

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["https://x:1"], "the scheme is https"),
            (["x"], "not of the form"),
            (["127.0.0.1:1"], "connection refused"),
            (["127.0.0.1:1", "--timeout", "0"], "timeout"),
            (["127.0.0.1:1", "--timeout", "nan"], "timeout"),
        ],
    )
    def test_one_line_and_status_2(self, arguments: list[str], said: str) -> None:
        with pytest.raises(click.ClickException) as caught:  # `main` shows it and exits with 2
            self.run(*arguments)
        assert said in caught.value.format_message()
        assert "\n" not in caught.value.format_message()


class TestServeAuto:
    """`run_serve(dialect="auto")`, up to the point where HTTP would begin."""

    class Ready(Exception):
        pass

    @pytest.fixture(autouse=True)
    def _without_http(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def transcoder(adapter: Adapter, **_: Any) -> Any:
            raise self.Ready(f"{adapter.dialect} {adapter.snapshot.name}")

        monkeypatch.setattr(transcoders, "Transcoder", transcoder)
        monkeypatch.setattr(discovery, "_RETRY_S", 0.01)

    async def serve(self, target: str, **options: Any) -> str:
        options = {"tokenizer": "builtin", "connect_timeout_s": LIMIT_S} | options
        with pytest.raises(self.Ready) as ready:
            await asgi_server.run_serve(upstream=target, dialect="auto", listen="127.0.0.1:0", **options)
        return str(ready.value)

    async def fails(self, target: str, **options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            await asgi_server.run_serve(upstream=target, dialect="auto", listen="127.0.0.1:0", tokenizer="builtin", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_exact(self, caplog: pytest.LogCaptureFixture) -> None:
        snapshot = load("vllm.engine", "smg-0.4.13")

        async def main() -> tuple[str, str]:
            async with running(schema_server(snapshot), snapshot.services, snapshot.pool) as target:
                return await self.serve(target), await self.serve(target, snapshot="smg-0.4.8")

        with caplog.at_level(logging.INFO, "gaie_codec.upstream"):
            assert asyncio.run(main()) == ("vllm.engine smg-0.4.13", "vllm.engine smg-0.4.8")
        first, second = (message.partition(": ")[2] for message in caplog.messages)
        assert first == "dialect vllm.engine, snapshot smg-0.4.13 (exact): the server reflects exactly the schema smg-0.4.13"
        assert second.startswith("dialect vllm.engine; snapshot smg-0.4.8 as given")
        assert caplog.records[0].levelno == logging.INFO

    def test_guess_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> str:
            async with running(schema_server(load("vllm.engine", "smg-0.4.13"), filled)) as target:
                return await self.serve(target)

        assert asyncio.run(main()) == "vllm.engine smg-0.4.13"
        assert [(record.levelno, "(floor)" in record.message) for record in caplog.records] == [(logging.WARNING, True)]

    def test_waits_for_the_server(self) -> None:
        async def main() -> str:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
            waiting = asyncio.Event()

            class Heard(logging.Handler):
                def emit(self, record: logging.LogRecord) -> None:
                    waiting.set()

            log = logging.getLogger("gaie_codec.upstream")
            heard, level = Heard(), log.level
            log.addHandler(heard)
            log.setLevel(logging.INFO)
            server = SimServer("vllm.engine", tokenizer=TOKENIZER)
            try:
                async with asyncio.timeout(LIMIT_S):
                    serving = asyncio.create_task(self.serve(f"127.0.0.1:{port}"))
                    await waiting.wait()
                    await server.start(f"127.0.0.1:{port}")
                    return await serving
            finally:
                await server.stop()
                log.removeHandler(heard)
                log.setLevel(level)

        assert asyncio.run(main()) == f"vllm.engine {SNAPSHOTS['vllm.engine'][-1]}"

    def test_what_is_in_the_way(self) -> None:
        refused = load("sglang.scheduler", "intree-0.5.3")

        async def main() -> None:
            async with running(ModelServer({})) as target:
                assert "no model server that is known" in await self.fails(target)
            async with running(ModelServer({}), refused.services, refused.pool) as target:
                assert "speaks sglang.scheduler: sglang.scheduler intree-0.5.3 is not spoken" in await self.fails(target)
            async with running(schema_server(load("vllm.engine"))) as target:
                assert "no snapshot 'x'" in await self.fails(target, snapshot="x")
            async with tcp(HTTP_1) as target:
                assert "speaks HTTP/1" in await self.fails(target)
            with socket.create_server(("127.0.0.1", 0)) as taken:
                target = f"127.0.0.1:{taken.getsockname()[1]}"
            assert "connection refused" in await self.fails(target, connect_timeout_s=0.05)

        asyncio.run(main())

    def test_no_adapter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def get(snapshot: Snapshot) -> Any:
            raise UsageError(f"no adapter for dialect {snapshot.dialect!r}")

        monkeypatch.setattr(discovery.adapters, "get", get)

        async def main() -> None:
            async with running(schema_server(load("sglang.api"))) as target:
                assert f"upstream {target} speaks sglang.api: no adapter for dialect 'sglang.api'" in await self.fails(target)

        asyncio.run(main())
