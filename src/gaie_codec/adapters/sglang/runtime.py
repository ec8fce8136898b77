"""`sglang.runtime`: service `sglang.runtime.v1.SglangService`: OpenAI JSON passed through, or token ids in and out.

Spoken by SGLang's native gRPC server beside its Python front end (`--grpc-port`). ChatComplete and its like take the client's JSON as it
is. Generate (ids) and TextGenerate (text) are the second mode: `meta_info` maps names to JSON texts, messages repeat everything so far
unless the server streams incrementally, several choices share a stream without an index, and an unset max_new_tokens means 128.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..._errors import Code, MalformedMessageError, UsageError, code_from_server_status
from ..._events import BodyEvent, ErrorEvent, Event, FinishEvent, ModelInfo, PromptLogprob, TokenLogprob, TokensEvent
from .._embeddings import sglang_runtime_embeddings
from .._loads import sglang_runtime_loads
from ..base import Adapter, Convention, Passthrough, find_abort
from ..wire import decode_json, decode_json_object, rank_among
from ._bodies import body_fields
from ._runtime_request import DEFAULT_MAX_TOKENS, coder

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
# A failed handler's str(exception): an HTTPException begins with its status, pydantic's refusal with its count.
_HTTP_EXCEPTION: Final = re.compile(r"([45]\d\d): (.*)", re.DOTALL)
_REFUSED_BY_PYDANTIC: Final = re.compile(r"\d+ validation errors? for \w+\n")


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
    text_response_type: Any = text_generate.response
    requests = coder(request_type, text_generate.request)

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
            "prompt_logprobs": _decode_prompt(meta),
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

    def decode_tokens(message: Any) -> tuple[int, Sequence[int]]:
        meta, token_ids = message.meta_info, message.output_ids  # not copied: only the new ones of them are looked at
        is_plain = meta["finish_reason"] == "null" and meta["completion_tokens"] == str(len(token_ids))
        return 0, token_ids if is_plain else ()

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
        if event.prompt_logprobs:
            told["input_token_logprobs"] = [(entry.logprob, entry.token_id, None) for entry in event.prompt_logprobs]
            told["input_top_logprobs"] = [[(value, token_id, None) for token_id, value in entry.top] for entry in event.prompt_logprobs]
        for key, value in told.items():
            message.meta_info[key] = msgspec.json.encode(value).decode()
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        model, server, models = (answers.get(path) for path in (_MODEL_PATH, _SERVER_PATH, _MODELS_PATH))
        told = decode_json_object(model.json_info, "json_info") if model is not None else {}
        started_with = decode_json_object(server.json_info, "json_info") if server is not None else {}
        cards = list(models.models) if models is not None else []
        bases = [card for card in cards if not card.HasField("parent")]
        return ModelInfo(
            model_path=model.model_path if model is not None else "",
            served_model_name=str(told.get("served_model_name") or (bases[0].id if bases else "")),
            tokenizer_path=str(told.get("tokenizer_path") or ""),
            is_generation=told.get("is_generation") is not False,
            max_model_len=max(bases[0].max_model_len, 0) if bases else 0,
            lora_adapters={card.id: card.id for card in cards if card.HasField("parent")},
            tool_call_parser=str(started_with.get("tool_call_parser") or ""),
            reasoning_parser=str(started_with.get("reasoning_parser") or ""),
            server_version=str(started_with.get("version") or ""),
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        model: Any = snapshot.method_at(_MODEL_PATH).response()
        model.model_path = info.model_path
        told = {name: getattr(info, name) for name in ("model_path", "served_model_name", "tokenizer_path", "is_generation")}
        model.json_info = msgspec.json.encode(told).decode()
        parsers = {name: getattr(info, name) or None for name in ("tool_call_parser", "reasoning_parser")}
        server: Any = snapshot.method_at(_SERVER_PATH).response()
        server.json_info = msgspec.json.encode(
            {**told, **parsers, "version": info.server_version, "incremental_streaming_output": False}
        ).decode()
        models: Any = snapshot.method_at(_MODELS_PATH).response()
        models.models.add(id=info.served_model_name, root=info.served_model_name, max_model_len=info.max_model_len)
        for name in info.lora_adapters:
            models.models.add(id=name, root=name, parent=info.served_model_name)
        return {_MODEL_PATH: model, _SERVER_PATH: server, _MODELS_PATH: models}

    abort_path, encode_abort = find_abort(snapshot, SERVICE, lambda request_id: {"rid": request_id})
    loads = sglang_runtime_loads(snapshot, SERVICE)
    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        generate_paths=(generate.path, text_generate.path),
        path_for=lambda request: generate.path if request.prompt_text is None else text_generate.path,
        info_paths=(_MODEL_PATH, _SERVER_PATH, _MODELS_PATH),
        health_path=f"/{SERVICE}/HealthCheck",
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
        answers_text_with_text=True,
        names_eos=True,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        counts="total",
        convention=Convention(counts="total", repeats="all", is_cumulative=True, joins_finish=True, names_choices=True),
        encode_request=requests.encode,
        decode_request=requests.decode,
        encode_metadata=lambda _: (),
        decode_response=decode_response,
        decode_tokens=decode_tokens,
        encode_response=encode_response,
        decode_status=_decode_status,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
        decode_loads=loads.decode,
        encode_loads=loads.encode,
        decode_capacity=loads.decode_capacity,
        encode_capacity=loads.encode_capacity,
        embed=sglang_runtime_embeddings(snapshot, SERVICE),
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
    return tuple(
        TokenLogprob(token_id=token_id, logprob=value if value is not None else float("-inf"), top=top)
        for token_id, value, top in _decode_columns(meta, "output")
    )


def _decode_prompt(meta: Mapping[str, str]) -> tuple[PromptLogprob, ...]:
    return tuple(
        PromptLogprob(token_id=token_id, logprob=value, rank=rank_among(token_id, top), top=top)
        for token_id, value, top in _decode_columns(meta, "input")
    )


def _decode_columns(meta: Mapping[str, str], side: str) -> Iterator[tuple[int, float | None, tuple[tuple[int, float], ...]]]:
    """Ids, their log probabilities and the likeliest at their places, of the output or the input."""
    if f"{side}_token_logprobs" not in meta:
        return
    try:
        rows = _decode_rows(meta[f"{side}_token_logprobs"])
        tops = _decode_tops(meta.get(f"{side}_top_logprobs", "[]"))
    except (msgspec.DecodeError, RecursionError):
        raise MalformedMessageError(f"meta_info.{side}_token_logprobs is not what it should be") from None
    for place, (value, token_id, _) in enumerate(rows):
        top = (tops[place] or ()) if place < len(tops) else ()
        yield token_id, value, tuple((other, low) for low, other, _ in top if low is not None)
