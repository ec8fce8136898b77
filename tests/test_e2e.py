"""The whole way: the openai SDK -> `gaie-codec serve`, a process of its own -> gRPC -> a model server.

Two model servers: the simulated one, and one made of the stubs that package smg-grpc-proto publishes, so that our snapshots are held
against bytes that we did not make.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import httpx
import openai
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from gaie_codec import ModelInfo
from gaie_codec.sim import SimServer
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")


class SimThread:
    """A SimServer in an event loop of its own."""

    def __init__(self, **options: Any) -> None:
        self.server = SimServer("vllm.engine", **options)
        self._loop = asyncio.new_event_loop()
        # A daemon, so that a test which fails before `stop` does not keep pytest from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._run(self.server.start("127.0.0.1:0"))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def stop(self) -> None:
        self._run(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def serve(upstream_port: int, *extra: str) -> Iterator[str]:
    """`gaie-codec serve` in front of a port; gives its base URL."""
    command = [sys.executable, "-m", "gaie_codec.cli", "serve", "--upstream", f"grpc://127.0.0.1:{upstream_port}"]
    command += ["--dialect", "vllm.engine", "--listen", "127.0.0.1:0", *extra]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.fullmatch(r"ready http=(\S+)\n", process.stdout.readline())
            if ready is None:
                process.terminate()
                pytest.fail(f"serve did not start: {process.communicate()[1]}")
            yield f"http://{ready[1]}"
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module", params=["smg-0.4.28", "intree-0.14.0"])
def snapshot(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sim(snapshot: str) -> Iterator[SimThread]:
    thread = SimThread(snapshot=snapshot, model=ModelInfo(served_model_name="sim", max_model_len=2048))
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def url(sim: SimThread, snapshot: str) -> Iterator[str]:
    # intree-0.14.0 has no GetTokenizer.
    tokenizer = () if snapshot != "intree-0.14.0" else ("--tokenizer", "builtin")
    with serve(sim.port, "--snapshot", snapshot, *tokenizer) as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with connect(url) as made:
        yield made


def ask(script: dict[str, Any] | None = None, text: str = "Hi") -> list[Any]:
    prompt = text if script is None else f"{text} [[sim {json.dumps(script, ensure_ascii=False)}]]"
    return [{"role": "user", "content": prompt}]


def stream_text(client: openai.OpenAI, **request: Any) -> tuple[str, list[Any]]:
    chunks = list(client.chat.completions.create(model="", stream=True, **request))
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks


class TestThroughSim:
    @pytest.mark.parametrize("counts", ["delta", "cumulative"])
    @pytest.mark.parametrize("text", ["Hello there.", "Emoji 🌍👋🏽 and 你好", ""])
    def test_unary_and_stream_agree(self, client: openai.OpenAI, text: str, counts: str) -> None:
        messages = ask({"text": text, "counts": counts})
        unary = client.chat.completions.create(model="", messages=messages)
        streamed, chunks = stream_text(client, messages=messages, stream_options={"include_usage": True})
        assert unary.choices[0].message.content == streamed == text
        assert unary.choices[0].finish_reason == "stop"
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
        assert chunks[-1].usage == unary.usage
        assert unary.usage is not None
        assert unary.usage.completion_tokens == len(TOKENIZER.encode(text, add_special_tokens=False)) + 1

    def test_n(self, client: openai.OpenAI, snapshot: str) -> None:
        messages = ask({"text": ["first", "the second is longer"]})
        if snapshot == "intree-0.14.0":  # its responses have no index
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model="", messages=messages, n=2)
            assert refused.value.param == "n"
            return
        unary = client.chat.completions.create(model="", messages=messages, n=2)
        assert [choice.message.content for choice in unary.choices] == ["first", "the second is longer"]
        _, chunks = stream_text(client, messages=messages, n=2)
        assert [(c.index, c.delta.role) for chunk in chunks[:2] for c in chunk.choices] == [(0, "assistant"), (1, "assistant")]
        order = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices]
        assert order.index((0, "stop")) < order.index((1, "stop"))
        assert (1, None) in order[order.index((0, "stop")) :], "the early choice is reported as it ends"

    def test_stop_strings(self, client: openai.OpenAI) -> None:
        messages = ask({"text": "one two STOP three"})
        for stop in ("STOP", ["zzz", "two ST"]):
            unary = client.chat.completions.create(model="", messages=messages, stop=stop)
            streamed, _ = stream_text(client, messages=messages, stop=stop)
            assert unary.choices[0].message.content == streamed == ("one two " if stop == "STOP" else "one ")
            assert unary.choices[0].finish_reason == "stop"

    def test_length(self, client: openai.OpenAI) -> None:
        unary = client.chat.completions.create(model="", messages=ask({"text": "many words come here"}), max_completion_tokens=3)
        assert unary.choices[0].finish_reason == "length"
        assert unary.usage is not None
        assert unary.usage.completion_tokens == 3

    @pytest.mark.parametrize(
        ("code", "raised"),
        [
            ("INVALID_ARGUMENT", openai.BadRequestError),
            ("NOT_FOUND", openai.NotFoundError),
            ("PERMISSION_DENIED", openai.PermissionDeniedError),
            ("RESOURCE_EXHAUSTED", openai.RateLimitError),
            ("UNAVAILABLE", openai.InternalServerError),
            ("INTERNAL", openai.InternalServerError),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_error_before_the_first_token(self, client: openai.OpenAI, code: str, raised: Any, stream: bool) -> None:
        messages = ask({"error": {"code": code, "message": "the server says no", "after": 0}})
        with pytest.raises(raised) as caught:
            client.chat.completions.create(model="", messages=messages, stream=stream)
        assert ("the server says no" in str(caught.value)) == (caught.value.status_code < 500)

    def test_error_amid_the_stream(self, url: str) -> None:
        body = {"messages": ask({"text": "one two three", "error": {"code": "INTERNAL", "message": "boom", "after": 2}}), "stream": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 200
        *_, last = answer.text.removesuffix("\n\n").split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 500
        assert "boom" not in answer.text
        assert "[DONE]" not in answer.text

    @pytest.mark.parametrize("script", [{"complete": False}, {"finish": "abort"}, {"finish": "error"}])
    def test_no_proper_finish_is_an_error(self, client: openai.OpenAI, script: dict[str, Any]) -> None:
        messages = ask({"text": "cut", **script})
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="", messages=messages)
        with pytest.raises(openai.APIError):
            stream_text(client, messages=messages)

    def test_killed_client_aborts_the_call(self, url: str, sim: SimThread) -> None:
        for delays in ({"delay_ms": 50}, {"first_delay_ms": 60_000}):
            before = len(sim.server.aborted)
            body = json.dumps({"messages": ask({"text": "word " * 500, **delays}), "stream": True}).encode()
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as connection:
                lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
                connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
                if "delay_ms" in delays:
                    connection.recv(100)
                else:
                    wait_until(lambda: bool(sim.server.running))
            wait_until(lambda before=before: len(sim.server.aborted) > before)
            assert not sim.server.running

    def test_models_and_health(self, client: openai.OpenAI, url: str) -> None:
        assert [model.id for model in client.models.list()] == ["sim"]
        assert httpx.get(f"{url}/health").status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="", prompt="x")

    def test_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=ask())


def wait_until(happened: Any) -> None:
    give_up = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.01)


class PublishedServer(pb_grpc.VllmEngineServicer):
    """What the smg servicer for vLLM sends, message by message, written with the published stubs alone."""

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        return pb.GetModelInfoResponse(
            model_path="/models/published",
            is_generation=True,
            max_context_length=4096,
            vocab_size=TOKENIZER.vocab_size,
            served_model_name="published",
            eos_token_ids=[2],
            default_sampling_params_json='{"temperature": 0.25, "top_k": 20}',
        )

    def HealthCheck(self, request: Any, context: Any) -> Any:
        return pb.HealthCheckResponse(healthy=True, message="Health")

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self.last = request
        prompt = TOKENIZER.detokenizer([]).decode(request.tokenized.input_ids)
        if "large" in prompt:
            yield from self.large(request)
            return
        ids = [*TOKENIZER.encode("published 🌍 answer", add_special_tokens=False), 2]
        usage = {"prompt_tokens": len(request.tokenized.input_ids), "cached_tokens": 1}
        for index in range(request.sampling_params.n):
            if not request.stream:
                yield pb.GenerateResponse(
                    complete=pb.GenerateComplete(output_ids=ids, finish_reason="stop", completion_tokens=len(ids), index=index, **usage)
                )
                continue
            for token_id in ids:
                yield pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=[token_id], completion_tokens=1, index=index, **usage))
            yield pb.GenerateResponse(
                complete=pb.GenerateComplete(output_ids=ids[-1:], finish_reason="stop", completion_tokens=1, index=index, **usage)
            )

    def large(self, request: Any) -> Iterator[Any]:
        """One message of more than gRPC's default limit of 4 MiB."""
        ids = [40] * 30_000
        top = [pb.TopLogProbs(token_ids=list(range(40, 60)), values=[-0.5] * 20)] * len(ids)
        logprobs = pb.OutputLogProbs(token_ids=ids, token_logprobs=[-0.5] * len(ids), top_logprobs=top)
        complete = pb.GenerateComplete(output_ids=ids, finish_reason="length", completion_tokens=len(ids), output_logprobs=logprobs)
        assert complete.ByteSize() > 3 * 1024 * 1024
        yield pb.GenerateResponse(complete=complete)


