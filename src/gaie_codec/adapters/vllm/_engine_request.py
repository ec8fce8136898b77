"""The requests of `vllm.engine`: InferenceRequest <-> GenerateRequest."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from ..._events import Constraint, InferenceRequest, SamplingParams
from ..base import RequestCoder, existing
from ..wire import check_json

_FIELDS = {
    "request_id": "request_id",
    "prompt_token_ids": "tokenized.input_ids",
    "prompt_text": "text",
    "stream": "stream",
    "data_parallel_rank": "data_parallel_rank",
    "kv_transfer_params": "kv_transfer_params_json",
    "temperature": "sampling_params.temperature",
    "top_p": "sampling_params.top_p",
    "top_k": "sampling_params.top_k",
    "min_p": "sampling_params.min_p",
    "frequency_penalty": "sampling_params.frequency_penalty",
    "presence_penalty": "sampling_params.presence_penalty",
    "repetition_penalty": "sampling_params.repetition_penalty",
    "max_tokens": "sampling_params.max_tokens",
    "min_tokens": "sampling_params.min_tokens",
    "stop": "sampling_params.stop",
    "stop_token_ids": "sampling_params.stop_token_ids",
    "skip_special_tokens": "sampling_params.skip_special_tokens",
    "spaces_between_special_tokens": "sampling_params.spaces_between_special_tokens",
    "ignore_eos": "sampling_params.ignore_eos",
    "n": "sampling_params.n",
    "logprobs": "sampling_params.logprobs",
    "prompt_logprobs": "sampling_params.prompt_logprobs",
    "seed": "sampling_params.seed",
    "include_stop_str_in_output": "sampling_params.include_stop_str_in_output",
    "logit_bias": "sampling_params.logit_bias",
    "grammar_from_first_token": "sampling_params.grammar_from_first_token",
    "constraint.json_schema": "sampling_params.json_schema",
    "constraint.regex": "sampling_params.regex",
    "constraint.grammar": "sampling_params.grammar",
    "constraint.structural_tag": "sampling_params.structural_tag",
    "constraint.json_object": "sampling_params.json_object",
    "constraint.choice": "sampling_params.choice",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "trace_headers": "metadata",
    "return_token_ids": "ids always come",
    "thinks": "found by the server's own reasoning parser",
}
# the text of ids that are there changes nothing
_ALSO_READ = frozenset("tokenized.original_text sampling_params.prompt_logprobs".split())

_UINT32 = (0, 2**32 - 1)
# A float that rounds to 0 would be read as the default, one that rounds to infinity as nonsense.
_POSITIVE_FLOAT = (2.0**-126, 2.0**127)
_RANGES = MappingProxyType(
    {
        "top_p": _POSITIVE_FLOAT,
        "top_k": _UINT32,
        "repetition_penalty": _POSITIVE_FLOAT,
        "max_tokens": _UINT32,
        "min_tokens": _UINT32,
        "n": _UINT32,
        "seed": (-(2**31), 2**31 - 1),
    }
)


def coder(request_type: Any, *, tells_index: bool, tells_logprobs: bool) -> RequestCoder:
    """Both ways, for one snapshot. `tells_index` and `tells_logprobs` are whether its answers have these."""
    known = request_type.DESCRIPTOR.fields_by_name
    has_kv_transfer, has_dp_rank = "kv_transfer_params_json" in known, "data_parallel_rank" in known
    sends = existing(request_type, _FIELDS)
    # Without an index in the response several choices cannot be told apart, so asking for them would be a lie.
    for name, answered in (("n", tells_index), ("logprobs", tells_logprobs), ("prompt_logprobs", tells_logprobs)):
        if not answered:
            del sends[name]

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        message.request_id = request.request_id
        if request.prompt_text is None:
            message.tokenized.input_ids.extend(request.prompt_token_ids)
        else:
            message.text = request.prompt_text
        _encode_sampling(request.sampling, message.sampling_params)
        message.stream = request.stream
        if request.kv_transfer_params:
            message.kv_transfer_params_json = request.kv_transfer_params
        if request.data_parallel_rank is not None:
            message.data_parallel_rank = request.data_parallel_rank
        return message

    def decode_request(message: Any) -> InferenceRequest:
        return InferenceRequest(
            request_id=message.request_id,
            prompt_token_ids=list(message.tokenized.input_ids),
            prompt_text=message.text if message.HasField("text") else None,
            sampling=_decode_sampling(message.sampling_params, "grammar_from_first_token" in sends),
            stream=message.stream,
            kv_transfer_params=check_json(message.kv_transfer_params_json, "kv_transfer_params_json") if has_kv_transfer else "",
            data_parallel_rank=message.data_parallel_rank if has_dp_rank and message.HasField("data_parallel_rank") else None,
        )

    return RequestCoder(
        sends=sends, emulates=_EMULATED, also_reads=_ALSO_READ, ranges=_RANGES, encode=encode_request, decode=decode_request
    )


def _encode_sampling(params: SamplingParams, message: Any) -> None:
    if params.temperature is not None:
        message.temperature = params.temperature
    message.top_p = params.top_p
    message.top_k = params.top_k
    message.min_p = params.min_p
    message.frequency_penalty = params.frequency_penalty
    message.presence_penalty = params.presence_penalty
    message.repetition_penalty = params.repetition_penalty
    if params.max_tokens is not None:
        message.max_tokens = params.max_tokens
    message.min_tokens = params.min_tokens
    message.stop.extend(params.stop)
    message.stop_token_ids.extend(params.stop_token_ids)
    message.skip_special_tokens = params.skip_special_tokens
    message.spaces_between_special_tokens = params.spaces_between_special_tokens
    message.ignore_eos = params.ignore_eos
    message.n = params.n
    if params.constraint is not None:
        _encode_constraint(params.constraint, message)
    if params.logprobs is not None:
        message.logprobs = params.logprobs
    if params.prompt_logprobs is not None:
        message.prompt_logprobs = params.prompt_logprobs
    if params.seed is not None:
        message.seed = params.seed
    message.include_stop_str_in_output = params.include_stop_str_in_output
    if params.logit_bias:
        message.logit_bias.update(params.logit_bias)
    if params.grammar_from_first_token:
        message.grammar_from_first_token = True


def _decode_sampling(message: Any, has_gate: bool) -> SamplingParams:
    # A zero that the servicer would read as a default is decoded as that default.
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        skip_special_tokens=message.skip_special_tokens,
        spaces_between_special_tokens=message.spaces_between_special_tokens,
        ignore_eos=message.ignore_eos,
        n=message.n or 1,
        constraint=_decode_constraint(message),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        seed=message.seed if message.HasField("seed") else None,
        include_stop_str_in_output=message.include_stop_str_in_output,
        logit_bias=dict(message.logit_bias),
        grammar_from_first_token=message.grammar_from_first_token if has_gate else False,
    )


def _encode_constraint(constraint: Constraint, message: Any) -> None:
    if constraint.kind == "json_object":
        message.json_object = True
    elif constraint.kind == "choice":
        message.choice.choices.extend(constraint.value)
    else:
        setattr(message, constraint.kind, constraint.value)


def _decode_constraint(message: Any) -> Constraint | None:
    kind = message.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not message.json_object):
        return None
    if kind == "json_object":
        return Constraint(kind=kind)
    return Constraint(kind=kind, value=tuple(message.choice.choices) if kind == "choice" else getattr(message, kind))
