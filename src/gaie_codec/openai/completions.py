"""`POST /v1/completions`: a JSON body -> one InferenceRequest per prompt, and deltas -> chunks or one body.

A prompt is a text, token ids, or a list of either; the choices of prompt p are n*p to n*p + n - 1. Log probabilities of an echoed prompt
are asked for like those of the output. An echo without any output takes one token all the same, which is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import UnsupportedFieldError, UsageError
from .._events import InferenceRequest, SamplingParams
from . import chat, policy, sampling
from .endpoint import Asked, Decoded
from .fields import bool_field, decode_json_object, int_field, range_error
from .flavors import renamed
from .logprobs import decode_completion_logprobs, decode_logprob_token_ids, decode_prompt_logprobs, decode_shows_ids
from .prompts import decode_prompts
from .request import (
    base_model,
    decode_max_tokens,
    decode_model,
    decode_request_id,
    decode_routing,
    decode_stream_options,
    truncate,
)

if TYPE_CHECKING:
    from ..text import Tokenizer

PATH: Final = "/v1/completions"
ID_PREFIX: Final = "cmpl-"
DEFAULT_MAX_TOKENS: Final = 16

READ: Final = sampling.FIELDS | frozenset(
    (
        "model prompt request_id stream stream_options return_token_ids return_tokens_as_token_ids echo logprobs prompt_logprobs"
        " logprob_token_ids add_special_tokens truncate_prompt_tokens truncation_side priority cache_salt kv_transfer_params"
        " ec_transfer_params watermarking session_id"
    ).split()
)
ADVISORY: Final = policy.ADVISORY
REFUSED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({**policy.REFUSED, "suffix": (None, ""), "prompt_embeds": (None,)})


class CompletionOptions(chat.ChatOptions, frozen=True, kw_only=True):
    """What the answer has to look like."""

    echoes: bool = False
    echo_texts: tuple[str, ...] = ()
    """Of each prompt; none where their ids are shown instead, as by vLLM."""
    hides_output: bool = False
    """Only the prompt is shown."""

    @property
    def is_detailed(self) -> bool:
        """Whether a chunk in the middle of the stream says more than its text, or the first of a choice does."""
        return super().is_detailed or self.echoes

    def echo_of(self, number: int) -> str:
        """What the text begins with where the prompt is that with this number."""
        return self.echo_texts[number] if self.echo_texts else ""


def decode_request(body: bytes, asked: Asked) -> Decoded:
    """Decode a completion request. Raises RequestError."""
    tokenizer, model = asked.tokenizer, asked.model
    if tokenizer is None:
        raise UsageError("a prompt has to be tokenized, and there is no tokenizer")
    fields = renamed(decode_json_object(body), asked.flavor)
    policy.check_types(fields, policy.COMPLETION_TYPES)
    if fields.get("suffix"):
        raise UnsupportedFieldError("suffix is not currently supported", param="suffix")
    lost = policy.refuse(fields, REFUSED, drops=asked.drops)
    given, name = decode_model(fields, asked)
    stream = bool_field(fields, "stream")
    prefixes = asked.flavor.prefixes_ids
    request_id = (ID_PREFIX if prefixes else "") + decode_request_id(fields, asked)
    wanted = int_field(fields, "max_tokens")
    if "max_tokens" not in fields:
        wanted = DEFAULT_MAX_TOKENS
    echoes = bool_field(fields, "echo")
    hides_output = echoes and wanted == 0
    if hides_output:
        wanted = 1
    vocab_size = model.vocab_size or tokenizer.vocab_size
    logprobs = decode_completion_logprobs(fields, vocab_size)
    prompt_logprobs = decode_prompt_logprobs(fields, vocab_size, stream=stream)
    selected = decode_logprob_token_ids(fields, vocab_size, logprobs)
    if selected and hides_output:
        raise range_error("logprob_token_ids", "`logprob_token_ids` is for generated tokens, and there are none.")
    if echoes and prompt_logprobs is None:
        prompt_logprobs = logprobs
    include_usage, continuous_usage = decode_stream_options(fields, stream)
    return_token_ids = bool_field(fields, "return_token_ids")
    texts, prompts = decode_prompts(fields, tokenizer, model, asked.max_prompts)
    params = sampling.decode_sampling(
        fields,
        model=model,
        vocab_size=vocab_size,
        max_tokens=wanted,
        logprobs=0 if selected else logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=selected,
        max_stop_strings=asked.flavor.max_stop_strings,
    )
    if params.n * len(prompts) > sampling.MAX_N:
        raise range_error("n", f"n times the number of prompts must be at most {sampling.MAX_N}, got {params.n * len(prompts)}.", params.n)
    inferences = []
    for place, token_ids in enumerate(prompts):
        kept = truncate(fields, token_ids, model.max_model_len)
        inferences.append(
            InferenceRequest(
                request_id=f"{request_id}-{place}" if prefixes or len(prompts) > 1 else request_id,
                model=base_model(name, model),
                prompt_token_ids=kept,
                sampling=_limited(params, decode_max_tokens(wanted, len(kept), model, fills=asked.fills_max_tokens)),
                stream=stream,
                lora_name=model.lora_adapters.get(name, ""),
                return_token_ids=return_token_ids,
                **decode_routing(fields),
            )
        )
    options = CompletionOptions(
        id=request_id,
        model=given or inferences[0].model,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=return_token_ids,
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
        prompt_logprobs=prompt_logprobs is not None,
        return_tokens_as_token_ids=decode_shows_ids(fields),
        echoes=echoes,
        echo_texts=_echo_texts(texts, prompts, tokenizer) if echoes and not return_token_ids else (),
        hides_output=hides_output,
    )
    ignored = (*lost, *policy.unknown(fields, READ | REFUSED.keys()))
    return Decoded(prompts=tuple(inferences), options=options, ignored=tuple(sorted(ignored)))


def _limited(params: SamplingParams, max_tokens: int | None) -> SamplingParams:
    """The parameters of one prompt, whose length decides how much room there is."""
    if max_tokens == params.max_tokens:
        return params
    if max_tokens is not None and params.min_tokens > max_tokens:
        least = params.min_tokens
        raise range_error("min_tokens", f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {least}.", least)
    return msgspec.structs.replace(params, max_tokens=max_tokens)


def _echo_texts(texts: list[str | None], prompts: list[list[int]], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The prompts as they were sent, or what their ids stand for."""
    return tuple(
        tokenizer.detokenizer((), skip_special_tokens=False).decode(token_ids) if text is None else text
        for text, token_ids in zip(texts, prompts, strict=True)
    )
