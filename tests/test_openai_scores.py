"""`/score` and `/rerank` over a wire that embeds: cosines of vectors, in vLLM's bodies."""

from __future__ import annotations

import json
import math

import pytest

from gaie_codec import EmbeddingEvent, Limits, MalformedRequestError, ModelInfo, Transcoder, UnsupportedEndpointError, UnsupportedFieldError
from gaie_codec.openai.scores import RERANK_PATHS, SCORE_PATHS
from gaie_codec.testing import ByteTokenizer
from test_openai_embeddings import answer

MODEL = ModelInfo(max_model_len=100, served_model_name="m", is_generation=False)
TRANSCODER = Transcoder("vllm.engine", tokenizer=ByteTokenizer(), model=MODEL)
VECTORS = {"east": [1.0, 0.0], "north": [0.0, 2.0], "west": [-3.0, 0.0], "ne": [1.0, 1.0], "nowhere": [0.0, 0.0]}


def ask(path, fields, transcoder=TRANSCODER):
    return transcoder.request("POST", path, (), json.dumps(fields).encode(), request_id="r")


def told(path, fields):
    call = ask(path, fields)
    texts = [bytes(prompt.prompt_token_ids).decode() for prompt in call.prompts]
    status, headers, body = answer(call, [EmbeddingEvent(values=VECTORS[text], prompt_tokens=len(text)) for text in texts])
    assert (status, headers["content-type"]) == (200, "application/json")
    return json.loads(body)


@pytest.mark.parametrize("path", SCORE_PATHS)
@pytest.mark.parametrize("names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")])
def test_one_text_against_several(path, names):
    one, two = names
    body = told(path, {one: "east", two: ["east", "north", "west", "ne", "nowhere"], "request_id": "x"})
    assert [item["score"] for item in body["data"]] == pytest.approx([1.0, 0.0, -1.0, math.sqrt(0.5), 0.0])
    assert [(item["index"], item["object"]) for item in body["data"]] == [(place, "score") for place in range(5)]
    assert (body["id"], body["object"], body["model"], body["created"]) == ("score-x", "list", "m", 1795421476)
    assert body["usage"]["prompt_tokens"] == len("easteastnorthwestnenowhere")


def test_pairs():
    body = told("/score", {"text_1": ["east", "north"], "text_2": ["west", "north"]})
    assert [item["score"] for item in body["data"]] == [-1.0, 1.0]
    assert len(told("/score", {"text_1": "east", "text_2": "north"})["data"]) == 1


@pytest.mark.parametrize("path", RERANK_PATHS)
def test_documents_by_their_likeness(path):
    fields = {"query": "east", "documents": ["west", "nowhere", "ne", "north"], "model": "m"}
    body = told(path, fields)
    assert [item["index"] for item in body["results"]] == [2, 1, 3, 0]
    assert body["results"][0]["document"] == {"text": "ne", "multi_modal": None}
    assert [item["relevance_score"] for item in body["results"]] == pytest.approx([math.sqrt(0.5), 0.0, 0.0, -1.0])
    assert [*body] == ["id", "model", "usage", "results"]
    assert [item["index"] for item in told(path, {**fields, "top_n": 2})["results"]] == [2, 1]
    for all_of_them in (0, -1, 9, None):
        assert len(told(path, {**fields, "top_n": all_of_them})["results"]) == 4


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/score", {}, "body.queries"),
        ("/score", {"queries": "a"}, "body.documents"),
        ("/score", {"text_1": "a"}, "body.text_2"),
        ("/score", {"text_1": "a", "text_2": 5}, "body.text_2"),
        ("/score", {"text_1": "a", "text_2": ["a", 5]}, "body.text_2.1"),
        ("/score", {"text_1": [], "text_2": ["a"]}, None),
        ("/score", {"text_1": "a", "text_2": []}, None),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"]}, None),
        ("/score", {"text_1": "", "text_2": ["a"]}, None),
        ("/score", {"text_1": "a", "text_2": "x" * 101}, "input_tokens"),
        ("/rerank", {"documents": ["a"]}, "body.query"),
        ("/rerank", {"query": "a"}, "body.documents"),
        ("/rerank", {"query": ["a"], "documents": ["a"]}, "body.query"),
        ("/rerank", {"query": "a", "documents": []}, None),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": "x"}, "body.top_n"),
    ],
)
def test_malformed(path, fields, param):
    with pytest.raises(MalformedRequestError) as caught:
        ask(path, fields)
    assert caught.value.param == param


def test_refused():
    with pytest.raises(UnsupportedFieldError, match="content parts"):
        ask("/rerank", {"query": "a", "documents": [{"content": []}]})
    with pytest.raises(UnsupportedFieldError, match="use_activation"):
        ask("/score", {"text_1": "a", "text_2": "b", "use_activation": False})
    few = Transcoder("vllm.engine", tokenizer=ByteTokenizer(), limits=Limits(max_embedding_calls=2))
    with pytest.raises(UnsupportedFieldError) as caught:
        ask("/rerank", {"query": "a", "documents": ["a", "b"]}, few)
    assert caught.value.param == "documents"
    with pytest.raises(UnsupportedEndpointError):
        ask("/score", {}, Transcoder("vllm.inference", tokenizer=ByteTokenizer()))


def test_unknown_fields_are_reported():
    assert ask("/score", {"text_1": "a", "text_2": "b", "top_n": 1, "user": "u"}).dropped == ("top_n",)


def test_equal_texts_are_embedded_under_ids_of_their_own():
    call = ask("/rerank", {"query": "a", "documents": ["a", "a"]})
    assert len({prompt.request_id for prompt in call.prompts}) == 3
