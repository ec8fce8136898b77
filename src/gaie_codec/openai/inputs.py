"""Texts, token ids or messages to embed -> token ids, one list a prompt, cut and checked as vLLM's pooling endpoints do it.

Unlike a prompt to continue, one to embed keeps its beginning when it is cut, and the special tokens around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from .._errors import MalformedRequestError, ModelNotFoundError, UnsupportedFieldError
from .._events import InferenceRequest, ModelInfo
from .endpoint import Asked
from .fields import Fault, bool_field, object_field, type_error, type_errors
from .messages import decode_messages
from .request import (
    Truncation,
    base_model,
    check_ids,
    check_length,
    decode_model,
    decode_request_id,
    decode_routing,
    decode_truncation,
    encode_text,
)

if TYPE_CHECKING:
    from ..text import Tokenizer

# What `render_messages` passes on; everything else of the template's is its own.
_RESERVED_TEMPLATE_KWARGS: Final = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
_LIST: Final = Fault("input", "list_type", "Input should be a valid list")
_MESSAGES: Final = Fault("messages", "missing", "Field required")
# What each of vLLM's alternatives says of an `input` that is neither text nor a list: the forms of it, chats, and plugins.
_NO_INPUT: Final = (
    *(_LIST, _LIST, Fault("input", "string_type", "Input should be a valid string"), _LIST),
    *(_MESSAGES, _MESSAGES, _MESSAGES, _LIST, _MESSAGES),
    Fault("input", "is_instance_of", "Input should be an instance of Sequence", {"class": "Sequence"}),
)


def encode_inputs(fields: Mapping[str, Any], value: Any, name: str, asked: Asked, tokenizer: Tokenizer) -> list[list[int]]:
    """A text, token ids, or a list of either, as token ids. `name` is the field's. Raises RequestError."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, int) for item in value)):
        value = [value]
    if not isinstance(value, list):
        raise type_errors(*_NO_INPUT) if name == "input" else type_error(name, "list_type", "Input should be a valid list")
    if not value:
        raise MalformedRequestError("You must pass at least one prompt")
    check_count(len(value), name, asked)
    special = bool_field(fields, "add_special_tokens", True)
    return [
        _encode_one(fields, item, asked.model, tokenizer, special=special)
        if isinstance(item, str)
        else _decode_ids(fields, item, f"{name}.{place}", asked.model, tokenizer)
        for place, item in enumerate(value)
    ]


def encode_chat(fields: Mapping[str, Any], asked: Asked, tokenizer: Tokenizer) -> list[int]:
    """`messages` as token ids: without a generation prompt, where nobody asks for one. Raises RequestError."""
    text = render_messages(fields, tokenizer, add_generation_prompt=False)
    return _encode_one(fields, text, asked.model, tokenizer, special=bool_field(fields, "add_special_tokens"))


def render_messages(
    fields: Mapping[str, Any], tokenizer: Tokenizer, *, add_generation_prompt: bool, tools: Sequence[dict[str, Any]] | None = None
) -> str:
    """The text of `messages` by the chat template; `add_generation_prompt` is what holds where the client says nothing."""
    messages, _ = decode_messages(fields.get("messages"), accepts_content_parts=tokenizer.accepts_content_parts)
    continue_final_message = bool_field(fields, "continue_final_message")
    add_generation_prompt = bool_field(fields, "add_generation_prompt", add_generation_prompt)
    if add_generation_prompt and continue_final_message:
        raise MalformedRequestError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    kwargs = object_field(fields, "chat_template_kwargs") or {}
    return tokenizer.render_chat(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs={key: value for key, value in kwargs.items() if key not in _RESERVED_TEMPLATE_KWARGS},
    )


def check_count(count: int, name: str, asked: Asked) -> None:
    """Raise UnsupportedFieldError for more prompts than calls can be made, before any is tokenized."""
    if count > asked.max_prompts:
        raise UnsupportedFieldError(
            f"`{name}` takes {count} calls to this model server, and this gateway makes at most {asked.max_prompts}", param=name
        )


def decode_embedded_model(fields: Mapping[str, Any], asked: Asked) -> tuple[str, str]:
    """As `decode_model`; vLLM's pooling endpoints name no parameter."""
    try:
        return decode_model(fields, asked)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(error.message) from None


def make_requests(
    fields: Mapping[str, Any], prompts: Sequence[list[int]], asked: Asked, *, name: str, prefix: str
) -> tuple[str, tuple[InferenceRequest, ...], tuple[str, ...]]:
    """The id of the answer, a request for each prompt, and the fields that have no effect: `name` is the model that the client named.

    A priority orders requests where a server is set up for that, and changes no vector; no wire carries one for Embed.
    """
    request_id = prefix + decode_request_id(fields, asked)
    routing = decode_routing(fields)
    requests = tuple(
        InferenceRequest(
            request_id=f"{request_id}-{place}",
            model=base_model(name, asked.model),
            prompt_token_ids=token_ids,
            cache_salt=routing["cache_salt"],
            lora_name=asked.model.lora_adapters.get(name, ""),
        )
        for place, token_ids in enumerate(prompts)
    )
    return request_id, requests, ("priority",) if routing["priority"] else ()


def _decode_ids(fields: Mapping[str, Any], value: Any, loc: str, model: ModelInfo, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise type_error(loc, "string_type", "Input should be a valid string or a list of token ids")
    token_ids = [int(item) for item in value]
    check_ids(token_ids, model, tokenizer)
    token_ids = decode_truncation(fields, model.max_model_len, side="right").cut(token_ids)
    check_length(token_ids, model.max_model_len)
    return token_ids


def _encode_one(fields: Mapping[str, Any], text: str, model: ModelInfo, tokenizer: Tokenizer, *, special: bool) -> list[int]:
    truncation = decode_truncation(fields, model.max_model_len, side="right")
    token_ids = encode_text(fields, text, tokenizer, model.max_model_len, add_special_tokens=special)
    keep = truncation.keep
    if keep is not None and len(token_ids) > keep:
        bare = tokenizer.encode(text, add_special_tokens=False) if special else token_ids
        before, after = _around(token_ids, bare)
        room = max(keep - len(before) - len(after), 0)
        token_ids = [*before, *Truncation(room, truncation.side).cut(bare), *after][:keep]
    check_length(token_ids, model.max_model_len)
    return token_ids


def _around(token_ids: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens before and after those of the text itself."""
    for start in range(len(token_ids) - len(bare) + 1):
        end = start + len(bare)
        if token_ids[start:end] == bare:
            return token_ids[:start], token_ids[end:]
    return [], []
