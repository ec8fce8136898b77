"""Anthropic messages and their content blocks -> chat messages, as vLLM 0.33 turns them.

A tool's result is a message of its own, before the rest of the user's; thinking goes back as reasoning, and what was redacted is left
out. Blocks that would need Anthropic's own servers are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .._errors import MalformedRequestError, UnsupportedFieldError
from ..openai.fields import json_text, literal_fault, no_model_fault, type_error, type_errors

if TYPE_CHECKING:
    from ..text import Tokenizer

_ROLES: Final = ("user", "assistant", "system")
_OF_ASSISTANT: Final = ("thinking", "redacted_thinking", "tool_use")
# Claude Code's first block: a hash of the request, by which no two prompts would begin alike in a prefix cache.
_BILLING: Final = "x-anthropic-billing-header"


def decode_conversation(fields: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], set[str]]:
    """The chat messages, system first, and what of the blocks has no effect. Raises RequestError naming the block."""
    if "messages" not in fields:
        raise type_error("messages", "missing", "Field required")
    messages = fields["messages"]
    if not isinstance(messages, list):
        raise type_error("messages", "list_type", "Input should be a valid list")
    reader = _Reader()
    for place, message in enumerate(messages):
        reader.read(message, f"messages.{place}")
    system = _decode_system(fields.get("system"), "system")
    inline = [message["content"] for message in reader.messages if message["role"] == "system"]
    if inline and _wants_system_first(tokenizer):
        system += "".join(inline)
        reader.messages = [message for message in reader.messages if message["role"] != "system"]
    leading = [{"role": "system", "content": system}] if system else []
    return leading + reader.messages, reader.ignored


def _wants_system_first(tokenizer: Tokenizer) -> bool:
    """Whether the chat template refuses a system message further down, as vLLM finds out."""
    probe = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
    try:
        tokenizer.render_chat(probe, add_generation_prompt=False)
    except MalformedRequestError:
        return True
    return False


def _decode_system(content: Any, loc: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for block, kind, where in _blocks(content, loc):
        if kind != "text":
            raise _unsupported(kind, where)
        texts.append(_text(block, "text", where))
    return "".join(text for text in texts if not text.startswith(_BILLING))


class _Reader:
    """Reads messages one by one; one of theirs may be several of a chat."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ignored: set[str] = set()

    def read(self, message: Any, loc: str) -> None:
        if not isinstance(message, dict):
            raise type_errors(no_model_fault(loc))
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise type_error(f"{loc}.role", "missing", "Field required")
        if role not in _ROLES:
            raise type_errors(literal_fault(f"{loc}.role", *_ROLES))
        if content is None:
            raise type_error(f"{loc}.content", "missing", "Field required")
        if role == "system":
            text = _decode_system(content, f"{loc}.content")
            if text and not text.startswith(_BILLING):
                self.messages.append({"role": role, "content": text})
        elif isinstance(content, str):
            self.messages.append({"role": role, "content": content})
        elif role == "assistant":
            self._read_assistant(content, f"{loc}.content")
        else:
            self._read_user(content, f"{loc}.content")

    def _read_assistant(self, content: Any, loc: str) -> None:
        parts: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        thoughts = ""
        for block, kind, where in _blocks(content, loc):
            if kind == "thinking":
                thoughts += _text(block, "thinking", where)
            elif kind == "tool_use":
                calls.append(_decode_tool_use(block, where))
            elif kind == "tool_result":
                raise MalformedRequestError("tool_result blocks belong into messages of the user", param=where)
            elif kind != "redacted_thinking":
                parts += _decode_part(block, kind, where)
        message: dict[str, Any] = {"role": "assistant", **_content(parts)}
        if thoughts:
            message["reasoning"] = thoughts
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)

    def _read_user(self, content: Any, loc: str) -> None:
        parts: list[dict[str, Any]] = []
        for block, kind, where in _blocks(content, loc):
            if kind == "tool_result":
                self._read_result(block, where)
            elif kind in _OF_ASSISTANT:
                raise MalformedRequestError(f"{kind} blocks belong into messages of the assistant", param=where)
            else:
                parts += _decode_part(block, kind, where)
        if parts:
            self.messages.append({"role": "user", **_content(parts)})

    def _read_result(self, block: dict[str, Any], loc: str) -> None:
        """Images cannot be in a tool's message, and follow in one of the user."""
        content, call_id = block.get("content"), block.get("tool_use_id")
        if not isinstance(call_id, str | None):
            raise type_error(f"{loc}.tool_use_id", "string_type", "Input should be a valid string")
        if block.get("is_error"):
            self.ignored.add("tool_result.is_error")  # chat templates have no place for it
        texts, images = [], []
        if isinstance(content, str):
            texts.append(content)
        elif content is not None:
            for inner, kind, where in _blocks(content, f"{loc}.content"):
                if kind == "text":
                    texts.append(_text(inner, "text", where))
                else:
                    images += _decode_part(inner, kind, where)
        self.messages.append({"role": "tool", "tool_call_id": call_id or "", "content": "\n".join(texts)})
        if images:
            self.messages.append({"role": "user", "content": images})


