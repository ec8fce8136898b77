"""`vllm.inference`: service `vllm.Inference` (before vLLM 0.27 `vllm.Generate`), token ids in, text out.

Spoken by vLLM's own Rust front end. Traps of this wire: an unset temperature is greedy, so it is always written; before 0.32 a 0 of
top_k, top_p and min_p means the model's default; a text prompt would get its special tokens a second time, so ids are sent for
rendered chats; there is one choice per call; log probabilities do not name the sampled token, so its id is asked for besides; an older
server passes over a field that it does not know without a word, so only what the snapshot has is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..._errors import MalformedMessageError, UsageError
from ..._events import Event, FinishEvent, ModelInfo, PromptEvent, PromptLogprob, TokenLogprob, TokensEvent
from .._loads import vllm_inference_loads
from ..base import Adapter, Convention, LoadsCoder, find_abort
from ..wire import decode_json_object, encode_struct, json_text_of
from ._inference_request import coder, encode_metadata

if TYPE_CHECKING:
    from ...snapshots import Snapshot

_SERVER_PATH = "/vllm.Control/GetServerInfo"
_MODEL_PATH = "/vllm.Control/GetModelInfo"
_LORA_PATH = "/vllm.Control/ListLoras"

_REASONS = ("", "length", "stop", "abort")  # FinishInfo.FinishReason


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    service = "vllm.Inference" if "vllm.Inference" in snapshot.services else "vllm.Generate"
    unary, streaming = snapshot.method(service, "Generate"), snapshot.method(service, "GenerateStream")
    request_type: Any = streaming.request
    response_type: Any = streaming.response
    has_control = "vllm.Control" in snapshot.services
    has_loras = has_control and snapshot.has_method("vllm.Control", "ListLoras")
    has_multimodal = has_control and snapshot.has_field("ModelInfo", "supports_multimodal")
    has_parsers = has_control and snapshot.has_field("ModelInfo", "tool_call_parser")
    has_cached_tokens = snapshot.has_field("FinishInfo", "num_cached_tokens")
    # The schema of 0.22 to 0.25. A stop string and a character of several tokens end the process of 0.22, and no release of these can be
    # told from another by its schema.
    is_first = not snapshot.has_field("FinishInfo", "ec_transfer_params")
    requests = coder(snapshot, request_type, sends_stops=not is_first)

    def decode_response(message: Any) -> tuple[Event, ...]:
        events: list[Event] = []
        if message.HasField("prompt_info"):
            info = message.prompt_info
            events.append(PromptEvent(prompt_tokens=info.num_prompt_tokens, prompt_logprobs=_decode_prompt(info)))
        if message.HasField("outputs"):
            output = message.outputs
            is_finished = output.HasField("finish_info") and output.finish_info.finish_reason
            events.append(decode_finish(output) if is_finished else _decode_tokens(output))
        return tuple(events)

    def decode_finish(output: Any) -> FinishEvent:
        info = output.finish_info
        which = info.WhichOneof("stop_reason")
        return FinishEvent(
            index=output.index,
            token_ids=output.token_ids[:],
            text=output.text,
            logprobs=_decode_logprobs(output) if output.logprobs else (),
            is_delta=True,
            finish_reason=_finish_reason(info.finish_reason),
            matched_stop=getattr(info, which) if which and which != "eos_token_id" else None,
            completion_tokens=info.num_output_tokens,
            cached_tokens=info.num_cached_tokens if has_cached_tokens else 0,
            kv_transfer_params=json_text_of(info.kv_transfer_params) if info.HasField("kv_transfer_params") else "",
        )

    def decode_text(message: Any) -> tuple[int, str, int] | None:
        output = message.outputs
        if output.HasField("finish_info") or message.HasField("prompt_info"):
            return None
        return output.index, output.text, output.num_tokens

    def encode_prompt(event: PromptEvent | TokensEvent | FinishEvent, info: Any) -> None:
        info.num_prompt_tokens = event.prompt_tokens
        for entry in event.prompt_logprobs:
            info.token_ids.append(entry.token_id)
            info.logprobs.append(entry.logprob or 0.0)
            info.ranks.append(entry.rank)
            _encode_candidates(entry.top, info.candidate_tokens.add())

    def encode_response(event: Event) -> Any:
        message = response_type()
        if isinstance(event, PromptEvent):
            encode_prompt(event, message.prompt_info)
            return message
        if not isinstance(event, TokensEvent | FinishEvent):
            raise UsageError(f"{service} has no message for a {type(event).__name__}")
        if event.prompt_tokens or event.prompt_logprobs:
            encode_prompt(event, message.prompt_info)
        output = message.outputs
        output.SetInParent()
        output.index = event.index
        output.text = event.text or ""
        output.token_ids.extend(event.token_ids)
        for entry in event.logprobs:
            output.logprobs.append(entry.logprob)
            output.ranks.append(1)
            _encode_candidates(entry.selected or entry.top, output.candidate_tokens.add())
        if isinstance(event, TokensEvent):
            output.num_tokens = event.completion_tokens
            return message
        output.num_tokens = len(event.token_ids)
        info = output.finish_info
        info.num_output_tokens = event.completion_tokens
        info.finish_reason = _REASONS.index(event.finish_reason) if event.finish_reason in _REASONS else _REASONS.index("abort")
        if isinstance(event.matched_stop, str):
            info.stop_string = event.matched_stop
        elif event.matched_stop is not None:
            info.stop_token_id = event.matched_stop
        if has_cached_tokens:
            info.num_cached_tokens = event.cached_tokens
        if event.kv_transfer_params:
            encode_struct(decode_json_object(event.kv_transfer_params, "kv_transfer_params"), info.kv_transfer_params)
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        server, model, loras = (answers.get(path) for path in (_SERVER_PATH, _MODEL_PATH, _LORA_PATH))
        return ModelInfo(
            model_path=model.model_id if model is not None else "",
            served_model_name=model.served_model_name if model is not None else "",
            aliases=tuple(model.served_model_aliases) if model is not None else (),
            max_model_len=server.max_model_len if server is not None else 0,
            server_version=server.engine_version if server is not None else "",
            is_multimodal=model.supports_multimodal if model is not None and has_multimodal else None,
            lora_adapters={one.lora_name: one.lora_name for one in loras.adapters} if loras is not None else {},
            tool_call_parser=model.tool_call_parser if model is not None and has_parsers else "",
            reasoning_parser=model.reasoning_parser if model is not None and has_parsers else "",
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        if not has_control:
            return {}
        server: Any = snapshot.method_at(_SERVER_PATH).response()
        server.max_model_len = info.max_model_len
        server.engine_version = info.server_version
        model: Any = snapshot.method_at(_MODEL_PATH).response()
        model.model_id = info.model_path
        model.served_model_name = info.served_model_name
        model.served_model_aliases.extend(info.aliases)
        model.supports_text_input = model.supports_token_ids_input = True
        if has_multimodal:
            model.supports_multimodal = bool(info.is_multimodal)
        if has_parsers:
            model.tool_call_parser, model.reasoning_parser = info.tool_call_parser, info.reasoning_parser
        answers = {_SERVER_PATH: server, _MODEL_PATH: model}
        if has_loras:
            loras: Any = snapshot.method_at(_LORA_PATH).response()
            for place, name in enumerate(info.lora_adapters, 1):
                loras.adapters.add(lora_id=place, lora_name=name)
            answers[_LORA_PATH] = loras
        return answers

    loads = vllm_inference_loads(snapshot, _SERVER_PATH) if has_control else LoadsCoder()
    abort_path, encode_abort = find_abort(snapshot, "vllm.Control", lambda request_id: {"request_ids": [request_id]})
    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=streaming.path,
        abort_path=abort_path,
        encode_abort=encode_abort,
        generate_paths=(streaming.path, unary.path),
        path_for=lambda request: streaming.path if request.stream else unary.path,
        info_paths=(_SERVER_PATH, _MODEL_PATH, *((_LORA_PATH,) if has_loras else ())) if has_control else (),
        capacity_path=loads.capacity_path,
        request_type=request_type,
        response_type=response_type,
        sends=requests.sends,
        emulates=requests.emulates,
        also_reads=requests.also_reads,
        carries=frozenset((*requests.sends, *requests.emulates)),
        ranges=requests.ranges,
        sends_text=True,
        sends_final_text=not is_first,
        ends_at_stop_strings=not is_first,
        echoes_prompt=is_first,
        counts="delta",
        convention=Convention(counts="delta", repeats="nothing", joins_finish=True, announces_prompt=True),
        encode_request=requests.encode,
        decode_request=requests.decode,
        encode_metadata=encode_metadata,
        decode_response=decode_response,
        decode_text=decode_text,
        encode_response=encode_response,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
        decode_capacity=loads.decode_capacity,
        encode_capacity=loads.encode_capacity,
    )


def _finish_reason(number: int) -> str:
    if not 0 < number < len(_REASONS):  # the enum is open: a server may send any number
        raise MalformedMessageError(f"finish_reason {number} is none that this snapshot knows")
    return _REASONS[number]


def _decode_tokens(output: Any) -> TokensEvent:
    return TokensEvent(
        index=output.index,
        token_ids=output.token_ids[:],
        text=output.text,
        logprobs=_decode_logprobs(output) if output.logprobs else (),
        completion_tokens=output.num_tokens,
    )


def _decode_logprobs(output: Any) -> tuple[TokenLogprob, ...]:
    token_ids, rows = output.token_ids, output.candidate_tokens
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=value,
            top=tuple((one.id, one.logprob) for one in rows[place].tokens) if place < len(rows) else (),
        )
        for place, (token_id, value) in enumerate(zip(token_ids, output.logprobs, strict=False))
    )


def _decode_prompt(info: Any) -> tuple[PromptLogprob, ...]:
    """The first token, which nothing comes before, has log probability 0 and rank 0."""
    ranks, rows = info.ranks, info.candidate_tokens
    entries = []
    for place, (token_id, value) in enumerate(zip(info.token_ids, info.logprobs, strict=False)):
        top = tuple((one.id, one.logprob) for one in rows[place].tokens) if place < len(rows) else ()
        rank = ranks[place] if place < len(ranks) else 0
        entries.append(PromptLogprob(token_id=token_id, logprob=value if place else None, rank=rank, top=top))
    return tuple(entries)


def _encode_candidates(top: tuple[tuple[int, float], ...], row: Any) -> None:
    for rank, (token_id, value) in enumerate(top, 1):
        row.tokens.add(id=token_id, logprob=value, rank=rank)
