"""What xgrammar's structural tags are made of. Every default is written out, as vLLM does: servers cache grammars by their text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..._errors import MalformedRequestError

Json: TypeAlias = dict[str, Any]


def structural_tag(content: Json) -> str:
    """The whole, as JSON text."""
    return json_text({"type": "structural_tag", "format": content})


def json_text(value: Any) -> str:
    """The text by which servers cache. Raises MalformedRequestError for a client's schema that JSON or the stack has no room for."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise MalformedRequestError("A JSON schema is nested too deeply, or has a number that is infinite or none.") from None


def tag(begin: str, content: Json, end: str | list[str]) -> Json:
    """Content between two texts, or before one of several."""
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: Json) -> Json:
    """One after the other."""
    return {"type": "sequence", "elements": list(elements)}


def one_of(elements: Sequence[Json]) -> Json:
    """Any one of them."""
    return {"type": "or", "elements": elements}


def constant(text: str) -> Json:
    """Just this text."""
    return {"type": "const_string", "value": text}


def any_text() -> Json:
    """Any text at all."""
    return {"type": "any_text", "excludes": [], "max_tokens": None, "max_chars": None}


def json_of(schema: Any, written: str = "json") -> Json:
    """A value of this schema; `written` is xgrammar's name for another way to write it than as JSON."""
    return {
        "type": "json_schema",
        "json_schema": schema,
        "style": written,
        "any_order": False,
        "max_whitespace_cnt": None,
        "excludes": [],
    }


def in_text(triggers: list[str], tags: Sequence[Json], *, at_least_one: bool = False, excludes: Sequence[str] = ()) -> Json:
    """Tags within free text, in which each begins with one of the triggers."""
    return {
        "type": "triggered_tags",
        "triggers": triggers,
        "tags": tags,
        "at_least_one": at_least_one,
        "stop_after_first": False,
        "excludes": list(excludes),
    }


def in_a_row(tags: Sequence[Json], separator: str, *, stop_after_first: bool = False) -> Json:
    """Tags with nothing but the separator between them, at least one."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": stop_after_first,
    }
