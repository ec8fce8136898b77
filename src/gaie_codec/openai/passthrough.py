"""OpenAI JSON for a server that takes it as it is: a look at the request.

It is decoded so far as a scheduler and the client's good need it: a field out of range, an unknown model, or a field that the server
would pass over without a word is refused here by name. What is sent are the client's own bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from .._errors import UnsupportedFieldError
from .._events import InferenceRequest, SamplingParams
from . import chat, completions, embeddings, sampling
from .endpoint import Asked, Decoded
from .fields import bool_field, decode_json_object, int_field, object_field, range_error, str_field, type_error
from .flavors import FLAVORS
from .messages import decode_messages
from .request import base_model, decode_model, decode_request_id, decode_stream_options

PATHS: Final[Mapping[str, str]] = MappingProxyType(
    {
        chat.PATH: "chat",
        completions.PATH: "completions",
        embeddings.PATH: "embeddings",
        "/v1/classify": "classify",
        "/classify": "classify",
        "/v1/score": "score",
        "/score": "score",
        "/v1/rerank": "rerank",
        "/rerank": "rerank",
    }
)
"""The kind of request behind each path."""

_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "chat": ("messages",),
        "completions": ("prompt",),
        "embeddings": ("input",),
        "classify": ("input",),
        "score": ("query", "items"),
        "rerank": ("query", "documents"),
    }
)
GENERATES: Final = ("chat", "completions")
"""The kinds whose answers have choices."""

_PREFIXES: Final = MappingProxyType({"chat": chat.ID_PREFIX, "completions": completions.ID_PREFIX})
# What vLLM's endpoints know, and therefore clients may send in good faith.
_VLLM_FIELDS: Final = frozenset().union(
    *(module.READ | module.REFUSED.keys() for module in (chat, completions)), embeddings.READ, embeddings.REFUSED
)
# The values of vLLM's fields that ask for nothing; of others it is null alone.
_HARMLESS: Final = MappingProxyType(
    {
        "add_generation_prompt": (None, True),
        "bad_words": (None, []),
        "embed_dtype": (None, "float32"),
        "endianness": (None, "native", "little"),
        "echo": (None, False),
        "include_stop_str_in_output": (None, False),
        "logprob_token_ids": (None, []),
        "request_id": (None, ""),
        "return_prompt_text": (None, False),
        "return_token_ids": (None, False),
        "return_tokens_as_token_ids": (None, False),
        "spaces_between_special_tokens": (None, True),
        "suffix": (None, ""),
        "thinking_token_budget": (None, -1),
        "watermarking": (None, False),
    }
)


class PassthroughOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like."""

    id: str
    kind: str
    stream: bool = False
    n: int = 1


