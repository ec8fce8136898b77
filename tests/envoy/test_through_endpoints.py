"""Endpoints that do not generate, behind Envoy: prompts to embed, and what the endpoint picker answers itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx
import openai
import pytest
from stack import Stack, make_sim, stack_of
from test_through_grpc import call

from gaie_codec import Transcoder
from gaie_codec.tokenizer_sources import load_tokenizer
from test_e2e import connect

TOKENIZER = load_tokenizer("builtin")


@pytest.fixture(scope="module", params=["vllm.engine", "sglang.scheduler", "sglang.runtime"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack"), "--serve-models", sims=[make_sim(request.param)]) as made:
        yield made


def test_embeddings(stack: Stack) -> None:
    with connect(stack.url) as client:
        answer = client.embeddings.create(model="sim", input="Hello there")
        assert math.hypot(*answer.data[0].embedding) == pytest.approx(1.0)
        assert answer.usage.prompt_tokens == len(TOKENIZER.encode("Hello there", add_special_tokens=True))
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="other", input="a")


def test_one_model_tokens_and_version(stack: Stack) -> None:
    with connect(stack.url) as client:
        assert client.models.retrieve("sim").id == "sim"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
    with httpx.Client(base_url=stack.url) as http:
        answer = http.post("/tokenize", json={"prompt": "Hello there"})
        assert answer.json()["tokens"] == TOKENIZER.encode("Hello there", add_special_tokens=True)
        assert answer.headers["content-type"] == "application/json"
        long = http.post("/tokenize", json={"prompt": "word " * 50_000})
        assert long.json()["count"] > 50_000
        assert http.post("/detokenize", json={"tokens": answer.json()["tokens"]}).json()["prompt"].endswith("Hello there")
        assert http.get("/version").json()["version"]
        assert http.post("/tokenize", json={}).status_code == 400


def test_grpc_that_embeds_passes(stack: Stack) -> None:
    dialect = stack.sims[0].server.adapter.dialect
    made = Transcoder(dialect, tokenizer=TOKENIZER, passthrough=False).request(
        "POST", "/v1/embeddings", (), b'{"input": [5, 6]}', request_id="mine"
    )
    seen = call(stack.envoy.authority, made.path, made.message)
    assert seen.code == "OK"
    (event,) = made.transcoder.adapter.embed.decode_response(
        made.transcoder.adapter.snapshot.method_at(made.path).response.FromString(seen.messages[0])
    )
    assert event.prompt_tokens == 2
