"""`prompt` of a completion request -> the token ids of each prompt: a text, token ids, or a list of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from .._errors import MalformedRequestError, UnsupportedFieldError
from .fields import MAX_FAULTS, Fault, bool_field, range_error, read_int, type_errors
from .request import check_ids, encode_text

if TYPE_CHECKING:
    from .._events import ModelInfo
    from ..text import Tokenizer

MAX_PROMPTS: Final = 1024
_NO_LIST: Final = ("list_type", "Input should be a valid list")
_NO_TEXT: Final = ("string_type", "Input should be a valid string")


def decode_prompts(
    fields: Mapping[str, Any], tokenizer: Tokenizer, model: ModelInfo, most: int
) -> tuple[list[str | None], list[list[int]]]:
    """Of each prompt the text, None where it came as ids, and the ids; `most` is how many calls the host makes. Raises RequestError."""
    value = fields.get("prompt")
    special = bool_field(fields, "add_special_tokens", True)
    if value is None or value == "":
        raise MalformedRequestError("Either prompt or prompt_embeds must be provided and non-empty.")
    if value == []:
        raise range_error("prompt", "You must pass at least one prompt")
    prompts: list[Any] = [value] if isinstance(value, str) else value
    # Texts are texts, be they numbers.
    if isinstance(value, list) and not all(isinstance(item, str) for item in value) and (ids := _as_ids(value)) is not None:
        prompts = [ids]
    if not isinstance(prompts, list):
        raise _no_prompt(value)
    if len(prompts) > min(most, MAX_PROMPTS):
        if len(prompts) > MAX_PROMPTS:
            raise range_error(
                "prompt",
                f"prompt list length {len(prompts)} exceeds the maximum allowed count of {MAX_PROMPTS}. To increase this limit, set the"
                " VLLM_MAX_COMPLETION_PROMPTS environment variable.",
            )
        raise UnsupportedFieldError(f"`prompt` takes {len(prompts)} calls, and this gateway makes at most {most}", param="prompt")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts, [encode_text(fields, text, tokenizer, model.max_model_len, add_special_tokens=special) for text in prompts]
    lists = []
    for prompt in prompts:
        ids = _as_ids(prompt)
        if ids is None:
            raise _no_prompt(value)
        lists.append(ids)
    for ids in lists:
        check_ids(ids, model, tokenizer)
    return [None] * len(lists), lists


def _as_ids(value: Any) -> list[int] | None:
    """`value` as token ids, None where it is no list of them. Numbers as texts, and whole ones with a point, are taken."""
    if not isinstance(value, list):
        return None
    ids = []
    for item in value:
        token_id = item if type(item) is int else read_int(item, "prompt")
        if not isinstance(token_id, int) or token_id < 0:
            return None
        ids.append(token_id)
    return ids


def _no_prompt(value: Any) -> MalformedRequestError:
    """What is wrong with a value for each form of a prompt, as pydantic says it of a union."""
    return type_errors(*islice(_faults(value), MAX_FAULTS))


def _faults(value: Any) -> Iterator[Fault]:
    yield from _faults_of_ids(value, "prompt")
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from _faults_of_ids(item, f"prompt.{place}")
        yield Fault("prompt", *_NO_TEXT)
        yield from (Fault(f"prompt.{place}", *_NO_TEXT) for place, item in enumerate(value) if not isinstance(item, str))
    else:
        yield from (Fault("prompt", *_NO_LIST), Fault("prompt", *_NO_TEXT), Fault("prompt", *_NO_LIST))


def _faults_of_ids(value: Any, loc: str) -> Iterator[Fault]:
    if not isinstance(value, list):
        yield Fault(loc, *_NO_LIST)
        return
    for place, item in enumerate(value):
        where = f"{loc}.{place}"
        token_id = read_int(item, where)
        if isinstance(token_id, Fault):
            yield token_id
        elif token_id is None:
            yield Fault(where, "int_type", "Input should be a valid integer")
        elif token_id < 0:
            yield Fault(where, "greater_than_equal", "Input should be greater than or equal to 0", {"ge": 0})
