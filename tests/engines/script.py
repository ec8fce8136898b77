"""What a fake engine answers, and its log of what it was asked. Standard library only: the fakes run in other environments.

The keys of a script are in README.md. The log is `ENGINE_LOG`, one JSON object a line, `{"request": {...}}` or `{"abort": {...}}`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import model

DEFAULT_TEXT = " hello world! é你"
_OPENING = "[[mock "


class Step(NamedTuple):
    """What one step of an engine brings. `finish` is "" until the last one; `matched` is the stop token or stop string behind it."""

    ids: list[int]
    finish: str = ""
    matched: int | str | None = None


def find(prompt: str | Sequence[int], direct: Any = None) -> dict[str, Any]:
    """The script of a request: `direct`, else the last `[[mock {...}]]` in the prompt (text or ids), else the file, else {}."""
    if isinstance(direct, Mapping):
        return dict(direct)
    text = prompt if isinstance(prompt, str) else model.decode(prompt)
    start = text.rfind(_OPENING)
    if start >= 0:
        return json.JSONDecoder().raw_decode(text, start + len(_OPENING))[0]
    path = os.environ.get("ENGINE_SCRIPT")
    if path:
        with open(path) as file:
            return json.load(file)
    return {}


def steps(
    script: Mapping[str, Any],
    *,
    limit: int | None = None,
    eos: int | None = model.EOS,
    stop_ids: Collection[int] = (),
    stops: Sequence[str] = (),
) -> Iterator[Step]:
    """The steps of one choice; the last one has a `finish`: "stop", "length", what the script says, or "error".

    `eos` is empty for a request that ignores the end tokens: its tokens are repeated until the limit. `stops` are for engines that
    match stop strings themselves.
    """
    planned = _planned(script)
    if not eos and limit is not None and planned:
        planned = itertools.cycle(planned)
    produced: list[int] = []
    for ids in planned:
        room = len(ids) if limit is None else limit - len(produced)
        for end, token_id in enumerate(ids[:room], 1):
            produced.append(token_id)
            matched = token_id if token_id in eos or token_id in stop_ids else _stop_string(stops, produced)
            if matched is not None:
                yield Step(ids[:end], "stop", matched)
                return
        if limit is not None and len(produced) >= limit:
            yield Step(ids[:room], "length")
            return
        yield Step(ids)
    if "error" in script:
        yield Step([], "error")
        return
    finish = script.get("finish", "stop" if eos else "length")
    matched = script.get("stop_token", eos[0] if eos else None) if finish == "stop" else None
    yield Step([] if matched is None else [matched], finish, matched)


def hold(found: Iterator[Step], stops: Sequence[str]) -> Iterator[Step]:
    """The steps as SGLang's scheduler streams them: none ends where a stop string may have begun, those wait for the next."""
    produced: list[int] = []
    held: list[int] = []
    for step in found:
        produced += step.ids
        held += step.ids
        text = model.decode(produced, partial=True, special=False)
        if step.finish or not any(text.endswith(stop[:length]) for stop in stops for length in range(1, len(stop) + 1)):
            yield step._replace(ids=held)
            held = []


def failure(script: Mapping[str, Any]) -> tuple[int, str]:
    """HTTP status and message of a script's `error`."""
    error = script.get("error") or {}
    return int(error.get("status", 500)), str(error.get("message", "the script says so"))


def logprobs(script: Mapping[str, Any], token_id: int, count: int) -> list[tuple[int, float]]:
    """Made-up (id, logprob) pairs: the token itself and `count` candidates, most likely first, of which it is one, if likely."""
    others = [(token_id + i) % 256 for i in range(1, count + 1)]
    if script.get("unlikely"):
        return [(token_id, -9.0), *((other, -0.5 * i) for i, other in enumerate(others, 1))]
    return [(token_id, -0.25), *((token_id if i == 0 else others[i - 1], -0.25 - 0.5 * i) for i in range(count))]


def log(kind: str, /, **what: Any) -> None:
    """Append to the log; `kind` is "request", "abort" or whatever else is worth a look."""
    line = json.dumps({kind: what}, default=repr, ensure_ascii=False)
    sys.stderr.write(f"{line[:1000]}\n")
    sys.stderr.flush()
    path = os.environ.get("ENGINE_LOG")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


def ready() -> None:
    """Tell `launch` that this process does its part now."""
    sys.stdout.write("READY\n")
    sys.stdout.flush()


def _planned(script: Mapping[str, Any]) -> Any:
    if "tokens" in script:
        return [list(ids) for ids in script["tokens"]]
    text = script.get("text", [] if "error" in script else DEFAULT_TEXT)
    return [model.encode(part) for part in text] if isinstance(text, list) else [[token_id] for token_id in model.encode(text)]


def _stop_string(stops: Sequence[str], produced: Sequence[int]) -> str | None:
    if not stops:
        return None
    text = model.decode(produced, partial=True, special=False)
    return next((stop for stop in stops if stop in text), None)
