"""`vllm.engine`: service `vllm.grpc.engine.VllmEngine`, token ids in, token ids out.

Spoken by `vllm serve --grpc` and the smg servicers. Traps of this wire: scalars without presence whose zero is not OpenAI's default
(top_p, repetition_penalty, the two *special_tokens flags) are always written; a streamed Complete repeats ids which chunks already
brought; `completion_tokens` is the message's own count with the Python servicer and the choice's total with the Rust one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ..._errors import UsageError
from ..._events import Event, FinishEvent, ModelInfo, PromptLogprob, TokensEvent
from .._embeddings import servicer_embeddings
from .._loads import vllm_engine_loads
from ..base import Adapter, find_abort, trace_metadata
from ..wire import check_json, decode_json_object, decode_logprobs, decode_prompt_logprobs, encode_logprobs, encode_prompt_logprobs
from ._engine_request import coder

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "vllm.grpc.engine.VllmEngine"
_INFO_PATH = f"/{SERVICE}/GetModelInfo"
_SERVER_PATH = f"/{SERVICE}/GetServerInfo"


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate = snapshot.method(SERVICE, "Generate")
    has_index = snapshot.has_field("GenerateStreamChunk", "index")
    has_logprobs = snapshot.has_field("GenerateStreamChunk", "output_logprobs")
    has_matched_stop = snapshot.has_field("GenerateComplete", "matched_stop_str")
    has_kv_transfer = snapshot.has_field("GenerateComplete", "kv_transfer_params_json")
    request_type: Any = generate.request
    response_type: Any = generate.response
    info_type: Any = snapshot.message("GetModelInfoResponse")
    tells_parser = snapshot.has_field("GetServerInfoResponse", "engine_reasoning_parser")
    requests = coder(request_type, tells_index=has_index, tells_logprobs=has_logprobs)

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
        sends=requests.sends,
        emulates=requests.emulates,
        also_reads=requests.also_reads,
        carries=frozenset((*requests.sends, *requests.emulates)),
        ranges=requests.ranges,
        encode_request=requests.encode,
        decode_request=requests.decode,
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
