"""What SGLang's own servers refuse alike. The texts are SGLang's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import MalformedRequestError, ModelInfo, SamplingParams


def check_prompt(token_ids: Sequence[int], model: ModelInfo) -> None:
    """Raise MalformedRequestError for a prompt that SGLang refuses."""
    if not token_ids:
        raise MalformedRequestError("prompt cannot be empty")
    if len(token_ids) >= model.max_model_len:
        raise MalformedRequestError(
            f"The input ({len(token_ids)} tokens) is longer than the model's context length ({model.max_model_len} tokens)."
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < model.vocab_size:
            raise MalformedRequestError(f"input_ids contains out-of-vocabulary token id {token_id}; valid range is [0, {model.vocab_size})")


def check_length(params: SamplingParams, token_ids: Sequence[int], model: ModelInfo) -> None:
    """SGLang does not shorten what was asked for. Raises MalformedRequestError."""
    total = len(token_ids) + (params.max_tokens or 0)
    if total > model.max_model_len:
        raise MalformedRequestError(
            f"Requested token count exceeds the model's maximum context length of {model.max_model_len} tokens. You requested a total"
            f" of {total} tokens: {len(token_ids)} tokens from the input messages and {params.max_tokens} tokens for the completion."
        )


def check_sampling(params: SamplingParams) -> None:
    """Raise MalformedRequestError for a value out of SGLang's range."""
    temperature = 1.0 if params.temperature is None else params.temperature
    if not (math.isfinite(temperature) and temperature >= 0):
        raise MalformedRequestError(f"temperature must be a non-negative finite number, got {temperature:g}")
    if not 0 < params.top_p <= 1:
        raise MalformedRequestError(f"top_p must be in (0, 1], got {params.top_p:g}")
    if not 0 <= params.min_p <= 1:
        raise MalformedRequestError(f"min_p must be in [0, 1], got {params.min_p:g}")
    if not 0 < params.repetition_penalty <= 2:
        raise MalformedRequestError(f"repetition_penalty must be in (0, 2], got {params.repetition_penalty:g}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(params, name) <= 2:
            raise MalformedRequestError(f"{name} must be in [-2, 2], got {getattr(params, name):g}")
    if params.max_tokens is not None and params.max_tokens < params.min_tokens:
        raise MalformedRequestError(f"min_new_tokens must be at most max_new_tokens, got {params.min_tokens}")
