"""`sglang.scheduler`: service `sglang.grpc.scheduler.SglangScheduler`, token ids in, token ids out.

Spoken by SGLang's `--smg-grpc-mode` (before 0.5.16 `--grpc-mode`). Traps of this wire: hardly a scalar has presence, and the zeros of
temperature (greedy), top_k, n and logprob_start_len (log probabilities of the whole prompt) are not OpenAI's defaults, so all are
written; the engine behind it has no tokenizer and refuses stop strings, so they are the gateway's; unary choices all say index 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ..._errors import UsageError, code_from_server_status, server_status_from_code
from ..._events import (
    Constraint,
    ErrorEvent,
    Event,
    FinishEvent,
    InferenceRequest,
    ModelInfo,
    PromptLogprob,
    SamplingParams,
    TokensEvent,
)
from .._embeddings import servicer_embeddings
from .._loads import sglang_scheduler_loads
from ..base import Adapter, Convention, existing, find_abort, trace_metadata
from ..wire import (
    decode_json_object,
    decode_logit_bias,
    decode_logprobs,
    decode_prompt_logprobs,
    encode_logprobs,
    encode_prompt_logprobs,
    regex_of_choices,
)

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "sglang.grpc.scheduler.SglangScheduler"
_INFO_PATH = f"/{SERVICE}/GetModelInfo"
_SERVER_PATH = f"/{SERVICE}/GetServerInfo"
_LORA_PATH = f"/{SERVICE}/ListLoadedLoRAAdapters"
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


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate = snapshot.method(SERVICE, "Generate")
    request_type: Any = generate.request
    response_type: Any = generate.response
    info_type: Any = snapshot.message("GetModelInfoResponse")
    tells_args = snapshot.has_method(SERVICE, "GetServerInfo") and snapshot.has_field("GetServerInfoResponse", "server_args")
    info_fields = frozenset(field.name for field in info_type.DESCRIPTOR.fields)
    has_lora_list = snapshot.has_method(SERVICE, "ListLoadedLoRAAdapters")
    has_inline_error = snapshot.has_field("GenerateResponse", "error")
    has_reasoning_tokens = snapshot.has_field("GenerateStreamChunk", "reasoning_tokens")
    has_rank_presence = request_type.DESCRIPTOR.fields_by_name["data_parallel_rank"].has_presence

    has_selected = snapshot.has_field("OutputLogProbs", "token_ids_logprobs")
    sends = existing(request_type, _FIELDS)
    if not has_selected:
        del sends["logprob_token_ids"]  # no answer would show them
    emulates = {name: how for name, how in _EMULATED.items() if name not in sends}
    ranges = {
        "top_p": _POSITIVE_FLOAT,
        "top_k": _COUNT,
        "repetition_penalty": _POSITIVE_FLOAT,
        "max_tokens": _COUNT,
        "min_tokens": _COUNT,
        "n": _COUNT,
        "stream_interval": (1, 2**31 - 1),
        # Without presence a rank of 0 is not to be told from none.
        "data_parallel_rank": (0 if has_rank_presence else 1, 2**31 - 1),
    }

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

    def decode_response(message: Any) -> tuple[Event, ...]:
        which = message.WhichOneof("response")
        if which == "chunk":
            return (decode_chunk(message.chunk),)
        if which == "complete":
            return (decode_complete(message.complete),)
        return (_decode_error(message.error),) if which == "error" else ()

    def decode_chunk(chunk: Any) -> TokensEvent:
        return TokensEvent(
            index=chunk.index,
            token_ids=chunk.token_ids[:],
            logprobs=decode_logprobs(chunk.output_logprobs, has_selected=has_selected) if chunk.HasField("output_logprobs") else (),
            prompt_tokens=chunk.prompt_tokens,
            completion_tokens=chunk.completion_tokens,
            cached_tokens=chunk.cached_tokens,
            reasoning_tokens=chunk.reasoning_tokens if has_reasoning_tokens else 0,
            prompt_logprobs=_decode_prompt(chunk),
        )

    def decode_complete(complete: Any) -> FinishEvent:
        matched = complete.WhichOneof("matched_stop")
        return FinishEvent(
            index=complete.index,
            token_ids=complete.output_ids[:],
            logprobs=decode_logprobs(complete.output_logprobs, has_selected=has_selected) if complete.HasField("output_logprobs") else (),
            finish_reason=complete.finish_reason or "stop",
            matched_stop=getattr(complete, matched) if matched else None,
            prompt_tokens=complete.prompt_tokens,
            completion_tokens=complete.completion_tokens,
            cached_tokens=complete.cached_tokens,
            reasoning_tokens=complete.reasoning_tokens if has_reasoning_tokens else 0,
            prompt_logprobs=_decode_prompt(complete),
        )

    def decode_tokens(message: Any) -> tuple[int, list[int]]:
        chunk = message.chunk
        return chunk.index, chunk.token_ids[:]

    def encode_response(event: Event) -> Any:
        message = response_type()
        if isinstance(event, TokensEvent):
            part = message.chunk
            part.SetInParent()
            part.token_ids.extend(event.token_ids)
        elif isinstance(event, FinishEvent):
            part = message.complete
            part.SetInParent()
            part.output_ids.extend(event.token_ids)
            part.finish_reason = event.finish_reason
            if isinstance(event.matched_stop, str):
                part.matched_stop_str = event.matched_stop
            elif event.matched_stop is not None:
                part.matched_token_id = event.matched_stop
        elif isinstance(event, ErrorEvent) and has_inline_error:
            message.error.message = event.message
            message.error.http_status_code = str(server_status_from_code(event.code))
            return message
        else:
            raise UsageError(f"{snapshot} has no message for a {type(event).__name__}")
        part.prompt_tokens = event.prompt_tokens
        part.completion_tokens = event.completion_tokens
        part.cached_tokens = event.cached_tokens
        if has_reasoning_tokens:
            part.reasoning_tokens = event.reasoning_tokens
        if event.logprobs:
            encode_logprobs(event.logprobs, part.output_logprobs)
        if event.prompt_logprobs:
            encode_prompt_logprobs(event.prompt_logprobs, part.input_logprobs)
        part.index = event.index
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        message, loras = answers.get(_INFO_PATH, info_type(is_generation=True)), answers.get(_LORA_PATH)
        server = answers.get(_SERVER_PATH)
        started_with = server.server_args if server is not None else {}
        text = message.default_sampling_params_json if "default_sampling_params_json" in info_fields else ""
        return ModelInfo(
            model_path=message.model_path,
            served_model_name=message.served_model_name,
            tokenizer_path=message.tokenizer_path,
            is_generation=message.is_generation,
            max_model_len=max(message.max_context_length, 0),
            vocab_size=max(message.vocab_size, 0),
            eos_token_ids=tuple(message.eos_token_ids),
            default_sampling_params=decode_json_object(text, "default_sampling_params_json"),
            lora_adapters={one.lora_name: one.lora_id for one in loras.loaded_adapters} if loras is not None else {},
            tool_call_parser=_text(started_with, "tool_call_parser"),
            reasoning_parser=_text(started_with, "reasoning_parser"),
            server_version=server.sglang_version if server is not None else "",
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        message = info_type()
        message.model_path = info.model_path
        message.served_model_name = info.served_model_name
        message.tokenizer_path = info.tokenizer_path
        message.is_generation = info.is_generation
        message.max_context_length = info.max_model_len
        message.vocab_size = info.vocab_size
        message.eos_token_ids.extend(info.eos_token_ids)
        if "default_sampling_params_json" in info_fields and info.default_sampling_params:
            message.default_sampling_params_json = msgspec.json.encode(info.default_sampling_params).decode()
        answers = {_INFO_PATH: message}
        if has_lora_list:
            loras: Any = snapshot.method(SERVICE, "ListLoadedLoRAAdapters").response()
            for name, lora_id in info.lora_adapters.items():
                loras.loaded_adapters.add(lora_name=name, lora_id=lora_id)
            answers[_LORA_PATH] = loras
        if tells_args:
            server: Any = snapshot.method_at(_SERVER_PATH).response()
            for name in ("tool_call_parser", "reasoning_parser"):
                server.server_args[name] = getattr(info, name) or None
            server.sglang_version = info.server_version
            answers[_SERVER_PATH] = server
        return answers

    abort_path, encode_abort = find_abort(snapshot, SERVICE, lambda request_id: {"request_id": request_id})
    loads = sglang_scheduler_loads(snapshot, SERVICE)
    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        generate_paths=(generate.path,),
        path_for=lambda _: generate.path,
        info_paths=(_INFO_PATH, *((_LORA_PATH,) if has_lora_list else ()), *((_SERVER_PATH,) if tells_args else ())),
        tokenizer_path=f"/{SERVICE}/GetTokenizer" if snapshot.has_method(SERVICE, "GetTokenizer") else None,
        advertises_defaults="default_sampling_params_json" in info_fields,
        abort_path=abort_path,
        encode_abort=encode_abort,
        loads_path=loads.path,
        loads_request=loads.request,
        capacity_path=loads.capacity_path,
        request_type=request_type,
        response_type=response_type,
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        carries=frozenset((*sends, *emulates)),
        ranges=ranges,
        ends_at_stop_strings=False,
        names_eos=True,
        streams_several=True,
        convention=Convention(counts="total", repeats="last"),
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


def _decode_prompt(part: Any) -> tuple[PromptLogprob, ...]:
    return decode_prompt_logprobs(part.input_logprobs, is_cut=False) if part.HasField("input_logprobs") else ()


def _decode_error(error: Any) -> ErrorEvent:
    """SGLang 0.5.3 to 0.5.9 report failures in the stream, whose status is then OK. The HTTP status is a text."""
    status = error.http_status_code
    return ErrorEvent(code=code_from_server_status(int(status) if status.isascii() and status.isdigit() else 500), message=error.message)


def _text(values: Any, name: str) -> str:
    """An entry of a Struct, "" where it is none or no text."""
    value = values[name] if name in values else None  # noqa: SIM401  # a Struct has no get
    return value if isinstance(value, str) else ""
