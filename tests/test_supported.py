"""docs/supported.md is what happens: every field is sent to every dialect and snapshot, and the outcome held against the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gaie_codec import MalformedRequestError, ModelInfo, Transcoder, UnsupportedFieldError
from gaie_codec.compat._supported import FIELDS, columns, treatment
from gaie_codec.openai import chat, completions
from gaie_codec.testing import ByteTokenizer
from test_openai_chat import ASKING, ASKING_IN_VAIN

ROOT = Path(__file__).parents[1]
MODEL = ModelInfo(max_model_len=4096, served_model_name="m", lora_adapters={"tuned": "tuned-7"}, is_multimodal=True, vocab_size=257)
USER = {"role": "user", "content": "hi"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}


def detailed(detail=None, **more):
    url = {"url": "https://x/y.png"} | ({"detail": detail} if detail else {})
    return {"role": "user", "content": [{"type": "image_url", "image_url": url, **more}]}


SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# Fields whose example in test_openai_chat.py does not do here, with what they need besides.
EXAMPLES = {
    "messages": {"messages": [USER, USER]},
    "messages (image_url, video_url, input_audio)": {"messages": [IMAGE]},
    "messages (detail of an image)": {"messages": [detailed(detail="low")]},
    "messages (uuid of an image)": {"messages": [detailed(uuid="mine")]},
    "prompt": {"prompt": "other"},
    "model": {"model": "m"},
    "model (of a LoRA adapter)": {"model": "tuned"},
    "request_id": {"request_id": "mine"},
    "response_format (json_object)": {"response_format": {"type": "json_object"}},
    "response_format (json_schema)": {"response_format": SCHEMA},
    "response_format (structural_tag)": {"response_format": {"type": "structural_tag", "format": {}}},
    "structured_outputs (regex)": {"structured_outputs": {"regex": "a+"}},
    "structured_outputs (choice)": {"structured_outputs": {"choice": ["a", "b"]}},
    "structured_outputs (grammar)": {"structured_outputs": {"grammar": "root ::= 'a'"}},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "logprob_token_ids": {"logprobs": True, "logprob_token_ids": [5]},
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": False},
    "tools": {"tools": [TOOL], "tool_choice": "none"},
    "tool_choice": {"tools": [TOOL], "tool_choice": "none"},
    "n": {"n": 2, "temperature": 1.0},
}
REFUSED = ASKING_IN_VAIN | {"user": "me", "prompt_logprobs": 1, "routed_experts_prompt_start": 2, "chat_template": "{{ messages }}"}
SAME_AS_NOT_SAID = {"model"}
PARAMS = {
    "model (of a LoRA adapter)": "model",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "logprob_token_ids": "logprob",
    "echo": "prompt_logprobs",
}
NEEDS = {"logprob_token_ids": "logprobs"}
HEADERS = {"x-data-parallel-rank (header)": ("x-data-parallel-rank", "3"), "traceparent (header)": ("traceparent", "00-a-b-01")}
CASES = [
    pytest.param(adapter, passthrough, id=f"{adapter.snapshot}{' passed' * passthrough}".replace(" ", "-"))
    for adapters, passthrough in columns().values()
    for adapter in adapters
]


class PartsTokenizer(ByteTokenizer):
    accepts_content_parts = True

    def render_chat(self, messages, **_):
        return "".join(f"{message['role']}: {message.get('content') or ''}\n" for message in messages)


def body_for(field: str) -> tuple[str, dict, list]:
    """Path, body and headers of a request that asks for the field."""
    body = {} if field == "prompt" else {"messages": [USER]}
    if field in HEADERS:
        return chat.PATH, body, [HEADERS[field]]
    asked = EXAMPLES.get(field)
    if asked is None:
        asked = {field: ASKING[field] if field in ASKING else REFUSED.get(field, True)}
    return completions.PATH if field == "prompt" else chat.PATH, body | asked, []


def send(transcoder: Transcoder, field: str | None):
    path, body, headers = body_for(field) if field else (chat.PATH, {"messages": [USER]}, [])
    return transcoder.request("POST", path, headers, json.dumps(body).encode(), request_id="r")


@pytest.mark.parametrize(("adapter", "passthrough"), CASES)
def test_every_field_is_treated_as_the_page_says(adapter, passthrough):
    transcoder = Transcoder(adapter, tokenizer=PartsTokenizer(), model=MODEL, passthrough=passthrough)
    plain = send(transcoder, None)
    wrong = {}
    for field in FIELDS:
        found = treatment(adapter, field, passthrough=passthrough)
        try:
            call = send(transcoder, field)
        except (UnsupportedFieldError, MalformedRequestError) as error:
            name = PARAMS.get(field, field.partition(" ")[0])
            told = isinstance(error, UnsupportedFieldError) and (error.param or "").startswith(
                (name, field.partition(" ")[0], "response_format")
            )
            told |= field == "chat_template" and "untrusted chat template" in error.message
            if found.kind != "refused" or not told:
                wrong[field] = f"{found}, but {type(error).__name__}: {error} ({error.param})"
            continue
        is_same = call.calls == plain.calls
        match found.kind:
            case "sent":
                is_right = field in SAME_AS_NOT_SAID or not is_same
            case "emulated" | "gateway":
                is_right = True
            case "several calls":
                is_right = len(call.calls) == 2
            case "advisory":
                is_right = is_same or passthrough
            case _:
                is_right = False
        if not is_right or call.dropped != ((field,) if found.how == "reported as dropped" else ()):
            wrong[field] = f"{found}, but accepted; dropped {call.dropped}"
    assert wrong == {}


def test_what_is_dropped_is_reported():
    for adapters, passthrough in columns().values():
        adapter = adapters[0]
        transcoder = Transcoder(adapter, tokenizer=PartsTokenizer(), model=MODEL, unsupported="drop", passthrough=passthrough)
        plain = send(transcoder, None)
        for field in FIELDS:
            found = treatment(adapter, field, passthrough=passthrough)
            if found.kind == "refused" and not found.how and field in ASKING:
                call = send(transcoder, field)
                without = send(transcoder, NEEDS[field]) if field in NEEDS else plain
                assert len(call.dropped) == 1 + len(without.dropped), (adapter.snapshot, field)
                assert passthrough or call.calls == without.calls, (adapter.snapshot, field)


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("supported", ROOT / "tools" / "supported.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs" / "supported.md").read_text() == tool.document()
