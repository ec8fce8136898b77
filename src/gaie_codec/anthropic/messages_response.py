"""Deltas -> a message: as named server-sent events, or folded into one JSON body.

A message is a list of content blocks, in the order in which the model wrote them: a block begins where the kind of what is said changes,
or another tool is called, and then the one before has ended. Both encoders count blocks alike, so that the body is the fold of the
events. Events are vLLM's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from .. import _sse
from .._choices import Delta
from .._errors import CodecError, UsageError
from .._events import BodyEvent, Usage
from ..openai.endpoint import ResponseMeta
from .errors import encode_error
from .messages import MessageOptions

if TYPE_CHECKING:
    from ..text import ToolCall

_encode = msgspec.json.Encoder().encode

Kind: TypeAlias = Literal["", "text", "thinking", "tool_use"]

_DELTAS: Final[Mapping[Kind, bytes]] = MappingProxyType(
    {
        "text": b'"text_delta","text"',
        "thinking": b'"thinking_delta","thinking"',
        "tool_use": b'"input_json_delta","partial_json"',
    }
)


class _Block:
    """One content block. Of text and thinking that are streamed nothing is kept."""

    __slots__ = ("id", "kind", "name", "number", "pieces")

    def __init__(self, number: int, kind: Kind, id: str = "", name: str = "") -> None:
        self.number = number
        self.kind = kind
        self.id = id
        self.name = name
        self.pieces: list[str] = []

    def start(self) -> dict[str, Any]:
        """As it begins."""
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        return {"type": self.kind, self.kind: "", **({"signature": ""} if self.kind == "thinking" else {})}


class _Encoder:
    """What both encoders know of the content so far."""

    is_detailed = False
    wants_usage = False
    shows_ids = False
    reported_usage = None

    def __init__(self, options: MessageOptions, meta: ResponseMeta) -> None:
        self._options = options
        self._meta = meta
        self._last: _Block | None = None
        self._count = 0
        self._kind: Kind = ""
        self._calls: dict[int, _Block] = {}
        self._finish: Delta | None = None

    def text(self, index: int, text: str) -> bytes:
        """Text of the answer. There is one choice."""
        return self._add("text", text)

    def reasoning(self, index: int, text: str) -> bytes:
        """Text that the model thought."""
        return self._add("thinking", text)

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """All that one delta says."""
        parts = []
        if delta.reasoning:
            parts.append(self._add("thinking", delta.reasoning))
        if delta.text:
            parts.append(self._add("text", delta.text))
        parts += [self._add_call(piece) for piece in delta.tool_calls]
        for broken in delta.broken:
            call = self._calls.pop(broken.index, None)
            parts.append(self._take_back(call, broken.text) if call is not None else self._add("text", broken.text))
        if delta.finish_reason is not None:
            self._finish = delta
        return b"".join(parts)

    def body(self, event: BodyEvent) -> bytes:
        """No server sends this to a decoded request."""
        raise UsageError("a passed-through body in an answer of deltas")

    def check_complete(self) -> None:
        """Deltas are counted before they come here."""

    def _add(self, kind: Kind, text: str) -> bytes:
        begun = self._begin(kind) if self._kind != kind or self._last is None else b""
        assert self._last is not None
        return begun + self._append(self._last, text)

    def _add_call(self, piece: ToolCall) -> bytes:
        begun = b""
        if piece.index not in self._calls:
            begun = self._begin("tool_use", piece.id, piece.name)
            assert self._last is not None
            self._calls[piece.index] = self._last
        call = self._calls[piece.index]
        if not piece.arguments:
            return begun
        call.pieces.append(piece.arguments)
        return begun + self._append(call, piece.arguments)

    def _begin(self, kind: Kind, id: str = "", name: str = "") -> bytes:
        self._kind = kind
        self._last = _Block(self._count, kind, id, name)
        self._count += 1
        return b""

    def _append(self, block: _Block, text: str) -> bytes:
        return b""

    def _take_back(self, call: _Block, text: str) -> bytes:
        """The call is none, and `text` is what it was made of."""
        return b""

    def _signature(self, block: _Block) -> str:
        """Clients send it back with the thinking; nobody checks it."""
        return hashlib.blake2b(f"{self._meta.id}\0{block.number}".encode("utf-8", "replace"), digest_size=16).hexdigest()

    def _stop(self) -> dict[str, str | None]:
        """Why it ended. A stop string that cut the last call short goes before the calls: that one must not be run."""
        reason, matched = (None, None) if self._finish is None else (self._finish.finish_reason, self._finish.stop_reason)
        if reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if reason not in ("stop", "tool_calls"):
            return {"stop_reason": None, "stop_sequence": None}
        last = self._calls[max(self._calls)] if self._calls else None
        if isinstance(matched, str) and (last is None or isinstance(_decode_input(last), str)):
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        is_use = last is not None or reason == "tool_calls"
        return {"stop_reason": "tool_use" if is_use else "end_turn", "stop_sequence": None}

    def _usage(self, usage: Usage) -> dict[str, int]:
        """Tokens from the cache are no part of input_tokens."""
        if not self._meta.prompt_tokens_details:
            return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
        return {"input_tokens": fresh, "output_tokens": usage.completion_tokens, "cache_read_input_tokens": usage.cached_tokens}

    def _message(self, content: list[dict[str, Any]], stop: dict[str, str | None], usage: Usage) -> dict[str, Any]:
        head = {"id": self._meta.id, "type": "message", "role": "assistant", "model": self._options.model}
        return {**head, "content": content, **stop, "usage": self._usage(usage)}


class StreamEncoder(_Encoder):
    """Server-sent events."""

    content_type = _sse.CONTENT_TYPE
    streams = True

    def __init__(self, options: MessageOptions, meta: ResponseMeta) -> None:
        super().__init__(options, meta)
        self._prefix = b""

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """The message without content."""
        stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}
        return _event("message_start", message=self._message([], stop, usage))

    def text(self, index: int, text: str) -> bytes:
        """The per-token path."""
        if self._kind == "text":
            return b"%b%b}}\n\n" % (self._prefix, _encode(text))
        return self._add("text", text)

    def reasoning(self, index: int, text: str) -> bytes:
        """Likewise."""
        if self._kind == "thinking":
            return b"%b%b}}\n\n" % (self._prefix, _encode(text))
        return self._add("thinking", text)

    def close(self, usage: Usage) -> bytes:
        """The end of the last block, why it ended, and the end. A message without content has one empty text, as the body has."""
        begun = self._begin("text") if not self._count else b""
        delta = _event("message_delta", delta=self._stop(), usage=self._usage(usage))
        return begun + self._end_block() + delta + _event("message_stop")

    def error(self, error: CodecError) -> bytes:
        """An error event, after the end of the block that was under way."""
        return self._end_block() + _sse.encode_event(encode_error(error), "error")

    def _begin(self, kind: Kind, id: str = "", name: str = "") -> bytes:
        ended = self._end_block()
        super()._begin(kind, id, name)
        assert self._last is not None
        self._prefix = _before_delta(self._last)
        return ended + _event("content_block_start", index=self._last.number, content_block=self._last.start())

    def _append(self, block: _Block, text: str) -> bytes:
        return b"%b%b}}\n\n" % (self._prefix if block is self._last else _before_delta(block), _encode(text))

    def _end_block(self) -> bytes:
        block, self._last, self._kind = self._last, None, ""
        if block is None:
            return b""
        signed = b""
        if block.kind == "thinking":
            delta = {"type": "signature_delta", "signature": self._signature(block)}
            signed = _event("content_block_delta", index=block.number, delta=delta)
        return signed + _event("content_block_stop", index=block.number)


class UnaryEncoder(_Encoder):
    """One JSON body: the fold of what StreamEncoder would have sent."""

    content_type = "application/json"
    streams = False

    def __init__(self, options: MessageOptions, meta: ResponseMeta) -> None:
        super().__init__(options, meta)
        self._blocks: list[_Block] = []

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """Nothing yet: the body comes whole."""
        return b""

    def close(self, usage: Usage) -> bytes:
        """The whole body."""
        content: list[dict[str, Any]] = []
        for block in self._blocks or [_Block(0, "text")]:
            encoded = self._encoded(block)
            if content and block.kind == "text" == content[-1]["type"]:  # one of them was a call
                content[-1]["text"] += encoded["text"]
            else:
                content.append(encoded)
        body = self._message(content, self._stop(), usage)
        if self._finish is not None and self._finish.kv_transfer_params:
            body["kv_transfer_params"] = msgspec.Raw(self._finish.kv_transfer_params.encode())
        return _encode(body)

    def error(self, error: CodecError) -> bytes:
        """The error body alone."""
        return encode_error(error)

    def _begin(self, kind: Kind, id: str = "", name: str = "") -> bytes:
        super()._begin(kind, id, name)
        assert self._last is not None
        self._blocks.append(self._last)
        return b""

    def _append(self, block: _Block, text: str) -> bytes:
        if block.kind != "tool_use":
            block.pieces.append(text)
        return b""

    def _take_back(self, call: _Block, text: str) -> bytes:
        call.kind, call.pieces = "text", [text]
        if self._last is call:
            self._last, self._kind = None, ""
        return b""

    def _encoded(self, block: _Block) -> dict[str, Any]:
        encoded = block.start()
        if block.kind == "tool_use":
            return {**encoded, "input": _decode_input(block)}
        encoded[block.kind] = "".join(block.pieces)
        if block.kind == "thinking":
            encoded["signature"] = self._signature(block)
        return encoded


def _decode_input(call: _Block) -> msgspec.Raw | str:
    """The arguments of a call: JSON as it came, or the text of what is none."""
    text = "".join(call.pieces)
    if not text:
        return msgspec.Raw(b"{}")
    try:
        return msgspec.Raw(bytes(msgspec.json.decode(text.encode(), type=msgspec.Raw)))
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return text


def _before_delta(block: _Block) -> bytes:
    """The event of a delta as far as it is the same for all of a block."""
    kind = _DELTAS[block.kind]
    return b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":%b:' % (block.number, kind)


def _event(name: str, **data: Any) -> bytes:
    return _sse.encode_event(_encode({"type": name, **data}), name)


def make_encoder(options: MessageOptions, meta: ResponseMeta) -> StreamEncoder | UnaryEncoder:
    """What the options ask for."""
    return StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)
