"""An inference request held against what one adapter can carry: refused by name, or without what is dropped and reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Final

import msgspec

from ._errors import MalformedRequestError, UnsupportedFieldError
from ._events import InferenceRequest, SamplingParams
from .openai.sampling import MAX_N

if TYPE_CHECKING:
    from .adapters.base import Adapter

_REQUEST_DEFAULTS: Final = InferenceRequest(request_id="")
_SAMPLING_DEFAULTS: Final = SamplingParams()
_OF_MEDIA: Final = ("media.detail", "media.uuid")
_NAMES: Final = {
    "bad_words_token_ids": "bad_words",
    "grammar_from_first_token": "include_reasoning",
    "lora_name": "model",
    "media": "messages",
    "media.detail": "messages",
    "media.uuid": "messages",
    "prompt_text": "prompt",
    "prompt_token_ids": "prompt",
    "data_parallel_rank": "x-data-parallel-rank",
}
# Hints: a server that cannot be told them does the same, so they are left out and reported.
ADVISORY: Final = ("session_id",)
# What the gateway does with a text that it makes itself, and cannot do with the server's; and media, which stand for tokens.
_OF_IDS: Final = ("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "media")


def fit(adapter: Adapter, request: InferenceRequest, *, drops: bool) -> tuple[InferenceRequest, tuple[str, ...]]:
    """The request without what the adapter cannot carry, and the OpenAI names of that.

    `n` is not looked at: where the wire has none, several calls are made. Raises UnsupportedFieldError unless `drops`, and
    MalformedRequestError for a value that the wire has no room for.
    """
    if not 1 <= request.sampling.n <= MAX_N:
        raise MalformedRequestError(f"n must be from 1 to {MAX_N}, got {request.sampling.n}.", param="n")
    if "" in request.sampling.stop:
        raise MalformedRequestError("stop cannot contain an empty string.", param="stop")
    carries = adapter.carries
    if request.prompt_text is not None and adapter.answers_text_with_text:
        carries = carries.difference(_OF_IDS)
    request, lost = _carried(adapter, request, carries | {"n"}, drops=drops)
    highest = adapter.ranges.get("top_k", (0, math.inf))[1]
    if request.sampling.top_k > highest:
        # No vocabulary has so many: it cuts off nothing, and so does the highest.
        request = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, top_k=int(highest)))
    _check_ranges(request, adapter.ranges)
    if request.sampling.max_tokens is None and adapter.default_max_tokens is not None:
        raise MalformedRequestError(
            f"this model server would stop after {adapter.default_max_tokens} tokens by itself: send max_tokens, or give the gateway"
            " the context length",
            param="max_tokens",
        )
    return request, lost


def fit_embedding(adapter: Adapter, request: InferenceRequest, *, drops: bool) -> tuple[InferenceRequest, tuple[str, ...]]:
    """Likewise for a prompt to embed."""
    assert adapter.embed is not None
    request, lost = _carried(adapter, request, adapter.embed.sends.keys() | adapter.embed.emulates.keys(), drops=drops)
    _check_ranges(request, adapter.embed.ranges)
    return request, lost


def _check_ranges(request: InferenceRequest, ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(request.sampling if name in SamplingParams.__struct_fields__ else request, name)
        if value is not None and not low <= value <= high:
            public = _openai_name(name)
            raise MalformedRequestError(
                f"{public} must be between {low} and {high} for this model server, got {value}. (parameter={public}, value={value})",
                param=public,
            )


def _carried(adapter: Adapter, request: InferenceRequest, carries: Set[str], *, drops: bool) -> tuple[InferenceRequest, tuple[str, ...]]:
    """The request without what is not in `carries`, and the OpenAI names of that. Raises UnsupportedFieldError unless `drops`."""
    if request.watermarking is False and "watermarking" not in carries:
        # Servers whose wire has no word for watermarks make none.
        request = msgspec.structs.replace(request, watermarking=None)
    lost = [name for name in asked_for(request) if name not in carries]
    if lost:
        missing = [name for name in lost if name not in ADVISORY]
        if missing and not drops:
            raise UnsupportedFieldError(
                f"`{_openai_name(missing[0])}` cannot be sent to this model server ({adapter.dialect}, snapshot {adapter.snapshot.name})",
                param=_openai_name(missing[0]),
            )
        request = _without(request, lost)
    return request, tuple(_openai_name(name) for name in lost)


def asked_for(request: InferenceRequest) -> list[str]:
    """The neutral fields that ask for something: those which differ from their defaults."""
    names = [name for name in request.__struct_fields__ if getattr(request, name) != getattr(_REQUEST_DEFAULTS, name)]
    if "sampling" in names:
        names.remove("sampling")
    for name in SamplingParams.__struct_fields__:
        value = getattr(request.sampling, name)
        if value != getattr(_SAMPLING_DEFAULTS, name):
            names.append(f"constraint.{value.kind}" if name == "constraint" else name)
    names += [name for name in _OF_MEDIA if any(getattr(one, name.partition(".")[2]) not in ("", "auto") for one in request.media)]
    return names


def _without(request: InferenceRequest, names: Sequence[str]) -> InferenceRequest:
    for name in _OF_MEDIA:
        if name in names:
            field = name.partition(".")[2]
            request = msgspec.structs.replace(request, media=tuple(msgspec.structs.replace(one, **{field: ""}) for one in request.media))
    plain = ["constraint" if name.startswith("constraint.") else name for name in names]
    sampling = {name: getattr(_SAMPLING_DEFAULTS, name) for name in plain if name in SamplingParams.__struct_fields__}
    outer = {name: getattr(_REQUEST_DEFAULTS, name) for name in plain if name in InferenceRequest.__struct_fields__}
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **sampling), **outer)


def _openai_name(name: str) -> str:
    """The request field behind a neutral name, where they differ."""
    if name.startswith("constraint."):
        return "response_format"
    return _NAMES.get(name, name)
