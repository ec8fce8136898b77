"""Chat messages as clients send them -> what a chat template is given, in vLLM's flavour.

Content parts become one text, joined by line breaks, unless the template wants the parts; tool-call arguments become objects;
`reasoning_content` is `reasoning` to vLLM and both to a template. Keys that templates do not know are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .._errors import MalformedRequestError, UnsupportedFieldError
from .fields import type_error

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}


def decode_messages(value: Any, *, accepts_content_parts: bool) -> list[dict[str, Any]]:
    """The conversation. Raises MalformedRequestError or UnsupportedFieldError naming the message."""
    if not isinstance(value, list):
        raise type_error("messages", "list_type", "Input should be a valid list")
    if not value:
        raise MalformedRequestError("Cannot apply chat template to an empty conversation. Provide at least one message.", param="messages")
    return [_decode_message(message, f"messages.{place}", accepts_content_parts) for place, message in enumerate(value)]


def _decode_message(message: Any, loc: str, accepts_content_parts: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise type_error(loc, "model_attributes_type", "Input should be a valid dictionary or object to extract fields from")
    role = message.get("role")
    if not isinstance(role, str):
        fault = ("missing", "Field required") if role is None else ("string_type", "Input should be a valid string")
        raise type_error(f"{loc}.role", *fault)
    content = message.get("content")
    if content is None and "content" in message and role != "assistant":
        raise type_error(f"{loc}.content", "string_type", "Input should be a valid string")
    decoded: dict[str, Any] = {"role": role, "content": _decode_content(content, f"{loc}.content", accepts_content_parts)}
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            decoded[key] = message[key]
    if role == "assistant":
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        if isinstance(reasoning, str):
            decoded["reasoning"] = decoded["reasoning_content"] = reasoning
        tool_calls = message.get("tool_calls")
        if tool_calls:
            decoded["tool_calls"] = _decode_tool_calls(tool_calls, f"{loc}.tool_calls")
    return decoded


def _decode_content(content: Any, loc: str, accepts_content_parts: bool) -> str | list[dict[str, str]]:
    if content is None:
        return [] if accepts_content_parts else ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if accepts_content_parts else content
    if not isinstance(content, list):
        raise type_error(loc, "string_type", "Input should be a valid string")
    texts = [_decode_part(part, f"{loc}.{place}") for place, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if accepts_content_parts else "\n".join(texts)


def _decode_part(part: Any, loc: str) -> str:
    if not isinstance(part, dict):
        raise type_error(loc, "dict_type", "Input should be a valid dictionary")
    kind = part.get("type")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        if isinstance(kind, str) and kind:
            raise UnsupportedFieldError(f"content parts of type {kind[:40]!r} are not supported: text only", param=loc)
        raise type_error(f"{loc}.type", "missing", "Field required")
    text = part.get(key)
    if not isinstance(text, str):
        raise type_error(f"{loc}.{key}", "string_type", "Input should be a valid string")
    return text


def _decode_tool_calls(value: Any, loc: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise type_error(loc, "list_type", "Input should be a valid list")
    calls = []
    for place, call in enumerate(value):
        where = f"{loc}.{place}.function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise type_error(where, "missing", "Field required")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments) if arguments else {}
            except (msgspec.DecodeError, RecursionError):
                raise MalformedRequestError("tool-call arguments are not valid JSON", param=f"{where}.arguments") from None
        elif arguments is not None:
            raise type_error(f"{where}.arguments", "string_type", "Input should be a valid string")
        calls.append({**call, "function": {**function, "arguments": arguments if arguments is not None else {}}})
    return calls


def decode_tools(value: Any) -> Sequence[dict[str, Any]] | None:
    """Tool definitions as vLLM hands them to a template: type and function first, missing keys as explicit nulls, others dropped."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise type_error("tools", "list_type", "Input should be a valid list")
    if not value:
        raise MalformedRequestError("tools must not be an empty list; leave it out instead", param="tools")
    tools = []
    for place, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise type_error(f"tools.{place}.function", "missing", "Field required")
        if not isinstance(function.get("name"), str):
            raise type_error(f"tools.{place}.function.name", "missing", "Field required")
        dumped = {key: function.get(key) for key in ("name", "description", "parameters")}
        tools.append({"type": "function", "function": dumped})
    return tools
