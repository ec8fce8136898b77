"""`vllm.inference`: service `vllm.Inference` (before vLLM 0.27 `vllm.Generate`), token ids in, text out.

Spoken by vLLM's own Rust front end. Traps of this wire: an unset temperature is greedy, so it is always written; before 0.32 a 0 of
top_k, top_p and min_p means the model's default; a text prompt would get its special tokens a second time, so ids are sent for
rendered chats; there is one choice per call; log probabilities do not name the sampled token, so its id is asked for besides; an older
server passes over a field that it does not know without a word, so only what the snapshot has is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.json_format import MessageToDict

from ..._errors import MalformedRequestError, UsageError
from ..._events import (
    Constraint,
    Event,
    FinishEvent,
    InferenceRequest,
    Media,
    ModelInfo,
    PromptEvent,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
)
from ..base import Adapter, Convention, existing, has_path

if TYPE_CHECKING:
    from ...snapshots import Snapshot

_SERVER_PATH = "/vllm.Control/GetServerInfo"
_MODEL_PATH = "/vllm.Control/GetModelInfo"
_LORA_PATH = "/vllm.Control/ListLoras"
_RANK = "x-data-parallel-rank"

_FIELDS = {
    "request_id": "request_id",
    "model": "model",
    "prompt_token_ids": "token_ids",
    "prompt_text": "text",
    "priority": "priority",
    "session_id": "session_id",
    "media": "media",
    "lora_name": "lora_name",
    "cache_salt": "kv.cache_salt",
    "kv_transfer_params": "kv.kv_transfer_params",
    "return_token_ids": "response.output_token_ids",
    "temperature": "temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "seed": "sampling.seed",
    "presence_penalty": "decoding.presence_penalty",
    "frequency_penalty": "decoding.frequency_penalty",
    "repetition_penalty": "decoding.repetition_penalty",
    "logit_bias": "decoding.logit_bias",
    "allowed_token_ids": "decoding.allowed_token_ids",
    "constraint.json_schema": "decoding.json",
    "constraint.regex": "decoding.regex",
    "constraint.choice": "decoding.choice",
    "constraint.grammar": "decoding.grammar",
    "constraint.json_object": "decoding.json_object",
    "constraint.structural_tag": "decoding.structural_tag",
    "max_tokens": "stopping.max_new_tokens",
    "min_tokens": "stopping.min_new_tokens",
    "stop_token_ids": "stopping.stop_token_ids",
    "stop": "stopping.stop_strings",
    "include_stop_str_in_output": "stopping.include_stop_strings",
    "ignore_eos": "stopping.ignore_eos",
    "logprobs": "response.output_logprobs",
    "skip_special_tokens": "response.skip_special_tokens",
}
_EMULATED = {
    "trace_headers": "metadata, which vLLM does not read",
    "stream": "by the method: GenerateStream or Generate",
}
_ALSO_READ = frozenset(
    (
        "sampling.num_sequences",
        "stopping.stop_strings",
        "stopping.include_stop_strings",
        "response.output_text",
        "response.output_candidates",
        "response.prompt_logprobs",
        "response.prompt_candidates",
    )
)
_UINT32 = (0, 2**32 - 1)
# A float that rounds to 0 would be read as the default, one that rounds to infinity as nonsense.
_POSITIVE_FLOAT = (2.0**-126, 2.0**127)
_MAX_INTEGER = 2**53 - 1
_NO_TOP_K = 2**31 - 1  # no vocabulary is larger
_KINDS = {"json_schema": "json"}  # where our name of a constraint differs
_REASONS = ("", "length", "stop", "abort")  # FinishInfo.FinishReason
_MODALITIES = ("", "image", "video", "audio")  # Modality


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    service = "vllm.Inference" if "vllm.Inference" in snapshot.services else "vllm.Generate"
    unary, streaming = snapshot.method(service, "Generate"), snapshot.method(service, "GenerateStream")
    request_type: Any = streaming.request
    response_type: Any = streaming.response
    has_control = "vllm.Control" in snapshot.services
    has_loras = has_control and snapshot.has_method("vllm.Control", "ListLoras")
    has_multimodal = has_control and snapshot.has_field("ModelInfo", "supports_multimodal")
    has_presence = snapshot.message("RandomSampling").DESCRIPTOR.fields_by_name["top_k"].has_presence
    has_cached_tokens = snapshot.has_field("FinishInfo", "num_cached_tokens")
    has_media_uuid = has_path(request_type, "media.uuid")
    # The schema of 0.22 to 0.25. A stop string and a character of several tokens end the process of 0.22, and no release of these can be
    # told from another by its schema.
    is_first = not snapshot.has_field("FinishInfo", "ec_transfer_params")
    sends = existing(request_type, _FIELDS)
    if is_first:
        del sends["stop"]
    # The metadata is read since 0.28.0, the release that brought session_id.
    emulates = _EMULATED | ({"data_parallel_rank": f"metadata {_RANK}"} if "session_id" in sends else {})
    emulates |= {"stop": "matched by the gateway, which then ends the call"} if is_first else {}

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        params = request.sampling
        message.request_id = request.request_id
        message.model = request.model
        if request.prompt_text is None:
            message.token_ids.ids.extend(request.prompt_token_ids)
        else:
            message.text = request.prompt_text
        message.temperature = 1.0 if params.temperature is None else params.temperature
        encode_random(params, message.sampling)
        _encode_decoding(params, message.decoding)
        _encode_stopping(params, message.stopping, sends_strings=not is_first)
        encode_response_options(request, message.response)
        if request.cache_salt:
            message.kv.cache_salt = request.cache_salt
        if request.kv_transfer_params:
            _encode_struct(_doubles(msgspec.json.decode(request.kv_transfer_params)), message.kv.kv_transfer_params)
        message.priority = request.priority
        if request.session_id:
            message.session_id = request.session_id
        for media in request.media:
            encode_media(media, message.media.add())
        if request.lora_name:
            message.lora_name = request.lora_name
        return message

    def encode_random(params: SamplingParams, message: Any) -> None:
        message.top_k = params.top_k if params.top_k or has_presence else _NO_TOP_K
        message.top_p = params.top_p
        message.min_p = params.min_p
        if params.seed is not None:
            message.seed = params.seed

    def encode_response_options(request: InferenceRequest, message: Any) -> None:
        params = request.sampling
        message.output_text = True
        message.output_token_ids = request.return_token_ids or params.logprobs is not None
        if params.logprobs is not None:
            message.output_logprobs = True
            message.output_candidates.top_n = params.logprobs
        if "skip_special_tokens" in sends:
            message.skip_special_tokens = params.skip_special_tokens

    def encode_media(media: Media, message: Any) -> None:
        message.modality = _MODALITIES.index(media.kind)
        if media.url.startswith("data:"):
            message.data_uri = media.url
        else:
            message.url = media.url
        if has_media_uuid:
            message.uuid = media.uuid

    def decode_request(message: Any) -> InferenceRequest:
        kv = message.kv
        wants_ids = message.response.output_token_ids
        return InferenceRequest(
            request_id=message.request_id,
            model=message.model,
            prompt_token_ids=list(message.token_ids.ids),
            prompt_text=message.text if message.HasField("text") else None,
            sampling=decode_sampling(message),
            priority=message.priority,
            cache_salt=kv.cache_salt,
            kv_transfer_params=_json_text(kv.kv_transfer_params) if kv.HasField("kv_transfer_params") else "",
            session_id=message.session_id if "session_id" in sends else "",
            media=tuple(_decode_media(one) for one in message.media) if "media" in sends else (),
            lora_name=message.lora_name if "lora_name" in sends else "",
            return_token_ids=wants_ids and not message.response.output_logprobs,
        )

    def decode_sampling(message: Any) -> SamplingParams:
        random, decoding, stopping, response = message.sampling, message.decoding, message.stopping, message.response
        skips = response.skip_special_tokens if "skip_special_tokens" in sends and response.HasField("skip_special_tokens") else True
        top_k = random.top_k if has_presence or random.top_k < _NO_TOP_K else 0
        return SamplingParams(
            temperature=message.temperature,  # unset is 0.0, and so it is to vLLM
            top_p=random.top_p if has_presence and random.HasField("top_p") else random.top_p or 1.0,
            top_k=top_k,
            min_p=random.min_p,
            seed=random.seed if random.HasField("seed") else None,
            n=random.num_sequences or 1,
            presence_penalty=decoding.presence_penalty,
            frequency_penalty=decoding.frequency_penalty,
            repetition_penalty=decoding.repetition_penalty or 1.0,
            logit_bias=dict(decoding.logit_bias),
            allowed_token_ids=tuple(decoding.allowed_token_ids),
            constraint=_decode_constraint(decoding),
            max_tokens=stopping.max_new_tokens or None,
            min_tokens=stopping.min_new_tokens,
            stop_token_ids=tuple(stopping.stop_token_ids),
            stop=tuple(stopping.stop_strings),
            include_stop_str_in_output=stopping.include_stop_strings,
            ignore_eos=stopping.ignore_eos,
            logprobs=response.output_candidates.top_n if response.output_logprobs else None,
            prompt_logprobs=response.prompt_candidates.top_n if response.prompt_logprobs else None,
            skip_special_tokens=skips,
        )

    def decode_response(message: Any) -> tuple[Event, ...]:
        events: list[Event] = []
        if message.HasField("prompt_info"):
            events.append(PromptEvent(prompt_tokens=message.prompt_info.num_prompt_tokens))
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
            finish_reason=_REASONS[info.finish_reason] if info.finish_reason < len(_REASONS) else "stop",
            matched_stop=getattr(info, which) if which and which != "eos_token_id" else None,
            completion_tokens=info.num_output_tokens,
            cached_tokens=info.num_cached_tokens if has_cached_tokens else 0,
            kv_transfer_params=_json_text(info.kv_transfer_params) if info.HasField("kv_transfer_params") else "",
        )

    def decode_text(message: Any) -> tuple[int, str, int] | None:
        output = message.outputs
        if output.HasField("finish_info") or message.HasField("prompt_info"):
            return None
        return output.index, output.text, output.num_tokens

    def encode_response(event: Event) -> Any:
        message = response_type()
        if isinstance(event, PromptEvent):
            message.prompt_info.num_prompt_tokens = event.prompt_tokens
            return message
        if not isinstance(event, TokensEvent | FinishEvent):
            raise UsageError(f"{service} has no message for a {type(event).__name__}")
        if event.prompt_tokens:
            message.prompt_info.num_prompt_tokens = event.prompt_tokens
        output = message.outputs
        output.SetInParent()
        output.index = event.index
        output.text = event.text or ""
        output.token_ids.extend(event.token_ids)
        for entry in event.logprobs:
            output.logprobs.append(entry.logprob)
            output.ranks.append(1)
            row = output.candidate_tokens.add()
            for rank, (token_id, value) in enumerate(entry.top, 1):
                row.tokens.add(id=token_id, logprob=value, rank=rank)
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
            _encode_struct(msgspec.json.decode(event.kv_transfer_params), info.kv_transfer_params)
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        server, model, loras = (answers.get(path) for path in (_SERVER_PATH, _MODEL_PATH, _LORA_PATH))
        return ModelInfo(
            model_path=model.model_id if model is not None else "",
            served_model_name=model.served_model_name if model is not None else "",
            aliases=tuple(model.served_model_aliases) if model is not None else (),
            max_model_len=server.max_model_len if server is not None else 0,
            is_multimodal=model.supports_multimodal if model is not None and has_multimodal else None,
            lora_adapters={one.lora_name: one.lora_name for one in loras.adapters} if loras is not None else {},
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        if not has_control:
            return {}
        server: Any = snapshot.method_at(_SERVER_PATH).response()
        server.max_model_len = info.max_model_len
        model: Any = snapshot.method_at(_MODEL_PATH).response()
        model.model_id = info.model_path
        model.served_model_name = info.served_model_name
        model.served_model_aliases.extend(info.aliases)
        model.supports_text_input = model.supports_token_ids_input = True
        if has_multimodal:
            model.supports_multimodal = bool(info.is_multimodal)
        answers = {_SERVER_PATH: server, _MODEL_PATH: model}
        if has_loras:
            loras: Any = snapshot.method_at(_LORA_PATH).response()
            for place, name in enumerate(info.lora_adapters, 1):
                loras.adapters.add(lora_id=place, lora_name=name)
            answers[_LORA_PATH] = loras
        return answers

    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=streaming.path,
        generate_paths=(streaming.path, unary.path),
        path_for=lambda request: streaming.path if request.stream else unary.path,
        info_paths=(_SERVER_PATH, _MODEL_PATH, *((_LORA_PATH,) if has_loras else ())) if has_control else (),
        request_type=request_type,
        response_type=response_type,
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        carries=frozenset((*sends, *emulates)),
        ranges={
            "top_p": _POSITIVE_FLOAT,
            "top_k": _UINT32 if has_presence else (0, _NO_TOP_K - 1),
            "repetition_penalty": _POSITIVE_FLOAT,
            "max_tokens": (1, 2**32 - 1),
            "min_tokens": _UINT32,
            "seed": (-(2**63), 2**63 - 1),
            "priority": (-(2**31), 2**31 - 1),
        },
        sends_text=True,
        sends_final_text=not is_first,
        ends_at_stop_strings=not is_first,
        echoes_prompt=is_first,
        counts="delta",
        convention=Convention(counts="delta", repeats="nothing", joins_finish=True, announces_prompt=True),
        encode_request=encode_request,
        decode_request=decode_request,
        encode_metadata=_encode_metadata,
        decode_response=decode_response,
        decode_text=decode_text,
        encode_response=encode_response,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
    )


def _encode_metadata(request: InferenceRequest) -> tuple[tuple[str, str], ...]:
    rank = () if request.data_parallel_rank is None else ((_RANK, str(request.data_parallel_rank)),)
    return (*request.trace_headers.items(), *rank)


def _encode_decoding(params: SamplingParams, message: Any) -> None:
    message.presence_penalty = params.presence_penalty
    message.frequency_penalty = params.frequency_penalty
    message.repetition_penalty = params.repetition_penalty
    message.logit_bias.update(params.logit_bias)
    message.allowed_token_ids.extend(params.allowed_token_ids)
    constraint = params.constraint
    if constraint is None:
        return
    if constraint.kind == "json_object":
        message.json_object = True
    elif constraint.kind == "choice":
        message.choice.choices.extend(constraint.value)
    else:
        setattr(message, _KINDS.get(constraint.kind, constraint.kind), constraint.value)


def _decode_constraint(message: Any) -> Constraint | None:
    kind = message.WhichOneof("structured_output")
    if kind is None or (kind == "json_object" and not message.json_object):
        return None
    if kind == "json_object":
        return Constraint(kind=kind)
    if kind == "json":
        return Constraint(kind="json_schema", value=message.json)
    return Constraint(kind=kind, value=tuple(message.choice.choices) if kind == "choice" else getattr(message, kind))


def _encode_stopping(params: SamplingParams, message: Any, *, sends_strings: bool) -> None:
    message.max_new_tokens = params.max_tokens or 0
    message.min_new_tokens = params.min_tokens
    message.stop_token_ids.extend(params.stop_token_ids)
    if sends_strings:  # but no empty one, which ends the server process of vLLM before 0.28
        message.stop_strings.extend(filter(None, params.stop))
    message.include_stop_strings = params.include_stop_str_in_output
    message.ignore_eos = params.ignore_eos


def _decode_media(message: Any) -> Media:
    source = message.WhichOneof("source")
    return Media(
        kind=_MODALITIES[message.modality] if 0 < message.modality < len(_MODALITIES) else "image",  # type: ignore[arg-type]
        url=getattr(message, source) if source in ("url", "data_uri") else "",
        uuid=message.uuid,
    )


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


def _doubles(value: Any) -> Any:
    """The value, if a Struct can hold it: its numbers are doubles. Raises MalformedRequestError for an integer that would change."""
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise MalformedRequestError("an integer of more than 53 bits cannot be sent to this model server", param="kv_transfer_params")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _doubles(item)
    return value


def _encode_struct(value: dict[str, Any], struct: Any) -> None:
    struct.SetInParent()  # an empty object says something too
    struct.update(value)


def _json_text(struct: Any) -> str:
    """A Struct as JSON text. Its numbers are doubles; those that are whole are written as integers, as they were sent."""
    return msgspec.json.encode(_whole(MessageToDict(struct))).decode()


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_INTEGER else value
