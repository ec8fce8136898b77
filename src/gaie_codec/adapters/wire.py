"""Pieces of wire that several dialects write alike: parallel columns of log probabilities, JSON in strings, choices as a pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from .._errors import MalformedMessageError, MalformedRequestError
from .._events import PromptLogprob, TokenLogprob

MAX_INTEGER: Final = 2**53 - 1
"""What a Struct holds exactly: its numbers are doubles."""

_LONGEST_ID: Final = 10  # digits of a 32-bit number
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
        if entry.selected:
            selected = message.token_ids_logprobs.add()
            selected.token_ids.extend(token_id for token_id, _ in entry.selected)
            selected.values.extend(value for _, value in entry.selected)


def decode_logprobs(message: Any, *, has_selected: bool = False) -> tuple[TokenLogprob, ...]:
    """The inverse. `has_selected` is whether there is a column for tokens selected by id. Raises MalformedMessageError for columns of
    different lengths."""
    token_ids, values, tops = message.token_ids, message.token_logprobs, message.top_logprobs
    if len(token_ids) != len(values):
        raise MalformedMessageError(f"output_logprobs: {len(values)} token_logprobs for {len(token_ids)} token_ids")
    selected = message.token_ids_logprobs if has_selected else ()
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=value,
            top=tuple(zip(tops[place].token_ids, tops[place].values, strict=False)) if place < len(tops) else (),
            selected=tuple(zip(selected[place].token_ids, selected[place].values, strict=False)) if place < len(selected) else (),
        )
        for place, (token_id, value) in enumerate(zip(token_ids, values, strict=True))
    )


def encode_prompt_logprobs(logprobs: Sequence[PromptLogprob], message: Any) -> None:
    """Into a message with the same columns, of which that of the values may be unset."""
    for entry in logprobs:
        value = message.token_logprobs.add()
        if entry.logprob is not None:
            value.value = entry.logprob
        message.token_ids.append(entry.token_id)
        top = message.top_logprobs.add()
        top.token_ids.extend(token_id for token_id, _ in entry.top)
        top.values.extend(value for _, value in entry.top)


def decode_prompt_logprobs(message: Any, *, is_cut: bool) -> tuple[PromptLogprob, ...]:
    """The inverse. `is_cut` is as for `rank_among`. Raises MalformedMessageError for columns of different lengths."""
    token_ids, values, tops = message.token_ids, message.token_logprobs, message.top_logprobs
    if len(token_ids) != len(values):
        raise MalformedMessageError(f"input_logprobs: {len(values)} token_logprobs for {len(token_ids)} token_ids")
    entries = []
    for place, (token_id, value) in enumerate(zip(token_ids, values, strict=True)):
        top = tuple(zip(tops[place].token_ids, tops[place].values, strict=False)) if place < len(tops) else ()
        logprob = value.value if value.HasField("value") else None
        entries.append(PromptLogprob(token_id=token_id, logprob=logprob, rank=rank_among(token_id, top, is_cut=is_cut), top=top))
    return tuple(entries)


def rank_among(token_id: int, top: Sequence[tuple[int, float]], *, is_cut: bool = False) -> int:
    """The rank of a token among the likeliest, 0 where it is unknown. `is_cut` says that the list holds the token in any case, in the
    place of the last of the likeliest: then the lowest rank of the list may be any that is lower."""
    own = next((value for other, value in top if other == token_id), None)
    if own is None:
        return 0
    rank = sum(value >= own for _, value in top)
    return 0 if is_cut and rank == len(top) else rank


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
    """A Struct as JSON text. Its numbers are doubles; those that are whole are written as integers, as they were sent. Its keys have no
    order, so they are sorted: the same bytes in give the same text in every process. Raises MalformedMessageError for NaN and infinity.
    """
    return msgspec.json.encode(_members(struct)).decode()


def _members(struct: Any) -> dict[str, Any]:
    return {key: _value(struct.fields[key]) for key in sorted(struct.fields)}


def _value(value: Any) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise MalformedMessageError("a Struct holds a number that JSON has not")
            return int(number) if number.is_integer() and abs(number) <= MAX_INTEGER else number
        case "struct_value":
            return _members(value.struct_value)
        case "list_value":
            return [_value(item) for item in value.list_value.values]
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None


def decode_logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    """A map whose keys are token ids as text. Raises MalformedRequestError for a key that is none."""
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= _LONGEST_ID):
            raise MalformedRequestError("logit_bias contains a key that is no token id", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}
