"""The whole way: the openai SDK -> `gaie-codec serve`, a process of its own -> gRPC -> a model server.

Two model servers: the simulated one in every dialect, and one made of the stubs that package smg-grpc-proto publishes, so that our
snapshots are held against bytes that we did not make. What a dialect cannot do is said where it is expected.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import grpc
import httpx
import openai
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from gaie_codec import ModelInfo
from gaie_codec.tokenizer_sources import load_tokenizer
from sim_thread import SimThread

TOKENIZER = load_tokenizer("builtin")


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def serve(upstream_port: int, *extra: str, dialect: str = "vllm.engine") -> Iterator[str]:
    """`gaie-codec serve` in front of a port; gives its base URL."""
    command = [sys.executable, "-m", "gaie_codec.cli", "serve", "--upstream", f"grpc://127.0.0.1:{upstream_port}"]
    command += ["--dialect", dialect, "--listen", "127.0.0.1:0", *extra]
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


class Target(NamedTuple):
    """One server, and how it is spoken to."""

    dialect: str
    snapshot: str
    passes_through: bool = False

    @property
    def fans_out(self) -> bool:
        """Several choices take several calls."""
        # The first has no index in its responses, SGLang 0.5.16 ends with the first choice that ends.
        lacks_n = [("vllm.engine", "intree-0.14.0"), ("sglang.runtime", "0.5.16")]
        return self.dialect in ("vllm.inference", "sglang.api") or (not self.passes_through and self[:2] in lacks_n)

    @property
    def tells_its_model(self) -> bool:
        return self.dialect != "vllm.inference" or self.snapshot >= "0.27"

    def status(self, code: str) -> int:
        """The HTTP status of an error that the engine reports before the first token."""
        if self.dialect == "vllm.inference":
            told = {"INVALID_ARGUMENT": 400, "UNAVAILABLE": 503} if self.snapshot >= "0.33" else {}
            return told.get(code, 500)
        if self.dialect == "sglang.runtime" and not self.passes_through and code == "INVALID_ARGUMENT":
            return 500  # a ValueError comes as INTERNAL with nothing but its text
        return STATUSES[code]


STATUSES = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "INTERNAL": 500,
}
RAISED = {
    400: openai.BadRequestError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}
TARGETS = (
    Target("vllm.engine", "smg-0.4.28"),
    Target("vllm.engine", "intree-0.14.0"),
    Target("vllm.inference", "0.33.0"),
    Target("vllm.inference", "0.30.0"),
    Target("vllm.inference", "0.26.0"),
    Target("vllm.inference", "0.25.1"),
    Target("sglang.scheduler", "smg-0.4.28"),
    Target("sglang.scheduler", "intree-0.5.8"),
    Target("sglang.runtime", "0.5.23", passes_through=True),
    Target("sglang.runtime", "0.5.16", passes_through=True),
    Target("sglang.runtime", "0.5.23"),
    Target("sglang.runtime", "0.5.16"),
    Target("sglang.api", "0.5.23"),
    Target("sglang.api", "0.5.22"),
)


def name_of(target: Target) -> str:
    return f"{target.dialect}-{target.snapshot}" + ("-passthrough" if target.passes_through else "")


@pytest.fixture(scope="module", params=TARGETS, ids=name_of)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(scope="module")
def sim(target: Target) -> Iterator[SimThread]:
    model = ModelInfo(served_model_name="sim", max_model_len=2048)
    thread = SimThread(target.dialect, snapshot=target.snapshot, model=model, tokenizer="builtin")
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def url(sim: SimThread, target: Target) -> Iterator[str]:
    options = ["--snapshot", target.snapshot]
    if sim.server.adapter.tokenizer_path is None and not target.passes_through:
        options += ["--tokenizer", "builtin"]
    if target.dialect == "sglang.runtime" and not target.passes_through:
        options.append("--no-passthrough")
    with serve(sim.port, *options, dialect=target.dialect) as base:
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
        assert unary.usage.completion_tokens == len(encode(text)) + 1

    def test_n(self, client: openai.OpenAI, target: Target) -> None:
        messages = ask({"text": ["first", "the second is longer"]})
        # Calls of their own are each the first choice of their call.
        texts = ["first", "first"] if target.fans_out else ["first", "the second is longer"]
        unary = client.chat.completions.create(model="", messages=messages, n=2)
        assert [(choice.index, choice.message.content) for choice in unary.choices] == list(enumerate(texts))
        assert unary.usage is not None
        assert unary.usage.completion_tokens == sum(len(encode(text)) + 1 for text in texts)
        _, chunks = stream_text(client, messages=messages, n=2, stream_options={"include_usage": True})
        for index, text in enumerate(texts):
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in mine) == text
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
            assert mine[0].delta.role == "assistant"
        assert chunks[-1].usage == unary.usage
        if target.fans_out or target.passes_through:
            return  # the one order is the network's, the other SGLang's, which tells all ends together
        order = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices]
        assert order.index((0, "stop")) < order.index((1, "stop"))
        assert (1, None) in order[order.index((0, "stop")) :], "the early choice is reported as it ends"

    @pytest.mark.parametrize("holds", [True, False])
    @pytest.mark.parametrize("step", [1, 4])
    def test_stop_strings(self, client: openai.OpenAI, target: Target, step: int, holds: bool) -> None:
        if target.passes_through and not holds:
            pytest.skip("text that a server sent as JSON is not cut again")
        messages = ask({"text": "one two STOP three", "step": step, "holds_stops": holds})
        for stop, kept in (("STOP", "one two "), (["zzz", "two ST"], "one "), ("never", "one two STOP three")):
            unary = client.chat.completions.create(model="", messages=messages, stop=stop)
            streamed, chunks = stream_text(client, messages=messages, stop=stop, stream_options={"include_usage": True})
            assert unary.choices[0].message.content == streamed == kept
            assert unary.choices[0].finish_reason == "stop"
            assert chunks[-1].usage == unary.usage
            so_far = ""
            for chunk in chunks:
                so_far += "".join(choice.delta.content or "" for choice in chunk.choices)
                assert kept.startswith(so_far), "a part of the stop string went out"

    def test_a_long_answer_without_a_limit(self, client: openai.OpenAI) -> None:
        # More than SGLang's own default of 128.
        unary = client.chat.completions.create(model="", messages=ask({"text": "word " * 300, "step": 7}), stop=["no such"])
        assert unary.choices[0].message.content == "word " * 300
        assert unary.choices[0].finish_reason == "stop"

    def test_log_probabilities(self, client: openai.OpenAI, target: Target) -> None:
        request: dict[str, Any] = {"messages": ask({"tokens": [[40], [41, 42], [2]]}), "logprobs": True, "top_logprobs": 2}
        if target.snapshot == "intree-0.14.0":
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model="", **request)
            assert refused.value.param == "logprobs"
            return
        unary = client.chat.completions.create(model="", **request).choices[0].logprobs
        chunks = client.chat.completions.create(model="", stream=True, **request)
        streamed = [entry for chunk in chunks for one in chunk.choices if one.logprobs for entry in one.logprobs.content or ()]
        assert unary is not None
        assert unary.content == streamed
        assert [entry.logprob for entry in streamed[:3]] == [-0.5, -0.5625, -0.625]
        assert [len(entry.top_logprobs) for entry in streamed[:3]] == [2, 2, 2]
        assert len(streamed) == 4, "the end token has one too"

    def test_an_echo_with_log_probabilities(self, client: openai.OpenAI, target: Target) -> None:
        prompt = 'x [[sim {"tokens": [[40], [41, 42], [2]]}]]'
        request: dict[str, Any] = {"prompt": prompt, "logprobs": 2, "echo": True}
        if target.snapshot == "intree-0.14.0" or target.passes_through:
            return  # refused by name; or SGLang's own
        unary = client.completions.create(model="", **request).choices[0]
        chunks = list(client.completions.create(model="", stream=True, **request))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == unary.text
        assert unary.text.startswith(prompt)
        streamed = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
        assert unary.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [item for one in streamed for item in getattr(one, name) or ()] == getattr(unary.logprobs, name)
        assert "".join(unary.logprobs.tokens or ()).startswith(prompt)
        known = unary.logprobs.token_logprobs or []
        assert known[0] is None
        assert None not in known[1:]
        assert known[-4:-1] == [-0.5, -0.5625, -0.625]
        asked = client.completions.create(model="", prompt=prompt, extra_body={"prompt_logprobs": 2}).choices[0]
        shown = (asked.model_extra or {})["prompt_logprobs"]
        assert len(shown) == len(known) - 4
        assert {len(place) for place in shown[1:]} == {2}

    def test_length(self, client: openai.OpenAI) -> None:
        unary = client.chat.completions.create(model="", messages=ask({"text": "many words come here"}), max_completion_tokens=3)
        assert unary.choices[0].finish_reason == "length"
        assert unary.usage is not None
        assert unary.usage.completion_tokens == 3

    @pytest.mark.parametrize("code", STATUSES)
    @pytest.mark.parametrize("stream", [False, True])
    def test_error_before_the_first_token(self, client: openai.OpenAI, target: Target, code: str, stream: bool) -> None:
        messages = ask({"error": {"code": code, "message": "the server says no", "after": 0}})
        status = target.status(code)
        with pytest.raises(RAISED[status]) as caught:
            client.chat.completions.create(model="", messages=messages, stream=stream)
        assert caught.value.status_code == status
        assert ("the server says no" in str(caught.value)) == (status < 500)

    def test_a_raw_answer_names_what_had_no_effect(self, client: openai.OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(model="", messages=ask({"text": "x"}), extra_body={"frobnicate": 1})
        assert raw.headers["x-gaie-codec-dropped"] == "frobnicate"
        assert raw.parse().choices[0].message.content == "x"

    @pytest.mark.parametrize(
        ("fields", "param", "kind", "words"),
        [
            ({"temperature": 3}, "temperature", "BadRequestError", "temperature must be in [0, 2], got 3.0."),
            ({"temperature": "hot"}, "body.temperature", "Bad Request", "1 validation error"),
            ({"n": 0}, None, "BadRequestError", "n must be at least 1, got 0."),
        ],
    )
    def test_what_is_wrong_with_a_request(
        self, client: openai.OpenAI, fields: dict[str, Any], param: str | None, kind: str, words: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.with_raw_response.create(model="", messages=ask({"text": "x"}), extra_body=fields)
        error = caught.value
        assert (error.status_code, error.param, error.type) == (400, param, kind)
        assert isinstance(error.body, dict)
        assert error.body["code"] == 400
        assert error.body["message"].startswith(words)

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

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("delays", [{"delay_ms": 50}, {"first_delay_ms": 60_000}])
    def test_killed_client_aborts_the_call(self, url: str, sim: SimThread, target: Target, delays: dict[str, int], n: int) -> None:
        before = count_aborted(sim)
        calls = n if target.fans_out else 1
        body = json.dumps({"messages": ask({"text": "word " * 500, **delays}), "stream": True, "n": n}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            if "delay_ms" in delays:
                connection.recv(100)
            wait_until(lambda: len(sim.server.running) == calls)
        wait_until(lambda: len(sim.server.aborted) == before + calls)
        assert not sim.server.running

    def test_models_and_health(self, client: openai.OpenAI, url: str, sim: SimThread, target: Target) -> None:
        assert [model.id for model in client.models.list()] == (["sim"] if target.tells_its_model else [])
        before = len(sim.server.requests)
        assert httpx.get(f"{url}/health").status_code == 200
        assert len(sim.server.requests) == before, "a health check that generates a token"
        if target.passes_through:  # what is passed through is no response, and there is no tokenizer
            with pytest.raises(openai.NotFoundError):
                client.responses.create(model="", input="x")

    def test_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=ask())

    def test_completions_of_several_prompts(self, client: openai.OpenAI, target: Target) -> None:
        prompts = [f"{name} [[sim {json.dumps({'text': [f'{name}0', f'{name}1 and on']})}]]" for name in ("a", "b")]
        texts = ["a0", "a0", "b0", "b0"] if target.fans_out else ["a0", "a1 and on", "b0", "b1 and on"]
        unary = client.completions.create(model="", prompt=prompts, n=2, max_tokens=50)
        assert [(choice.index, choice.text) for choice in unary.choices] == list(enumerate(texts))
        assert unary.usage is not None
        assert unary.usage.prompt_tokens == sum(len(encode(prompt)) for prompt in prompts), "each prompt counts once"
        assert unary.usage.completion_tokens == sum(len(encode(text)) + 1 for text in texts)
        chunks = list(
            client.completions.create(model="", prompt=prompts, n=2, max_tokens=50, stream=True, stream_options={"include_usage": True})
        )
        for index, text in enumerate(texts):
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.text for choice in mine) == text
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
        assert chunks[-1].usage == unary.usage

    def test_completions_default_to_16_tokens(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="", prompt=f"x [[sim {json.dumps({'text': 'word ' * 50})}]]")
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string_that_the_server_does_not_know(self, client: openai.OpenAI, sim: SimThread, target: Target, stream: bool) -> None:
        if target.dialect != "sglang.scheduler" and target.snapshot != "0.25.1":
            pytest.skip("this server is told the stop strings, and ends there")
        before = count_aborted(sim)
        request = {"messages": ask({"text": "one two STOP" + " more" * 500, "delay_ms": 20}), "stop": "STOP"}
        if stream:
            text, _ = stream_text(client, **request)
            assert text == "one two "
            wait_until(lambda: len(sim.server.aborted) == before + 1)
        else:  # a unary answer comes whole, and is cut
            request["messages"] = ask({"text": "one two STOP and more"})
            assert client.chat.completions.create(model="", **request).choices[0].message.content == "one two "

    def test_embeddings_and_scores(self, client: openai.OpenAI, url: str, target: Target) -> None:
        if target.dialect in ("vllm.inference", "sglang.api"):
            with pytest.raises(openai.NotFoundError):
                client.embeddings.create(model="", input="x")
            return
        answer = client.embeddings.create(model="sim", input=["one", "two words"])
        assert [len(one.embedding) for one in answer.data] == [8, 8]
        assert answer.usage.prompt_tokens == len(encode("one")) + len(encode("two words"))
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="sim", input=[])
        if not target.passes_through:
            return  # test_e2e_endpoints.py
        body = {"query": "q", "documents": ["one", "two"]}
        ranked = httpx.post(f"{url}/v1/rerank", json=body)
        if target.snapshot == "0.5.16":
            assert ranked.status_code == 500, "its gRPC bridge cannot encode the list"
        else:
            assert sorted(one["index"] for one in ranked.json()) == [0, 1]
        scored = httpx.post(f"{url}/v1/score", json={"query": "q", "items": ["one", "two"], "label_token_ids": [7, 8]})
        assert [len(row) for row in scored.json()["scores"]] == [2, 2]
        assert httpx.post(f"{url}/v1/classify", json={"model": "sim", "input": "x"}).json()["data"][0]["num_classes"] == 2


def count_aborted(sim: SimThread) -> int:
    """How many calls were given up, when none is under way any more: the one before may just be ending."""
    wait_until(lambda: not sim.server.running)
    return len(sim.server.aborted)


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


@pytest.mark.parametrize("dialect", ["vllm.engine", "sglang.scheduler"])
def test_sglangs_flavor(dialect: str) -> None:
    thread = SimThread(dialect)
    try:
        with serve(thread.port, "--flavor", "sglang", dialect=dialect) as base, connect(base) as client:
            body = client.chat.completions.create(model="whatever", messages=ask(), max_tokens=50)
            streamed, chunks = stream_text(client, messages=ask(), max_tokens=50, stream_options={"include_usage": True})
            assert streamed == body.choices[0].message.content
            assert chunks[-1].usage.reasoning_tokens == 0  # the SDK keeps what it does not know
            assert chunks[-2].choices[0].model_extra == {"matched_stop": body.choices[0].matched_stop}
            with client.chat.completions.stream(model="", messages=ask(), max_tokens=50) as stream:
                assert stream.get_final_completion().choices[0].message.content == streamed
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="", messages=ask(), temperature=-1)
            assert caught.value.body["object"] == "error"
    finally:
        thread.stop()


@pytest.mark.parametrize("asked", ["vllm.engine", "vllm.inference", "sglang.api"])
def test_a_dialect_that_the_server_does_not_speak(asked: str) -> None:
    thread = SimThread("sglang.runtime")
    command = [sys.executable, "-m", "gaie_codec.cli", "serve", "--upstream", f"127.0.0.1:{thread.port}", "--dialect", asked]
    try:
        for tokenizer in ("builtin", "server"):
            done = subprocess.run([*command, "--tokenizer", tokenizer], capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.endswith(f"no {asked} model server: it speaks sglang.runtime; dialect auto sees that\n")
    finally:
        thread.stop()


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
