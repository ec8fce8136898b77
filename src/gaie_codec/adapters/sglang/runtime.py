"""`sglang.runtime`: service `sglang.runtime.v1.SglangService`: OpenAI JSON passed through, or token ids in and out.

Spoken by SGLang's native gRPC server beside its Python front end (`--grpc-port`). ChatComplete and its like take the client's JSON as it
is. Generate (ids) and TextGenerate (text) are the second mode: `meta_info` maps names to JSON texts, messages repeat everything so far
unless the server streams incrementally, several choices share a stream without an index, and an unset max_new_tokens means 128.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..._errors import Code, MalformedMessageError, UsageError, code_from_server_status
from ..._events import (
    BodyEvent,
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
from ..base import Adapter, Convention, Passthrough, existing
from ..wire import decode_json, decode_json_object, regex_of_choices
from ._bodies import body_fields

if TYPE_CHECKING:
    from ...snapshots import Snapshot

SERVICE = "sglang.runtime.v1.SglangService"
_MODEL_PATH, _SERVER_PATH, _MODELS_PATH = (f"/{SERVICE}/{name}" for name in ("GetModelInfo", "GetServerInfo", "ListModels"))
_BODY_METHODS: Final = MappingProxyType(
    {
        "chat": "ChatComplete",
        "completions": "Complete",
        "embeddings": "OpenAIEmbed",
        "classify": "OpenAIClassify",
        "score": "Score",
        "rerank": "Rerank",
    }
)
DEFAULT_MAX_TOKENS = 128  # what the server takes an unset max_new_tokens for
_ANY_OBJECT = '{"type": "object"}'
_RANK = "x-data-parallel-rank"
# A failed handler's str(exception): an HTTPException begins with its status, pydantic's refusal with its count.
_HTTP_EXCEPTION: Final = re.compile(r"([45]\d\d): (.*)", re.DOTALL)
_REFUSED_BY_PYDANTIC: Final = re.compile(r"\d+ validation errors? for \w+\n")

_FIELDS = {
    "request_id": "rid",
    "prompt_token_ids": "input_ids",
    "stream": "stream",
    "lora_name": "lora_path",
    "data_parallel_rank": "routed_dp_rank",
    "trace_headers": "trace_headers",
    "priority": "priority",
    "session_id": "session_id",
    "media": "image_data",
    "temperature": "sampling_params.temperature",
    "top_p": "sampling_params.top_p",
    "top_k": "sampling_params.top_k",
    "min_p": "sampling_params.min_p",
    "frequency_penalty": "sampling_params.frequency_penalty",
    "presence_penalty": "sampling_params.presence_penalty",
    "repetition_penalty": "sampling_params.repetition_penalty",
    "max_tokens": "sampling_params.max_new_tokens",
    "min_tokens": "sampling_params.min_new_tokens",
    "stop": "sampling_params.stop",
    "stop_token_ids": "sampling_params.stop_token_ids",
    "ignore_eos": "sampling_params.ignore_eos",
    "n": "sampling_params.n",
    "logprobs": "top_logprobs_num",
    "seed": "sampling_params.seed",
    "constraint.json_schema": "sampling_params.json_schema",
    "constraint.regex": "sampling_params.regex",
    "constraint.grammar": "sampling_params.guided_decoding.ebnf",
    "constraint.choice": "sampling_params.guided_decoding.choice",
    "constraint.structural_tag": "sampling_params.guided_decoding.structural_tag",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "return_token_ids": "ids always come",
    "prompt_text": "text of TextGenerate",
    "include_stop_str_in_output": "cut by the gateway",
    "skip_special_tokens": "detokenized by the gateway",
    "spaces_between_special_tokens": "detokenized by the gateway",
    "constraint.json_object": "sampling_params.json_schema",
    "constraint.choice": "sampling_params.regex",
}
_ALSO_READ = frozenset(
    ("text", "return_logprob", "logprob_start_len", "return_text", "video_data", "audio_data", "sampling_params.guided_decoding")
)
_MEDIA_FIELDS = {"image": "image_data", "video": "video_data", "audio": "audio_data"}
_INT32 = (0, 2**31 - 1)


class _Finish(msgspec.Struct, frozen=True):
    """`finish_reason` of meta_info."""

    type: str
    matched: str | int | list[int] | None = None
    message: str | None = None
    status_code: int | None = None


_decode_finish: Final = msgspec.json.Decoder(_Finish | None).decode
_decode_rows: Final = msgspec.json.Decoder(list[tuple[float | None, int, str | None]]).decode
_decode_tops: Final = msgspec.json.Decoder(list[list[tuple[float | None, int, str | None]] | None]).decode


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate, text_generate = snapshot.method(SERVICE, "Generate"), snapshot.method(SERVICE, "TextGenerate")
    request_type: Any = generate.request
    response_type: Any = generate.response
    text_request_type: Any = text_generate.request
    text_response_type: Any = text_generate.response
    sends = existing(request_type, _FIELDS)
    has_guided = "constraint.choice" in sends
    if not has_guided:
        # 0.5.16, the only release without it, ends a stream at the first finished choice, and a unary call with several never.
        del sends["n"]
    emulates = {name: how for name, how in _EMULATED.items() if name not in sends}

    def encode_request(request: InferenceRequest) -> Any:
        if request.prompt_text is None:
            message = request_type()
            message.input_ids.extend(request.prompt_token_ids)
        else:
            message = text_request_type()
            message.text = request.prompt_text
        params = request.sampling
        encode_sampling(params, message.sampling_params)
        message.stream = request.stream
        if params.logprobs is not None:
            message.return_logprob = True
            message.top_logprobs_num = params.logprobs
        message.rid = request.request_id
        if request.lora_name:
            message.lora_path = request.lora_name
        if request.data_parallel_rank is not None:
            message.routed_dp_rank = request.data_parallel_rank
        message.trace_headers.update(request.trace_headers)
        if request.session_id:
            message.session_id = request.session_id
        if request.priority:
            message.priority = request.priority
        for media in request.media:
            getattr(message, _MEDIA_FIELDS[media.kind]).append(media.url)
        return message

    def encode_sampling(params: SamplingParams, message: Any) -> None:
        if params.temperature is not None:
            message.temperature = params.temperature
        message.top_p = params.top_p
        message.top_k = params.top_k or -1
        message.min_p = params.min_p
        message.frequency_penalty = params.frequency_penalty
        message.presence_penalty = params.presence_penalty
        message.repetition_penalty = params.repetition_penalty
        if params.max_tokens is not None:
            message.max_new_tokens = params.max_tokens
        message.min_new_tokens = params.min_tokens
        message.stop.extend(params.stop)
        message.stop_token_ids.extend(params.stop_token_ids)
        message.ignore_eos = params.ignore_eos
        message.n = params.n
        if params.seed is not None:
            message.seed = params.seed
        if params.constraint is not None:
            _encode_constraint(params.constraint, message, has_guided=has_guided)

    def decode_request(message: Any) -> InferenceRequest:
        is_text = message.DESCRIPTOR is text_request_type.DESCRIPTOR
        return InferenceRequest(
            request_id=message.rid,
            prompt_token_ids=[] if is_text else list(message.input_ids),
            prompt_text=message.text if is_text else None,
            sampling=_decode_sampling(message, has_guided=has_guided),
            stream=message.stream,
            lora_name=message.lora_path,
            data_parallel_rank=message.routed_dp_rank if message.HasField("routed_dp_rank") else None,
            trace_headers=dict(message.trace_headers),
            session_id=message.session_id,
            priority=message.priority if "priority" in sends else 0,
            media=tuple(_decode_media(message)) if "media" in sends and not is_text else (),
        )

    def decode_response(message: Any) -> tuple[Event, ...]:
        meta = message.meta_info
        is_text = message.DESCRIPTOR is text_response_type.DESCRIPTOR
        token_ids = [] if is_text else message.output_ids[:]
        completion_tokens = _count(meta, "completion_tokens")
        said: dict[str, Any] = {
            "choice_id": _text(meta, "id"),
            "token_ids": token_ids,
            "text": message.text if is_text else None,
            "logprobs": _decode_logprobs(meta),
            "prompt_tokens": _count(meta, "prompt_tokens"),
            "completion_tokens": completion_tokens,
            "cached_tokens": _count(meta, "cached_tokens"),
            "reasoning_tokens": _count(meta, "reasoning_tokens"),
        }
        finish = _finish_of(meta)
        if finish is None:
            return (TokensEvent(**said, is_cumulative=is_text or len(token_ids) == completion_tokens),)
        if finish.type == "abort":
            if finish.status_code is not None:
                return (ErrorEvent(code=code_from_server_status(finish.status_code), message=finish.message or ""),)
            return (FinishEvent(**said, finish_reason="abort"),)
        matched = finish.matched[-1] if isinstance(finish.matched, list) and finish.matched else finish.matched
        return (
            FinishEvent(
                **said,
                # A server that streams incrementally: the ids are the message's own, not all of the choice.
                is_delta=not is_text and len(token_ids) != completion_tokens,
                finish_reason=finish.type,
                matched_stop=None if isinstance(matched, list) else matched,
            ),
        )

    def decode_tokens(message: Any) -> tuple[int, list[int]]:
        meta, token_ids = message.meta_info, message.output_ids[:]
        is_plain = meta["finish_reason"] == "null" and meta["completion_tokens"] == str(len(token_ids))
        return 0, token_ids if is_plain else []

    def encode_response(event: Event) -> Any:
        if not isinstance(event, TokensEvent | FinishEvent):
            raise UsageError(f"{SERVICE} has no message for a {type(event).__name__}")
        message = response_type() if event.text is None else text_response_type()
        if event.text is None:
            message.output_ids.extend(event.token_ids)
        else:
            message.text = event.text
        message.finished = isinstance(event, FinishEvent)
        told: dict[str, Any] = {
            "id": event.choice_id,
            "finish_reason": _encode_finish(event) if isinstance(event, FinishEvent) else None,
            "prompt_tokens": event.prompt_tokens,
            "completion_tokens": event.completion_tokens,
            "cached_tokens": event.cached_tokens,
            "reasoning_tokens": event.reasoning_tokens,
        }
        if event.logprobs:
            told["output_token_logprobs"] = [(entry.logprob, entry.token_id, None) for entry in event.logprobs]
            told["output_top_logprobs"] = [[(value, token_id, None) for token_id, value in entry.top] for entry in event.logprobs]
        for key, value in told.items():
            message.meta_info[key] = msgspec.json.encode(value).decode()
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        model, models = answers.get(_MODEL_PATH), answers.get(_MODELS_PATH)
        told = decode_json_object(model.json_info, "json_info") if model is not None else {}
        cards = list(models.models) if models is not None else []
        bases = [card for card in cards if not card.HasField("parent")]
        return ModelInfo(
            model_path=model.model_path if model is not None else "",
            served_model_name=str(told.get("served_model_name") or (bases[0].id if bases else "")),
            tokenizer_path=str(told.get("tokenizer_path") or ""),
            is_generation=told.get("is_generation") is not False,
            max_model_len=max(bases[0].max_model_len, 0) if bases else 0,
            lora_adapters={card.id: card.id for card in cards if card.HasField("parent")},
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        model: Any = snapshot.method_at(_MODEL_PATH).response()
        model.model_path = info.model_path
        told = {name: getattr(info, name) for name in ("model_path", "served_model_name", "tokenizer_path", "is_generation")}
        model.json_info = msgspec.json.encode(told).decode()
        server: Any = snapshot.method_at(_SERVER_PATH).response()
        server.json_info = msgspec.json.encode({**told, "incremental_streaming_output": False}).decode()
        models: Any = snapshot.method_at(_MODELS_PATH).response()
        models.models.add(id=info.served_model_name, root=info.served_model_name, max_model_len=info.max_model_len)
        for name in info.lora_adapters:
            models.models.add(id=name, root=name, parent=info.served_model_name)
        return {_MODEL_PATH: model, _SERVER_PATH: server, _MODELS_PATH: models}

    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        generate_paths=(generate.path, text_generate.path),
        path_for=lambda request: generate.path if request.prompt_text is None else text_generate.path,
        info_paths=(_MODEL_PATH, _SERVER_PATH, _MODELS_PATH),
        health_path=f"/{SERVICE}/HealthCheck",
        request_type=request_type,
        response_type=response_type,
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        carries=frozenset((*sends, *emulates)),
        ranges={
            "top_k": _INT32,
            "max_tokens": (1, 2**31 - 1),
            "min_tokens": _INT32,
            "n": _INT32,
            "seed": (-(2**63), 2**63 - 1),
            "priority": (-(2**31), 2**31 - 1),
            "data_parallel_rank": _INT32,
        },
        answers_text_with_text=True,
        names_eos=True,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        counts="total",
        convention=Convention(counts="total", repeats="all", is_cumulative=True, joins_finish=True, names_choices=True),
        encode_request=encode_request,
        decode_request=decode_request,
        encode_metadata=lambda _: (),
        decode_response=decode_response,
        decode_tokens=decode_tokens,
        encode_response=encode_response,
        decode_status=_decode_status,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
        passthrough=_passthrough(snapshot),
    )


def _passthrough(snapshot: Snapshot) -> Passthrough:
    request_type: Any = snapshot.message("OpenAIRequest")
    chunk_type: Any = snapshot.message("OpenAIStreamChunk")
    has_status = snapshot.has_field("OpenAIStreamChunk", "status_code")

    def encode_request(body: bytes, headers: Mapping[str, str]) -> Any:
        message = request_type()
        message.json_body = body
        message.trace_headers.update(headers)
        return message

    def decode_response(message: Any) -> BodyEvent:
        if message.DESCRIPTOR is not chunk_type.DESCRIPTOR:
            return BodyEvent(data=message.json_body, http_status=message.status_code or None, is_last=True)
        status = message.status_code if has_status and message.HasField("status_code") else None
        return BodyEvent(data=message.json_chunk, http_status=status, is_last=message.finished)

    def encode_response(event: BodyEvent, path: str) -> Any:
        message: Any = snapshot.method_at(path).response()
        if isinstance(message, chunk_type):
            message.json_chunk = event.data
            message.finished = event.is_last
            if has_status and event.http_status is not None:
                message.status_code = event.http_status
        else:
            message.json_body = event.data
            message.status_code = event.http_status or 200
        return message

    return Passthrough(
        paths={kind: f"/{SERVICE}/{method}" for kind, method in _BODY_METHODS.items()},
        fields=body_fields(snapshot.name),
        encode_request=encode_request,
        decode_request=lambda message: (message.json_body, dict(message.trace_headers)),
        decode_response=decode_response,
        encode_response=encode_response,
    )


def _decode_status(code: Code, detail: str) -> tuple[Code, str]:
    """INTERNAL is what any exception of a handler becomes; what kind it was stands only at the beginning of its text."""
    if code is not Code.INTERNAL:
        return code, detail
    found = _HTTP_EXCEPTION.match(detail)
    if found is not None:
        return code_from_server_status(int(found[1])), found[2]
    return (Code.INVALID_ARGUMENT if _REFUSED_BY_PYDANTIC.match(detail) else code), detail


def _encode_constraint(constraint: Constraint, message: Any, *, has_guided: bool) -> None:
    # The two old fields and the new message must not come together; the old ones are what every release takes.
    if constraint.kind in ("json_schema", "json_object"):
        message.json_schema = constraint.value or _ANY_OBJECT
    elif constraint.kind == "regex":
        message.regex = constraint.value
    elif constraint.kind == "grammar":
        message.guided_decoding.ebnf = constraint.value
    elif constraint.kind == "structural_tag":
        message.guided_decoding.structural_tag = constraint.value
    elif has_guided:
        message.guided_decoding.choice.values.extend(constraint.value)
    else:
        message.regex = regex_of_choices(constraint.value)


def _decode_constraint(message: Any, *, has_guided: bool) -> Constraint | None:
    guided: Any = message.guided_decoding if has_guided else None
    kind = guided.WhichOneof("constraint") if guided is not None else None
    schema = message.json_schema or (guided.json_schema if kind == "json_schema" else "")
    if schema:
        return Constraint(kind="json_object") if schema == _ANY_OBJECT else Constraint(kind="json_schema", value=schema)
    if message.regex or kind == "regex":
        return Constraint(kind="regex", value=message.regex or guided.regex)
    if kind is None:
        return None
    if kind == "choice":
        return Constraint(kind="choice", value=tuple(guided.choice.values))
    return Constraint(kind="grammar" if kind == "ebnf" else "structural_tag", value=getattr(guided, kind))


def _decode_sampling(request: Any, *, has_guided: bool) -> SamplingParams:
    message = request.sampling_params
    asks_prompt = request.return_logprob and request.HasField("logprob_start_len") and request.logprob_start_len >= 0
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=max(message.top_k, 0),
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        max_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else DEFAULT_MAX_TOKENS,
        min_tokens=message.min_new_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        n=message.n or 1,
        logprobs=request.top_logprobs_num if request.return_logprob else None,
        prompt_logprobs=request.top_logprobs_num if asks_prompt else None,
        seed=message.seed if has_guided and message.HasField("seed") else None,
        constraint=_decode_constraint(message, has_guided=has_guided),
    )


def _decode_media(message: Any) -> list[Media]:
    return [Media(kind=kind, url=url) for kind, field in _MEDIA_FIELDS.items() for url in getattr(message, field)]  # type: ignore[arg-type]


def _text(meta: Mapping[str, str], key: str) -> str:
    value = decode_json(meta[key], f"meta_info.{key}") if key in meta else ""
    return value if isinstance(value, str) else ""


def _count(meta: Mapping[str, str], key: str) -> int:
    text = meta.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def _finish_of(meta: Mapping[str, str]) -> _Finish | None:
    text = meta.get("finish_reason", "null")
    if text == "null":
        return None
    try:
        finish: _Finish | None = _decode_finish(text)
    except (msgspec.DecodeError, RecursionError):
        raise MalformedMessageError("meta_info.finish_reason is none of SGLang's") from None
    return finish


def _encode_finish(event: FinishEvent) -> dict[str, Any]:
    match event.finish_reason:
        case "length":
            return {"type": "length", "length": event.completion_tokens}
        case "abort":
            return {"type": "abort", "message": "Abort"}
        case reason:
            return {"type": reason, "matched": event.matched_stop}


def _decode_logprobs(meta: Mapping[str, str]) -> tuple[TokenLogprob, ...]:
    if "output_token_logprobs" not in meta:
        return ()
    try:
        rows = _decode_rows(meta["output_token_logprobs"])
        tops = _decode_tops(meta.get("output_top_logprobs", "[]"))
    except (msgspec.DecodeError, RecursionError):
        raise MalformedMessageError("meta_info.output_token_logprobs is not what it should be") from None
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=value if value is not None else float("-inf"),
            top=tuple((other, low) for low, other, _ in (tops[place] or ()) if low is not None) if place < len(tops) else (),
        )
        for place, (value, token_id, _) in enumerate(rows)
    )
