"""The requests of `sglang.scheduler`: InferenceRequest <-> GenerateRequest."""

from __future__ import annotations

from typing import Any

from ..._events import Constraint, InferenceRequest, SamplingParams
from ..base import RequestCoder, existing
from ..wire import decode_logit_bias, regex_of_choices

_ANY_OBJECT = '{"type": "object"}'  # as SGLang's own HTTP layer asks for a JSON object

_FIELDS = {
    "request_id": "request_id",
    "prompt_token_ids": "tokenized.input_ids",
    "stream": "stream",
    "lora_name": "lora_id",
    "thinks": "require_reasoning",
    "data_parallel_rank": "data_parallel_rank",
    "temperature": "sampling_params.temperature",
    "top_p": "sampling_params.top_p",
    "top_k": "sampling_params.top_k",
    "min_p": "sampling_params.min_p",
    "frequency_penalty": "sampling_params.frequency_penalty",
    "presence_penalty": "sampling_params.presence_penalty",
    "repetition_penalty": "sampling_params.repetition_penalty",
    "max_tokens": "sampling_params.max_new_tokens",
    "min_tokens": "sampling_params.min_new_tokens",
    "stop_token_ids": "sampling_params.stop_token_ids",
    "skip_special_tokens": "sampling_params.skip_special_tokens",
    "spaces_between_special_tokens": "sampling_params.spaces_between_special_tokens",
    "ignore_eos": "sampling_params.ignore_eos",
    "n": "sampling_params.n",
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "logprob_start_len",
    "logprob_token_ids": "token_ids_logprob",
    "include_stop_str_in_output": "sampling_params.no_stop_trim",
    "logit_bias": "sampling_params.logit_bias",
    "stream_interval": "sampling_params.stream_interval",
    "constraint.json_schema": "sampling_params.json_schema",
    "constraint.regex": "sampling_params.regex",
    "constraint.grammar": "sampling_params.ebnf_grammar",
    "constraint.structural_tag": "sampling_params.structural_tag",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "trace_headers": "metadata",
    "return_token_ids": "ids always come",
    "thinks": "constraints hold from the first token on, and no reasoning tokens are counted",
    "stop": "matched by the gateway, which then ends the call",
    "grammar_from_first_token": "by the default: require_reasoning is not sent then",
    "constraint.json_object": "sampling_params.json_schema",
    "constraint.choice": "sampling_params.regex",
}
_ALSO_READ = frozenset(
    ("return_logprob", "sampling_params.stop", "tokenized.original_text", "timestamp", "log_metrics")
)  # the last three change nothing in what is generated
_COUNT = (0, 2**31 - 1)  # uint32 on the wire since smg-0.3.2, int32 in the scheduler
_POSITIVE_FLOAT = (2.0**-126, 2.0**127)


def coder(request_type: Any, *, shows_selected: bool) -> RequestCoder:
    """Both ways, for one snapshot. `shows_selected` is whether answers have log probabilities of tokens that were selected by id."""
    has_rank_presence = request_type.DESCRIPTOR.fields_by_name["data_parallel_rank"].has_presence
    sends = existing(request_type, _FIELDS)
    if not shows_selected:
        del sends["logprob_token_ids"]  # no answer would show them
    emulates = {name: how for name, how in _EMULATED.items() if name not in sends}

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        params = request.sampling
        message.request_id = request.request_id
        message.tokenized.input_ids.extend(request.prompt_token_ids)
        _encode_sampling(params, message.sampling_params)
        message.return_logprob = params.logprobs is not None or params.prompt_logprobs is not None
        message.logprob_start_len = -1 if params.prompt_logprobs is None else 0
        message.top_logprobs_num = max(params.logprobs or 0, params.prompt_logprobs or 0)
        message.token_ids_logprob.extend(params.logprob_token_ids)
        if request.lora_name:
            message.lora_id = request.lora_name
        if request.data_parallel_rank is not None:
            message.data_parallel_rank = request.data_parallel_rank
        message.stream = request.stream
        if request.thinks and "thinks" in sends and not params.grammar_from_first_token:
            message.require_reasoning = True
        return message

    def decode_request(message: Any) -> InferenceRequest:
        has_rank = message.HasField("data_parallel_rank") if has_rank_presence else message.data_parallel_rank
        return InferenceRequest(
            request_id=message.request_id,
            prompt_token_ids=list(message.tokenized.input_ids),
            sampling=_decode_sampling(message),
            stream=message.stream,
            thinks="thinks" in sends and message.require_reasoning,
            lora_name=message.lora_id,
            data_parallel_rank=message.data_parallel_rank if has_rank else None,
        )

    return RequestCoder(
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        ranges={
            "top_p": _POSITIVE_FLOAT,
            "top_k": _COUNT,
            "repetition_penalty": _POSITIVE_FLOAT,
            "max_tokens": _COUNT,
            "min_tokens": _COUNT,
            "n": _COUNT,
            "stream_interval": (1, 2**31 - 1),
            # Without presence a rank of 0 is not to be told from none.
            "data_parallel_rank": (0 if has_rank_presence else 1, 2**31 - 1),
        },
        encode=encode_request,
        decode=decode_request,
    )


