"""Endpoints that do not generate, the whole way: the openai SDK and plain HTTP -> `gaie-codec serve` -> a simulated server."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from gaie_codec import ModelInfo
from gaie_codec.tokenizer_sources import load_tokenizer
from sim_thread import SimThread
from test_e2e import connect, serve

TOKENIZER = load_tokenizer("builtin")
MODEL = ModelInfo(served_model_name="sim", max_model_len=2048, lora_adapters={"tuned": "tuned"})


class Served(NamedTuple):
    sim: SimThread
    url: str
    client: openai.OpenAI
    passes: bool
    """OpenAI JSON through: what is not refused here is SGLang's, and the simulated one embeds whatever comes."""


TARGETS = [
    ("vllm.engine", "smg-0.4.28", False),
    ("vllm.engine", "intree-0.14.0", False),
    ("sglang.scheduler", "smg-0.4.28", False),
    ("sglang.scheduler", "smg-0.3.2", False),
    ("sglang.runtime", "0.5.23", False),
    ("sglang.runtime", "0.5.23", True),
]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: "-".join(map(str, target)))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    dialect, snapshot, passes = request.param
    sim = SimThread(dialect, snapshot=snapshot, model=MODEL, tokenizer="builtin")
    options = ["--snapshot", snapshot, "--tokenizer", "builtin"]
    options += ["--no-passthrough"] if dialect == "sglang.runtime" and not passes else []
    try:
        with serve(sim.port, *options, dialect=dialect) as url, connect(url) as client:
            yield Served(sim, url, client, passes)
    finally:
        sim.stop()


def test_embeddings_by_the_sdk_which_asks_for_base64(served: Served) -> None:
    texts = ["Hello", "world", "Größe 🌍", "Hello"]
    many = served.client.embeddings.create(model="sim", input=texts)
    assert [one.index for one in many.data] == [0, 1, 2, 3]
    assert many.data[0].embedding == many.data[3].embedding != many.data[1].embedding
    for text, one in zip(texts, many.data, strict=True):
        assert math.hypot(*one.embedding) == pytest.approx(1.0)
        alone = served.client.embeddings.create(model="sim", input=text)
        assert alone.data[0].embedding == one.embedding
        assert alone.usage.prompt_tokens == len(TOKENIZER.encode(text, add_special_tokens=True))
    assert many.usage.prompt_tokens == sum(len(TOKENIZER.encode(text, add_special_tokens=True)) for text in texts)
    floats = served.client.embeddings.create(model="sim", input=texts, encoding_format="float")
    assert [one.embedding for one in floats.data] == [pytest.approx(one.embedding) for one in many.data]


def test_token_ids_and_long_lists(served: Served) -> None:
    ids = TOKENIZER.encode("Hello", add_special_tokens=True)
    by_text = served.client.embeddings.create(model="sim", input="Hello").data[0].embedding
    assert served.client.embeddings.create(model="sim", input=ids).data[0].embedding == by_text
    assert [one.embedding for one in served.client.embeddings.create(model="sim", input=[ids, ids]).data] == [by_text, by_text]
    longer = served.client.embeddings.create(model="sim", input=[[number % 50 + 1] for number in range(600)])
    assert len(longer.data) == 600
    assert longer.data[0].embedding == longer.data[50].embedding
    assert not served.sim.server.running


def test_errors_are_the_sdks_own(served: Served) -> None:
    with pytest.raises(openai.BadRequestError):
        served.client.embeddings.create(model="sim", input=[])
    with pytest.raises(openai.NotFoundError):
        served.client.embeddings.create(model="other", input="a")
    if not served.passes:
        with pytest.raises(openai.BadRequestError):
            served.client.embeddings.create(model="sim", input=[10**7])


def test_models_one_by_one(served: Served) -> None:
    for model in served.client.models.list():
        assert served.client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")


def test_service_endpoints_by_plain_http(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        for path in ("/health", "/ping"):
            assert (http.get(path).status_code, http.get(path).content) == (200, b"")
        assert http.post("/ping").status_code == 200
        assert http.get("/load").json() == {"server_load": 0}
        assert http.get("/version").json()["version"]
        assert http.get("/tokenizer_info").status_code == 404
        tokens: dict[str, Any] = http.post("/tokenize", json={"prompt": "Größe 🌍", "return_token_strs": True}).json()
        assert tokens["tokens"] == TOKENIZER.encode("Größe 🌍", add_special_tokens=True)
        assert (len(tokens["token_strs"]), tokens["max_model_len"]) == (tokens["count"], 2048)
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"].endswith("Größe 🌍")
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        assert http.post("/tokenize", json=chat).json()["count"] > 2
        assert http.get("/tokenize").headers["allow"] == "POST"


def test_scores_and_bytes(served: Served) -> None:
    if served.passes:
        return
    with httpx.Client(base_url=served.url) as http:
        ranked = http.post("/v1/rerank", json={"query": "a b", "documents": ["c", "a b", "d"], "top_n": 1}).json()
        assert (ranked["results"][0]["index"], ranked["results"][0]["relevance_score"]) == (1, pytest.approx(1.0))
        scores = http.post("/score", json={"text_1": "a b", "text_2": ["c", "a b"]}).json()
        assert scores["data"][1]["score"] == pytest.approx(1.0)
        packed = http.post("/v1/embeddings", json={"input": ["a", "b"], "encoding_format": "bytes"})
        metadata = json.loads(packed.headers["metadata"])
        assert [item["end"] - item["start"] for item in metadata["data"]] == [32, 32]
        assert packed.headers["content-type"] == "application/octet-stream"
        assert math.hypot(*struct.unpack("<8f", packed.content[:32])) == pytest.approx(1.0)


def test_a_failing_server(served: Served) -> None:
    if served.passes:
        return
    script = json.dumps({"error": {"code": "UNAVAILABLE", "message": "gone"}})
    with pytest.raises(openai.InternalServerError):
        served.client.embeddings.create(model="sim", input=["a", f"b [[sim {script}]]"])
