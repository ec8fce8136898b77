"""`input` and `instructions` of a Responses request -> the messages of a chat.

Several items may be one message to a chat template: reasoning, text and calls of the assistant in a row are, as with vLLM 0.33
(`responses/utils.py`): each goes to the assistant message before it if that has none of its kind yet. What only OpenAI's own tools make
is refused by name, and so is what would have to be looked up in a store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from .._errors import MalformedRequestError, UnsupportedFieldError
from .fields import type_error

_TEXT_PARTS: Final = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_PARTIAL: Final = ("in_progress", "incomplete")


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """`messages` of a chat, and of each where in the request it comes from. `continues` the last of them instead of answering it."""

    messages: list[dict[str, Any]]
    origins: list[str]
    continues: bool


def decode_input(fields: Mapping[str, Any]) -> Conversation:
    """The conversation. Raises MalformedRequestError or UnsupportedFieldError naming the item."""
    if "input" not in fields:
        raise type_error("input", "missing", "Field required")
    messages: list[dict[str, Any]] = []
    origins: list[str] = []
    instructions = fields.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            raise type_error("instructions", "string_type", "Input should be a valid string")
        if instructions:
            messages.append({"role": "system", "content": instructions})
            origins.append("instructions")
    items = fields["input"]
    if isinstance(items, str):
        return Conversation(messages=[*messages, {"role": "user", "content": items}], origins=[*origins, "input"], continues=False)
    if not isinstance(items, list):
        raise type_error("input", "string_type", "Input should be a valid string or list")
    if not items:
        raise MalformedRequestError("input must not be an empty list", param="input")
    for place, item in enumerate(items):
        loc = f"input.{place}"
        message = _decode_item(item, loc)
        if message and not (messages and _joined(messages[-1], message)):
            messages.append(message)
            origins.append(loc)
    last = items[-1]
    is_partial = last.get("type") in (None, "message", "reasoning") and last.get("status") in _PARTIAL
    continues = is_partial and bool(messages) and messages[-1]["role"] == "assistant"
    return Conversation(messages=messages, origins=origins, continues=continues)


def _joined(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether the assistant's last message could take this one in, and now has."""
    if before["role"] != "assistant" or message["role"] != "assistant":
        return False
    if "tool_calls" in message:
        before.setdefault("tool_calls", []).extend(message["tool_calls"])
        return True
    kind = "reasoning" if "reasoning" in message else "content"
    if kind in before:
        return False
    before[kind] = message[kind]
    return True


def _decode_item(item: Any, loc: str) -> dict[str, Any] | None:
    """One item as a message; None for one that says nothing."""
    if not isinstance(item, dict):
        raise type_error(loc, "dict_type", "Input should be a valid dictionary")
    kind = item.get("type")
    if kind in (None, "message"):
        return _decode_message(item, loc)
    if kind == "function_call":
        function = {"name": _text(item, "name", loc), "arguments": _text(item, "arguments", loc)}
        call = {"id": _text(item, "call_id", loc), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        if "output" not in item:
            raise type_error(f"{loc}.output", "missing", "Field required")
        return {"role": "tool", "tool_call_id": _text(item, "call_id", loc), "content": _decode_content(item["output"], f"{loc}.output")}
    if kind == "reasoning":
        return _decode_reasoning(item, loc)
    if kind == "item_reference":
        raise UnsupportedFieldError("items cannot be referred to: no response is stored here", param=f"{loc}.id")
    if not isinstance(kind, str):
        raise type_error(f"{loc}.type", "string_type", "Input should be a valid string")
    raise UnsupportedFieldError(f"input items of type {kind[:40]!r} are not supported", param=f"{loc}.type")


def _text(item: Mapping[str, Any], name: str, loc: str) -> str:
    value = item.get(name)
    if isinstance(value, str):
        return value
    fault = ("missing", "Field required") if value is None else ("string_type", "Input should be a valid string")
    raise type_error(f"{loc}.{name}", *fault)


def _decode_message(item: Mapping[str, Any], loc: str) -> dict[str, Any]:
    role = _text(item, "role", loc)
    if "content" not in item:
        raise type_error(f"{loc}.content", "missing", "Field required")
    content = item["content"]
    if role != "assistant":
        return {"role": role, "content": _decode_content(content, f"{loc}.content")}
    if content is None or isinstance(content, str):
        return {"role": role, "content": content or ""}
    return {"role": role, "content": "".join(_decode_texts(content, f"{loc}.content"))}


def _decode_reasoning(item: Mapping[str, Any], loc: str) -> dict[str, Any] | None:
    """Its own words, else their summary. OpenAI's encrypted ones mean nothing to another model."""
    if item.get("encrypted_content"):
        raise UnsupportedFieldError("Encrypted content is not supported.", param=f"{loc}.encrypted_content")
    for name in ("content", "summary"):
        if item.get(name):
            reasoning = "".join(_decode_texts(item[name], f"{loc}.{name}"))
            return {"role": "assistant", "reasoning": reasoning} if reasoning else None
    return None


def _decode_texts(parts: Any, loc: str) -> list[str]:
    """What the assistant said: text, or its refusal."""
    if not isinstance(parts, list):
        raise type_error(loc, "list_type", "Input should be a valid list")
    texts = []
    for place, part in enumerate(parts):
        where = f"{loc}.{place}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (*_TEXT_PARTS, "refusal"):
            raise UnsupportedFieldError("only text is supported here", param=f"{where}.type")
        texts.append(_text(part, "refusal" if kind == "refusal" else "text", where))
    return texts


def _decode_content(content: Any, loc: str) -> str | list[dict[str, Any]]:
    """Content in a chat's form: text, or parts whose places are the same."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise type_error(loc, "string_type", "Input should be a valid string or list")
    return [_decode_part(part, f"{loc}.{place}") for place, part in enumerate(content)]


def _decode_part(part: Any, loc: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise type_error(f"{loc}.type", "missing", "Field required")
    if kind in _TEXT_PARTS:
        return {"type": "text", "text": _text(part, "text", loc)}
    if kind == "input_image":
        if part.get("file_id") is not None:
            raise UnsupportedFieldError("files are not stored here: send the image's URL", param=f"{loc}.file_id")
        detail = {"detail": part["detail"]} if part.get("detail") is not None else {}
        return {"type": "image_url", "image_url": {"url": _text(part, "image_url", loc), **detail}}
    if kind in ("input_file", "refusal"):
        raise UnsupportedFieldError(f"content parts of type {kind!r} are not supported here", param=f"{loc}.type")
    return part  # as a chat has it: sound, or a name that a chat refuses
