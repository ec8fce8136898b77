"""The sampling fields that chat completions and completions share -> SamplingParams.

Order of precedence: what the client sent, the model's own defaults (which servers only advertise), OpenAI's defaults. Ranges and
messages are those of vLLM's OpenAI server, because not every gRPC server checks them, and none names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from .._errors import MalformedRequestError, UnsupportedFieldError
from .._events import Constraint, ModelInfo, SamplingParams
from .fields import as_float, as_int, bool_field, float_field, int_field, json_text, list_field, object_field, range_error, type_error

MAX_STOP_STRINGS: Final = 4
MAX_LOGPROBS: Final = 20
MAX_N: Final = 16384
_MIN_TEMPERATURE: Final = 0.01  # vLLM raises anything between 0 and this, for numerical reasons
_MAX_BIAS: Final = 100.0
_CONSTRAINT_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

FIELDS: Final = frozenset(
    (
        "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty max_tokens min_tokens stop stop_token_ids"
        " skip_special_tokens spaces_between_special_tokens ignore_eos n seed include_stop_str_in_output logit_bias bad_words"
        " allowed_token_ids response_format structured_outputs"
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
    max_stop_strings: int = MAX_STOP_STRINGS,
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
    seed = int_field(body, "seed")
    min_tokens = int_field(body, "min_tokens") or 0

    if not math.isfinite(temperature):
        raise range_error("temperature", f"temperature must be a finite number, got {temperature}.", temperature)
    if not 0 <= temperature <= 2:
        raise range_error("temperature", f"temperature must be in [0, 2], got {temperature}.", temperature)
    if not 0 < top_p <= 1:
        raise range_error("top_p", f"top_p must be in (0, 1], got {top_p}.", top_p)
    if top_k < -1:
        raise range_error("top_k", f"top_k must be 0 (disable), or at least 1, got {top_k}.", top_k)
    if not 0 <= min_p <= 1:
        raise MalformedRequestError(f"min_p must be in [0, 1], got {min_p}.")
    if not -2 <= frequency_penalty <= 2:
        raise MalformedRequestError(f"frequency_penalty must be in [-2, 2], got {frequency_penalty}.")
    if not -2 <= presence_penalty <= 2:
        raise MalformedRequestError(f"presence_penalty must be in [-2, 2], got {presence_penalty}.")
    if not 0 < repetition_penalty < math.inf:
        raise MalformedRequestError(f"repetition_penalty must be greater than zero, got {repetition_penalty}.")
    if n < 1:
        raise MalformedRequestError(f"n must be at least 1, got {n}.")
    if n > MAX_N:
        raise range_error("n", f"n must be at most {MAX_N}, got {n}.", n)
    if n > 1 and temperature == 0:
        raise MalformedRequestError(f"n must be 1 when using greedy sampling, got {n}.")
    if max_tokens is not None and max_tokens < 1:
        raise range_error("max_tokens", f"max_tokens must be at least 1, got {max_tokens}.", max_tokens)
    if min_tokens < 0:
        raise range_error("min_tokens", f"min_tokens must be greater than or equal to 0, got {min_tokens}.", min_tokens)
    if max_tokens is not None and min_tokens > max_tokens:
        raise range_error("min_tokens", f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.", min_tokens)
    if seed is not None and not -(2**63) <= seed < 2**63:
        side = "less than or equal to 9223372036854775807" if seed > 0 else "greater than or equal to -9223372036854775808"
        raise type_error("seed", "less_than_equal" if seed > 0 else "greater_than_equal", f"Input should be {side}")
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
        stop=_decode_stop(body.get("stop"), max_stop_strings),
        stop_token_ids=_token_ids(body, "stop_token_ids", vocab_size),
        skip_special_tokens=bool_field(body, "skip_special_tokens", True),
        spaces_between_special_tokens=bool_field(body, "spaces_between_special_tokens", True),
        ignore_eos=bool_field(body, "ignore_eos"),
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        seed=seed,
        include_stop_str_in_output=bool_field(body, "include_stop_str_in_output"),
        logit_bias=_decode_logit_bias(body, vocab_size),
        bad_words=_decode_bad_words(body),
        allowed_token_ids=_decode_allowed(body, vocab_size),
        constraint=_decode_constraint(body),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _number(body: Mapping[str, Any], defaults: Mapping[str, Any], name: str, default: float) -> float:
    value = float_field(body, name)
    if value is None:
        value = as_float(defaults.get(name), name)
    return default if value is None else value


def _decode_stop(value: Any, most: int) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise type_error("stop", "string_type", "Input should be a valid string")
    for place, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise type_error(f"stop.{place}", "string_type", "Input should be a valid string")
    if len(stops) > most:
        raise type_error("stop", "too_long", f"List should have at most {most} items after validation, not {len(stops)}")
    if "" in stops:
        raise range_error("stop", "stop cannot contain an empty string.")
    return tuple(stops)


def _token_ids(body: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    values = list_field(body, name) or ()
    ids = []
    for place, value in enumerate(values):
        token_id = as_int(value, f"{name}.{place}")
        if token_id is None:
            raise type_error(f"{name}.{place}", "int_type", "Input should be a valid integer")
        ids.append(token_id)
    outside = [token_id for token_id in ids if token_id < 0 or (vocab_size and token_id >= vocab_size)]
    if outside:
        shown = outside[:10]
        raise range_error(name, f"token_id(s) {shown} in {name} contain out-of-vocab token ids. Vocabulary size: {vocab_size}", shown)
    return tuple(ids)


def _decode_allowed(body: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    if body.get("allowed_token_ids") == []:
        raise range_error("allowed_token_ids", "allowed_token_ids is not None and empty!", [])
    return _token_ids(body, "allowed_token_ids", vocab_size)


def _decode_bad_words(body: Mapping[str, Any]) -> tuple[str, ...]:
    words = list_field(body, "bad_words") or ()
    for place, word in enumerate(words):
        if not isinstance(word, str):
            raise type_error(f"bad_words.{place}", "string_type", "Input should be a valid string")
        if not word:
            raise range_error("bad_words", "bad_words cannot contain an empty string.")
    return tuple(words)


def _decode_logit_bias(body: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in (object_field(body, "logit_bias") or {}).items():
        try:
            token_id = int(key)
        except ValueError:
            raise range_error("logit_bias", "logit_bias contains a key that cannot be converted to an integer token ID") from None
        bias = as_float(value, f"logit_bias.{token_id}")
        if bias is None:
            raise type_error(f"logit_bias.{token_id}", "float_type", "Input should be a valid number")
        if token_id < 0 or (vocab_size and token_id >= vocab_size):
            raise range_error(
                "logit_bias",
                f"token_id(s) [{token_id}] in logit_bias contain out-of-vocab token ids. Vocabulary size: {vocab_size}",
                [token_id],
            )
        biases[token_id] = -_MAX_BIAS if math.isnan(bias) else min(max(bias, -_MAX_BIAS), _MAX_BIAS)
    return biases


def _decode_constraint(body: Mapping[str, Any]) -> Constraint | None:
    from_format = _decode_response_format(object_field(body, "response_format"))
    outputs = object_field(body, "structured_outputs")
    if outputs is None:
        return from_format
    set_kinds = [kind for kind in _CONSTRAINT_KINDS if outputs.get(kind) is not None]
    if len(set_kinds) + (from_format is not None) > 1:
        raise MalformedRequestError(
            "You can only use one kind of structured outputs constraint but multiple are specified", param="structured_outputs"
        )
    if not set_kinds:
        raise MalformedRequestError(
            "You must use one kind of structured outputs constraint but none are specified", param="structured_outputs"
        )
    for option in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
        if outputs.get(option):
            raise UnsupportedFieldError(f"structured_outputs.{option} cannot be sent over gRPC", param=f"structured_outputs.{option}")
    return _decode_structured(set_kinds[0], outputs[set_kinds[0]])


def _decode_structured(kind: str, value: Any) -> Constraint:
    loc = f"structured_outputs.{kind}"
    if kind == "json_object":
        if value is not True:
            raise MalformedRequestError(
                "structured_outputs.json_object must be True if set; omit structured_outputs to disable structured outputs"
            )
        return Constraint(kind="json_object")
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise type_error(loc, "list_type", "Input should be a valid list of strings")
        if not value:
            raise MalformedRequestError("Choice '[]' cannot be an empty list")
        return Constraint(kind="choice", value=tuple(value))
    if kind == "json":
        return Constraint(kind="json_schema", value=value if isinstance(value, str) else json_text(value, loc))
    if not isinstance(value, str):
        if kind != "structural_tag" or not isinstance(value, dict):
            raise type_error(loc, "string_type", "Input should be a valid string")
        value = json_text(value, loc)
    if kind == "regex":
        return Constraint(kind="regex", value=value)
    return Constraint(kind="grammar" if kind == "grammar" else "structural_tag", value=value)


def _decode_response_format(value: dict[str, Any] | None) -> Constraint | None:
    if value is None:
        return None
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(kind="json_object")
    if kind == "structural_tag":
        return Constraint(kind="structural_tag", value=json_text(value, "response_format"))
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        if not isinstance(wrapper, dict):
            raise type_error("response_format.json_schema", "missing", "Field required")
        if not isinstance(wrapper.get("name"), str):
            raise type_error("response_format.json_schema.name", "missing", "Field required")
        schema = wrapper.get("schema")
        if not isinstance(schema, dict):
            raise type_error("response_format.json_schema.schema", "dict_type", "Input should be a valid dictionary")
        return Constraint(kind="json_schema", value=json_text(schema, "response_format.json_schema.schema"))
    raise type_error("response_format.type", "literal_error", "Input should be text, json_object, json_schema or structural_tag")
