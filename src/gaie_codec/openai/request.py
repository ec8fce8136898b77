"""What the requests of all generating endpoints have in common besides how to sample: names, ids, routing, length, stream options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from .._errors import MalformedRequestError, ModelNotFoundError
from .._events import ModelInfo
from .endpoint import Asked
from .fields import (
    as_int,
    bool_field,
    bounded_int,
    int_field,
    json_text,
    literal_fault,
    no_model_fault,
    object_field,
    range_error,
    shorten,
    str_field,
    type_errors,
)

if TYPE_CHECKING:
    from ..text import Tokenizer

MAX_CACHE_SALT: Final = 128
MAX_REQUEST_ID: Final = 1024  # characters; the id is repeated in every chunk


def decode_model(fields: Mapping[str, Any], asked: Asked) -> tuple[str, str]:
    """The name as the client gave it, and what it stands for, maybe a LoRA adapter. Raises ModelNotFoundError if that is not served."""
    given = str_field(fields, "model")
    name = asked.rewritten_model or given
    if asked.flavor.checks_model and not asked.model.serves(name):
        raise ModelNotFoundError(f"The model `{name[:200]}` does not exist.", param="model")
    return given or name, name


def base_model(name: str, model: ModelInfo) -> str:
    """The model's own name behind what a client named."""
    return name if name and name not in model.lora_adapters else next(iter(model.names), "")


def decode_request_id(fields: Mapping[str, Any], asked: Asked) -> str:
    """The id without its prefix: of the header, the body, or the host."""
    own_id = asked.fixed_id or str_field(fields, "request_id")
    if len(own_id) > MAX_REQUEST_ID:
        raise range_error("request_id", f"a request id must be at most {MAX_REQUEST_ID} characters, got {len(own_id)}.")
    return own_id or asked.request_id


def decode_routing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of InferenceRequest that say where and in what order to run."""
    return {
        "priority": int_field(fields, "priority") or 0,
        "cache_salt": _decode_cache_salt(fields),
        "session_id": str_field(fields, "session_id"),
        **{name: _object_text(fields, name) for name in ("kv_transfer_params", "ec_transfer_params")},
        "watermarking": bool_field(fields, "watermarking") if fields.get("watermarking") is not None else None,
    }


def _object_text(fields: Mapping[str, Any], name: str) -> str:
    value = object_field(fields, name)
    return json_text(value, name) if value is not None else ""


def encode_text(fields: Mapping[str, Any], text: str, tokenizer: Tokenizer, max_model_len: int, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a prompt. One that is too long whatever its tokens are is refused without counting them, as by vLLM: that takes
    a second for each MB."""
    check_chars(fields, len(text), tokenizer, max_model_len)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def check_chars(fields: Mapping[str, Any], chars: int, tokenizer: Tokenizer, max_model_len: int) -> None:
    """Raise MalformedRequestError for a prompt of so many characters that no tokens of its context can stand for them."""
    most = max_model_len * getattr(tokenizer, "max_token_chars", 0)
    if most and chars > most and fields.get("truncate_prompt_tokens") is None:
        raise range_error(
            "input_text",
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {chars} characters, and"
            f" {most} are the most that so many tokens can stand for. Please reduce the length of the input prompt.",
            chars,
        )


def truncate(fields: Mapping[str, Any], token_ids: list[int], max_model_len: int) -> list[int]:
    """The prompt, cut as the client asked for. Raises MalformedRequestError where no room for an answer is left."""
    token_ids = decode_truncation(fields, max_model_len, side="left").cut(token_ids)
    check_length(token_ids, max_model_len)
    if max_model_len and len(token_ids) == max_model_len:
        raise range_error(
            "input_tokens",
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {len(token_ids)} input"
            " tokens, which leaves no room for output tokens. Please reduce the length of the input prompt.",
            len(token_ids),
        )
    return token_ids


