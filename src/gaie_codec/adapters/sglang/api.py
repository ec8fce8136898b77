"""`sglang.api`: service `sglang.api.v1.SglangService`, token ids in, text and ids out.

Spoken by SGLang's all-Rust server (`SGLANG_RUST_SERVER=1`). Every frame repeats all text and ids of the choice so far, and
its text may hold a stop string, whole or in part: the server cuts one only if it came in one step, so the gateway cuts again. There is
one choice per call. What is wrong with a request comes as an error item in the stream, with gRPC status OK. An unset max_new_tokens
means 128.
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
    Media,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
)
from ..base import Adapter, Convention, existing, trace_metadata
from ..wire import decode_json_object, regex_of_choices

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "sglang.api.v1.SglangService"
_MODEL_PATH, _SERVER_PATH, _MODELS_PATH = (f"/{SERVICE}/{name}" for name in ("GetModelInfo", "GetServerInfo", "ListModels"))
DEFAULT_MAX_TOKENS = 128  # what the server takes an unset max_new_tokens for
_ANY_OBJECT = '{"type": "object"}'

_FIELDS = {
    "request_id": "rid.one",
    "prompt_token_ids": "input_ids.one",
    "prompt_text": "text.one",
    "stream": "stream",
    "media": "image_data",
    "data_parallel_rank": "routed_dp_rank",
    "priority": "priority",
    "cache_salt": "cache_salt.one",
    "lora_name": "lora_path.one",
    "max_tokens": "sampling_params.one.max_new_tokens",
    "stop": "sampling_params.one.stop.many",
    "stop_token_ids": "sampling_params.one.stop_token_ids",
    "temperature": "sampling_params.one.temperature",
    "top_p": "sampling_params.one.top_p",
    "top_k": "sampling_params.one.top_k",
    "min_p": "sampling_params.one.min_p",
    "frequency_penalty": "sampling_params.one.frequency_penalty",
    "presence_penalty": "sampling_params.one.presence_penalty",
    "repetition_penalty": "sampling_params.one.repetition_penalty",
    "min_tokens": "sampling_params.one.min_new_tokens",
    "ignore_eos": "sampling_params.one.ignore_eos",
    "skip_special_tokens": "sampling_params.one.skip_special_tokens",
    "spaces_between_special_tokens": "sampling_params.one.spaces_between_special_tokens",
    "include_stop_str_in_output": "sampling_params.one.no_stop_trim",
    "logit_bias": "sampling_params.one.logit_bias",
    "seed": "sampling_params.one.sampling_seed",
    "logprobs": "top_logprobs_num.one",
    "constraint.json_schema": "sampling_params.one.json_schema",
    "constraint.regex": "sampling_params.one.regex",
    "constraint.grammar": "sampling_params.one.ebnf",
    "constraint.structural_tag": "sampling_params.one.structural_tag",
    "constraint.choice": "sampling_params.one.choice",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "trace_headers": "metadata",
    "return_token_ids": "ids always come",
    "constraint.json_object": "sampling_params.one.json_schema",
    "constraint.choice": "sampling_params.one.regex",
}
_ALSO_READ = frozenset(
    ("return_logprob", "logprob_start_len", "video_data", "audio_data", "sampling_params.one.n", "sampling_params.one.stop")
)
_MEDIA_FIELDS = {"image": "image_data", "video": "video_data", "audio": "audio_data"}
_INT64 = (0, 2**31 - 1)  # int64 on the wire, 32 bits in the scheduler


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate = snapshot.method(SERVICE, "Generate")
    request_type: Any = generate.request
    response_type: Any = generate.response
    has_models = snapshot.has_method(SERVICE, "ListModels")
    has_cached_tokens = snapshot.has_field("GenerateMetaInfo", "cached_tokens")
    sends = existing(request_type, _FIELDS)
    emulates = {name: how for name, how in _EMULATED.items() if name not in sends}

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        params = request.sampling
        message.rid.one = request.request_id
        if request.prompt_text is None:
            message.input_ids.one.ids.extend(request.prompt_token_ids)
        else:
            message.text.one = request.prompt_text
        message.stream = request.stream
        encode_sampling(params, message.sampling_params.one)
        if params.logprobs is not None:
            message.return_logprob.one = True
            message.top_logprobs_num.one = params.logprobs
        for media in request.media:
            ref = getattr(message, _MEDIA_FIELDS[media.kind]).many.items.add().item.ref
            ref.url = media.url
            if media.detail:
                ref.detail = media.detail
        if request.data_parallel_rank is not None:
            message.routed_dp_rank = request.data_parallel_rank
        if request.priority:
            message.priority = request.priority
        if request.cache_salt:
            message.cache_salt.one = request.cache_salt
        if request.lora_name:
            message.lora_path.one.value = request.lora_name
        return message

    def encode_sampling(params: SamplingParams, message: Any) -> None:
        if params.max_tokens is not None:
            message.max_new_tokens = params.max_tokens
        if params.stop:
            message.stop.many.items.extend(params.stop)
        if params.stop_token_ids:
            message.stop_token_ids.items.extend(params.stop_token_ids)
        if params.temperature is not None:
            message.temperature = params.temperature
        message.top_p = params.top_p
        message.top_k = params.top_k or -1
        message.min_p = params.min_p
        message.frequency_penalty = params.frequency_penalty
        message.presence_penalty = params.presence_penalty
        message.repetition_penalty = params.repetition_penalty
        message.min_new_tokens = params.min_tokens
        constraint = params.constraint
        if constraint is not None and constraint.kind == "choice" and "constraint.choice" in sends:
            message.choice.extend(constraint.value)
        elif constraint is not None:
            encode_constraint(constraint, message)
        message.ignore_eos = params.ignore_eos
        message.skip_special_tokens = params.skip_special_tokens
        message.spaces_between_special_tokens = params.spaces_between_special_tokens
        message.no_stop_trim = params.include_stop_str_in_output
        for token_id, bias in params.logit_bias.items():
            message.logit_bias[str(token_id)] = bias
        if params.seed is not None:
            message.sampling_seed = params.seed

    def decode_request(message: Any) -> InferenceRequest:
        return InferenceRequest(
            request_id=_one(message, "rid"),
            prompt_token_ids=list(message.input_ids.one.ids),
            prompt_text=_one(message, "text") if message.HasField("text") else None,
            sampling=decode_sampling(message),
            stream=message.stream,
            media=tuple(_decode_media(message)),
            data_parallel_rank=message.routed_dp_rank if message.HasField("routed_dp_rank") else None,
            priority=message.priority if "priority" in sends else 0,
            cache_salt=_one(message, "cache_salt") if "cache_salt" in sends else "",
            lora_name=message.lora_path.one.value if "lora_name" in sends else "",
        )

    def decode_sampling(request: Any) -> SamplingParams:
        message = request.sampling_params.one
        wants_logprobs = request.return_logprob.one
        return SamplingParams(
            max_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else DEFAULT_MAX_TOKENS,
            stop=tuple(message.stop.many.items) or ((message.stop.one,) if message.stop.one else ()),
            stop_token_ids=tuple(message.stop_token_ids.items),
            temperature=message.temperature if message.HasField("temperature") else None,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            top_k=max(message.top_k, 0),
            min_p=message.min_p,
            frequency_penalty=message.frequency_penalty,
            presence_penalty=message.presence_penalty,
            repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
            min_tokens=message.min_new_tokens,
            n=message.n or 1,
            constraint=_decode_constraint(message, tuple(message.choice) if "constraint.choice" in sends else ()),
            ignore_eos=message.ignore_eos,
            skip_special_tokens=message.skip_special_tokens if message.HasField("skip_special_tokens") else True,
            spaces_between_special_tokens=not message.HasField("spaces_between_special_tokens") or message.spaces_between_special_tokens,
            include_stop_str_in_output=message.no_stop_trim,
            logit_bias={int(key): bias for key, bias in message.logit_bias.items() if key.isascii() and key.isdigit()},
            seed=message.sampling_seed if message.HasField("sampling_seed") else None,
            logprobs=request.top_logprobs_num.one if wants_logprobs else None,
            prompt_logprobs=(
                request.top_logprobs_num.one
                if wants_logprobs and request.HasField("logprob_start_len") and request.logprob_start_len.one >= 0
                else None
            ),
        )

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
        _encode_logprobs(event.logprobs, meta)
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
            lora_adapters={card.id: card.id for card in cards if card.HasField("parent")},
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
        server.max_context_length = info.max_model_len
        answers = {_MODEL_PATH: model, _SERVER_PATH: server}
        if has_models:
            models: Any = snapshot.method_at(_MODELS_PATH).response()
            models.models.add(id=info.served_model_name, root=info.served_model_name, max_model_len=info.max_model_len)
            for name in info.lora_adapters:
                models.models.add(id=name, root=name, parent=info.served_model_name)
            answers[_MODELS_PATH] = models
        return answers

    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        generate_paths=(generate.path,),
        path_for=lambda _: generate.path,
        info_paths=(_MODEL_PATH, _SERVER_PATH, *((_MODELS_PATH,) if has_models else ())),
        request_type=request_type,
        response_type=response_type,
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        carries=frozenset((*sends, *emulates)),
        ranges={
            "top_k": _INT64,
            "max_tokens": (1, 2**31 - 1),
            "min_tokens": _INT64,
            "seed": (-(2**63), 2**63 - 1),
            "data_parallel_rank": _INT64,
        },
        sends_text=True,
        names_eos=True,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        counts="total",
        convention=Convention(counts="total", repeats="all", is_cumulative=True, joins_finish=True),
        encode_request=encode_request,
        decode_request=decode_request,
        encode_metadata=trace_metadata,
        decode_response=decode_response,
        decode_text=decode_text,
        encode_response=encode_response,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
    )


def encode_constraint(constraint: Constraint, message: Any) -> None:
    """Into the four fields that both of SGLang's native protocols have."""
    if constraint.kind == "json_object":
        message.json_schema = _ANY_OBJECT
    elif constraint.kind == "choice":
        message.regex = regex_of_choices(constraint.value)
    elif constraint.kind == "grammar":
        message.ebnf = constraint.value
    else:
        setattr(message, constraint.kind, constraint.value)


