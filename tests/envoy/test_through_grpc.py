"""gRPC clients through Envoy and ext-proc: they see what they would see of the model server itself, and what they use is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import grpc
import pytest
from harness import GrpcThread
from stack import Stack, arguments, envoy_of, ext_proc_of, stack_of, wait_until

from gaie_codec import FinishEvent, InferenceRequest, Observer, SamplingParams, TokensEvent, adapters, encode_frame, snapshots
from gaie_codec.adapters import DIALECTS
from test_e2e import TOKENIZER, encode

# What Envoy says of itself.
ENVOYS = {"server", "date", "x-envoy-upstream-service-time"}
FOREVER = 3_600_000


class Seen(NamedTuple):
    """What a client has seen of a call."""

    initial: list[tuple[str, Any]]
    messages: list[bytes]
    code: str
    details: str
    trailing: list[tuple[str, Any]]


def call(address: str, path: str, *requests: bytes, metadata: Sequence[tuple[str, Any]] = (), timeout_s: float = 20) -> Seen:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        under_way = channel.stream_stream(path)(iter(requests), metadata=metadata, timeout=timeout_s)
        messages = []
        with suppress(grpc.RpcError):
            messages.extend(under_way)
        initial = [pair for pair in under_way.initial_metadata() if pair[0] not in ENVOYS]
        trailing = [pair for pair in under_way.trailing_metadata() if pair[0] not in ENVOYS]
        return Seen(sorted(initial), messages, under_way.code().name, under_way.details() or "", sorted(trailing))


class TestAScriptedServer:
    """Metadata of all kinds, messages large and small."""

    @pytest.fixture(scope="class")
    @classmethod
    def addresses(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
        """Straight to it, and through Envoy."""
        directory = tmp_path_factory.mktemp("scripted")
        with ExitStack() as stack:
            handlers = {
                "Generate": grpc.unary_stream_rpc_method_handler(cls.generate),
                "GetModelInfo": grpc.unary_unary_rpc_method_handler(cls.unary),
                "Chat": grpc.stream_stream_rpc_method_handler(cls.chat),
            }
            server = GrpcThread({"vllm.grpc.engine.VllmEngine": handlers})
            stack.callback(server.stop)
            ext_proc = stack.enter_context(ext_proc_of(directory, *arguments(f"{server.address},dialect=vllm.engine")))
            yield server.address, stack.enter_context(envoy_of(directory, ext_proc.address)).authority

    @staticmethod
    async def generate(request: bytes, context: Any) -> None:
        told = dict(context.invocation_metadata())
        kind = told.get("x-kind", "")
        if kind != "trailers only":
            await context.send_initial_metadata((("x-initial", "1"), ("x-initial", "2"), ("x-initial-bin", b"\0\xff")))
        if kind not in ("trailers only", "no message"):
            for size in (0, 1, 300_000):
                await context.write(request + bytes(range(256)) * (size // 256) + b"\n\x03abc")
        context.set_trailing_metadata((("x-trailing", "1"), ("x-trailing-bin", b"\1\xfe"), ("x-credit", told.get("x-credit", ""))))
        if kind:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "größer als 100 %\n", context.trailing_metadata())

    @staticmethod
    async def unary(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-trailing", "1"),))
        if request == b"no":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
        return b"\x08\x96\x01" + request

    @staticmethod
    async def chat(requests: Any, context: Any) -> None:
        async for request in requests:
            await context.write(request * 2)

    @pytest.mark.parametrize("kind", ["", "trailers only", "no message", "some messages"])
    def test_a_generating_call_is_the_same(self, addresses: tuple[str, str], kind: str):
        path = "/vllm.grpc.engine.VllmEngine/Generate"
        request = encoded("vllm.engine", "r-1")[1]
        direct, through = (call(one, path, request, metadata=[("x-kind", kind), ("x-credit", "7")]) for one in addresses)
        assert direct == through
        assert direct.code == ("RESOURCE_EXHAUSTED" if kind else "OK")
        assert len(direct.messages) == (3 if kind in ("", "some messages") else 0)
        assert ("x-credit", "7") in direct.trailing

    @pytest.mark.parametrize("request_", [b"yes", b"no", b"", b"x" * 3_000_000])
    def test_another_call_is_the_same(self, addresses: tuple[str, str], request_: bytes):
        path = "/vllm.grpc.engine.VllmEngine/GetModelInfo"
        direct, through = (call(one, path, request_) for one in addresses)
        assert direct == through
        assert direct.code == ("FAILED_PRECONDITION" if request_ == b"no" else "OK")

    def test_a_conversation_is_the_same(self, addresses: tuple[str, str]):
        _, through = addresses
        said = []
        with grpc.insecure_channel(through) as channel:

            def ask() -> Iterator[bytes]:
                for number in range(5):
                    wait_until(lambda number=number: len(said) == number)
                    yield b"%d" % number

            for message in channel.stream_stream("/vllm.grpc.engine.VllmEngine/Chat")(ask(), timeout=20):
                said.append(message)
        assert said == [b"00", b"11", b"22", b"33", b"44"]

    def test_a_method_that_nobody_has_is_unimplemented(self, addresses: tuple[str, str]):
        direct, through = (call(one, "/vllm.grpc.engine.VllmEngine/Nope", b"") for one in addresses)
        assert direct.code == through.code == "UNIMPLEMENTED"


def encoded(
    dialect: str, request_id: str, *, script: dict[str, Any] | None = None, stream: bool = True, max_tokens: int = 50
) -> tuple[str, bytes]:
    """Path and message of a call that generates."""
    prompt = "Tell me" if script is None else f"Tell me [[sim {json.dumps(script)}]]"
    adapter = adapters.get(snapshots.load(dialect))
    request = InferenceRequest(
        request_id=request_id,
        prompt_token_ids=encode(prompt),
        stream=stream,
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    return adapter.path_for(request), adapter.encode_request(request).SerializeToString()


def decoded(dialect: str, path: str, messages: list[bytes]) -> tuple[list[int], list[FinishEvent]]:
    """The token ids of an answer as its own dialect tells them, and its ends."""
    observer = Observer(dialect)
    told = observer.adapter.convention
    response = observer.request_message(path, (), encoded(dialect, "r")[1]).response()
    ids: list[int] = []
    ends = []
    events = [*response.receive_headers()]
    for message in messages:
        events += response.receive_data(encode_frame(message))
    for event in events:
        if isinstance(event, TokensEvent):
            ids = [*event.token_ids] if told.is_cumulative else [*ids, *event.token_ids]
        elif isinstance(event, FinishEvent):
            ids = [*event.token_ids] if told.is_cumulative else [*ids, *event.token_ids]
            ends.append(event)
    return ids, ends


@pytest.fixture(scope="module", params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stack(dialect: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack"), dialect=dialect) as made:
        yield made


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_the_same_and_is_counted(stack: Stack, dialect: str, stream: bool):
    path, request = encoded(dialect, f"own-{stream}", script={"text": "one two three", "cached_tokens": 3}, stream=stream)
    direct = call(f"127.0.0.1:{stack.sim.port}", path, request)
    through = call(stack.envoy.authority, path, request, metadata=[("x-request-id", f"header-{stream}")])
    assert direct == through
    assert (direct.code, bool(direct.messages)) == ("OK", True)
    line = stack.ext_proc.request(f"own-{stream}")
    prompt = len(stack.sim.server.requests[-1].prompt_token_ids)
    assert (line.path, line.status, line.error) == (path, "200", "")
    assert (line.mode, line.prompt_tokens, line.completion_tokens) == ("grpc-in-grpc-out", prompt, len(encode("one two three")) + 1)
    assert stack.sim.server.requests[-1].request_id == stack.sim.server.requests[-2].request_id


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_an_error_is_the_same(stack: Stack, dialect: str, code: str, after: int):
    script = {"text": "one two three", "error": {"code": code, "message": "the server says no", "after": after}}
    path, request = encoded(dialect, "e", script=script)
    assert call(f"127.0.0.1:{stack.sim.port}", path, request) == call(stack.envoy.authority, path, request)


def test_all_other_methods_are_the_same(stack: Stack, dialect: str):
    snapshot = snapshots.load(dialect)
    codes = set()
    for service, name in methods(snapshot):
        path = f"/{service}/{name}"
        if is_read(dialect, path) or name in ("GetLoads", "GetServerInfo"):  # these two tell the time
            continue
        if snapshot.method_at(path).server_streaming and name != "GetTokenizer":  # without an end
            continue
        direct, through = (call(one, path, b"") for one in (f"127.0.0.1:{stack.sim.port}", stack.envoy.authority))
        assert direct == through, path
        codes.add(direct.code)
    assert "OK" in codes


def is_read(dialect: str, path: str) -> bool:
    return path in Observer(dialect).paths


def methods(snapshot: Any) -> list[tuple[str, str]]:
    found = []
    for service in snapshot.services:
        described = snapshot.pool.FindServiceByName(service)
        found += [(service, method.name) for method in described.methods]
    return found


def test_a_client_that_cancels_or_whose_deadline_passes_ends_the_call(stack: Stack, dialect: str):
    path, request = encoded(dialect, "c", script={"first_delay_ms": FOREVER})
    before = len(stack.sim.server.aborted)
    assert call(stack.envoy.authority, path, request, timeout_s=0.3).code == "DEADLINE_EXCEEDED"
    wait_until(lambda: len(stack.sim.server.aborted) == before + 1, within_s=5)
    with grpc.insecure_channel(stack.envoy.authority) as channel:
        under_way = channel.unary_stream(path)(request, timeout=20)
        wait_until(lambda: stack.sim.server.running)
        under_way.cancel()
        wait_until(lambda: len(stack.sim.server.aborted) == before + 2, within_s=5)


@pytest.mark.parametrize("body", [b"\xff\xff\xff\xff", b"\x0a\xff"])
def test_a_malformed_request_is_an_invalid_argument(stack: Stack, dialect: str, body: bytes):
    before = len(stack.sim.server.requests)
    path, _ = encoded(dialect, "m")
    seen = call(stack.envoy.authority, path, body)
    assert (seen.code, seen.messages) == ("INVALID_ARGUMENT", [])
    assert seen.details
    assert "{" not in seen.details, "JSON is for HTTP clients"
    assert len(stack.sim.server.requests) == before


@pytest.mark.parametrize("other", range(1, len(DIALECTS)))
@pytest.mark.parametrize("stream", [True, False])
def test_a_call_of_another_dialect_is_bridged(stack: Stack, dialect: str, other: int, stream: bool):
    inbound = DIALECTS[(DIALECTS.index(dialect) + other) % len(DIALECTS)]
    path, request = encoded(inbound, f"{inbound}-{stream}", script={"text": "one two three"}, stream=stream)
    seen = call(stack.envoy.authority, path, request)
    assert (seen.code, seen.details) == ("OK", "")
    ids, ends = decoded(inbound, path, seen.messages)
    assert TOKENIZER.detokenizer(()).decode(ids).startswith("one two three")
    assert [end.finish_reason for end in ends] == ["stop"]
    line = stack.ext_proc.request(f"{inbound}-{stream}")
    assert (line.mode, line.path, line.status) == ("grpc-bridged", path, "200")
    assert line.completion_tokens == len(encode("one two three")) + 1


def test_an_error_is_bridged(stack: Stack, dialect: str):
    inbound = "vllm.engine" if dialect != "vllm.engine" else "sglang.scheduler"
    script = {"text": "one two three", "error": {"code": "UNAVAILABLE", "message": "the server says no", "after": 0}}
    path, request = encoded(inbound, "be", script=script)
    seen = call(stack.envoy.authority, path, request)
    assert (seen.code, seen.messages) in (("UNAVAILABLE", []), ("INTERNAL", []))
