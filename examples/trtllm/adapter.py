"""`trtllm.service`: service `trtllm.TrtllmService`, token ids in, token ids out.

Spoken by TensorRT-LLM (`trtllm-serve --grpc`). Traps of this wire: `max_tokens` is required, and its zero is not "as many as fit"; stop
strings are found only as the token sequence that the server makes of them, and are cut from the ids after some of these were streamed, so
the gateway matches them; a guide without text is no guide; `logprobs` 0 gives none; a health check says in words that all is not well.
docs/adding-a-server.md names the sources, and what of this nobody could verify.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gaie_codec import (
    Code,
    Constraint,
    ErrorEvent,
    Event,
    FinishEvent,
    InferenceRequest,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    UsageError,
)
from gaie_codec.adapters.base import Adapter, Convention, existing, trace_metadata
from gaie_codec.adapters.wire import regex_of_choices
from gaie_codec.snapshots import Snapshot

SERVICE = "trtllm.TrtllmService"
_INFO_PATH = f"/{SERVICE}/GetModelInfo"
_ANY_OBJECT = '{"type": "object"}'

_FIELDS = {
    "request_id": "request_id",
    "prompt_token_ids": "tokenized.input_token_ids",
    "stream": "streaming",
    "temperature": "sampling_config.temperature",
    "top_p": "sampling_config.top_p",
    "top_k": "sampling_config.top_k",
    "min_p": "sampling_config.min_p",
    "frequency_penalty": "sampling_config.frequency_penalty",
    "presence_penalty": "sampling_config.presence_penalty",
    "repetition_penalty": "sampling_config.repetition_penalty",
    "max_tokens": "max_tokens",
    "min_tokens": "sampling_config.min_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "n": "sampling_config.num_return_sequences",
    "logprobs": "output_config.logprobs",
    "seed": "sampling_config.seed",
    "bad_words": "bad",
    "constraint.json_schema": "guided_decoding.guide",
    "constraint.regex": "guided_decoding.guide",
    "constraint.grammar": "guided_decoding.guide",
    "constraint.structural_tag": "guided_decoding.guide",
}
_EMULATED = {
    "model": "a server has one model; the name is checked by the gateway",
    "trace_headers": "metadata",
    "return_token_ids": "ids always come",
    "skip_special_tokens": "the gateway makes the text",
    "spaces_between_special_tokens": "the gateway makes the text",
    "include_stop_str_in_output": "the server always leaves it in, and the gateway cuts it",
    "constraint.json_object": "guided_decoding.guide, as a schema",
    "constraint.choice": "guided_decoding.guide, as a pattern",
}
_ALSO_READ = frozenset(
    (
        "guided_decoding.guide_type",
        "include_stop_token_in_output",
        "output_config.exclude_input_from_output",
        "tokenized.original_text",
        "arrival_time",
    )
)  # but for the first they change nothing that a client of the gateway sees

_COUNT = (0, 2**31 - 1)
_POSITIVE_FLOAT = (2.0**-126, 2.0**127)
_RANGES = {
    "top_p": _POSITIVE_FLOAT,
    "top_k": _COUNT,
    "repetition_penalty": _POSITIVE_FLOAT,
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": _COUNT,
    "n": _COUNT,
    "seed": (0, 2**64 - 1),
}

_GUIDES = {
    "json_schema": "GUIDE_TYPE_JSON_SCHEMA",
    "regex": "GUIDE_TYPE_REGEX",
    "grammar": "GUIDE_TYPE_EBNF_GRAMMAR",
    "structural_tag": "GUIDE_TYPE_STRUCTURAL_TAG",
}
# The schema's comment knows a stop_word that the servicer does not send; an end without a reason is one by EOS for all that is known.
_REASONS = {"cancelled": "abort", "stop_word": "stop", "": "stop"}


def adapter(snapshot: Snapshot) -> Adapter:
    """The adapter for one snapshot of this dialect."""
    generate = snapshot.method(SERVICE, "Generate")
    request_type: Any = generate.request
    response_type: Any = generate.response
    info_type: Any = snapshot.message("GetModelInfoResponse")
    guided_type: Any = snapshot.message("GuidedDecodingParams")
    guide_types = {kind: getattr(guided_type, name) for kind, name in _GUIDES.items()}
    guide_kinds: dict[int, Any] = {number: kind for kind, number in guide_types.items()}
    sends = existing(request_type, _FIELDS)

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        params = request.sampling
        message.request_id = request.request_id
        message.tokenized.input_token_ids.extend(request.prompt_token_ids)
        _encode_sampling(params, message.sampling_config)
        if params.logprobs is not None:
            message.output_config.logprobs = max(params.logprobs, 1)
        message.output_config.exclude_input_from_output = True
        if params.max_tokens is not None:
            message.max_tokens = params.max_tokens
        message.streaming = request.stream
        if params.constraint is not None:
            encode_constraint(params.constraint, message.guided_decoding)
        message.stop.extend(params.stop)
        message.stop_token_ids.extend(params.stop_token_ids)
        message.ignore_eos = params.ignore_eos
        message.bad.extend(params.bad_words)
        message.include_stop_token_in_output = True
        return message

    def decode_request(message: Any) -> InferenceRequest:
        return InferenceRequest(
            request_id=message.request_id,
            prompt_token_ids=list(message.tokenized.input_token_ids),
            sampling=_decode_sampling(message, decode_constraint(message.guided_decoding)),
            stream=message.streaming,
        )

    def encode_constraint(constraint: Constraint, message: Any) -> None:
        # The servicer passes over a guide whose text is empty, so GUIDE_TYPE_JSON, which needs none, is not used.
        kind, value = constraint.kind, constraint.value
        if kind == "json_object":
            kind, value = "json_schema", _ANY_OBJECT
        elif kind == "choice":
            kind, value = "regex", regex_of_choices(value)
        message.guide_type = guide_types[kind]
        message.guide = value

    def decode_constraint(message: Any) -> Constraint | None:
        if not message.guide:
            return None
        if message.guide_type == guided_type.GUIDE_TYPE_JSON or message.guide == _ANY_OBJECT:
            return Constraint(kind="json_object")
        kind = guide_kinds.get(message.guide_type)
        return Constraint(kind=kind, value=message.guide) if kind is not None else None

    def decode_response(message: Any) -> tuple[Event, ...]:
        which = message.WhichOneof("response")
        if which is None:
            return ()
        return (_decode_chunk(message.chunk) if which == "chunk" else _decode_complete(message.complete),)

    def decode_tokens(message: Any) -> tuple[int, list[int]]:
        chunk = message.chunk
        return chunk.sequence_index, chunk.token_ids[:]

    def encode_response(event: Event) -> Any:
        message = response_type()
        if isinstance(event, TokensEvent):
            part = message.chunk
            part.SetInParent()
            part.token_ids.extend(event.token_ids)
        elif isinstance(event, FinishEvent):
            part = message.complete
            part.output_token_ids.extend(event.token_ids)
            part.finish_reason = "cancelled" if event.finish_reason == "abort" else event.finish_reason
            if isinstance(event.matched_stop, str):
                part.matched_stop_str = event.matched_stop
            elif event.matched_stop is not None:
                part.matched_token_id = event.matched_stop
        elif isinstance(event, ErrorEvent) and event.code is Code.DEADLINE_EXCEEDED:
            message.complete.sequence_index = event.index or 0
            message.complete.finish_reason = "timeout"
            return message
        else:
            raise UsageError(f"{SERVICE} has no message for a {type(event).__name__}")
        part.sequence_index = event.index
        part.prompt_tokens = event.prompt_tokens
        part.completion_tokens = event.completion_tokens
        part.cached_tokens = event.cached_tokens
        _encode_logprobs(event.logprobs, part.logprobs)
        return message

    def decode_model_info(answers: Mapping[str, Any]) -> ModelInfo:
        message = answers.get(_INFO_PATH, info_type())
        return ModelInfo(
            model_path=message.model_id,
            max_model_len=max(message.max_seq_len, 0),
            vocab_size=max(message.vocab_size, 0),
        )

    def encode_model_info(info: ModelInfo) -> dict[str, Any]:
        message = info_type()
        message.model_id = info.served_model_name or info.model_path
        message.max_seq_len = info.max_model_len
        message.vocab_size = info.vocab_size
        return {_INFO_PATH: message}

    return Adapter(
        dialect=snapshot.dialect,
        snapshot=snapshot,
        generate_path=generate.path,
        generate_paths=(generate.path,),
        path_for=lambda _: generate.path,
        info_paths=(_INFO_PATH,),
        tokenizer_path=f"/{SERVICE}/GetTokenizer" if snapshot.has_method(SERVICE, "GetTokenizer") else None,
        request_type=request_type,
        response_type=response_type,
        sends=sends,
        emulates=_EMULATED,
        also_reads=_ALSO_READ,
        carries=frozenset((*sends, *_EMULATED)),
        ranges=_RANGES,
        ends_at_stop_strings=False,
        names_eos=True,
        default_max_tokens=0,
        convention=Convention(counts="total", repeats="all"),
        encode_request=encode_request,
        decode_request=decode_request,
        encode_metadata=trace_metadata,
        decode_response=decode_response,
        decode_tokens=decode_tokens,
        encode_response=encode_response,
        decode_model_info=decode_model_info,
        encode_model_info=encode_model_info,
    )


def _encode_sampling(params: SamplingParams, message: Any) -> None:
    message.num_return_sequences = params.n
    # What has presence and is not asked for stays unset: the engine's own defaults for these ask for nothing either.
    if params.top_k:
        message.top_k = params.top_k
    message.top_p = params.top_p
    if params.seed is not None:
        message.seed = params.seed
    if params.temperature is not None:
        message.temperature = params.temperature
    if params.min_tokens:
        message.min_tokens = params.min_tokens
    message.repetition_penalty = params.repetition_penalty
    if params.presence_penalty:
        message.presence_penalty = params.presence_penalty
    if params.frequency_penalty:
        message.frequency_penalty = params.frequency_penalty
    if params.min_p:
        message.min_p = params.min_p


def _decode_sampling(request: Any, constraint: Constraint | None) -> SamplingParams:
    message, output = request.sampling_config, request.output_config
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=max(message.top_k, 0),
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        max_tokens=request.max_tokens or None,
        min_tokens=message.min_tokens,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        n=message.num_return_sequences or 1,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        seed=message.seed if message.HasField("seed") else None,
        bad_words=tuple(request.bad),
        constraint=constraint,
    )


def _decode_chunk(chunk: Any) -> TokensEvent:
    return TokensEvent(
        index=chunk.sequence_index,
        token_ids=chunk.token_ids[:],
        logprobs=_decode_logprobs(chunk.logprobs),
        prompt_tokens=chunk.prompt_tokens,
        completion_tokens=chunk.completion_tokens,
        cached_tokens=chunk.cached_tokens,
    )


def _decode_complete(complete: Any) -> FinishEvent | ErrorEvent:
    if complete.finish_reason == "timeout":
        return ErrorEvent(code=Code.DEADLINE_EXCEEDED, message="the model server ran out of time", index=complete.sequence_index)
    matched = complete.WhichOneof("matched_stop")
    return FinishEvent(
        index=complete.sequence_index,
        token_ids=complete.output_token_ids[:],
        logprobs=_decode_logprobs(complete.logprobs),
        finish_reason=_REASONS.get(complete.finish_reason, complete.finish_reason),
        matched_stop=getattr(complete, matched) if matched else None,
        prompt_tokens=complete.prompt_tokens,
        completion_tokens=complete.completion_tokens,
        cached_tokens=complete.cached_tokens,
    )


def _encode_logprobs(logprobs: Iterable[TokenLogprob], column: Any) -> None:
    for entry in logprobs:
        message = column.add(token_id=entry.token_id, logprob=entry.logprob)
        for token_id, logprob in entry.top:
            message.top_logprobs.add(token_id=token_id, logprob=logprob)


def _decode_logprobs(column: Any) -> tuple[TokenLogprob, ...]:
    # The servicer writes a dict's items, in whatever order that has.
    return tuple(
        TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=tuple(sorted(((one.token_id, one.logprob) for one in entry.top_logprobs), key=lambda pair: -pair[1])),
        )
        for entry in column
    )