def _blocks(content: Any, loc: str) -> list[tuple[dict[str, Any], str, str]]:
    """Each block with its type and its place."""
    if not isinstance(content, list):
        raise type_error(loc, "string_type", "Input should be a valid string")
    found = []
    for place, block in enumerate(content):
        where = f"{loc}.{place}"
        if not isinstance(block, dict):
            raise type_errors(no_model_fault(where))
        kind = block.get("type")
        if not isinstance(kind, str):
            fault = ("missing", "Field required") if kind is None else ("literal_error", "Input should be the name of a content block")
            raise type_error(f"{where}.type", *fault)
        found.append((block, kind, where))
    return found


def _text(block: Mapping[str, Any], name: str, loc: str) -> str:
    text = block.get(name)
    if not isinstance(text, str | None):
        raise type_error(f"{loc}.{name}", "string_type", "Input should be a valid string")
    return text or ""


def _decode_part(block: dict[str, Any], kind: str, loc: str) -> list[dict[str, Any]]:
    """A content part; none for an empty text."""
    if kind == "text":
        text = _text(block, "text", loc)
        return [{"type": "text", "text": text}] if text else []
    if kind != "image":
        raise _unsupported(kind, loc)
    return [{"type": "image_url", "image_url": {"url": _decode_source(block.get("source"), f"{loc}.source")}}]


def _decode_source(source: Any, loc: str) -> str:
    if not isinstance(source, dict):
        raise type_error(loc, "dict_type", "Input should be a valid dictionary")
    kind = source.get("type", "base64")
    if kind == "url":
        return _required(source, "url", loc)
    if kind != "base64":
        raise UnsupportedFieldError("images are taken as base64 or by url only", param=f"{loc}.type")
    return f"data:{_text(source, 'media_type', loc) or 'image/jpeg'};base64,{_required(source, 'data', loc)}"


def _required(block: Mapping[str, Any], name: str, loc: str) -> str:
    if not isinstance(block.get(name), str):
        raise type_error(f"{loc}.{name}", "string_type", "Input should be a valid string")
    return str(block[name])


def _decode_tool_use(block: dict[str, Any], loc: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict | None):
        raise type_error(f"{loc}.input", "dict_type", "Input should be a valid dictionary")
    function = {"name": _text(block, "name", loc), "arguments": json_text(given or {}, f"{loc}.input")}
    return {"id": _text(block, "id", loc), "type": "function", "function": function}


def _content(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A lone text is a plain string."""
    if not parts:
        return {}
    return {"content": parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts}


def _unsupported(kind: str, loc: str) -> UnsupportedFieldError:
    return UnsupportedFieldError(f"content blocks of type {kind[:40]!r} are not supported here", param=loc)