@pytest.fixture(scope="module")
def published() -> Iterator[tuple[PublishedServer, openai.OpenAI]]:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
    servicer = PublishedServer()
    pb_grpc.add_VllmEngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with serve(port, "--tokenizer", "builtin", "--enable-prompt-tokens-details") as base, connect(base) as client:
            yield servicer, client
    finally:
        server.stop(None).wait()


class TestThroughPublishedStubs:
    def test_request_means_what_was_asked(self, published: tuple[PublishedServer, openai.OpenAI]) -> None:
        servicer, client = published
        client.chat.completions.create(
            model="published", messages=ask(), max_tokens=7, top_p=0.5, logit_bias={"50": -2}, seed=11, stop=["x", "y"], user="me"
        )
        params = servicer.last.sampling_params
        assert (params.temperature, params.top_k) == (0.25, 20), "the model's defaults, where the client was silent"
        assert (params.max_tokens, params.top_p, params.seed, list(params.stop)) == (7, 0.5, 11, ["x", "y"])
        assert dict(params.logit_bias) == {50: -2.0}
        assert (params.n, params.skip_special_tokens, params.spaces_between_special_tokens) == (1, True, True)
        assert not servicer.last.stream

    def test_unary_stream_and_usage(self, published: tuple[PublishedServer, openai.OpenAI]) -> None:
        servicer, client = published
        unary = client.chat.completions.create(model="published", messages=ask(), n=2)
        assert [choice.message.content for choice in unary.choices] == ["published 🌍 answer"] * 2
        streamed, chunks = stream_text(client, messages=ask(), stream_options={"include_usage": True})
        assert streamed == "published 🌍 answer"
        tokens = len(TOKENIZER.encode(streamed, add_special_tokens=False)) + 1
        assert unary.usage is not None
        assert unary.usage.completion_tokens == 2 * tokens
        assert unary.usage.prompt_tokens == len(servicer.last.tokenized.input_ids)
        assert unary.usage.prompt_tokens_details is not None
        assert unary.usage.prompt_tokens_details.cached_tokens == 1
        assert chunks[-1].usage.completion_tokens == tokens

    def test_message_over_4_mib(self, published: tuple[PublishedServer, openai.OpenAI]) -> None:
        _, client = published
        answer = client.chat.completions.create(model="published", messages=ask(text="large"), logprobs=True, top_logprobs=20)
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.content is not None
        assert len(answer.choices[0].logprobs.content) == 30_000
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 20


class BareServer(pb_grpc.VllmEngineServicer):
    """Generate and nothing else."""

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        ids = TOKENIZER.encode("bare", add_special_tokens=False)
        yield pb.GenerateResponse(complete=pb.GenerateComplete(output_ids=ids, finish_reason="stop"))


def test_a_server_that_tells_nothing_of_itself_is_served_with_a_tokenizer_of_ours() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_VllmEngineServicer_to_server(BareServer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with serve(port, "--tokenizer", "builtin") as base, connect(base) as client:
            assert client.chat.completions.create(model="anything", messages=ask()).choices[0].message.content == "bare"
            assert httpx.get(f"{base}/health").status_code == 200
    finally:
        server.stop(None).wait()


def test_serve_says_what_is_wrong() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        command = [sys.executable, "-m", "gaie_codec.cli", "serve", "--dialect", "vllm.engine", "--connect-timeout", "1"]
        done = subprocess.run([*command, "--upstream", f"grpc://127.0.0.1:{port}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"gaie-codec: upstream 127\.0\.0\.1:\d+: .+\n", done.stderr)
    done = subprocess.run([*command, "--upstream", "http://127.0.0.1:1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "only grpc:// is supported" in done.stderr
