"""Which fields of the wire the adapters read and write, found out by changing one at a time; and the lists of those that they do not.

Each entry of the lists has its reason. A path covers all that is below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message

from gaie_codec import MalformedMessageError
from gaie_codec.snapshots import is_repeated

META = {
    "id": '"a"',
    "finish_reason": '{"type":"stop","matched":5}',
    "prompt_tokens": "3",
    "completion_tokens": "1",
    "cached_tokens": "1",
    "reasoning_tokens": "1",
    "output_token_logprobs": "[[-0.5,3,null]]",
    "output_top_logprobs": "[[[-0.5,3,null]]]",
    "input_token_logprobs": "[[null,3,null],[-0.5,3,null]]",
    "input_top_logprobs": "[null,[[-0.5,3,null]]]",
}
"""What sglang.runtime tells in a map of JSON texts."""


def bases(message_type: type[Message]) -> list[Message]:
    """Messages to change fields of, as fields that hide others in one do not in all: full ones, of whose oneofs the last or the first
    member stays, and the empty one."""
    full, reverse = message_type(), message_type()
    _fill(full, 4)
    _fill(reverse, 4, -1)
    together = [_parsed(message_type, text) for text in _TOGETHER.get(message_type.DESCRIPTOR.full_name, ())]
    return [full, reverse, message_type(), *(message for message in together if message is not None)]


def _parsed(message_type: type[Message], text: str) -> Message | None:
    try:
        return text_format.Parse(text, message_type())
    except text_format.ParseError:  # a field that this snapshot does not have
        return None


def _fill(message: Any, depth: int, step: int = 1) -> None:
    for field in [*message.DESCRIPTOR.fields][::step]:
        change(message, field, depth, step)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def change(message: Any, field: Any, depth: int = 4, step: int = 1) -> None:
    """Give a field another value than it has."""
    room = getattr(message, field.name)
    if field.name == "meta_info" and _is_map(field):
        if room:
            room.clear()
        else:
            room.update(META)
    elif _is_map(field):
        key, value = (field.message_type.fields_by_name[part] for part in ("key", "value"))
        # A digit, because some maps have token ids as text.
        key_value: Any = str(len(room) + 1) if key.cpp_type == key.CPPTYPE_STRING else len(room) + 1
        if value.message_type is not None:
            if depth:
                _fill(room[key_value], depth - 1, step)
        else:
            room[key_value] = "v" if isinstance(value.default_value, str) else 0.5
    elif field.message_type is not None:
        child = room.add() if is_repeated(field) else room
        child.SetInParent()
        if depth:
            _fill(child, depth - 1, step)
    elif is_repeated(field):
        text = b"s" if field.type == field.TYPE_BYTES else "s"
        room.append(text if field.cpp_type == field.CPPTYPE_STRING else 3)
    elif field.cpp_type == field.CPPTYPE_STRING:
        setattr(message, field.name, '{"was":%s}' % (room or 0) if field.type != field.TYPE_BYTES else room + b"b")
    elif field.cpp_type == field.CPPTYPE_BOOL:
        setattr(message, field.name, not room)
    else:
        setattr(message, field.name, room + 1)


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _at(message: Any, path: tuple[str, ...]) -> Any:
    """The message at the path; what is missing on the way is made."""
    for name in path:
        field = message.DESCRIPTOR.fields_by_name[name]
        room = getattr(message, name)
        message = (room[0] if room else room.add()) if is_repeated(field) else room
        message.SetInParent()
    return message


def unread(messages: list[Message], decode: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The paths of fields that change nothing in what is decoded from any of the messages."""
    for field in _at(_copy(messages[0]), path).DESCRIPTOR.fields:
        if not any(_is_seen(message, decode, path, field) for message in messages):
            yield ".".join((*path, field.name))
        elif _is_nested(field):
            yield from unread(messages, decode, (*path, field.name))