def _decode_constraint(message: Any, choices: tuple[str, ...]) -> Constraint | None:
    if choices:
        return Constraint(kind="choice", value=choices)
    if message.json_schema:
        schema = message.json_schema
        return Constraint(kind="json_object") if schema == _ANY_OBJECT else Constraint(kind="json_schema", value=schema)
    if message.regex:
        return Constraint(kind="regex", value=message.regex)
    if message.ebnf:
        return Constraint(kind="grammar", value=message.ebnf)
    return Constraint(kind="structural_tag", value=message.structural_tag) if message.structural_tag else None


def _one(message: Any, field: str) -> str:
    """The one value of a StringOrList, the only of a list of one."""
    value = getattr(message, field)
    items = value.many.items
    return items[0] if len(items) == 1 else value.one  # type: ignore[no-any-return]


def _decode_media(message: Any) -> list[Media]:
    found = []
    for kind, field in _MEDIA_FIELDS.items():
        value = getattr(message, field)
        items = [value.item] if value.HasField("item") else [one.item for one in value.many.items]
        for item in items:
            ref = item.ref
            found.append(Media(kind=kind, url=ref.url or item.source, detail=ref.detail))  # type: ignore[arg-type]
    return found


def _decode_logprobs(meta: Any) -> tuple[TokenLogprob, ...]:
    tops = meta.output_top_logprobs
    return tuple(
        TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=tuple((one.token_id, one.logprob) for one in tops[place].row.entries) if place < len(tops) else (),
        )
        for place, entry in enumerate(meta.output_token_logprobs.entries)
    )


def _encode_logprobs(logprobs: tuple[TokenLogprob, ...], meta: Any) -> None:
    for entry in logprobs:
        meta.output_token_logprobs.entries.add(token_id=entry.token_id, logprob=entry.logprob)
        row = meta.output_top_logprobs.add().row
        for token_id, value in entry.top:
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
