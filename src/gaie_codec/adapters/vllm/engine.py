"""`vllm.engine`: service `vllm.grpc.engine.VllmEngine`, token ids in, token ids out.

Spoken by `vllm serve --grpc` and the smg servicers. Traps of this wire: scalars without presence whose zero is not OpenAI's default
(top_p, repetition_penalty, the two *special_tokens flags) are always written; a streamed Complete repeats ids which chunks already
brought; `completion_tokens` is the message's own count with the Python servicer and the choice's total with the Rust one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from ..._errors import UsageError
from ..._events import Constraint, Event, FinishEvent, InferenceRequest, ModelInfo, PromptLogprob, SamplingParams, TokensEvent
from .._embeddings import servicer_embeddings
from .._loads import vllm_engine_loads
from ..base import Adapter, existing, find_abort, trace_metadata
from ..wire import (
    check_json,
    decode_json_object,
    decode_logprobs,
    decode_prompt_logprobs,
    encode_logprobs,
    encode_prompt_logprobs,
)

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "vllm.grpc.engine.VllmEngine"
_INFO_PATH = f"/{SERVICE}/GetModelInfo"
_SERVER_PATH = f"/{SERVICE}/GetServerInfo"

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


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate = snapshot.method(SERVICE, "Generate")
    has_index = snapshot.has_field("GenerateStreamChunk", "index")
    has_logprobs = snapshot.has_field("GenerateStreamChunk", "output_logprobs")
    has_matched_stop = snapshot.has_field("GenerateComplete", "matched_stop_str")
    has_kv_transfer = snapshot.has_field("GenerateRequest", "kv_transfer_params_json")
    has_dp_rank = snapshot.has_field("GenerateRequest", "data_parallel_rank")

    request_type: Any = generate.request
    response_type: Any = generate.response
    info_type: Any = snapshot.message("GetModelInfoResponse")
    tells_parser = snapshot.has_field("GetServerInfoResponse", "engine_reasoning_parser")

    sends = existing(request_type, _FIELDS)
    # Without an index in the response several choices cannot be told apart, so asking for them would be a lie.
    for name, answered in (("n", has_index), ("logprobs", has_logprobs), ("prompt_logprobs", has_logprobs)):
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

    def decode_response(message: Any) -> tuple[Event, ...]:
        which = message.WhichOneof("response")
        if which is None:
            return ()
        return (decode_complete(message.complete) if which == "complete" else decode_chunk(message.chunk),)

    def decode_chunk(chunk: Any) -> TokensEvent:
        return TokensEvent(
            index=chunk.index if has_index else 0,
            token_ids=chunk.token_ids[:],
            logprobs=decode_logprobs(chunk.output_logprobs) if has_logprobs and chunk.HasField("output_logprobs") else (),
            prompt_tokens=chunk.prompt_tokens,
            completion_tokens=chunk.completion_tokens,
            cached_tokens=chunk.cached_tokens,
            prompt_logprobs=decode_prompt(chunk),
        )

    def decode_prompt(part: Any) -> tuple[PromptLogprob, ...]:
        if not (has_logprobs and part.HasField("input_logprobs")):
            return ()
        # The token itself comes first, and then others until there are as many as were asked for.
        return decode_prompt_logprobs(part.input_logprobs, is_cut=True)

    def decode_tokens(message: Any) -> tuple[int, list[int]]:
        chunk = message.chunk
        return chunk.index if has_index else 0, chunk.token_ids[:]

    def decode_complete(complete: Any) -> FinishEvent:
        matched = complete.WhichOneof("matched_stop") if has_matched_stop else None
        return FinishEvent(
            index=complete.index if has_index else 0,
            token_ids=complete.output_ids[:],
            logprobs=decode_logprobs(complete.output_logprobs) if has_logprobs and complete.HasField("output_logprobs") else (),
            finish_reason=complete.finish_reason or "stop",
            matched_stop=getattr(complete, matched) if matched else None,
            prompt_tokens=complete.prompt_tokens,
            completion_tokens=complete.completion_tokens,
            cached_tokens=complete.cached_tokens,
            prompt_logprobs=decode_prompt(complete),
            kv_transfer_params=check_json(complete.kv_transfer_params_json, "kv_transfer_params_json") if has_kv_transfer else "",
        )

    def encode_response(event: Event) -> Any:
        message = response_type()
        if isinstance(event, TokensEvent):
            part = message.chunk
            part.SetInParent()
            part.token_ids.extend(event.token_ids)
        elif not isinstance(event, FinishEvent):
            raise UsageError(f"{SERVICE} has no message for a {type(event).__name__}")
        else:
            part = message.complete
            part.output_ids.extend(event.token_ids)
            part.finish_reason = event.finish_reason
            if has_matched_stop and isinstance(event.matched_stop, str):
                part.matched_stop_str = event.matched_stop
            elif has_matched_stop and event.matched_stop is not None:
                part.matched_token_id = event.matched_stop
            if has_kv_transfer and event.kv_transfer_params:
                part.kv_transfer_params_json = event.kv_transfer_params
        part.prompt_tokens = event.prompt_tokens
        part.completion_tokens = event.completion_tokens
        part.cached_tokens = event.cached_tokens
        if has_logprobs and event.logprobs:
            encode_logprobs(event.logprobs, part.output_logprobs)
        if has_logprobs and event.prompt_logprobs:
            encode_prompt_logprobs(event.prompt_logprobs, part.input_logprobs)
        if has_index:
            part.index = event.index
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        message = answers[_INFO_PATH]
        known = {field.name for field in info_type.DESCRIPTOR.fields}
        text = message.default_sampling_params_json if "default_sampling_params_json" in known else ""
        return ModelInfo(
            model_path=message.model_path,
            is_generation=message.is_generation,
            max_model_len=message.max_context_length,
            vocab_size=message.vocab_size,
            served_model_name=message.served_model_name if "served_model_name" in known else "",
            tokenizer_path=message.tokenizer_path if "tokenizer_path" in known else "",
            eos_token_ids=tuple(message.eos_token_ids) if "eos_token_ids" in known else (),
            default_sampling_params=decode_json_object(text, "default_sampling_params_json"),
            reasoning_parser=answers[_SERVER_PATH].engine_reasoning_parser if tells_parser and _SERVER_PATH in answers else "",
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        message = info_type()
        known = info_type.DESCRIPTOR.fields_by_name
        message.model_path = info.model_path
        message.is_generation = info.is_generation
        message.max_context_length = info.max_model_len
        message.vocab_size = info.vocab_size
        if "served_model_name" in known:
            message.served_model_name = info.served_model_name
        if "tokenizer_path" in known:
            message.tokenizer_path = info.tokenizer_path
        if "eos_token_ids" in known:
            message.eos_token_ids.extend(info.eos_token_ids)
        if "default_sampling_params_json" in known and info.default_sampling_params:
            message.default_sampling_params_json = msgspec.json.encode(info.default_sampling_params).decode()
        if not tells_parser:
            return {_INFO_PATH: message}
        server: Any = snapshot.method_at(_SERVER_PATH).response()
        server.engine_reasoning_parser = info.reasoning_parser
        return {_INFO_PATH: message, _SERVER_PATH: server}

    abort_path, encode_abort = find_abort(snapshot, SERVICE, lambda request_id: {"request_ids": [request_id]})
    loads = vllm_engine_loads(snapshot, SERVICE)
    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        generate_paths=(generate.path,),
        path_for=lambda _: generate.path,
        info_paths=(_INFO_PATH, _SERVER_PATH) if tells_parser else (_INFO_PATH,),
        tokenizer_path=f"/{SERVICE}/GetTokenizer" if snapshot.has_method(SERVICE, "GetTokenizer") else None,
        health_path=f"/{SERVICE}/HealthCheck" if snapshot.has_method(SERVICE, "HealthCheck") else None,
        advertises_defaults="default_sampling_params_json" in info_type.DESCRIPTOR.fields_by_name,
        abort_path=abort_path,
        encode_abort=encode_abort,
        loads_path=loads.path,
        loads_request=loads.request,
        capacity_path=loads.capacity_path,
        request_type=request_type,
        response_type=response_type,
        sends=sends,
        emulates=_EMULATED,
        also_reads=_ALSO_READ,
        carries=frozenset((*sends, *_EMULATED)),
        ranges=_RANGES,
        encode_request=encode_request,
        decode_request=decode_request,
        encode_metadata=trace_metadata,
        decode_response=decode_response,
        decode_tokens=decode_tokens,
        encode_response=encode_response,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
        decode_loads=loads.decode,
        encode_loads=loads.encode,
        decode_capacity=loads.decode_capacity,
        encode_capacity=loads.encode_capacity,
        embed=servicer_embeddings(snapshot, SERVICE),
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