def _is_seen(message: Message, decode: Any, path: tuple[str, ...], field: Any) -> bool:
    altered = _copy(message)
    place = _at(altered, path)
    expected = _outcome(decode, altered)
    change(place, field)
    if _outcome(decode, altered) != expected:
        return True
    place.ClearField(field.name)
    return bool(_outcome(decode, altered) != expected)


def _outcome(decode: Any, message: Message) -> Any:
    try:
        return decode(message)
    except MalformedMessageError as error:
        return str(error)


def has_path(descriptor: Any, path: str) -> bool:
    """Whether a dotted path of field names leads anywhere below the message."""
    name, _, rest = path.partition(".")
    field = descriptor.fields_by_name.get(name)
    return field is not None and (not rest or (field.message_type is not None and has_path(field.message_type, rest)))


def written(message: Message, path: str = "") -> set[str]:
    """The paths of the leaves that are set."""
    paths = set()
    for field, value in message.ListFields():
        name = path + field.name
        nested = _is_nested(field)
        for child in (value if is_repeated(field) else (value,)) if nested else ():
            paths |= written(child, name + ".")
        paths |= set() if nested else {name}
    return paths


def leaves(descriptor: Any, skipped: Iterable[str], path: str = "") -> set[str]:
    """The paths of all leaves, without those that are skipped and what is below them."""
    found: set[str] = set()
    for field in descriptor.fields:
        name = path + field.name
        if name not in skipped:
            found |= leaves(field.message_type, skipped, name + ".") if _is_nested(field) else {name}
    return found


def _is_nested(field: Any) -> bool:
    return field.message_type is not None and not _is_map(field) and not field.message_type.full_name.startswith("google.protobuf.")


_REF = "The prompt's media are what the client sent, without hints how to cut them."
_MANY = "One prompt a call."
_HIDDEN = "OpenAI's API has no hidden states."
_DISAGGREGATION = "Whoever pairs servers up for prefill and decode sets it; no request does."
_BY_IDS = "Log probabilities of given ids at the places of the prompt: no endpoint asks for them."
_OPAQUE = "Opaque to OpenAI's API, and of one server only."
_REASONING = "For reasoning models: no reasoning parser yet."
_HINTS = "Hints about the cache come from an orchestrator, not from a client."
_SPECULATION = "OpenAI's usage has no place for it that servers fill."
_WHOLE_MESSAGES = "The gateway does not ask for it, so it does not come."
_MEDIA_REF = {
    f"{kind}_data.{way}.ref.{name}": _REF
    for kind in ("image", "video", "audio")
    for way in ("item", "many.items.item")
    for name in (
        "max_dynamic_patch content_hash min_pixels max_pixels total_max_pixels fps num_frames min_frames max_frames max_tokens_per_frame"
        " max_image_tokens use_audio"
    ).split()
}

