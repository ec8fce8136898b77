"""What becomes of fields by their name: their types, nulls and values are checked as vLLM checks them; what cannot be done is refused.

Three tables: of which type a field is (a wrong one is an error, whatever becomes of the field), which values ask for nothing, and which
fields advise. What no table knows is accepted, as vLLM does, and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Final

from .._errors import MalformedRequestError, UnsupportedFieldError
from .fields import as_float, as_int, bool_field, list_field, no_dataclass_fault, object_field, str_field, type_error, type_errors

_Check = Callable[[Mapping[str, Any], str], Any]

_CHECKS: Final[Mapping[str, tuple[_Check, str, str]]] = MappingProxyType(
    {
        "int": (lambda fields, name: as_int(fields[name], name), "int_type", "Input should be a valid integer"),
        "float": (lambda fields, name: as_float(fields[name], name), "float_type", "Input should be a valid number"),
        "bool": (bool_field, "bool_type", "Input should be a valid boolean"),
        "str": (str_field, "string_type", "Input should be a valid string"),
        "dict": (object_field, "dict_type", "Input should be a valid dictionary"),
        "list": (list_field, "list_type", "Input should be a valid list"),
    }
)


def _types(**names: str) -> dict[str, tuple[str, bool]]:
    """Field -> type and whether it may be null; given as one text of names for each type, a `?` after those that may."""
    return {name.rstrip("?"): (kind, name.endswith("?")) for kind, text in names.items() for name in text.split()}


# Fields whose decoding has more to say about a wrong value are not here.
_SHARED: Final = _types(
    float="frequency_penalty? presence_penalty? temperature? top_p? min_p? repetition_penalty? length_penalty",
    int="max_tokens? top_k? seed? min_tokens priority routed_experts_prompt_start prompt_logprobs? truncate_prompt_tokens?"
    " stream_interval?",
    bool="stream? use_beam_search watermarking? include_stop_str_in_output ignore_eos skip_special_tokens? spaces_between_special_tokens"
    " add_special_tokens return_tokens_as_token_ids? return_token_ids? return_weight_versions return_token_offsets?",
    str="model? user? request_id session_id? cache_salt?",
    dict="logit_bias? kv_transfer_params? ec_transfer_params? vllm_xargs?",
    list="stop_token_ids? allowed_token_ids? bad_words logprob_token_ids?",
)
CHAT_TYPES: Final = MappingProxyType(
    _SHARED
    | _types(
        int="n? max_completion_tokens?",
        bool="logprobs? include_reasoning parallel_tool_calls? echo add_generation_prompt continue_final_message return_prompt_text?",
        str="chat_template?",
        dict="chat_template_kwargs? media_io_kwargs? mm_processor_kwargs?",
    )
)
COMPLETION_TYPES: Final = MappingProxyType(_SHARED | _types(int="n logprobs?", bool="echo?", str="suffix?"))

# Field -> the values that ask for nothing. Any other value is refused, whatever the dialect.
REFUSED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "repetition_detection": (None,),
        "return_token_offsets": (None, False),
        "return_weight_versions": (None, False),
        "routed_experts_prompt_start": (None, 0),
        "use_beam_search": (None, False),
        "vllm_xargs": (None, {}),
    }
)
_REPETITION: Final = ("max_pattern_size", "min_pattern_size", "min_count")
_NESTED: Final = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")

# They change nothing in what this gateway and its model servers generate.
ADVISORY: Final = frozenset(
    (
        "user metadata store service_tier prediction verbosity prompt_cache_key prompt_cache_retention safety_identifier"
        " mm_payload length_penalty"
    ).split()
)


def check_types(fields: Mapping[str, Any], types: Mapping[str, tuple[str, bool]]) -> None:
    """Raise MalformedRequestError for a field of another type, or a null where vLLM takes none."""
    for name, value in fields.items():
        found = types.get(name)
        if found is None:
            continue
        check, kind, message = _CHECKS[found[0]]
        if value is not None:
            check(fields, name)
        elif not found[1]:
            raise type_error(name, kind, message)
    _check_repetition(fields.get("repetition_detection"))


def refuse(fields: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]], *, drops: bool) -> tuple[str, ...]:
    """As `refuse_values`, for a request that generates: of `structured_outputs` too some parts are what no dialect can do."""
    outputs = fields.get("structured_outputs")
    nested = [f"structured_outputs.{name}" for name in _NESTED if outputs.get(name)] if isinstance(outputs, dict) else []
    return (*refuse_values(fields, refused, drops=drops), *_refuse(nested, drops=drops))


def refuse_values(fields: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]], *, drops: bool) -> tuple[str, ...]:
    """The names of fields that ask for what no dialect can do. Raises UnsupportedFieldError for them unless `drops`."""
    return _refuse(
        [name for name, nothing in refused.items() if name in fields and not _asks_nothing(name, fields[name], nothing)], drops=drops
    )


def unknown(fields: Mapping[str, Any], known: Set[str]) -> tuple[str, ...]:
    """The names of fields of which nothing is known; they are accepted, and reported."""
    return tuple(sorted(fields.keys() - known - ADVISORY))


def _refuse(lost: Sequence[str], *, drops: bool) -> tuple[str, ...]:
    if lost and not drops:
        raise UnsupportedFieldError(f"`{lost[0]}` is not supported by this gateway (parameter={lost[0]})", param=lost[0])
    return tuple(lost)


def _asks_nothing(name: str, value: Any, harmless: tuple[Any, ...]) -> bool:
    if name == "repetition_detection" and isinstance(value, dict):
        return not as_int(value.get("max_pattern_size"), name)
    if value in harmless:
        return True
    # A boolean may be said in other words.
    return any(one is False for one in harmless) and not isinstance(value, list | dict) and not bool_field({name: value}, name)


def _check_repetition(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise type_errors(no_dataclass_fault("repetition_detection", "RepetitionDetectionParams"))
    most, least, count = (as_int(value.get(name), f"repetition_detection.{name}") or 0 for name in _REPETITION)
    if most < 0 or least < 0 or least > most:
        raise MalformedRequestError(
            "max_pattern_size, min_pattern_size must be >=0, with min_pattern_size <= max_pattern_size. Set both to 0 to disable repetitive"
            " pattern detection."
        )
    if most > 0 and count < 2:
        raise MalformedRequestError(
            "min_count must be >= 2 to detect repetitive patterns in engine output. If you do not wish to detect repetitive patterns, set"
            " max_pattern_size to 0."
        )
