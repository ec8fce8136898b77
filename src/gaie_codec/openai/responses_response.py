"""Deltas -> a response: as named server-sent events, or as one JSON body, which the last event of the stream has too.

Both encoders keep the same `OutputItems`; the stream also sends what they tell. The order of events is OpenAI's
(https://platform.openai.com/docs/api-reference/responses-streaming), the body vLLM's. Per token only text and number are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import _sse
from .._errors import UsageError
from .errors import encode_error
from .responses_output import Event, Item, OutputItems

if TYPE_CHECKING:
    from .._choices import Delta
    from .._errors import CodecError
    from .._events import BodyEvent, Usage
    from .endpoint import ResponseMeta
    from .responses import ResponsesOptions

_encode = msgspec.json.Encoder().encode

_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ERROR_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class _Encoder:
    """What both have in common: the items, and the body about them."""

    reported_usage = None
    wants_usage = False

    def __init__(self, options: ResponsesOptions, meta: ResponseMeta) -> None:
        self.is_detailed = options.logprobs
        self.shows_ids = meta.return_tokens_as_token_ids
        self._options = options
        self._meta = meta
        self._items = OutputItems(meta.id, shows_logprobs=options.logprobs)

    def body(self, event: BodyEvent) -> bytes:
        """No server sends this to a decoded request."""
        raise UsageError("a passed-through body in an answer of deltas")

    def check_complete(self) -> None:
        """Deltas are counted before they come here."""

    def _response(self, status: str, usage: Usage | None = None, **more: Any) -> dict[str, Any]:
        finish = self._items.finish
        reason = _INCOMPLETE.get(finish.finish_reason or "") if finish is not None and status == "incomplete" else None
        transfer = finish.kv_transfer_params if finish is not None else ""
        return {
            "id": self._meta.id,
            "created_at": self._meta.created,
            "incomplete_details": {"reason": reason} if reason else None,
            "model": self._options.model,
            "object": "response",
            "output": [] if status == "in_progress" else self._items.encoded(),
            **self._options.echo,
            "status": status,
            "usage": _encode_usage(usage) if usage is not None else None,
            "kv_transfer_params": msgspec.Raw(msgspec.json.format(transfer.encode(), indent=-1)) if transfer else None,
            **more,
        }

    def _close_items(self) -> list[Event]:
        return self._items.close(needs_message=self._options.shows_empty)

    def _final(self, usage: Usage) -> tuple[str, bytes]:
        finish = self._items.finish
        status = "incomplete" if finish is not None and finish.finish_reason in _INCOMPLETE else "completed"
        return f"response.{status}", _encode(self._response(status, usage))


class StreamEncoder(_Encoder):
    """Server-sent events, each with its number."""

    content_type = _sse.CONTENT_TYPE
    streams = True

    def __init__(self, options: ResponsesOptions, meta: ResponseMeta) -> None:
        super().__init__(options, meta)
        self._number = 0
        self._spliced: Item | None = None  # the item whose deltas begin with `_before`
        self._before = b""

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """The response as it begins, twice, once the first upstream message is there."""
        begun = {"response": self._response("in_progress")}
        return self._events([("response.created", begun), ("response.in_progress", begun)])

    def text(self, index: int, text: str) -> bytes:
        """The per-token path: a delta that is nothing but text, for options without `is_detailed`."""
        item = self._spliced
        if item is None or item is not self._items.current or item.kind != "message":
            return self._begin(text, "response.output_text.delta", self._items.text)
        item.pieces.append(text)
        self._number += 1
        return b'%b%d,"delta":%b,"logprobs":[]}\n\n' % (self._before, self._number - 1, _encode(text))

    def reasoning(self, index: int, text: str) -> bytes:
        """Likewise of a delta that is nothing but reasoning."""
        item = self._spliced
        if item is None or item is not self._items.current or item.kind != "reasoning":
            return self._begin(text, "response.reasoning_text.delta", self._items.reasoning)
        item.pieces.append(text)
        self._number += 1
        return b'%b%d,"delta":%b}\n\n' % (self._before, self._number - 1, _encode(text))

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """What the delta tells; with the last one the ends of what is open."""
        events = self._items.receive(delta)
        if delta.finish_reason is not None:
            events += self._close_items()
        return self._events(events)

    def close(self, usage: Usage) -> bytes:
        """The whole response. Nothing follows it."""
        name, body = self._final(usage)
        return self._events([(name, {"response": msgspec.Raw(body)})])

    def error(self, error: CodecError) -> bytes:
        """The response as it failed, and an error event, which also has the form for which SDKs raise an exception."""
        self._items.abandon()
        told = msgspec.json.decode(encode_error(error))["error"]
        code = _ERROR_CODES.get(error.http_status, "server_error")
        failed = self._response("failed", error={"code": code, "message": told["message"]})
        own = {"code": code, "message": told["message"], "param": told["param"], "error": told}
        return self._events([("response.failed", {"response": failed}), ("error", own)])

    def _begin(self, text: str, name: str, receive: Callable[[str, list[Event]], None]) -> bytes:
        """Text of an item whose events are not spliced yet. They are from here on, if it is one already."""
        events: list[Event] = []
        receive(text, events)
        item = self._items.current
        if events and item is not None:
            self._spliced = item
            where = _encode(item.where_part)[1:-1]
            self._before = b'event: %b\ndata: {"type":"%b",%b,"sequence_number":' % (name.encode(), name.encode(), where)
        return self._events(events)

    def _events(self, events: Sequence[Event]) -> bytes:
        parts = []
        for name, fields in events:
            parts.append(_sse.encode_event(_encode({"type": name, "sequence_number": self._number, **fields}), name))
            self._number += 1
        return b"".join(parts)


class UnaryEncoder(_Encoder):
    """One JSON body."""

    content_type = "application/json"
    streams = False

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """Nothing yet: the body comes whole."""
        return b""

    def text(self, index: int, text: str) -> bytes:
        """Keep the text."""
        if self._items.grow("message", text) is None:
            self._items.text(text, [])
        return b""

    def reasoning(self, index: int, text: str) -> bytes:
        """Keep the reasoning."""
        if self._items.grow("reasoning", text) is None:
            self._items.reasoning(text, [])
        return b""

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """Keep the delta."""
        self._items.receive(delta)
        if delta.finish_reason is not None:
            self._close_items()
        return b""

    def close(self, usage: Usage) -> bytes:
        """The whole body."""
        return self._final(usage)[1]

    def error(self, error: CodecError) -> bytes:
        """The error body alone."""
        return encode_error(error)


def _encode_usage(usage: Usage) -> dict[str, Any]:
    """As vLLM has it; of its lists by turn there is nothing to tell, as there is one turn."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": usage.total_tokens,
    }


def make_encoder(options: ResponsesOptions, meta: ResponseMeta) -> StreamEncoder | UnaryEncoder:
    """What the options ask for."""
    return StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)