NOT_READ: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "vllm.engine": {
        "GenerateRequest": {
            "tokenized.original_text": "For the server's log; the ids decide.",
            "sampling_params.truncate_prompt_tokens": "The prompt is truncated before it is sent.",
            "kv_transfer_params": "The typed form of kv_transfer_params_json, which says more.",
            "mm_inputs": "Text only.",
            "extra_mm_inputs": "Text only.",
            "media_refs": "Text only.",
        },
        "GenerateResponse": {
            "complete.kv_transfer_params": "The typed form of kv_transfer_params_json, which says more.",
            "complete.spec_accepted_tokens": _SPECULATION,
            "complete.spec_draft_tokens": _SPECULATION,
            "complete.media_identity": "Text only.",
        },
    },
    "vllm.inference": {
        "GenerateRequest": {
            "truncate_prompt_tokens": "The prompt is truncated before it is sent.",
            "kv_hints": _HINTS,
            "engine_reasoning_gate.chat_template_kwargs": _REASONING,
            "response.prompt_token_ids": "The gateway has them; they come with log probabilities of the prompt.",
            "response.output_text": "Always asked for: the gateway needs the text.",
            "response.prompt_candidates.token_ids.ids": _BY_IDS,
            "kv.bypass_prefix_cache": "No request asks for it.",
            "media.mime_type": "Of raw bytes, which are not sent.",
            **{
                f"media.features.{name}": "Preprocessed media are not sent."
                for name in "kwargs identifier offset length mm_hash is_embed".split()
            },
        },
        "GenerateResponse": {
            "outputs.ranks": "OpenAI's API has no ranks.",
            "outputs.candidate_tokens.tokens.rank": "OpenAI's API has no ranks.",
            "prompt_info.candidate_tokens.tokens.rank": "Their order says it.",
            "outputs.sampling_mask": _WHOLE_MESSAGES,
            "outputs.finish_info.ec_transfer_params": _DISAGGREGATION,
        },
    },
    "sglang.scheduler": {
        "GenerateRequest": {
            "tokenized.original_text": "For the server's log; the ids decide.",
            "mm_inputs": "Text only.",
            "sampling_params.custom_params": _OPAQUE,
            "return_hidden_states": _HIDDEN,
            "disaggregated_params": _DISAGGREGATION,
            "custom_logit_processor": _OPAQUE,
            "timestamp": "For the server's metrics.",
            "log_metrics": "For the server's metrics.",
            "input_embeds": "No endpoint takes embeddings for a prompt.",
        },
        "GenerateResponse": {
            "request_id": "The call says which request it is.",
            "chunk.hidden_states": _HIDDEN,
            "complete.all_hidden_states": _HIDDEN,
            "complete.spec_accepted_tokens": _SPECULATION,
            "complete.spec_draft_tokens": _SPECULATION,
            "error.details": "A traceback, which is the server's own.",
        },
    },
    "sglang.runtime": {
        "GenerateRequest TextGenerateRequest": {
            "routing_key": "For a router before the server.",
            "disaggregated_params": _DISAGGREGATION,
            "max_thinking_tokens": _REASONING,
            "kv_hints": _HINTS,
            "return_text": "Ids are detokenized by the gateway.",
            "return_text_in_logprobs": "Ids are detokenized by the gateway.",
        },
        "GenerateResponse TextGenerateResponse": {
            "finished": "finish_reason says it, and with several choices this says it of all.",
        },
        "GenerateResponse": {"text": _WHOLE_MESSAGES},
    },
    "sglang.api": {
        "GenerateRequest": {
            **_MEDIA_REF,
            **{f"{kind}_data.nested.items": _MANY for kind in ("image", "video", "audio")},
            "input_ids.many.items": _MANY,
            "sampling_params.many.items": _MANY,
            "return_logprob.many.items": _MANY,
            "logprob_start_len.many.items": _MANY,
            "top_logprobs_num.many.items": _MANY,
            "lora_path.many.items": _MANY,
            "sampling_params.one.stop_regex": "No endpoint has stop patterns.",
            "sampling_params.one.custom_params": _OPAQUE,
            "sampling_params.one.beam_width": "Refused by name: use_beam_search.",
            "sampling_params.one.watermark": _OPAQUE,
            "token_ids_logprob.many.items": _MANY,
            "return_hidden_states": _HIDDEN,
            "return_text_in_logprobs": "Ids are detokenized by the gateway.",
            "bootstrap_host": _DISAGGREGATION,
            "bootstrap_port": _DISAGGREGATION,
            "bootstrap_room": _DISAGGREGATION,
            "bootstrap_pair_key": _DISAGGREGATION,
            "decode_tp_size": _DISAGGREGATION,
            "disagg_prefill_dp_rank": _DISAGGREGATION,
            "mm_hashes": _REF,
            "extra_key": "A salt for the cache that no client sends; cache_salt is the client's.",
            "session_params": "SGLang's sessions are opened by a call of their own.",
            "kv_hints": _HINTS,
            "routing_key": "For a router before the server.",
            "max_thinking_tokens": _REASONING,
        },
        "GenerateStreamItem": {
            "frame.meta_info.id": "The call says which request it is.",
            "frame.meta_info.finish_reason.length.length": "completion_tokens says it.",
            "frame.meta_info.finish_reason.abort.err_type": "The status says what kind it is.",
            "frame.meta_info.output_token_logprobs.entries.text": "Ids are detokenized by the gateway.",
            "frame.meta_info.output_top_logprobs.row.entries.text": "Ids are detokenized by the gateway.",
            "frame.meta_info.input_token_logprobs.entries.text": "Ids are detokenized by the gateway.",
            "frame.meta_info.input_top_logprobs.row.entries.text": "Ids are detokenized by the gateway.",
            "frame.meta_info.output_token_ids_logprobs.row.entries.text": "Ids are detokenized by the gateway.",
            "frame.meta_info.input_token_ids_logprobs": _BY_IDS,
            "frame.meta_info.hidden_states": _HIDDEN,
            "frame.meta_info.e2e_latency": "For the server's metrics.",
            "frame.meta_info.weight_version": "No endpoint shows it.",
        },
    },
}
"""By dialect and names of messages."""

