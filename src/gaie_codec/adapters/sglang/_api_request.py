"""The requests of `sglang.api`: InferenceRequest <-> GenerateRequest."""

from __future__ import annotations

from typing import Any

from ..._events import Constraint, InferenceRequest, Media, SamplingParams
from ..base import RequestCoder, existing
from ..wire import decode_logit_bias, regex_of_choices

DEFAULT_MAX_TOKENS = 128  # what the server takes an unset max_new_tokens for
_ANY_OBJECT = '{"type": "object"}'

_FIELDS = {
    "request_id": "rid.one",
    "prompt_token_ids": "input_ids.one",
    "prompt_text": "text.one",
    "stream": "stream",
    "media": "image_data.many.items.item.ref.url",
    "media.detail": "image_data.many.items.item.ref.detail",
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
    "stream_interval": "sampling_params.one.stream_interval",
    "logprobs": "top_logprobs_num.one",
    "prompt_logprobs": "logprob_start_len.one",
    "logprob_token_ids": "token_ids_logprob.one",
    "constraint.json_schema": "sampling_params.one.json_schema",
    "constraint.regex": "sampling_params.one.regex",
    "constraint.grammar": "sampling_params.one.ebnf",
    "constraint.structural_tag": "sampling_params.one.structural_tag",
    "constraint.choice": "sampling_params.one.choice",
    "thinks": "require_reasoning",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "trace_headers": "metadata",
    "return_token_ids": "ids always come",
    "thinks": "constraints hold from the first token on, and no reasoning tokens are counted",
    "grammar_from_first_token": "by the default: require_reasoning is not sent then",
    "constraint.json_object": "sampling_params.one.json_schema",
    "constraint.choice": "sampling_params.one.regex",
}
_MEDIA_FIELDS = {"image": "image_data", "video": "video_data", "audio": "audio_data"}
_MEDIA_ITEMS = [f"{field}.{item}" for field in _MEDIA_FIELDS.values() for item in ("item", "many.items.item")]
_ALSO_READ = frozenset(
    (
        *("return_logprob.one", "sampling_params.one.n", "sampling_params.one.stop"),
        *(f"{item}.{name}" for item in _MEDIA_ITEMS for name in ("source", "ref.url", "ref.detail")),
    )
)
_INT64 = (0, 2**31 - 1)  # int64 on the wire, 32 bits in the scheduler


def coder(request_type: Any) -> RequestCoder:
    """Both ways, for the request type of one snapshot."""
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
        if params.logprobs is not None or params.prompt_logprobs is not None:
            message.return_logprob.one = True
            message.top_logprobs_num.one = max(params.logprobs or 0, params.prompt_logprobs or 0)
        if params.prompt_logprobs is not None:
            message.logprob_start_len.one = 0
        if params.logprob_token_ids:
            message.token_ids_logprob.one.ids.extend(params.logprob_token_ids)
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
        if request.thinks and "thinks" in sends and not params.grammar_from_first_token:
            message.require_reasoning = True
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
            _encode_constraint(constraint, message)
        message.ignore_eos = params.ignore_eos
        message.skip_special_tokens = params.skip_special_tokens
        message.spaces_between_special_tokens = params.spaces_between_special_tokens
        message.no_stop_trim = params.include_stop_str_in_output
        for token_id, bias in params.logit_bias.items():
            message.logit_bias[str(token_id)] = bias
        if params.stream_interval is not None:
            message.stream_interval = params.stream_interval
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
            thinks="thinks" in sends and message.require_reasoning,
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
            logit_bias=decode_logit_bias(message.logit_bias),
            seed=message.sampling_seed if message.HasField("sampling_seed") else None,
            stream_interval=message.stream_interval or None,
            logprobs=request.top_logprobs_num.one if wants_logprobs else None,
            logprob_token_ids=tuple(request.token_ids_logprob.one.ids),
            prompt_logprobs=(
                request.top_logprobs_num.one
                if wants_logprobs and request.HasField("logprob_start_len") and request.logprob_start_len.one >= 0
                else None
            ),
        )

    return RequestCoder(
        sends=sends,
        emulates=emulates,
        also_reads=_ALSO_READ,
        ranges={
            "top_k": _INT64,
            "max_tokens": (1, 2**31 - 1),
            "min_tokens": _INT64,
            "stream_interval": (1, 2**31 - 1),
            "seed": (-(2**63), 2**63 - 1),
            "priority": (-(2**63), 2**63 - 1),
            "data_parallel_rank": _INT64,
        },
        encode=encode_request,
        decode=decode_request,
    )


def _encode_constraint(constraint: Constraint, message: Any) -> None:
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
