"""`POST /tokenize` and `/detokenize`, as vLLM serves them: a prompt or a chat -> token ids, and back. No model server is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import UnsupportedFieldError
from . import policy
from .endpoint import Asked
from .fields import bool_field, decode_json_object, type_error
from .inputs import render_messages
from .request import check_ids, decode_model
from .tools import decode_tools, template_tools

if TYPE_CHECKING:
    from ..text import Tokenizer

TOKENIZE_PATH: Final = "/tokenize"
DETOKENIZE_PATH: Final = "/detokenize"

_REFUSED: Final[dict[str, tuple[Any, ...]]] = {"chat_template": (None,), "media_io_kwargs": (None,), "mm_processor_kwargs": (None,)}


def encode_tokens(body: bytes, asked: Asked, tokenizer: Tokenizer) -> bytes:
    """The answer to `/tokenize`. Raises RequestError."""
    fields = decode_json_object(body)
    decode_model(fields, asked)
    if fields.get("prompt") is not None:
        text = fields["prompt"]
        if not isinstance(text, str):
            raise type_error("prompt", "string_type", "Input should be a valid string")
        special = bool_field(fields, "add_special_tokens", True)
    elif "messages" in fields:
        policy.refuse_values(fields, _REFUSED, drops=False)  # the answer has no place to say what was dropped
        text = render_messages(fields, tokenizer, add_generation_prompt=True, tools=template_tools(decode_tools(fields.get("tools"))))
        special = bool_field(fields, "add_special_tokens")
    else:
        raise type_error("prompt", "missing", "Field required")
    wants_texts = bool_field(fields, "return_token_strs")
    token_ids = tokenizer.encode(text, add_special_tokens=special)
    return msgspec.json.encode(
        {
            "count": len(token_ids),
            "max_model_len": asked.model.max_model_len,
            "tokens": token_ids,
            "token_strs": _token_texts(token_ids, tokenizer) if wants_texts else None,
        }
    )


def encode_prompt(body: bytes, asked: Asked, tokenizer: Tokenizer) -> bytes:
    """The answer to `/detokenize`. Raises RequestError."""
    fields = decode_json_object(body)
    decode_model(fields, asked)
    value = fields.get("tokens")
    if value is None:
        raise type_error("tokens", "missing", "Field required")
    if not isinstance(value, list):
        raise type_error("tokens", "list_type", "Input should be a valid list")
    for place, token_id in enumerate(value):
        if not isinstance(token_id, int):
            raise type_error(f"tokens.{place}", "int_type", "Input should be a valid integer")
        if token_id < 0:
            raise type_error(f"tokens.{place}", "greater_than_equal", "Input should be greater than or equal to 0")
    token_ids = [int(token_id) for token_id in value]
    check_ids(token_ids, asked.model, tokenizer)
    return msgspec.json.encode({"prompt": _whole_text(token_ids, tokenizer)})


def _token_texts(token_ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """As the vocabulary spells them. What is no Hugging Face tokenizer may have no such spelling."""
    spell = getattr(tokenizer, "token_texts", None)
    if spell is None:
        raise UnsupportedFieldError("`return_token_strs` is not supported by this tokenizer", param="return_token_strs")
    texts: list[str] = spell(token_ids)
    return texts


def _whole_text(token_ids: list[int], tokenizer: Tokenizer) -> str:
    """Special tokens included, like the characters that begin and do not end: a tokenizer that has no `decode` leaves these out."""
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        return tokenizer.detokenizer((), skip_special_tokens=False).decode(token_ids)
    text: str = decode(token_ids)
    return text
