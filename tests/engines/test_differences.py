"""Our answers against those of the same front end's own OpenAI server, and what each asks of the engine.

Every difference is a row of docs/engines.md with a verdict; one that is not there fails, and so does a row that is no longer true.
A row is named by the case, where one side answers and the other does not or fails otherwise; else by where in the answer it is.
Not compared: ids, times, fingerprints, and null against absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import launch
import model
import pytest
import traits

from conftest import Served, ask

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAM = ", stream"  # in the name of a case; a row without it is for both forms
VOLATILE = {"id", "created", "system_fingerprint", "request_id", "rid", "arrival_time", "client_index", "external_req_id", "e2e_latency"}
TOLD = re.compile(r"content$|text$|role$|finish_reason$|usage|logprobs|index$")  # what of a chunk is compared by another name
SLOW = {"delay": 0.01}  # so that neither side merges tokens
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}

# Name -> what a chat request has beside the messages.
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_tokens": {"max_tokens": 3},
    "sampling": {"temperature": 0.5, "top_p": 0.5, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    "more sampling": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2},
    "greedy": {"temperature": 0},
    "stop": {"stop": ["wor"]},
    "stop_token_ids": {"stop_token_ids": [model.IDS[b" world"]]},
    "include_stop_str_in_output": {"stop": ["wor"], "include_stop_str_in_output": True},
    "logit_bias": {"logit_bias": {"65": 1.5}},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 4},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "skip_special_tokens": {"skip_special_tokens": False},
    "json_schema": {"response_format": SCHEMA},
    "temperature 3": {"temperature": 3},
    "top_p 0": {"top_p": 0},
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens x": {"max_tokens": "x"},
    "n 2": {"n": 2},
    "unknown model": {"model": "nope"},
    "no messages": {"messages": []},
    "empty stop": {"stop": ""},
    "top_logprobs alone": {"top_logprobs": 2},
    "too long": {"messages": ask(text="x" * 5000)},
}
# Name -> the engine's script. A stop string that never comes is sent along.
SCRIPTS: dict[str, dict[str, Any]] = {
    "split characters": {"text": "né 你好 🌍"},
    "spanning stop": {"text": "abcXYZdef"},
    "no text": {"text": ""},
    "special token": {"tokens": [[*model.encode("a"), model.IDS[b"<think>"]], model.encode("b")]},
    "cached": {"text": "a", "cached": 16},
    "cut character": {"tokens": [model.encode("a"), model.encode("你")[:2]]},
    "engine error 400": {"error": {"status": 400, "message": "no"}},
    "engine error 503": {"error": {"status": 503, "message": "later"}},
    "engine error 500": {"error": {"status": 500, "message": "boom"}},
    "late engine error": {"text": ["abcdef", "ghi"], "error": {"status": 500, "message": "boom"}},
    "abort": {"text": "abcdef", "finish": "abort"},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "completion": {},
    "completion max_tokens": {"max_tokens": 3},
    "completion token ids": {"prompt": model.encode(" x")},
    "completion logprobs": {"logprobs": 2},
    "completion echo": {"echo": True},
    "completion echo logprobs": {"echo": True, "logprobs": 2},
    "completion prompt_logprobs": {"prompt_logprobs": 2},
    "completion prompts": {"prompt": [" x", " y"]},
    "completion stop": {"stop": ["wor"]},
}


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, endpoint and body of each request, unary and streaming."""
    plain = [(name, CHAT, {"messages": ask(SLOW), **fields}) for name, fields in FIELDS.items()]
    plain += [(name, CHAT, {"messages": ask(SLOW | found), "stop": ["XYZ"]}) for name, found in SCRIPTS.items()]
    plain += [(name, COMPLETIONS, {"prompt": " x", **fields}) for name, fields in PROMPTS.items()]
    for name, endpoint, fields in plain:
        body = {"model": model.NAME, **fields}
        yield name, endpoint, body
        yield name + STREAM, endpoint, body | {"stream": True, "stream_options": {"include_usage": True}}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything that is not null; positions in lists are left out of the path, but not of the order."""
    if isinstance(value, dict):
        for key in sorted(value.keys() - VOLATILE):
            yield from leaves(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    elif value is not None:
        yield path, value


def observe(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """How an answer went, in a word, and what a client sees of it, in a form that can be compared."""
    if "text/event-stream" not in response.headers.get("content-type", ""):
        body = response.json()
        if response.status_code < 400:
            return str(response.status_code), body
        return str(response.status_code), {"error": body.get("error", body), "without error key": None if "error" in body else True}
    events = [event.removeprefix("data:").strip() for event in response.text.split("\n\n") if event.startswith("data:")]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    errors = [chunk["error"] for chunk in parsed if "error" in chunk]
    chunks = [chunk for chunk in parsed if "error" not in chunk]
    # Choice by choice: which of two comes first is chance.
    choices = sorted((choice for chunk in chunks for choice in chunk.get("choices", ())), key=lambda choice: choice["index"])
    texts = [choice["delta"].get("content") if "delta" in choice else choice["text"] for choice in choices]
    said = sorted({leaf for chunk in chunks for leaf in leaves(chunk)}, key=repr)
    seen = {
        "text": "".join(text or "" for text in texts),
        "cuts": [text for text in texts if text],
        "roles": [choice["delta"]["role"] for choice in choices if "role" in choice.get("delta", {})],
        "finish_reason": [choice["finish_reason"] for choice in choices if choice.get("finish_reason")],
        "usage": [chunk["usage"] for chunk in chunks if chunk.get("usage")],
        "logprobs": [choice["logprobs"] for choice in choices if choice.get("logprobs")],
        "error": errors,
        "chunk": [{path: value} for path, value in said if not TOLD.search(path)],
    }
    outcome = f"{response.status_code}, then an error" if errors else str(response.status_code)
    return outcome + (" and [DONE]" if errors and events[-1] == "[DONE]" else ""), {"stream": seen}


def differences(served: Served, own: httpx.Client) -> Iterator[tuple[str, str, str]]:
    """Which, ours, theirs."""
    for name, endpoint, body in cases():
        outcomes, sides = [], []
        for client in (served.http, own):
            before = len(served.engine.log("request"))
            outcome, seen = observe(client.post(endpoint, json=body))
            found: dict[str, list[Any]] = {}
            asked = sorted(served.engine.log("request")[before:], key=repr)
            for path, leaf in leaves({**seen, "engine": asked}):
                # One name for a place, whether it is in the answer or in its chunks.
                found.setdefault(path.removeprefix("stream.").removeprefix("choices."), []).append(leaf)
            outcomes.append(outcome)
            sides.append(found)
        if outcomes[0] != outcomes[1]:
            yield name, *outcomes
            continue
        ours, theirs = sides
        for path in sorted(ours.keys() | theirs.keys()):
            if ours.get(path) != theirs.get(path):
                where = path if endpoint == CHAT else f"completions: {path}"
                yield where, f"{ours.get(path)} ({name})", f"{theirs.get(path)}"


def listed(name: str) -> set[str]:
    """What docs/engines.md says differs on an engine; patterns, with `*`."""
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return {which.strip("`") for which, engine, *_ in rows if name == engine}


COMPARED = {
    label: found
    for label, found in traits.selected().items()
    if found.name in launch.WITH_HTTP and found.version == launch.VERSIONS[found.name][0]
}
if not COMPARED:
    pytest.skip("none of the selected engines has an OpenAI server of its own, in its newest release", allow_module_level=True)


@pytest.mark.parametrize("served", COMPARED.items(), ids=lambda item: item[0], indirect=True)
def test_no_difference_but_the_listed(served: Served) -> None:
    found: dict[str, list[str]] = {}
    with httpx.Client(base_url=f"http://{served.engine.http}", timeout=30, trust_env=False) as own:
        for which, ours, theirs in differences(served, own):
            found.setdefault(which, []).append(f"{ours} against {theirs}")
    found = {
        which: details for which, details in found.items() if which.removesuffix(STREAM) == which or which.removesuffix(STREAM) not in found
    }
    (served.engine.folder / "differences.json").write_text(json.dumps(found, indent=2, ensure_ascii=False))
    rows = listed(served.engine.name)
    assert not {which: details[0] for which, details in found.items() if not any(fnmatch(which, row) for row in rows)}
    assert not {row for row in rows if not any(fnmatch(which, row) for which in found)}, "rows of docs/engines.md are no longer true"
