"""Chat messages as clients send them -> what a chat template is given, as vLLM does it.

Content parts become one text, joined by line breaks, unless the template wants the parts; tool-call arguments become objects;
`reasoning_content` is `reasoning` to vLLM and both to a template. Keys that templates do not know are left out. Of images, video and
sound the template sees what kind they are, and writes the placeholder tokens; the media themselves go beside the prompt.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .._errors import MalformedRequestError, UnsupportedFieldError
from .._events import Media
from .fields import literal_fault, no_model_fault, type_error, type_errors

_AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm", "pcm16")
_URL_PARTS = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}


def decode_messages(
    value: Any, *, accepts_content_parts: bool, accepts_media: bool = False, text_model: str = "", keeps_arguments: bool = False
) -> tuple[list[dict[str, Any]], list[Media]]:
    """The conversation, and the media in it in their order; `text_model` is the name of a model that takes text only, `keeps_arguments`
    leaves those of tool calls the text that they are. Raises MalformedRequestError or UnsupportedFieldError naming the message."""
    if not isinstance(value, list):
        raise type_error("messages", "list_type", "Input should be a valid list")
    if not value:
        raise MalformedRequestError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    media: list[Media] = []
    parts = _Parts(media, accepts_content_parts, accepts_media, text_model, keeps_arguments)
    return [_decode_message(message, f"messages.{place}", parts) for place, message in enumerate(value)], media


def _decode_message(message: Any, loc: str, parts: _Parts) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise type_errors(no_model_fault(loc))
    role = message.get("role")
    if not isinstance(role, str):
        fault = ("missing", "Field required") if role is None else ("string_type", "Input should be a valid string")
        raise type_error(f"{loc}.role", *fault)
    content = message.get("content")
    if content is None and "content" in message and role != "assistant":
        raise type_error(f"{loc}.content", "string_type", "Input should be a valid string")
    decoded: dict[str, Any] = {"role": role, "content": parts.decode_content(content, f"{loc}.content")}
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            decoded[key] = message[key]
    if role == "assistant":
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        if isinstance(reasoning, str):
            decoded["reasoning"] = decoded["reasoning_content"] = reasoning
        tool_calls = message.get("tool_calls")
        if tool_calls:
            decoded["tool_calls"] = _decode_tool_calls(tool_calls, f"{loc}.tool_calls", keeps_arguments=parts.keeps_arguments)
    return decoded


class _Parts:
    """Content as a template takes it. Media are put aside as they come."""

    def __init__(
        self, media: list[Media], accepts_content_parts: bool, accepts_media: bool, text_model: str, keeps_arguments: bool
    ) -> None:
        self.keeps_arguments = keeps_arguments
        self._media = media
        self._accepts_content_parts = accepts_content_parts
        self._accepts_media = accepts_media
        self._text_model = text_model

    def decode_content(self, content: Any, loc: str) -> str | list[dict[str, str]]:
        if content is None:
            return [] if self._accepts_content_parts else ""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._accepts_content_parts else content
        if not isinstance(content, list):
            raise type_error(loc, "string_type", "Input should be a valid string")
        parts = [self._decode_part(part, f"{loc}.{place}") for place, part in enumerate(content)]
        return parts if self._accepts_content_parts else "\n".join(part["text"] for part in parts)

    def _decode_part(self, part: Any, loc: str) -> dict[str, str]:
        if not isinstance(part, dict):
            raise type_error(loc, "dict_type", "Input should be a valid dictionary")
        kind = part.get("type")
        key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if key is None:
            return self._decode_media(part, kind, loc)
        text = part.get(key)
        if not isinstance(text, str):
            raise type_error(f"{loc}.{key}", "string_type", "Input should be a valid string")
        return {"type": "text", "text": text}

    def _decode_media(self, part: dict[str, Any], kind: Any, loc: str) -> dict[str, str]:
        if not isinstance(kind, str) or not kind:
            raise type_error(f"{loc}.type", "missing", "Field required")
        if self._text_model and kind in (*_URL_PARTS, "input_audio") and isinstance(part.get(kind), dict):
            raise MalformedRequestError(f"{self._text_model} is not a multimodal model")
        if not self._accepts_media or kind not in (*_URL_PARTS, "input_audio"):
            raise UnsupportedFieldError(f"content parts of type {kind[:40]!r} are not supported: text only", param=loc)
        if not self._accepts_content_parts:
            raise UnsupportedFieldError(f"the model's chat template has no place for content parts of type {kind!r}", param=loc)
        inner = part.get(kind)
        if not isinstance(inner, dict):
            raise type_error(f"{loc}.{kind}", "dict_type", "Input should be a valid dictionary")
        uuid = part.get("uuid")
        media = Media(
            kind=_URL_PARTS.get(kind, "audio"),  # type: ignore[arg-type]
            url=_decode_audio(inner, f"{loc}.{kind}") if kind == "input_audio" else _decode_url(inner, f"{loc}.{kind}"),
            detail=_decode_detail(inner, f"{loc}.{kind}.detail"),
            uuid=uuid if isinstance(uuid, str) else "",
        )
        self._media.append(media)
        return {"type": media.kind}


def _decode_url(inner: dict[str, Any], loc: str) -> str:
    url = inner.get("url")
    if not isinstance(url, str):
        raise type_error(f"{loc}.url", "string_type", "Input should be a valid string")
    if not url.startswith(("http://", "https://", "data:")) or not url.isprintable():
        raise MalformedRequestError("the URL must be an http, https or data URL", param=f"{loc}.url")
    return url


def _decode_audio(inner: dict[str, Any], loc: str) -> str:
    data, form = inner.get("data"), inner.get("format")
    if not isinstance(data, str):
        raise type_error(f"{loc}.data", "string_type", "Input should be a valid string")
    if form not in _AUDIO_FORMATS:
        raise MalformedRequestError(f"the format must be one of {', '.join(_AUDIO_FORMATS)}", param=f"{loc}.format")
    return f"data:audio/{form};base64,{data}"


def _decode_detail(inner: dict[str, Any], loc: str) -> str:
    detail = inner.get("detail")
    if detail not in (None, "low", "high", "auto"):
        raise type_errors(literal_fault(loc, "auto", "low", "high"))
    return detail or ""


def _decode_tool_calls(value: Any, loc: str, *, keeps_arguments: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise type_error(loc, "list_type", "Input should be a valid list")
    calls = []
    for place, call in enumerate(value):
        where = f"{loc}.{place}.function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise type_error(where, "missing", "Field required")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not keeps_arguments:
            try:
                arguments = msgspec.json.decode(arguments) if arguments else {}
            except (msgspec.DecodeError, RecursionError):
                raise MalformedRequestError("tool-call arguments are not valid JSON", param=f"{where}.arguments") from None
        elif not isinstance(arguments, str | None):
            raise type_error(f"{where}.arguments", "string_type", "Input should be a valid string")
        calls.append({**call, "function": {**function, "arguments": arguments if arguments is not None else {}}})
    return calls
