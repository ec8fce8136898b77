"""Pieces of wire that several dialects write alike: parallel columns of log probabilities, JSON in strings, choices as a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from google.protobuf.json_format import MessageToDict

from .._errors import MalformedMessageError
from .._events import TokenLogprob

MAX_INTEGER: Final = 2**53 - 1
"""What a Struct holds exactly: its numbers are doubles."""

# Those that mean something outside of a character class. `re.escape` escapes more, which not every grammar engine takes.
_META: Final = re.compile(r"[\\.^$*+?()\[\]{}|]")


def encode_logprobs(logprobs: Sequence[TokenLogprob], message: Any) -> None:
    """Into a message with `token_logprobs`, `token_ids` and `top_logprobs`."""
    for entry in logprobs:
        message.token_logprobs.append(entry.logprob)
        message.token_ids.append(entry.token_id)
        top = message.top_logprobs.add()
        top.token_ids.extend(token_id for token_id, _ in entry.top)
        top.values.extend(value for _, value in entry.top)


def decode_logprobs(message: Any) -> tuple[TokenLogprob, ...]:
    """The inverse. Raises MalformedMessageError for columns of different lengths."""
    token_ids, values, tops = message.token_ids, message.token_logprobs, message.top_logprobs
    if len(token_ids) != len(values):
        raise MalformedMessageError(f"output_logprobs: {len(values)} token_logprobs for {len(token_ids)} token_ids")
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=value,
            top=tuple(zip(tops[place].token_ids, tops[place].values, strict=False)) if place < len(tops) else (),
        )
        for place, (token_id, value) in enumerate(zip(token_ids, values, strict=True))
    )


def check_json(text: str, field: str) -> str:
    """The text, which is empty or JSON. Raises MalformedMessageError, naming the field."""
    if text:
        decode_json(text, field)
    return text


def decode_json(text: str, field: str) -> Any:
    """The value. Raises MalformedMessageError, naming the field."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise MalformedMessageError(f"{field} is not JSON") from None


def decode_json_object(text: str, field: str) -> dict[str, Any]:
    """The object, empty for an empty text. Raises MalformedMessageError, naming the field."""
    if not text:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise MalformedMessageError(f"{field} is not a JSON object") from None


def regex_of_choices(choices: Iterable[str]) -> str:
    """A pattern that matches just these texts."""
    return "(?:" + "|".join(_META.sub(r"\\\g<0>", choice) for choice in choices) + ")"


def encode_struct(value: dict[str, Any], struct: Any) -> None:
    """A JSON object into a Struct."""
    struct.SetInParent()  # an empty object says something too
    struct.update(value)


def json_text_of(struct: Any) -> str:
    """A Struct as JSON text. Its numbers are doubles; those that are whole are written as integers, as they were sent."""
    return msgspec.json.encode(_whole(MessageToDict(struct))).decode()


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INTEGER else value
