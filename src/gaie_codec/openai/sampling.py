"""The sampling fields that chat completions and completions share -> SamplingParams.

Order of precedence: what the client sent, the model's own defaults (which servers only advertise), OpenAI's defaults. Ranges and
messages are those of vLLM's OpenAI server, because not every gRPC server checks them, and none names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import MalformedRequestError
from .._events import ModelInfo, SamplingParams
from . import constraints
from .fields import (
    Fault,
    as_float,
    as_int,
    bool_field,
    bounded_int,
    float_field,
    int_field,
    list_field,
    object_field,
    range_error,
    shorten,
    type_error,
    type_errors,
)

if TYPE_CHECKING:
    from ..text import Tokenizer

MAX_LOGPROBS: Final = 20
MAX_N: Final = 16384
_MIN_TEMPERATURE: Final = 0.01  # vLLM raises anything between 0 and this, for numerical reasons
_MAX_BIAS: Final = 100.0

FIELDS: Final = constraints.FIELDS | frozenset(
    (
        "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty max_tokens min_tokens stop stop_token_ids"
        " skip_special_tokens spaces_between_special_tokens ignore_eos n seed include_stop_str_in_output logit_bias bad_words"
        " allowed_token_ids thinking_token_budget stream_interval"
    ).split()
)
"""What this module reads."""


def decode_sampling(
    body: Mapping[str, Any],
    *,
    model: ModelInfo,
    vocab_size: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    logprob_token_ids: tuple[int, ...] = (),
    max_stop_strings: int,
) -> SamplingParams:
    """The sampling parameters of a request. `max_tokens` and the log probabilities differ by endpoint and come decoded.

    Raises MalformedRequestError whose message names the field; `param` is null where vLLM's is.
    """
    defaults = model.default_sampling_params
    temperature = _number(body, defaults, "temperature", 1.0)
    top_p = _number(body, defaults, "top_p", 1.0)
    top_k = int_field(body, "top_k")
    if top_k is None:
        top_k = as_int(defaults.get("top_k"), "top_k") or 0
    min_p = _number(body, defaults, "min_p", 0.0)
    repetition_penalty = _number(body, defaults, "repetition_penalty", 1.0)
    frequency_penalty = _number(body, {}, "frequency_penalty", 0.0)
    presence_penalty = _number(body, {}, "presence_penalty", 0.0)
    n = _or(int_field(body, "n"), 1)
    seed = bounded_int(body, "seed", low=-(2**63), high=2**63 - 1)
    min_tokens = int_field(body, "min_tokens") or 0
    thinking_token_budget = _decode_thinking_budget(body.get("thinking_token_budget"))

    # vLLM's order. Where it names no parameter, neither is one named here.
    if n < 1:
        raise MalformedRequestError(f"n must be at least 1, got {n}.")
    if n > MAX_N:
        raise MalformedRequestError(
            shorten(f"n must be at most {MAX_N}, got {n}. To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable.")
        )
    if not -2 <= presence_penalty <= 2:
        raise MalformedRequestError(f"presence_penalty must be in [-2, 2], got {presence_penalty}.")
    if not -2 <= frequency_penalty <= 2:
        raise MalformedRequestError(f"frequency_penalty must be in [-2, 2], got {frequency_penalty}.")
    if not math.isfinite(repetition_penalty):
        raise MalformedRequestError(f"repetition_penalty must be a finite number, got {repetition_penalty}.")
    if repetition_penalty <= 0:
        raise MalformedRequestError(f"repetition_penalty must be greater than zero, got {repetition_penalty}.")
    if not math.isfinite(temperature):
        raise range_error("temperature", f"temperature must be a finite number, got {temperature}.", temperature)
    if temperature < 0:
        raise range_error("temperature", f"temperature must be non-negative, got {temperature}.", temperature)
    if temperature > 2:
        raise range_error("temperature", f"temperature must be in [0, 2], got {temperature}.", temperature)
    if not 0 < top_p <= 1:
        raise range_error("top_p", f"top_p must be in (0, 1], got {top_p}.", top_p)
    if top_k < -1:
        raise MalformedRequestError(shorten(f"top_k must be 0 (disable), or at least 1, got {top_k}."))
    if not 0 <= min_p <= 1:
        raise MalformedRequestError(f"min_p must be in [0, 1], got {min_p}.")
    if max_tokens is not None and max_tokens < 1:
        raise range_error("max_tokens", f"max_tokens must be at least 1, got {max_tokens}.", max_tokens)
    if min_tokens < 0:
        raise MalformedRequestError(shorten(f"min_tokens must be greater than or equal to 0, got {min_tokens}."))
    if max_tokens is not None and min_tokens > max_tokens:
        raise MalformedRequestError(shorten(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."))
    stop = _decode_stop(body.get("stop"), max_stop_strings)
    if n > 1 and temperature == 0:
        raise MalformedRequestError(f"n must be 1 when using greedy sampling, got {n}.")
    if temperature == 0:
        top_p, top_k, min_p = 1.0, 0, 0.0
    elif temperature < _MIN_TEMPERATURE:
        temperature = _MIN_TEMPERATURE

    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=stop,
        stop_token_ids=decode_token_ids(body, "stop_token_ids", vocab_size),
        skip_special_tokens=bool_field(body, "skip_special_tokens", True),
        spaces_between_special_tokens=bool_field(body, "spaces_between_special_tokens", True),
        ignore_eos=bool_field(body, "ignore_eos"),
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=logprob_token_ids,
        seed=None if seed == -1 else seed,  # vLLM takes -1 for none
        include_stop_str_in_output=bool_field(body, "include_stop_str_in_output"),
        logit_bias=_decode_logit_bias(body, vocab_size),
        bad_words=_decode_bad_words(body),
        allowed_token_ids=_decode_allowed(body, vocab_size),
        constraint=constraints.decode_constraint(body),
        thinking_token_budget=thinking_token_budget,
        stream_interval=bounded_int(body, "stream_interval", low=1),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _number(body: Mapping[str, Any], defaults: Mapping[str, Any], name: str, default: float) -> float:
    value = float_field(body, name)
    if value is None:
        value = as_float(defaults.get(name), name)
    return default if value is None else value


def _decode_thinking_budget(value: Any) -> int | None:
    if value is None or (type(value) is int and value >= -1):
        return None if value == -1 else value
    raise range_error(
        "thinking_token_budget",
        "`thinking_token_budget` must be a non-negative integer or -1 for unlimited.",
        value if isinstance(value, bool | int | float) else None,
    )


def _decode_stop(value: Any, most: int) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    no_text = Fault("stop", "string_type", "Input should be a valid string")
    if not isinstance(stops, list):
        raise type_errors(no_text, Fault("stop", "list_type", "Input should be a valid list"))
    faults = [Fault(f"stop.{place}", *no_text[1:]) for place, stop in enumerate(stops) if not isinstance(stop, str)]
    if len(stops) > most:
        context = {"field_type": "List", "max_length": most, "actual_length": len(stops)}
        message = f"List should have at most {most} items after validation, not {len(stops)}"
        faults = [Fault("stop", "too_long", message, context)]
    if faults:
        raise type_errors(no_text, *faults)
    if "" in stops:
        raise MalformedRequestError("stop cannot contain an empty string.")
    return tuple(stops)


def _token_ids(body: Mapping[str, Any], name: str) -> list[int]:
    values = list_field(body, name) or ()
    ids = []
    for place, value in enumerate(values):
        token_id = as_int(value, f"{name}.{place}")
        if token_id is None:
            raise type_error(f"{name}.{place}", "int_type", "Input should be a valid integer")
        ids.append(token_id)
    return ids


def _outside(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    """Those that are no token ids, as many as an error shows."""
    return [token_id for token_id in token_ids if token_id < 0 or (vocab_size and token_id >= vocab_size)][:10]


def decode_token_ids(body: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """A field of token ids, none when absent or null. Raises MalformedRequestError for one outside of the vocabulary."""
    ids = _token_ids(body, name)
    if outside := _outside(ids, vocab_size):
        raise _out_of_vocabulary(name, outside, vocab_size)
    return tuple(ids)


def _out_of_vocabulary(name: str, ids: list[int], vocab_size: int) -> MalformedRequestError:
    return range_error(name, f"token_id(s) {ids} in {name} contain out-of-vocab token ids. Vocabulary size: {vocab_size}", ids)


def _decode_allowed(body: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    ids = _token_ids(body, "allowed_token_ids")
    if body.get("allowed_token_ids") == []:
        raise range_error("allowed_token_ids", "allowed_token_ids is not None and empty!", [])
    if outside := _outside(ids, vocab_size):
        raise range_error("allowed_token_ids", "allowed_token_ids contains out-of-vocab token id!", outside)
    return tuple(ids)


def _decode_bad_words(body: Mapping[str, Any]) -> tuple[str, ...]:
    words = list_field(body, "bad_words") or ()
    for place, word in enumerate(words):
        if not isinstance(word, str):
            raise type_error(f"bad_words.{place}", "string_type", "Input should be a valid string")
    if "" in words:
        raise MalformedRequestError("bad_words cannot contain an empty string.")
    return tuple(words)


def tokenize_bad_words(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """With the token ids of each bad word as vLLM bans them: at the beginning of a text, and after a space if that is another token."""
    banned: list[tuple[int, ...]] = []
    for word in params.bad_words:
        bare, spaced = (tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " "))
        banned.append(bare)
        if spaced[:1] != bare[:1] and len(spaced) == len(bare):
            banned.append(spaced)
    return msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=tuple(filter(None, banned)))


def _decode_logit_bias(body: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in (object_field(body, "logit_bias") or {}).items():
        try:
            token_id = int(key)
        except ValueError:
            raise range_error("logit_bias", "logit_bias contains key(s) that cannot be converted to integer token IDs") from None
        bias = as_float(value, f"logit_bias.{token_id}")
        if bias is None:
            raise type_error(f"logit_bias.{token_id}", "float_type", "Input should be a valid number")
        biases[token_id] = -_MAX_BIAS if math.isnan(bias) else min(max(bias, -_MAX_BIAS), _MAX_BIAS)
    if outside := _outside(biases, vocab_size):
        raise _out_of_vocabulary("logit_bias", outside, vocab_size)
    return biases
