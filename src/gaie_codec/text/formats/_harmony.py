"""gpt-oss in the table of formats: its parser, by a library that is an extra, and the structural tags that hold its answers to something.

A constraint of a gpt-oss answer has to allow for the channels: what a client wants of the answer is held to in the final message, after an
analysis. The tags are those of vLLM's `parser/harmony.py`, every default written out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..._errors import UsageError
from .. import OutputParser

_Json = dict[str, Any]
_JSON_TYPES: Final = (" json", " <|constrain|>json")
# "" is what ends an answer: the tokens for it are no part of a grammar.
_ENDS: Final = ("<|end|>", "")
_CHANNELS: Final = ("<|channel|>commentary", "<|channel|>analysis", "<|channel|>final")


def harmony_parser(*, parallel: bool = True) -> OutputParser:
    """A parser for one choice. Raises UsageError without the extra."""
    try:
        from ..harmony import HarmonyParser
    except ImportError as error:
        raise UsageError(f"answers of gpt-oss models cannot be read: {error}") from error
    return HarmonyParser(parallel=parallel)


def call_tag(functions: Sequence[tuple[str, Mapping[str, Any]]], choice: str) -> str:
    """The JSON text of a structural tag for an answer that calls one of these functions, each with the format of its arguments.

    With `choice` "auto" it may be a final message instead.
    """
    tags = [
        _tag(begin.format(name=name, channel=channel) + content_type + "<|message|>", arguments, _ENDS)
        for name, arguments in functions
        for begin in (" to=functions.{name}{channel}", "{channel} to=functions.{name}")
        for content_type in _JSON_TYPES
        for channel in _CHANNELS
    ]
    if choice == "auto":
        tags += [_tag(f"<|channel|>final{content_type}<|message|>", _any_text(), _ENDS) for content_type in (*_JSON_TYPES, "")]
    return _structural_tag(_optional("analysis"), _optional("commentary"), {"type": "or", "elements": tags})


def answer_tag(kind: str, value: Any) -> str:
    """The JSON text of a structural tag that holds the final message to a constraint of this kind, by the names of `Constraint`."""
    content = _content(kind, value)
    if kind in ("json_schema", "json_object"):
        tags = [_tag(f"<|channel|>final{content_type}<|message|>", content, _ENDS) for content_type in _JSON_TYPES]
        return _structural_tag(_optional("analysis"), {"type": "or", "elements": tags})
    return _structural_tag(_optional("analysis"), _tag("<|channel|>final<|message|>", content, _ENDS))


def _content(kind: str, value: Any) -> _Json:
    if kind == "json_object":
        return json_format({"type": "object"})
    if kind == "json_schema":
        return json_format(json.loads(value) if isinstance(value, str) else value)
    if kind == "regex":
        return {"type": "regex", "pattern": value}
    if kind == "choice":
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in value]}
    if kind == "grammar":
        return {"type": "grammar", "grammar": value}
    tag = json.loads(value)
    if "structures" not in tag:
        return dict(tag["format"])
    tags = [_tag(one["begin"], json_format(one["schema"]), one["end"]) for one in tag["structures"]]
    return {
        "type": "triggered_tags",
        "triggers": tag["triggers"],
        "tags": tags,
        "at_least_one": False,
        "stop_after_first": False,
        "excludes": [],
    }


def json_format(schema: Any) -> _Json:
    """JSON of this schema, as a format of xgrammar's."""
    return {
        "type": "json_schema",
        "json_schema": schema,
        "style": "json",
        "any_order": False,
        "max_whitespace_cnt": None,
        "excludes": [],
    }


def _any_text() -> _Json:
    return {"type": "any_text", "excludes": [], "max_tokens": None, "max_chars": None}


def _tag(begin: str, content: Mapping[str, Any], end: str | Sequence[str]) -> _Json:
    return {"type": "tag", "begin": begin, "content": content, "end": end if isinstance(end, str) else list(end)}


def _optional(channel: str) -> _Json:
    message = _tag(f"<|channel|>{channel}<|message|>", _any_text(), "<|end|>")
    return {
        "type": "optional",
        "content": {"type": "sequence", "elements": [message, {"type": "const_string", "value": "<|start|>assistant"}]},
    }


def _structural_tag(*elements: _Json) -> str:
    return json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": list(elements)}})