_ONE_OF_TWO = "The other form of the same is sent."
_ONE_CALL = "One choice a call: others are calls of their own."
NOT_WRITTEN: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "vllm.engine": {},
    "vllm.inference": {
        "GenerateRequest": {
            "response.prompt_candidates.all": "The number that is asked for is sent.",
            "response.output_candidates.all": "The number that is asked for is sent.",
            "sampling.num_sequences": _ONE_CALL,
            "media.raw_bytes": "Media go by URL.",
        },
        "GenerateResponse": {"outputs.finish_info.eos_token_id": "An end by EOS has no matched_stop."},
    },
    "sglang.scheduler": {"GenerateRequest": {"sampling_params.stop": "The scheduler refuses stop strings; the gateway matches them."}},
    "sglang.runtime": {
        "GenerateRequest TextGenerateRequest": {
            "sampling_params.guided_decoding.json_schema": _ONE_OF_TWO,
            "sampling_params.guided_decoding.regex": _ONE_OF_TWO,
        }
    },
    "sglang.api": {
        "GenerateRequest": {
            **{
                f"{kind}_data.{place}": _ONE_OF_TWO
                for kind in ("image", "video", "audio")
                for place in ("item.ref.detail", "item.ref.url", "item.source", "many.items.item.source")
            },
            "rid.many.items": _MANY,
            "text.many.items": _MANY,
            "cache_salt.many.items": _MANY,
            "sampling_params.one.n": _ONE_CALL,
            "sampling_params.one.stop.one": _ONE_OF_TWO,
        },
        "GenerateStreamItem": {
            "frame.meta_info.finish_reason.abort.status_code": "A failure with a status is told by an error item.",
            "frame.meta_info.finish_reason.stop.matched.tokens.ids": _ONE_OF_TWO,
        },
    },
}
"""What is read, because others may send it, but never sent by us."""

# Messages besides those of `bases`, for fields that are read only together.
_TOGETHER = {
    "sglang.api.v1.GenerateStreamItem": (
        'frame { meta_info { finish_reason { abort { message: "m" status_code: 503 } } } }',
        'error { index: 1 error { code: 503 message: "m" } }',
    ),
    "sglang.grpc.scheduler.GenerateResponse": (
        'error { http_status_code: "503" message: "m" }',
        "complete { output_logprobs { token_ids: 1 token_logprobs: 1 top_logprobs { token_ids: 1 values: 1 } } }",
        "complete { output_logprobs { token_ids: 1 token_logprobs: 1 token_ids_logprobs { token_ids: 1 values: 1 } } }",
        "complete { input_logprobs { token_ids: 1 token_logprobs { value: 1 } top_logprobs { token_ids: 1 values: 1 } } }",
    ),
    "sglang.grpc.scheduler.GenerateRequest": ("return_logprob: true logprob_start_len: -1",),
    "sglang.api.v1.GenerateRequest": ("return_logprob { one: true } logprob_start_len { one: -1 }",),
}