def decode_request(kind: str, body: bytes, asked: Asked, known: frozenset[str] | None, *, drops: bool = False) -> Decoded:
    """Decode a request of one kind, as far as the gateway has to know it; `known` are the fields that the server takes,
    None to refuse none. Those which it passes over are reported, or, where that changes what is asked for and not `drops`, refused.

    Raises RequestError. The prompt stays text or messages: only the server tokenizes it.
    """
    fields = decode_json_object(body)
    for name in _REQUIRED[kind]:
        if fields.get(name) is None:
            raise type_error(name, "missing", "Field required")
    if known is None:
        known = frozenset(fields)
    lost = [
        name
        for name, value in fields.items()
        if name in _VLLM_FIELDS and name not in known and name != "model" and not _asks_nothing(kind, name, value, fields)
    ]
    if lost and not drops:
        raise UnsupportedFieldError(f"`{lost[0]}` is not known to this model server, which would pass over it", param=lost[0])
    if kind == "embeddings" and not drops and fields.get("encoding_format") in ("bytes", "bytes_only"):
        raise UnsupportedFieldError("this model server answers with floats or base64, not with bytes", param="encoding_format")
    model = asked.model
    name, lora_name = _decode_model(fields, asked)
    if lora_name and "model" not in known:  # clients name the model for the gateway's sake too, and that name is checked here
        raise UnsupportedFieldError("this model server takes no adapter for such a request", param="model")
    stream = bool_field(fields, "stream") if kind in GENERATES else False
    params = SamplingParams()
    if kind in GENERATES:
        decode_stream_options(fields, stream)
        wanted = int_field(fields, "max_completion_tokens")
        params = sampling.decode_sampling(
            {field: value for field, value in fields.items() if field in known},
            model=model,
            vocab_size=model.vocab_size,
            max_tokens=int_field(fields, "max_tokens") if wanted is None else wanted,
            logprobs=_decode_logprobs(kind, fields),
            max_stop_strings=FLAVORS["sglang"].max_stop_strings,  # whose servers these are
        )
    if kind == "chat":
        decode_messages(fields["messages"], accepts_content_parts=True, accepts_media=True)
        object_field(fields, "chat_template_kwargs")
    if kind == "rerank" and not isinstance(fields["documents"], list):
        raise type_error("documents", "list_type", "Input should be a valid list")
    prompt = fields.get("prompt")
    inference = InferenceRequest(
        request_id=_PREFIXES.get(kind, "") + decode_request_id(fields, asked),
        model=base_model(name, model),
        prompt_text=prompt if isinstance(prompt, str) else None,
        sampling=params,
        stream=stream,
        lora_name=lora_name,
    )
    unknown = {field for field in fields if field not in known and field not in chat.ADVISORY and field not in _VLLM_FIELDS}
    options = PassthroughOptions(id=inference.request_id, kind=kind, stream=stream, n=params.n * _prompts(prompt))
    return Decoded(prompts=(inference,), options=options, ignored=tuple(sorted(unknown.union(lost))))


def _decode_model(fields: Mapping[str, Any], asked: Asked) -> tuple[str, str]:
    """The model and the LoRA adapter that SGLang understands: it takes `MODEL:ADAPTER`, and any other name for the model's own."""
    model = asked.model
    if asked.rewritten_model not in ("", str_field(fields, "model")):
        raise UnsupportedFieldError("this model server gets the body as it is: its model cannot be rewritten", param="model")
    name, _, adapter = str_field(fields, "model").partition(":")
    if adapter in model.lora_adapters and (not name or name in model.names):
        return name, model.lora_adapters[adapter]
    name, _ = decode_model(fields, asked)
    if name in model.lora_adapters:
        base = next(iter(model.names), "MODEL")
        raise UnsupportedFieldError(f"this model server knows the adapter `{name}` as `{base}:{name}`", param="model")
    return name, ""


def _decode_logprobs(kind: str, fields: Mapping[str, Any]) -> int | None:
    if kind == "completions":
        return int_field(fields, "logprobs")
    top = int_field(fields, "top_logprobs") or 0
    if not 0 <= top <= sampling.MAX_LOGPROBS:
        raise range_error("top_logprobs", f"top_logprobs must be between 0 and {sampling.MAX_LOGPROBS}, got {top}.", top)
    return top if bool_field(fields, "logprobs") else None


def _asks_nothing(kind: str, name: str, value: Any, fields: Mapping[str, Any]) -> bool:
    """Whether a field that the server does not know has the value which it would have anyway."""
    if name == "add_special_tokens":
        return value in (None, kind in ("completions", "embeddings"))
    if name == "add_generation_prompt" and fields.get("continue_final_message") is True:
        return True  # who continues a message gets no generation prompt
    refused = {"completions": completions.REFUSED, "embeddings": embeddings.REFUSED}.get(kind, chat.REFUSED)
    return value in refused.get(name, _HARMLESS.get(name, (None,)))


def _prompts(prompt: Any) -> int:
    """How many prompts a completion request has: a list of texts, or of lists of ids, is several."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
