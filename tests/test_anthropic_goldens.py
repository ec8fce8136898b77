"""Messages against what vLLM 0.33's own converters make of the same: a request as a chat, and what a choice said as events and a body.

Differences on purpose are undone here, each by name; docs/differences.md has the reasons.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gaie_codec import MalformedRequestError
from gaie_codec.anthropic import messages
from gaie_codec.anthropic.conversation import decode_conversation
from gaie_codec.openai import chat
from test_anthropic_messages import MODEL_TOKENIZER, asked
from test_anthropic_response import deltas_of, stream, unary

GOLDEN = Path(__file__).parent / "golden" / "vllm-messages"
REQUESTS = json.loads((GOLDEN / "requests.json").read_text())
ANSWERS = json.loads((GOLDEN / "answers.json").read_text())


@pytest.mark.parametrize("case", REQUESTS, ids=range(len(REQUESTS)))
def test_a_request_is_the_same_chat(case, monkeypatch) -> None:
    made: list[dict[str, Any]] = []

    def decode_fields(fields, asked, *, id_prefix):
        made.append(fields)
        raise MalformedRequestError("that is enough")

    monkeypatch.setattr(chat, "decode_fields", decode_fields)
    with pytest.raises(MalformedRequestError, match="enough"):
        messages.decode_request(json.dumps(case["request"]).encode(), asked(MODEL_TOKENIZER, carries=frozenset({"thinking_token_budget"})))
    theirs = case["chat"]
    del theirs["max_tokens"]  # max_completion_tokens is the same
    theirs.pop("stream_options", None)  # usage needs no asking
    for tool in theirs.get("tools", ()):
        tool["function"] = {name: value for name, value in tool["function"].items() if value is not None}
    if "tool_choice" not in case["request"] and theirs.get("tool_choice") == "auto":
        del theirs["tool_choice"]  # as that of a chat is by itself
    assert made == [theirs]


@pytest.mark.parametrize("case", REQUESTS, ids=range(len(REQUESTS)))
def test_a_template_that_wants_system_first_gets_the_same(case) -> None:
    def render_chat(said, **_):
        raise MalformedRequestError("system must be first")

    assert decode_conversation(case["request"], SimpleNamespace(render_chat=render_chat))[0] == case["merged"]


@pytest.mark.parametrize("case", ANSWERS, ids=range(len(ANSWERS)))
def test_what_was_said_is_the_same_events(case) -> None:
    ours = without_signatures(stream(*deltas_of(case["said"], case["finish"])[0]))
    if not case["said"]:
        assert ours[1:3] == [
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_stop", "index": 0},
        ]
        del ours[1:3]
    theirs = without_signatures(case["events"])
    assert joined(ours) == joined(theirs)
    if not any(one["type"] == "content_block_start" and one["content_block"]["type"] == "tool_use" for one in theirs):
        assert ours == theirs, "text after a call waits with vLLM"


@pytest.mark.parametrize("case", [case for case in ANSWERS if case["body"]], ids=range(sum(bool(case["body"]) for case in ANSWERS)))
def test_what_was_said_is_the_same_body(case) -> None:
    ours, theirs = unary(*deltas_of(case["said"], case["finish"])[0]), case["body"]
    mine, vllms = by_kind(ours.pop("content")), by_kind(theirs.pop("content"))
    assert mine == vllms
    assert {name: value for name, value in ours.items() if value is not None} == theirs


def without_signatures(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for event in events:
        for part in (event.get("delta", {}), event.get("content_block", {})):
            part.pop("signature", None)
    return events


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the pieces of a block as one."""
    found: list[dict[str, Any]] = []
    for event in json.loads(json.dumps(events)):
        last = found[-1] if found else {}
        same = event["type"] == "content_block_delta" and [last.get("type"), last.get("index")] == [event["type"], event["index"]]
        if same and last["delta"]["type"] == event["delta"]["type"]:
            (key,) = event["delta"].keys() - {"type"}
            last["delta"][key] += event["delta"][key]
        else:
            found.append(event)
    return found


def by_kind(content: list[dict[str, Any]]) -> tuple[str, str, list[dict[str, Any]]]:
    """vLLM's order of blocks: all thinking, all text, then the calls."""
    texts = {kind: "".join(block[kind] for block in content if block["type"] == kind) for kind in ("thinking", "text")}
    return texts["thinking"], texts["text"], [block for block in content if block["type"] == "tool_use"]
