"""The typed requests of `sglang.runtime`: InferenceRequest <-> GenerateRequest, or TextGenerateRequest for a prompt that is text."""

from __future__ import annotations

from typing import Any

from ..._events import Constraint, InferenceRequest, Media, SamplingParams
from ..base import RequestCoder, existing
from ..wire import regex_of_choices

DEFAULT_MAX_TOKENS = 128  # what the server takes an unset max_new_tokens for
_ANY_OBJECT = '{"type": "object"}'
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
    "prompt_logprobs": "logprob_start_len",
    "seed": "sampling_params.seed",
    "constraint.json_schema": "sampling_params.json_schema",
    "constraint.regex": "sampling_params.regex",
    "constraint.grammar": "sampling_params.guided_decoding.ebnf",
    "constraint.choice": "sampling_params.guided_decoding.choice",
    "constraint.structural_tag": "sampling_params.guided_decoding.structural_tag",
    "thinks": "require_reasoning",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "return_token_ids": "ids always come",
    "thinks": "constraints hold from the first token on, and no reasoning tokens are counted",
    "grammar_from_first_token": "by the default: require_reasoning is not sent then",
    "prompt_text": "text of TextGenerate",
    "include_stop_str_in_output": "cut by the gateway",
    "skip_special_tokens": "detokenized by the gateway",
    "spaces_between_special_tokens": "detokenized by the gateway",
    "constraint.json_object": "sampling_params.json_schema",
    "constraint.choice": "sampling_params.regex",
}
_ALSO_READ = frozenset(("text", "return_logprob", "return_text", "video_data", "audio_data", "sampling_params.guided_decoding"))
_MEDIA_FIELDS = {"image": "image_data", "video": "video_data", "audio": "audio_data"}
_INT32 = (0, 2**31 - 1)


def coder(request_type: Any, text_request_type: Any) -> RequestCoder:
    """Both ways, for the two request types of one snapshot."""
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
        if params.logprobs is not None or params.prompt_logprobs is not None:
            message.return_logprob = True
            message.top_logprobs_num = max(params.logprobs or 0, params.prompt_logprobs or 0)
        if params.prompt_logprobs is not None:
            message.logprob_start_len = 0
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
        if request.thinks and "thinks" in sends and not params.grammar_from_first_token:
            message.require_reasoning = True
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
            thinks="thinks" in sends and message.require_reasoning,
            media=tuple(_decode_media(message)) if "media" in sends and not is_text else (),
        )

    return RequestCoder(
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        ranges={
            "top_k": _INT32,
            "max_tokens": (1, 2**31 - 1),
            "min_tokens": _INT32,
            "n": _INT32,
            "seed": (-(2**63), 2**63 - 1),
            "priority": (-(2**31), 2**31 - 1),
            "data_parallel_rank": _INT32,
        },
        encode=encode_request,
        decode=decode_request,
    )


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
