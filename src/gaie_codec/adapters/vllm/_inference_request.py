"""The requests of `vllm.inference`: InferenceRequest <-> GenerateRequest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ..._errors import MalformedRequestError
from ..._events import Constraint, InferenceRequest, Media, SamplingParams
from ..base import RequestCoder, existing, has_path
from ..wire import MAX_INTEGER, encode_struct, json_text_of

if TYPE_CHECKING:
    from ...snapshots import Snapshot

_RANK = "x-data-parallel-rank"
_FIELDS = {
    "request_id": "request_id",
    "model": "model",
    "prompt_token_ids": "token_ids",
    "prompt_text": "text",
    "priority": "priority",
    "session_id": "session_id",
    "media": "media.url",
    "media.uuid": "media.uuid",
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
    "prompt_logprobs": "response.prompt_logprobs",
    "logprob_token_ids": "response.output_candidates.token_ids.ids",
    "skip_special_tokens": "response.skip_special_tokens",
    "ec_transfer_params": "kv.ec_transfer_params",
    "watermarking": "watermarking",
    "bad_words_token_ids": "decoding.bad_words_token_ids",
    "grammar_from_first_token": "engine_reasoning_gate.reasoning_ended",
    "thinking_token_budget": "stopping.thinking_token_budget",
}
_EMULATED = {
    "trace_headers": "metadata, which vLLM does not read",
    "stream": "by the method: GenerateStream or Generate",
    "thinks": "found by the server's own reasoning parser",
}
_ALSO_READ = frozenset(
    (
        "sampling.num_sequences",
        "stopping.stop_strings",
        "response.output_text",
        "response.output_candidates.top_n",
        "response.prompt_token_ids",
        "response.prompt_candidates.top_n",
        "media.modality",
        "media.data_uri",
    )
)
_UINT32 = (0, 2**32 - 1)
# A float that rounds to 0 would be read as the default, one that rounds to infinity as nonsense.
_POSITIVE_FLOAT = (2.0**-126, 2.0**127)
_NO_TOP_K = 2**31 - 1  # no vocabulary is larger
_KINDS = {"json_schema": "json"}  # where our name of a constraint differs
_MODALITIES = ("", "image", "video", "audio")  # Modality
_MAX_STRUCT_DEPTH = 32  # an object in a Struct is three messages in one another, of which protobuf parsers take 100


def coder(snapshot: Snapshot, request_type: Any, *, sends_stops: bool) -> RequestCoder:
    """Both ways, for one snapshot. `sends_stops` is whether its servers may be told stop strings."""
    has_presence = snapshot.message("RandomSampling").DESCRIPTOR.fields_by_name["top_k"].has_presence
    has_media_uuid = has_path(request_type, "media.uuid")
    sends = existing(request_type, _FIELDS)
    # The metadata is read since 0.28.0, the release that brought session_id.
    emulates = _EMULATED | ({"data_parallel_rank": f"metadata {_RANK}"} if "session_id" in sends else {})
    if not sends_stops:
        del sends["stop"]
        emulates["stop"] = "matched by the gateway, which then ends the call"

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
        _encode_stopping(params, message.stopping, sends_strings=sends_stops)
        encode_response_options(request, message.response)
        if request.cache_salt:
            message.kv.cache_salt = request.cache_salt
        if request.kv_transfer_params:
            encode_struct(_decode_params(request.kv_transfer_params, "kv_transfer_params"), message.kv.kv_transfer_params)
        if request.ec_transfer_params:
            encode_struct(_decode_params(request.ec_transfer_params, "ec_transfer_params"), message.kv.ec_transfer_params)
        message.priority = request.priority
        if request.session_id:
            message.session_id = request.session_id
        for media in request.media:
            encode_media(media, message.media.add())
        if request.lora_name:
            message.lora_name = request.lora_name
        if request.watermarking is not None:
            message.watermarking = request.watermarking
        if params.grammar_from_first_token:
            message.engine_reasoning_gate.reasoning_ended = True
        return message

    def encode_random(params: SamplingParams, message: Any) -> None:
        message.top_k = params.top_k if params.top_k or has_presence else _NO_TOP_K
        message.top_p = params.top_p
        message.min_p = params.min_p
        if params.seed is not None:
            message.seed = params.seed

    def encode_response_options(request: InferenceRequest, message: Any) -> None:
        params = request.sampling
        if params.prompt_logprobs is not None:
            message.prompt_token_ids = message.prompt_logprobs = True
            message.prompt_candidates.top_n = params.prompt_logprobs
        message.output_text = True
        message.output_logprobs = params.logprobs is not None or bool(params.logprob_token_ids)
        message.output_token_ids = request.return_token_ids or message.output_logprobs
        if params.logprob_token_ids:
            message.output_candidates.token_ids.ids.extend(params.logprob_token_ids)
        elif params.logprobs is not None:
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
            kv_transfer_params=json_text_of(kv.kv_transfer_params) if kv.HasField("kv_transfer_params") else "",
            ec_transfer_params=(
                json_text_of(kv.ec_transfer_params) if "ec_transfer_params" in sends and kv.HasField("ec_transfer_params") else ""
            ),
            watermarking=message.watermarking if "watermarking" in sends and message.HasField("watermarking") else None,
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
            logprob_token_ids=tuple(response.output_candidates.token_ids.ids),
            skip_special_tokens=skips,
            bad_words_token_ids=tuple(tuple(one.ids) for one in decoding.bad_words_token_ids) if "bad_words_token_ids" in sends else (),
            grammar_from_first_token="grammar_from_first_token" in sends and message.engine_reasoning_gate.reasoning_ended,
            thinking_token_budget=(
                stopping.thinking_token_budget if "thinking_token_budget" in sends and stopping.HasField("thinking_token_budget") else None
            ),
        )

    return RequestCoder(
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        ranges={
            "top_p": _POSITIVE_FLOAT,
            "top_k": _UINT32 if has_presence else (0, _NO_TOP_K - 1),
            "repetition_penalty": _POSITIVE_FLOAT,
            "max_tokens": (1, 2**32 - 1),
            "min_tokens": _UINT32,
            "seed": (-(2**63), 2**63 - 1),
            "priority": (-(2**31), 2**31 - 1),
            "thinking_token_budget": (0, 2**63 - 1),
        },
        encode=encode_request,
        decode=decode_request,
    )


def encode_metadata(request: InferenceRequest) -> tuple[tuple[str, str], ...]:
    """Trace context, and the rank."""
    rank = () if request.data_parallel_rank is None else ((_RANK, str(request.data_parallel_rank)),)
    return (*request.trace_headers.items(), *rank)


def _encode_decoding(params: SamplingParams, message: Any) -> None:
    message.presence_penalty = params.presence_penalty
    message.frequency_penalty = params.frequency_penalty
    message.repetition_penalty = params.repetition_penalty
    message.logit_bias.update(params.logit_bias)
    message.allowed_token_ids.extend(params.allowed_token_ids)
    for ids in params.bad_words_token_ids:
        message.bad_words_token_ids.add(ids=ids)
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
    if params.thinking_token_budget is not None:
        message.thinking_token_budget = params.thinking_token_budget


def _decode_media(message: Any) -> Media:
    source = message.WhichOneof("source")
    return Media(
        kind=_MODALITIES[message.modality] if 0 < message.modality < len(_MODALITIES) else "image",  # type: ignore[arg-type]
        url=getattr(message, source) if source in ("url", "data_uri") else "",
        uuid=message.uuid,
    )


def _decode_params(text: str, name: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise MalformedRequestError(f"{name} is not a JSON object", param=name) from None
    _check_struct(value, name, _MAX_STRUCT_DEPTH)
    return value


def _check_struct(value: Any, name: str, levels: int) -> None:
    """Raise MalformedRequestError for an integer that would change in a Struct, whose numbers are doubles, and for too many levels."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise MalformedRequestError("an integer of more than 53 bits cannot be sent to this model server", param=name)
    if not isinstance(value, dict | list):
        return
    if not levels:
        raise MalformedRequestError(f"more than {_MAX_STRUCT_DEPTH} levels cannot be sent to this model server", param=name)
    for item in value.values() if isinstance(value, dict) else value:
        _check_struct(item, name, levels - 1)
