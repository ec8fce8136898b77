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
from ..._events import ErrorEvent, Event, FinishEvent, ModelInfo, PromptLogprob, TokensEvent
from .._embeddings import servicer_embeddings
from .._loads import sglang_scheduler_loads
from ..base import Adapter, Convention, find_abort, trace_metadata
from ..wire import decode_json_object, decode_logprobs, decode_prompt_logprobs, encode_logprobs, encode_prompt_logprobs
from ._scheduler_request import coder

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "sglang.grpc.scheduler.SglangScheduler"
_INFO_PATH = f"/{SERVICE}/GetModelInfo"
_SERVER_PATH = f"/{SERVICE}/GetServerInfo"
_LORA_PATH = f"/{SERVICE}/ListLoadedLoRAAdapters"


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
    has_selected = snapshot.has_field("OutputLogProbs", "token_ids_logprobs")
    requests = coder(request_type, shows_selected=has_selected)

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
        sends=requests.sends,
        emulates=requests.emulates,
        also_reads=requests.also_reads,
        carries=frozenset((*requests.sends, *requests.emulates)),
        ranges=requests.ranges,
        ends_at_stop_strings=False,
        names_eos=True,
        streams_several=True,
        convention=Convention(counts="total", repeats="last"),
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