class Truncation(msgspec.Struct, frozen=True):
    """How many tokens of a prompt are kept, None for all, and at which side others are cut off."""

    keep: int | None
    side: str

    def cut(self, token_ids: list[int]) -> list[int]:
        """What is kept of a prompt."""
        if self.keep is None or len(token_ids) <= self.keep:
            return token_ids
        return token_ids[: self.keep] if self.side == "right" else token_ids[len(token_ids) - self.keep :]


def decode_truncation(fields: Mapping[str, Any], max_model_len: int, *, side: Literal["left", "right"]) -> Truncation:
    """What the client asked for; `side` is what holds where it does not say. Raises MalformedRequestError."""
    keep = bounded_int(fields, "truncate_prompt_tokens", low=-1, high=2**63 - 1)
    told = fields.get("truncation_side")
    if told not in (None, "left", "right"):
        raise type_errors(literal_fault("truncation_side", "left", "right"))
    if keep is not None and max_model_len and keep > max_model_len:
        raise range_error(
            "truncate_prompt_tokens",
            f"truncate_prompt_tokens={keep} cannot be greater than max_model_len = {max_model_len}."
            " Please request a smaller truncation size.",
            keep,
        )
    return Truncation((max_model_len or None) if keep == -1 else keep, told or side)


def check_ids(token_ids: Sequence[int], model: ModelInfo, tokenizer: Tokenizer) -> None:
    """Raise MalformedRequestError for an id that is none of the vocabulary. A model's may be padded, hence larger than its tokenizer's."""
    size = max(tokenizer.vocab_size, model.vocab_size)
    outside = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
    if outside is not None:
        raise MalformedRequestError(shorten(f"Token id {outside} is out of vocabulary"))


def check_length(token_ids: list[int], max_model_len: int) -> None:
    """Raise MalformedRequestError for a prompt that is empty, or longer than the context."""
    if not token_ids:
        raise MalformedRequestError("The decoder prompt cannot be empty")
    if max_model_len and len(token_ids) > max_model_len:
        # vLLM tokenizes no further than this.
        raise range_error(
            "input_tokens",
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least {max_model_len + 1}"
            " input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
            max_model_len + 1,
        )


def decode_max_tokens(wanted: int | None, prompt_tokens: int, model: ModelInfo, *, fills: bool = True) -> int | None:
    """How many tokens to generate: as wanted, the model's own default, or, if it `fills` it in, what the context has room for. None where
    nobody knows."""
    max_model_len = model.max_model_len
    default = as_int(model.default_sampling_params.get("max_tokens"), "max_tokens")
    if wanted is None and default is not None:
        return min(default, max_model_len - prompt_tokens) if max_model_len else default
    if not max_model_len or (wanted is None and not fills):
        return wanted
    if wanted is not None and wanted > max_model_len:
        raise range_error(
            "max_tokens",
            f"max_tokens={wanted} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens.",
            wanted,
        )
    room = max_model_len - prompt_tokens
    return room if wanted is None else min(wanted, room)


def decode_stream_options(fields: Mapping[str, Any], stream: bool) -> tuple[bool, bool]:
    """include_usage and continuous_usage_stats."""
    options = fields.get("stream_options")
    if options and not stream:
        raise range_error("stream_options", "Stream options can only be defined when `stream=True`.")
    if options is not None and not isinstance(options, dict):
        raise type_errors(no_model_fault("stream_options"))
    if not options:
        return False, False
    include = bool_field(options, "include_usage", loc="stream_options.include_usage")
    return include, include and bool_field(options, "continuous_usage_stats", loc="stream_options.continuous_usage_stats")


def _decode_cache_salt(fields: Mapping[str, Any]) -> str:
    salt = str_field(fields, "cache_salt")
    if fields.get("cache_salt") == "":
        raise range_error("cache_salt", "Parameter 'cache_salt' must be a non-empty string if provided.")
    if len(salt) > MAX_CACHE_SALT or any(character in salt for character in "@/\\\0"):
        raise range_error(
            "cache_salt",
            f"Parameter 'cache_salt' must be at most {MAX_CACHE_SALT} characters and must not contain '@', '/', '\\\\', or NUL.",
        )
    return salt
