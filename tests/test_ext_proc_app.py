"""`gaie-codec ext-proc` and examples/epp.py as processes, and the server around the processor, asked over ext_proc itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from ext_proc_stream import CHAT, FULL_DUPLEX, GRPC_HEAD, SERVER, answer_frames, body_message, chat, gateway, headers_message
from gaie_codec import UsageError
from gaie_codec.ext_proc.messages import PROCESS_PATH, ProcessingRequest, ProcessingResponse
from gaie_codec.ext_proc.processor import Processor
from gaie_codec.ext_proc.server import ExtProcServer, Hooks
from gaie_codec.sim import Script
from sim_thread import SimThread

ROOT = Path(__file__).parent.parent
HEAD = [(":method", "POST"), (":path", CHAT), ("content-type", "application/json"), ("x-request-id", "r1")]
DESTINATION = "x-gateway-destination-endpoint"


class Process:
    """A program that says `ready ext_proc=HOST:PORT`."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready = re.fullmatch(r"ready ext_proc=(\S+)(?: metrics=(\S+))?\n", self.process.stdout.readline())
        if ready is None:
            pytest.fail(f"no start: {self.process.communicate()[1]}")
        self.address, self.metrics = ready[1], ready[2]

    def stop(self, number: int = signal.SIGTERM) -> str:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        assert "Traceback" not in errors
        return errors


@contextlib.contextmanager
def ext_proc(*arguments: str) -> Iterator[Process]:
    process = Process("-m", "gaie_codec.cli", "ext-proc", "--listen", "127.0.0.1:0", *arguments)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()


@pytest.fixture(scope="module")
def sims() -> Iterator[list[SimThread]]:
    started = [SimThread("vllm.engine"), SimThread("vllm.engine")]
    yield started
    for sim in started:
        sim.stop()


def first_message() -> Any:
    message = headers_message("request_headers", HEAD)
    message.protocol_config.request_body_mode = message.protocol_config.response_body_mode = FULL_DUPLEX
    return message


async def ask(address: str, *messages: Any, expect: int = 2, credentials: Any = None) -> list[Any]:
    """Send messages, and give the first answers."""
    make = grpc.aio.insecure_channel(address) if credentials is None else grpc.aio.secure_channel(address, *credentials)
    async with make as channel:
        method = channel.stream_stream(
            PROCESS_PATH, request_serializer=ProcessingRequest.SerializeToString, response_deserializer=ProcessingResponse.FromString
        )
        call = method(timeout=20)
        for message in messages:
            await call.write(message)
        answers = [await call.read() for _ in range(expect)]
        call.cancel()
        return answers


def picked(address: str, body: bytes = b"") -> str:
    head, _ = asyncio.run(ask(address, first_message(), body_message("request_body", body or chat(), end=True)))
    options = head.request_headers.response.header_mutation.set_headers
    return next(option.header.raw_value.decode() for option in options if option.header.key == DESTINATION)


# The command


def test_the_command_picks_and_transcodes(sims: list[SimThread]):
    ports = [str(sim.port) for sim in sims]
    with ext_proc(
        "--endpoint", f"localhost:{ports[0]},dialect=vllm.engine", "--endpoint", f"127.0.0.1:{ports[1]}", "--picker", "round-robin"
    ) as process:
        assert {picked(process.address) for _ in range(4)} == {f"127.0.0.1:{port}" for port in ports}


def test_an_endpoint_that_is_down_does_not_keep_the_command_from_starting_and_comes_in_later():
    sim = SimThread("vllm.engine")
    sim.stop()
    with ext_proc("--endpoint", f"127.0.0.1:{sim.port}", "--check-interval", "0.2") as process:
        (refused,) = asyncio.run(ask(process.address, first_message(), body_message("request_body", chat(), end=True), expect=1))
        assert refused.immediate_response.status.code == 503
        sim._loop = asyncio.new_event_loop()
        sim._thread = threading.Thread(target=sim._loop.run_forever, daemon=True)
        sim._thread.start()
        sim._run(sim.server.start(f"127.0.0.1:{sim.port}"))
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            (answer,) = asyncio.run(ask(process.address, first_message(), body_message("request_body", chat(), end=True), expect=1))
            if not answer.HasField("immediate_response"):
                break
        assert answer.HasField("request_headers")
    sim.stop()


def test_behind_another_picker_a_dialect_is_enough():
    with ext_proc("--picker", "none", "--dialect", "sglang.scheduler", "--tokenizer", "builtin") as process:
        message = first_message()
        message.request_headers.headers.headers.add(key=DESTINATION, raw_value=b"10.1.2.3:50051")
        head, _ = asyncio.run(ask(process.address, message, body_message("request_body", chat(max_tokens=4), end=True)))
    assert not head.HasField("dynamic_metadata")
    assert b"/sglang.grpc.scheduler.SglangScheduler/Generate" in [
        option.header.raw_value for option in head.request_headers.response.header_mutation.set_headers
    ]