def _encode_sampling(params: SamplingParams, message: Any) -> None:
    message.temperature = 1.0 if params.temperature is None else params.temperature
    message.top_p = params.top_p
    message.top_k = params.top_k or -1
    message.min_p = params.min_p
    message.frequency_penalty = params.frequency_penalty
    message.presence_penalty = params.presence_penalty
    message.repetition_penalty = params.repetition_penalty
    if params.max_tokens is not None:
        message.max_new_tokens = params.max_tokens
    message.stop_token_ids.extend(params.stop_token_ids)
    message.skip_special_tokens = params.skip_special_tokens
    message.spaces_between_special_tokens = params.spaces_between_special_tokens
    if params.constraint is not None:
        _encode_constraint(params.constraint, message)
    message.n = params.n
    message.min_new_tokens = params.min_tokens
    message.ignore_eos = params.ignore_eos
    message.no_stop_trim = params.include_stop_str_in_output
    for token_id, bias in params.logit_bias.items():
        message.logit_bias[str(token_id)] = bias
    if params.stream_interval is not None:
        message.stream_interval = params.stream_interval


def _decode_sampling(request: Any) -> SamplingParams:
    message = request.sampling_params
    # Zeros that the servicer reads as a default are decoded as that default; a temperature of 0 is greedy, as it says.
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=max(message.top_k, 0),
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        max_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else None,
        min_tokens=message.min_new_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        skip_special_tokens=message.skip_special_tokens,
        spaces_between_special_tokens=message.spaces_between_special_tokens,
        ignore_eos=message.ignore_eos,
        n=message.n or 1,
        constraint=_decode_constraint(message),
        logprobs=request.top_logprobs_num if request.return_logprob else None,
        prompt_logprobs=request.top_logprobs_num if request.return_logprob and request.logprob_start_len >= 0 else None,
        logprob_token_ids=tuple(request.token_ids_logprob),
        include_stop_str_in_output=message.no_stop_trim,
        logit_bias=decode_logit_bias(message.logit_bias),
        stream_interval=message.stream_interval or None,
    )


def _encode_constraint(constraint: Constraint, message: Any) -> None:
    if constraint.kind == "json_object":
        message.json_schema = _ANY_OBJECT
    elif constraint.kind == "choice":
        message.regex = regex_of_choices(constraint.value)
    elif constraint.kind == "grammar":
        message.ebnf_grammar = constraint.value
    else:
        setattr(message, constraint.kind, constraint.value)


def _decode_constraint(message: Any) -> Constraint | None:
    match message.WhichOneof("constraint"):
        case None:
            return None
        case "json_schema" if message.json_schema == _ANY_OBJECT:
            return Constraint(kind="json_object")
        case "ebnf_grammar":
            return Constraint(kind="grammar", value=message.ebnf_grammar)
        case kind:
            return Constraint(kind=kind, value=getattr(message, kind))
