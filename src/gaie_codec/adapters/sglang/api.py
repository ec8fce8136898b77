"""`sglang.api`: service `sglang.api.v1.SglangService`, token ids in, text and ids out.

Spoken by SGLang's all-Rust server (`SGLANG_RUST_SERVER=1`). Every frame repeats all text and ids of the choice so far, and
its text may hold a stop string, whole or in part: the server cuts one only if it came in one step, so the gateway cuts again. There is
one choice per call. What is wrong with a request comes as an error item in the stream, with gRPC status OK. An unset max_new_tokens
means 128.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..._errors import UsageError, code_from_server_status, server_status_from_code
from ..._events import ErrorEvent, Event, FinishEvent, ModelInfo, PromptLogprob, TokenLogprob, TokensEvent
from ..base import Adapter, Convention, find_abort, trace_metadata
from ..wire import decode_json_object, rank_among
from ._api_request import DEFAULT_MAX_TOKENS, coder

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "sglang.api.v1.SglangService"
_MODEL_PATH, _SERVER_PATH, _MODELS_PATH = (f"/{SERVICE}/{name}" for name in ("GetModelInfo", "GetServerInfo", "ListModels"))


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate = snapshot.method(SERVICE, "Generate")
    request_type: Any = generate.request
    response_type: Any = generate.response
    has_models = snapshot.has_method(SERVICE, "ListModels")
    has_cached_tokens = snapshot.has_field("GenerateMetaInfo", "cached_tokens")
    requests = coder(request_type)

    def decode_response(message: Any) -> tuple[Event, ...]:
        which = message.WhichOneof("item")
        if which is None:
            return ()
        if which == "error":
            error = message.error
            index = error.index if error.HasField("index") else None
            return (ErrorEvent(code=code_from_server_status(error.error.code), message=error.error.message, index=index),)
        frame = message.frame
        meta = frame.meta_info
        said: dict[str, Any] = {
            "index": frame.index,
            "token_ids": frame.output_ids.ids[:],
            "text": frame.text,
            "logprobs": _decode_logprobs(meta),
            "prompt_tokens": meta.prompt_tokens,
            "completion_tokens": meta.completion_tokens,
            "cached_tokens": meta.cached_tokens if has_cached_tokens else 0,
            "reasoning_tokens": meta.reasoning_tokens if has_cached_tokens else 0,
            "prompt_logprobs": _decode_prompt(meta),
        }
        reason = meta.finish_reason.WhichOneof("kind")
        if reason is None:
            return (TokensEvent(**said, is_cumulative=True),)
        if reason == "abort":
            return _decode_abort(meta.finish_reason.abort, said)
        kind = meta.finish_reason.unknown if reason == "unknown" else reason
        matched = _decode_matched(meta.finish_reason.stop.matched)
        # 0.5.22 leaves the token that ended the choice out of the ids, and counts it.
        if isinstance(matched, int) and meta.completion_tokens == len(said["token_ids"]) + 1:
            said["token_ids"].append(matched)
        return (FinishEvent(**said, finish_reason=kind or "stop", matched_stop=matched),)

    def decode_text(message: Any) -> tuple[int, str, int] | None:
        if message.WhichOneof("item") != "frame":
            return None
        frame = message.frame
        meta = frame.meta_info
        return None if meta.HasField("finish_reason") else (frame.index, frame.text, meta.completion_tokens)

    def encode_response(event: Event) -> Any:
        message = response_type()
        if isinstance(event, ErrorEvent):
            message.error.error.code = server_status_from_code(event.code)
            message.error.error.message = event.message
            if event.index is not None:
                message.error.index = event.index
            return message
        if not isinstance(event, TokensEvent | FinishEvent):
            raise UsageError(f"{SERVICE} has no message for a {type(event).__name__}")
        frame = message.frame
        frame.text = event.text or ""
        frame.output_ids.ids.extend(event.token_ids)
        if event.index:
            frame.index = event.index
        meta = frame.meta_info
        meta.prompt_tokens = event.prompt_tokens
        meta.completion_tokens = event.completion_tokens
        if has_cached_tokens:
            meta.cached_tokens = event.cached_tokens
            meta.reasoning_tokens = event.reasoning_tokens
        _encode_logprobs(event.logprobs, meta.output_token_logprobs, meta.output_top_logprobs)
        for selected in event.logprobs:
            if selected.selected:
                _encode_top(selected.selected, meta.output_token_ids_logprobs.add().row)
        _encode_logprobs(event.prompt_logprobs, meta.input_token_logprobs, meta.input_top_logprobs)
        if isinstance(event, FinishEvent):
            _encode_finish(event, meta.finish_reason)
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        model, server, models = (answers.get(path) for path in (_MODEL_PATH, _SERVER_PATH, _MODELS_PATH))
        cards = list(models.models) if models is not None else []
        preferred = model.preferred_sampling_params if model is not None else ""
        return ModelInfo(
            model_path=model.model_path if model is not None else "",
            served_model_name=model.served_model_name if model is not None else "",
            tokenizer_path=model.tokenizer_path if model is not None else "",
            is_generation=model.is_generation if model is not None else True,
            max_model_len=(server.max_context_length if server is not None else 0) or next((card.max_model_len for card in cards), 0),
            default_sampling_params=decode_json_object(preferred, "preferred_sampling_params"),
            server_version=server.version if server is not None else "",
            lora_adapters={card.id: card.id for card in cards if card.HasField("parent")},
            tool_call_parser=model.tool_call_parser if model is not None else "",
            reasoning_parser=model.reasoning_parser if model is not None else "",
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        model: Any = snapshot.method_at(_MODEL_PATH).response()
        server: Any = snapshot.method_at(_SERVER_PATH).response()
        for message in (model, server):
            message.model_path = info.model_path
            message.served_model_name = info.served_model_name
            message.tokenizer_path = info.tokenizer_path
        model.is_generation = info.is_generation
        if info.default_sampling_params:
            model.preferred_sampling_params = msgspec.json.encode(info.default_sampling_params).decode()
        if info.tool_call_parser:
            model.tool_call_parser = info.tool_call_parser
        if info.reasoning_parser:
            model.reasoning_parser = info.reasoning_parser
        server.max_context_length = info.max_model_len
        server.version = info.server_version
        answers = {_MODEL_PATH: model, _SERVER_PATH: server}
        if has_models:
            models: Any = snapshot.method_at(_MODELS_PATH).response()
            models.models.add(id=info.served_model_name, root=info.served_model_name, max_model_len=info.max_model_len)
            for name in info.lora_adapters:
                models.models.add(id=name, root=name, parent=info.served_model_name)
            answers[_MODELS_PATH] = models
        return answers

    abort_path, encode_abort = find_abort(snapshot, SERVICE, lambda request_id: {"rid": request_id})
    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        abort_path=abort_path,
        encode_abort=encode_abort,
        generate_paths=(generate.path,),
        path_for=lambda _: generate.path,
        info_paths=(_MODEL_PATH, _SERVER_PATH, *((_MODELS_PATH,) if has_models else ())),
        request_type=request_type,
        response_type=response_type,
        sends=requests.sends,
        emulates=requests.emulates,
        also_reads=requests.also_reads,
        carries=frozenset((*requests.sends, *requests.emulates)),
        ranges=requests.ranges,
        sends_text=True,
        names_eos=True,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        counts="total",
        convention=Convention(counts="total", repeats="all", is_cumulative=True, joins_finish=True),
        encode_request=requests.encode,
        decode_request=requests.decode,
        encode_metadata=trace_metadata,
        decode_response=decode_response,
        decode_text=decode_text,
        encode_response=encode_response,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
    )


def _decode_logprobs(meta: Any) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=_decode_top(meta.output_top_logprobs, place),
            selected=_decode_top(meta.output_token_ids_logprobs, place),
        )
        for place, entry in enumerate(meta.output_token_logprobs.entries)
    )


def _decode_prompt(meta: Any) -> tuple[PromptLogprob, ...]:
    entries = []
    for place, entry in enumerate(meta.input_token_logprobs.entries):
        top = _decode_top(meta.input_top_logprobs, place)
        logprob = entry.logprob if entry.HasField("logprob") else None
        entries.append(PromptLogprob(token_id=entry.token_id, logprob=logprob, rank=rank_among(entry.token_id, top), top=top))
    return tuple(entries)


def _decode_top(rows: Any, place: int) -> tuple[tuple[int, float], ...]:
    return tuple((one.token_id, one.logprob) for one in rows[place].row.entries) if place < len(rows) else ()


def _encode_logprobs(logprobs: Sequence[TokenLogprob | PromptLogprob], column: Any, rows: Any) -> None:
    for entry in logprobs:
        told = column.entries.add(token_id=entry.token_id)
        if entry.logprob is not None:
            told.logprob = entry.logprob
        _encode_top(entry.top, rows.add().row)


def _encode_top(top: Sequence[tuple[int, float]], row: Any) -> None:
    for token_id, value in top:
        row.entries.add(token_id=token_id, logprob=value)


def _decode_abort(abort: Any, said: dict[str, Any]) -> tuple[Event, ...]:
    if abort.HasField("status_code"):
        return (ErrorEvent(code=code_from_server_status(abort.status_code), message=abort.message, index=said["index"]),)
    return (FinishEvent(**said, finish_reason="abort"),)


def _decode_matched(matched: Any) -> str | int | None:
    match matched.WhichOneof("value"):
        case "token":
            return int(matched.token)
        case "str":
            return str(matched.str)
        case "tokens" if matched.tokens.ids:
            return int(matched.tokens.ids[-1])
    return None


def _encode_finish(event: FinishEvent, reason: Any) -> None:
    match event.finish_reason:
        case "stop":
            reason.stop.SetInParent()
            if isinstance(event.matched_stop, str):
                reason.stop.matched.str = event.matched_stop
            elif event.matched_stop is not None:
                reason.stop.matched.token = event.matched_stop
        case "length":
            reason.length.length = event.completion_tokens
        case "abort":
            reason.abort.message = "Abort"
        case other:
            reason.unknown = other