def test_behind_another_picker_the_first_request_waits_until_the_server_is_known(sims: list[SimThread]):
    with ext_proc("--picker", "none", "--dialect", "auto") as process:
        message = first_message()
        message.request_headers.headers.headers.add(key=DESTINATION, raw_value=f"127.0.0.1:{sims[0].port}".encode())
        head, _ = asyncio.run(ask(process.address, message, body_message("request_body", chat(), end=True)))
        assert head.HasField("request_headers")


def test_the_pool_decides_and_is_read_again_when_it_changes(sims: list[SimThread], tmp_path: Path):
    manifest = (ROOT / "deploy/inferencepool-vllm-grpc.yaml").read_text()
    pool = tmp_path / "pool.yaml"
    pool.write_text(manifest)

    def path(process: Process) -> bytes:
        head, _ = asyncio.run(ask(process.address, first_message(), body_message("request_body", chat(), end=True)))
        return next((o.header.raw_value for o in head.request_headers.response.header_mutation.set_headers if o.header.key == ":path"), b"")

    with ext_proc("--endpoint", f"127.0.0.1:{sims[0].port}", "--pool", str(pool), "--log-level", "info") as process:
        assert path(process) == b"/vllm.grpc.engine.VllmEngine/Generate"
        pool.write_text(manifest.replace("kubernetes.io/h2c", "http"))
        give_up = time.monotonic() + 20
        while path(process) and time.monotonic() < give_up:
            time.sleep(0.1)
        assert path(process) == b""
        assert "appProtocol is http" in process.stop()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no endpoint is given"),
        (("--endpoint", "nonsense"), "nonsense"),
        (("--endpoint", "127.0.0.1:1,dialect=other"), "no dialect 'other'"),
        (("--endpoint", "127.0.0.1:1", "--listen", "127.0.0.1:99999"), "listen 127.0.0.1:99999"),
        (("--endpoint", "127.0.0.1:1", "--dialect", "vllm.engine"), "--dialect is for --picker none"),
        (("--endpoint", "127.0.0.1:1", "--tokenizer", "/nowhere"), "/nowhere"),
        (("--endpoint", "127.0.0.1:1", "--pool", "/nowhere.yaml"), "/nowhere.yaml"),
        (("--endpoint", "127.0.0.1:1", "--endpoints", "/nowhere.txt"), "/nowhere.txt"),
        (("--endpoint", "127.0.0.1:1", "--transcode", "maybe"), "--transcode"),
        (("--endpoint", "127.0.0.1:1,dialect=http", "--transcode", "on"), "nothing to transcode to"),
        (("--endpoint", "127.0.0.1:1", "--metrics-listen", "x"), "metrics-listen"),
        (("--endpoint", "127.0.0.1:1", "--tls-key", __file__), "go together"),
        (("--endpoint", "127.0.0.1:1", "--tls-key", __file__, "--tls-cert", __file__), "certificate"),
        (("--endpoint", "127.0.0.1:1", "--picker", "best"), "'best'"),
        (("--endpoint", "127.0.0.1:1", "--chat-template", "TEMPLATE"), "the chat template does not compile"),
        (("--endpoint", "127.0.0.1:1", "--request-timeout", "nan"), "no number of seconds"),
        (("--endpoint", "127.0.0.1:1", "--check-interval", "1e30"), "--check-interval"),
        (("--endpoint", "127.0.0.1:1", "--snapshot", "smg-0.4.28"), "--snapshot is for --picker none"),
        (("--picker", "none", "--dialect", "vllm.engine", "--fallbacks", "1"), "--fallbacks is for a picker"),
        (("--endpoint", "127.0.0.1:1", "--forward-header", ":path"), "forward header ':path'"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments: tuple[str, ...], said: str, tmp_path: Path):
    (tmp_path / "template.jinja").write_text("{{ x")
    arguments = tuple(str(tmp_path / "template.jinja") if one == "TEMPLATE" else one for one in arguments)
    command = [sys.executable, "-m", "gaie_codec.cli", "ext-proc", "--listen", "127.0.0.1:0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("gaie-codec: ")]) == 1
    assert not done.stdout


def test_metrics_and_the_loads_of_model_servers_can_be_scraped():
    sim = SimThread("vllm.engine", script=Script(waiting=7))
    options = ("--endpoint", f"127.0.0.1:{sim.port}", "--metrics-listen", "127.0.0.1:0", "--loads-interval", "0.1")
    with ext_proc(*options) as process:
        picked(process.address)
        give_up = time.monotonic() + 20
        told: dict[str, Any] = {}
        while not ("vllm:num_requests_waiting" in told and told["gaie_codec_requests"]) and time.monotonic() < give_up:
            with urllib.request.urlopen(f"http://{process.metrics}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            told = {family.name: family.samples for family in text_string_to_metric_families(text)}
    (waiting,) = told["vllm:num_requests_waiting"]
    assert (waiting.value, waiting.labels["endpoint"]) == (7, f"127.0.0.1:{sim.port}")
    assert [(sample.value, sample.labels["endpoint"]) for sample in told["gaie_codec_endpoint_ready"]] == [(1, f"127.0.0.1:{sim.port}")]
    assert sum(sample.value for sample in told["gaie_codec_requests"] if sample.labels.get("mode") == "http-in-grpc-out") == 1
    sim.stop()


def test_the_example_keeps_servers_for_long_prompts(sims: list[SimThread]):
    short, long = (f"127.0.0.1:{sim.port}" for sim in sims)
    process = Process(str(ROOT / "examples/epp.py"), "127.0.0.1:0", "--short", short, "--long", long)
    try:
        assert picked(process.address) == short
        assert picked(process.address, chat(messages=[{"role": "user", "content": "word " * 600}])) == long
    finally:
        process.stop()
    assert len((ROOT / "examples/epp.py").read_text().splitlines()) < 60


# The server


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[ExtProcServer, str]]:
    server = ExtProcServer(options.pop("gateway", gateway(SERVER)), **options)
    port = await server.start("127.0.0.1:0")
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def stream_to(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.stream_stream(
            PROCESS_PATH, request_serializer=ProcessingRequest.SerializeToString, response_deserializer=ProcessingResponse.FromString
        )
        yield method(timeout=20)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_request_that_does_not_come_is_408():
    async def test() -> None:
        async with serving(body_timeout_s=0.1) as (_, address), stream_to(address) as call:
            await call.write(first_message())
            assert (await call.read()).immediate_response.status.code == 408
            assert await call.read() is grpc.aio.EOF

    run(test)


def test_an_answer_that_does_not_come_is_504_and_one_that_stops_coming_ends_with_the_error():
    async def test() -> None:
        async with serving(request_timeout_s=0.3) as (_, address):
            async with stream_to(address) as call:
                await call.write(first_message())
                await call.write(body_message("request_body", chat(), end=True))
                await call.read()
                await call.read()
                assert (await call.read()).immediate_response.status.code == 504
            async with stream_to(address) as call:
                await call.write(first_message())
                await call.write(body_message("request_body", chat(stream=True), end=True))
                await call.write(headers_message("response_headers", GRPC_HEAD))
                await call.write(body_message("response_body", answer_frames("Hi")[0]))
                kinds, said = [], b""
                while (answer := await call.read()) is not grpc.aio.EOF:
                    kinds.append(answer.WhichOneof("response"))
                    said += answer.response_body.response.body_mutation.streamed_response.body
                assert kinds[:3] == ["request_headers", "request_body", "response_headers"]
                assert b'"code":504' in said
                assert b"[DONE]" not in said

    run(test)


class SlowPeer:
    """A stream's context whose peer takes nothing until it is `open`."""

    def __init__(self, *messages: Any) -> None:
        self.open = asyncio.Event()
        self.taken: list[Any] = []
        self.aborted: Any = None
        self._messages = list(messages)

    async def read(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def write(self, answer: Any) -> None:
        await self.open.wait()
        self.taken.append(answer)

    async def abort(self, code: Any, _: str) -> None:
        self.aborted = code


def test_a_deadline_in_a_write_that_nobody_takes_loses_nothing():
    async def test() -> None:
        head = headers_message("request_headers", [(":method", "POST"), (":path", "/a.B/C"), ("content-type", "application/grpc")])
        peer = SlowPeer(head, body_message("request_body", b"x" * 100))
        serving = asyncio.create_task(ExtProcServer(gateway(SERVER), request_timeout_s=0.05)._process(None, peer))
        await asyncio.sleep(0.2)
        assert not serving.done()
        peer.open.set()
        await serving
        kinds = [answer.WhichOneof("response") for answer in peer.taken]
        assert kinds == ["request_headers", "immediate_response"]
        assert peer.taken[-1].immediate_response.grpc_status.status == 4

    run(test)


def test_a_peer_that_never_takes_the_last_word_does_not_keep_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gaie_codec.ext_proc.server._LAST_WRITE_S", 0.05)

    async def test() -> None:
        peer = SlowPeer(first_message(), body_message("request_body", chat(), end=True))
        await asyncio.create_task(ExtProcServer(gateway(SERVER), request_timeout_s=0.05)._process(None, peer))
        assert peer.aborted == grpc.StatusCode.DEADLINE_EXCEEDED, "grpcio takes no cancellation for an end"

    run(test)


def test_a_request_that_takes_too_long_to_decode_is_504_at_once(monkeypatch: pytest.MonkeyPatch):
    release = threading.Event()
    prepare = Processor.prepare

    def slow(processor: Processor) -> Any:
        release.wait(20)
        return prepare(processor)

    monkeypatch.setattr(Processor, "prepare", slow)

    async def test() -> None:
        async with serving(request_timeout_s=0.1) as (_, address), stream_to(address) as call:
            await call.write(first_message())
            await call.write(body_message("request_body", chat(messages=[{"role": "user", "content": "x" * 50_000}]), end=True))
            assert (await call.read()).immediate_response.status.code == 504
            release.set()

    run(test)


def test_what_is_no_ext_proc_is_refused_in_one_line(caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        async with serving() as (_, address), grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream(PROCESS_PATH)(timeout=10)
            await call.write(b"\xff\xff")
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(test)
    said = [record.message for record in caplog.records if record.name.startswith("gaie_codec")]
    assert said == ["a stream of what is no ProcessingRequest"]


def test_a_picker_with_a_bug_is_500_and_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture):
    def picker(*_: Any) -> Any:
        raise ZeroDivisionError

    async def test() -> None:
        async with serving(gateway=gateway(SERVER, picker=picker)) as (_, address), stream_to(address) as call:
            await call.write(first_message())
            await call.write(body_message("request_body", chat(), end=True))
            answer = (await call.read()).immediate_response
            assert answer.status.code == 500
            assert json.loads(answer.body)["error"]["message"] == "Internal server error"

    run(test)
    assert "ZeroDivisionError" in caplog.text


def test_who_embeds_it_learns_of_each_stream():
    seen: list[Any] = []

    class Notes:
        def __init__(self, processor: Processor) -> None:
            self.processor = processor
            seen.append(("opened", processor.path, processor.plan))

        def routed(self) -> None:
            seen.append(("routed", self.processor.server.address))

        def closed(self, ttft_s: float | None, duration_s: float) -> None:
            seen.append(("closed", self.processor.usage.completion_tokens, ttft_s is not None and 0 < ttft_s <= duration_s))

    class Watching(Hooks):
        opened = staticmethod(Notes)

    async def test() -> None:
        async with serving(hooks=Watching()) as (_, address), stream_to(address) as call:
            await call.write(first_message())
            await call.write(body_message("request_body", chat(), end=True))
            await call.write(headers_message("response_headers", GRPC_HEAD))
            for piece in answer_frames("Hi"):
                await call.write(body_message("response_body", piece))
            await call.write(headers_message("response_trailers", [("grpc-status", "0")]))
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass

    run(test)
    assert seen == [("opened", CHAT, None), ("routed", SERVER.address), ("closed", 2, True)]


def test_a_drained_server_lets_streams_end():
    async def test() -> None:
        async with serving() as (server, address), stream_to(address) as call:
            await call.write(first_message())
            await call.write(body_message("request_body", chat(), end=True))
            await call.read()
            stopping = asyncio.create_task(server.stop(10))
            await asyncio.sleep(0.1)
            await call.write(headers_message("response_headers", GRPC_HEAD))
            for piece in answer_frames("Hi"):
                await call.write(body_message("response_body", piece))
            await call.write(headers_message("response_trailers", [("grpc-status", "0")]))
            await call.done_writing()
            kinds = []
            while (answer := await call.read()) is not grpc.aio.EOF:
                kinds.append(answer.WhichOneof("response"))
            assert kinds[-1] == "response_trailers"
            await stopping

    run(test)


def test_signals_turn_readiness_off_and_streams_end(sims: list[SimThread]):
    process = Process(
        "-m", "gaie_codec.cli", "ext-proc", "--listen", "127.0.0.1:0", "--endpoint", f"127.0.0.1:{sims[0].port}", "--drain-delay", "20"
    )

    async def test() -> None:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def status(service: str) -> int:
                return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

            assert await status("readiness") == health_pb2.HealthCheckResponse.SERVING
            process.process.send_signal(signal.SIGTERM)
            while await status("readiness") != health_pb2.HealthCheckResponse.NOT_SERVING:
                await asyncio.sleep(0.05)
            assert await status("liveness") == health_pb2.HealthCheckResponse.SERVING
        head, _ = await ask(process.address, first_message(), body_message("request_body", chat(), end=True))
        assert head.HasField("request_headers"), "streams are still accepted"

    run(test)
    process.stop(signal.SIGINT)  # a second signal ends the delay


def test_a_port_that_is_taken_is_said():
    async def test() -> None:
        async with serving() as (_, address):
            with pytest.raises(UsageError, match=address):
                await ExtProcServer(gateway(SERVER)).start(address)

    run(test)
