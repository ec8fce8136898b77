"""OpenAI JSON through the OpenAI methods of sglang.runtime: what goes to SGLang unread, and what comes back so."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import traits

from conftest import Served, ask

PASSED = {label: found for label, found in traits.selected().items() if found.passthrough}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

if not PASSED:
    pytest.skip("none of the selected engines is passed through to", allow_module_level=True)
pytestmark = pytest.mark.parametrize("served", PASSED.items(), ids=lambda item: item[0], indirect=True)


def script(**found: Any) -> str:
    return f"[[mock {json.dumps(found)}]]"


def test_the_body_arrives_whole(served: Served) -> None:
    served.chat(messages=ask(), tools=[TOOL], tool_choice="auto", extra_body={"regex": "a+", "separate_reasoning": False})
    body = served.engine.log("request")[-1]["body"]
    assert body["tools"][0]["function"]["name"] == "look"
    assert (body["tool_choice"], body["regex"], body["separate_reasoning"]) == ("auto", "a+", False)


def test_trace_headers(served: Served) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    served.chat(messages=ask(), extra_headers={"traceparent": trace})
    assert served.engine.log("request")[-1]["headers"]["traceparent"] == trace


def test_the_answer_comes_unread(served: Served) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "a", "mood": None}, "finish_reason": "stop", "matched_stop": 7}
    body = {"id": "x", "object": "chat.completion", "choices": [choice], "created": 1, "model": "m", "sglext": {"deep": [1, {"a": None}]}}
    answer = served.http.post("/v1/chat/completions", json={"model": "mock-model", "messages": ask({"body": body})})
    assert answer.json() == body


def test_an_error_event_ends_the_stream(served: Served) -> None:
    events = [{"id": "1", "object": "chat.completion.chunk", "choices": []}, {"error": {"message": "boom", "type": "X", "code": 500}}]
    body = {"model": "mock-model", "stream": True, "messages": ask({"events": events})}
    answer = served.http.post("/v1/chat/completions", json=body)
    found = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert json.loads(found[0]) == events[0]
    assert json.loads(found[-1])["error"]["message"]
    assert "[DONE]" not in found


def test_embeddings(served: Served) -> None:
    answer = served.client.embeddings.create(model="mock-model", input=" x", encoding_format="float")
    assert answer.data[0].embedding == [0.5, -1.25, 3.0]
    with pytest.raises(openai.RateLimitError, match="slow down"):
        served.client.embeddings.create(model="mock-model", input=script(error={"status": 429, "message": "slow down"}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": "q", "documents": ["a"]}),
        ("/v1/score", {"model": "mock-model", "query": "q", "items": ["a"]}),
        ("/v1/classify", {"model": "mock-model", "input": "a"}),
    ],
)
def test_other_endpoints(served: Served, path: str, body: dict[str, Any]) -> None:
    assert served.http.post(path, json=body).json()["object"] == "list"
    field = "query" if "query" in body else "input"
    refused = served.http.post(path, json=body | {field: script(error={"status": 400, "message": "no"})})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "no")
