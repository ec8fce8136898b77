"""gpt-oss in the table of formats: its parser, by a library that is an extra, and the structural tags that hold its answers to something.

A constraint of a gpt-oss answer has to allow for the channels: what a client wants of the answer is held to in the final message, after an
analysis. The tags are those of vLLM's `parser/harmony.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..._errors import MalformedRequestError, UsageError
from .. import OutputParser
from ._tag_formats import Json, any_text, constant, in_text, json_of, one_of, sequence, structural_tag, tag

_JSON_TYPES: Final = (" json", " <|constrain|>json")
# "" is what ends an answer: the tokens for it are no part of a grammar.
_ENDS: Final = ("<|end|>", "")
_CHANNELS: Final = ("<|channel|>commentary", "<|channel|>analysis", "<|channel|>final")


class _Structure(msgspec.Struct):
    begin: str
    end: str
    schema: Any = None


class _Tag(msgspec.Struct):
    """A structural tag in either form of it."""

    format: Json | None = None
    structures: list[_Structure] | None = None
    triggers: list[str] = []


def harmony_parser(*, parallel: bool = True) -> OutputParser:
    """A parser for one choice. Raises UsageError without the extra."""
    try:
        from ..harmony import HarmonyParser
    except ImportError as error:
        raise UsageError(f"answers of gpt-oss models cannot be read: {error}") from error
    return HarmonyParser(parallel=parallel)


def call_tag(functions: Sequence[tuple[str, Json]], choice: str) -> str:
    """The JSON text of a structural tag for an answer that calls one of these functions, each with the format of its arguments.

    With `choice` "auto" it may be a final message instead.
    """
    tags = [
        tag(begin.format(name=name, channel=channel) + content_type + "<|message|>", arguments, [*_ENDS])
        for name, arguments in functions
        for begin in (" to=functions.{name}{channel}", "{channel} to=functions.{name}")
        for content_type in _JSON_TYPES
        for channel in _CHANNELS
    ]
    if choice == "auto":
        tags += _final(any_text(), *_JSON_TYPES, "")
    return structural_tag(sequence(_optional("analysis"), _optional("commentary"), one_of(tags)))


def answer_tag(kind: str, value: Any) -> str:
    """The JSON text of a structural tag that holds the final message to a constraint of this kind, by the names of `Constraint`.

    Raises MalformedRequestError for a schema or tag that is none.
    """
    content = _content(kind, value)
    if kind in ("json_schema", "json_object"):
        return structural_tag(sequence(_optional("analysis"), one_of(_final(content, *_JSON_TYPES))))
    return structural_tag(sequence(_optional("analysis"), *_final(content, "")))


def _final(content: Json, *content_types: str) -> list[Json]:
    """The final message, with each of these types in its header."""
    return [tag(f"<|channel|>final{content_type}<|message|>", content, [*_ENDS]) for content_type in content_types]


def _content(kind: str, value: Any) -> Json:
    if kind == "json_object":
        return json_of({"type": "object"})
    if kind == "json_schema":
        return json_of(_decode(value, Any, "JSON schema"))
    if kind == "regex":
        return {"type": "regex", "pattern": value}
    if kind == "choice":
        return one_of([constant(text) for text in value])
    if kind == "grammar":
        return {"type": "grammar", "grammar": value}
    whole: _Tag = _decode(value, _Tag, "structural tag")
    if whole.structures is not None:
        return in_text(whole.triggers, [tag(one.begin, json_of(one.schema), one.end) for one in whole.structures])
    if whole.format is None:
        raise _malformed("structural tag")
    return whole.format


def _decode(text: str, form: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(text, type=form)
    except (msgspec.DecodeError, RecursionError):
        raise _malformed(what) from None


def _malformed(what: str) -> MalformedRequestError:
    return MalformedRequestError(f"The {what} that the answer is to match is malformed.")


def _optional(channel: str) -> Json:
    message = tag(f"<|channel|>{channel}<|message|>", any_text(), "<|end|>")
    return {"type": "optional", "content": sequence(message, constant("<|start|>assistant"))}
