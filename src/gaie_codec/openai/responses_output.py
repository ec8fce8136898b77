"""Deltas -> the output items of a response, and the events that tell a client how they grow.

The one fold behind both answers: a stream sends the events, a whole body has the items. An item is open until another one begins; what
comes for it later opens it again. A tool call that turns out to be none ends as `incomplete` in the stream and is in no body: its text
is a message instead.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from .._choices import Delta
    from .._logprob_texts import TextLogprob
    from ..text import ToolCall

Event: TypeAlias = tuple[str, dict[str, Any]]
"""The type, and the fields besides type and sequence number."""

Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


def item_id(response_id: str, kind: str, place: int) -> str:
    """The id of an output item: the same for the same place in the same response."""
    digest = hashlib.blake2b(f"{response_id}\0{kind}\0{place}".encode("utf-8", "replace"), digest_size=8)
    return _PREFIXES[kind] + digest.hexdigest()


class Item:
    """One output item. `pieces` are its text or arguments so far."""

    __slots__ = ("call_id", "id", "kind", "logprobs", "name", "pieces", "place", "status")

    def __init__(self, kind: str, place: int, response_id: str) -> None:
        self.kind = kind
        self.place = place
        self.id = item_id(response_id, kind, place)
        self.status: Status = "in_progress"
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] | None = None
        self.name = self.call_id = ""

    def encoded(self, *, is_new: bool = False) -> dict[str, Any]:
        """The item as JSON; `is_new` as it is before any of its content."""
        text = "" if is_new else "".join(self.pieces)
        if self.kind == "message":
            content = [self.part(text)] if text or (self.logprobs and not is_new) else []
            return {"id": self.id, "content": content, "role": "assistant", "status": self.status, "type": "message", "phase": None}
        if self.kind == "reasoning":
            content = [self.part(text)] if text else []
            return {"id": self.id, "summary": [], "type": "reasoning", "content": content, "encrypted_content": None, "status": self.status}
        return {
            "arguments": text,
            "call_id": self.call_id,
            "name": self.name,
            "type": "function_call",
            "id": self.id,
            "status": self.status,
        }

    def part(self, text: str) -> dict[str, Any]:
        """The one content part of a message or of reasoning."""
        if self.kind == "reasoning":
            return {"text": text, "type": "reasoning_text"}
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": self.logprobs}

    @property
    def where(self) -> dict[str, Any]:
        """How events name the item."""
        return {"item_id": self.id, "output_index": self.place}

    @property
    def where_part(self) -> dict[str, Any]:
        """How events name its content part."""
        return {**self.where, "content_index": 0}


class OutputItems:
    """The items of one response. `current` is the one that is open."""

    __slots__ = ("_broken", "_calls", "_items", "_logprobs", "_response_id", "_shows_logprobs", "_space", "current", "finish")

    def __init__(self, response_id: str, *, shows_logprobs: bool) -> None:
        self.current: Item | None = None
        self.finish: Delta | None = None
        self._response_id = response_id
        self._shows_logprobs = shows_logprobs
        self._items: list[Item] = []
        self._calls: dict[int, Item] = {}
        self._broken: set[int] = set()  # places
        self._space: list[str] = []  # at the beginning of a message that may be none
        self._logprobs: list[dict[str, Any]] = []  # of text that was not told yet

    def encoded(self) -> list[dict[str, Any]]:
        """The output as a body has it."""
        return [item.encoded() for item in self._items if item.place not in self._broken]

    def abandon(self) -> None:
        """The response broke off: what is open stays incomplete."""
        if self.current is not None:
            self.current.status = "incomplete"

    def grow(self, kind: str, text: str) -> Item | None:
        """The per-token path: more text of the item that is open, if that is of this kind and has some already. Else nothing is done."""
        item = self.current
        if item is None or item.kind != kind or not item.pieces:
            return None
        item.pieces.append(text)
        return item

    def receive(self, delta: Delta) -> list[Event]:
        """What one delta tells."""
        events: list[Event] = []
        if delta.reasoning:
            self.reasoning(delta.reasoning, events)
            self._logprobs.clear()
        if self._shows_logprobs and (delta.text or not (delta.reasoning or delta.tool_calls)):
            self._logprobs += [_logprob(entry) for entry in delta.logprobs]
        if delta.text:
            self.text(delta.text, events)
        for call in delta.tool_calls:
            self._call(call, events)
        for broken in delta.broken:
            item = self._calls.pop(broken.index, None)
            if item is not None:
                self._take_back(item, events)
            if broken.text:
                self.text(broken.text, events)
        if delta.finish_reason is not None:
            self.finish = delta
        return events

    def close(self, *, needs_message: bool) -> list[Event]:
        """The end of what is open. `needs_message` gives a response without any item one that is empty."""
        events: list[Event] = []
        is_empty = all(item.place in self._broken for item in self._items)
        if is_empty and self._space:
            text = "".join(self._space)
            self._space.clear()
            self._write(self._open("message", events), text, events)
        elif is_empty and (needs_message or self._logprobs):
            self._open("message", events)
        if self._logprobs and self.current is not None and self.current.kind == "message":
            self._write(self.current, "", events)  # of tokens without text: the last one
        reason = self.finish.finish_reason if self.finish is not None else None
        self._close("incomplete" if reason in ("length", "content_filter") else "completed", events)
        return events

    def reasoning(self, text: str, events: list[Event]) -> None:
        """More reasoning."""
        item = self.current
        if item is None or item.kind != "reasoning":
            item = self._open("reasoning", events)
        item.pieces.append(text)
        events.append(("response.reasoning_text.delta", {**item.where_part, "delta": text}))

    def text(self, text: str, events: list[Event]) -> None:
        """More content. A message does not begin with white space that nothing follows: it is only between other items."""
        item = self.current
        if item is None or item.kind != "message":
            if text.isspace():
                self._space.append(text)
                return
            text = "".join((*self._space, text))
            self._space.clear()
            item = self._open("message", events)
        self._write(item, text, events)

    def _write(self, item: Item, text: str, events: list[Event]) -> None:
        if not item.pieces:
            events.append(("response.content_part.added", {**item.where_part, "part": {**item.part(""), "logprobs": []}}))
        item.pieces.append(text)
        logprobs, self._logprobs = self._logprobs, []
        if item.logprobs is not None:
            item.logprobs += logprobs
        events.append(("response.output_text.delta", {**item.where_part, "delta": text, "logprobs": logprobs}))

    def _call(self, piece: ToolCall, events: list[Event]) -> None:
        item = self._calls.get(piece.index)
        if item is None:
            item = self._calls[piece.index] = self._open("function_call", events, piece)
        elif item is not self.current:
            self._close("completed", events)
            item.status = "in_progress"
            self.current = item
        self._logprobs.clear()
        if piece.arguments:
            item.pieces.append(piece.arguments)
            events.append(("response.function_call_arguments.delta", {**item.where, "delta": piece.arguments}))

    def _open(self, kind: str, events: list[Event], call: ToolCall | None = None) -> Item:
        self._close("completed", events)
        item = Item(kind, len(self._items), self._response_id)
        self._items.append(item)
        self.current = item
        if kind != "message":
            self._space.clear()
            self._logprobs.clear()  # there is a place for those of messages only
        elif self._shows_logprobs:
            item.logprobs = []
        if call is not None:
            item.name, item.call_id = call.name, call.id
        events.append(("response.output_item.added", {"output_index": item.place, "item": item.encoded(is_new=True)}))
        if kind == "reasoning":
            events.append(("response.content_part.added", {**item.where_part, "part": item.part("")}))
        return item

    def _close(self, status: Status, events: list[Event]) -> None:
        item, self.current = self.current, None
        if item is None:
            return
        text = "".join(item.pieces)
        # A call that was whole when the limit came may be made.
        is_whole = status == "completed" or (item.kind == "function_call" and _is_json(text))
        item.status = "completed" if is_whole else status
        if item.kind == "function_call":
            events.append(("response.function_call_arguments.done", {**item.where, "arguments": text, "name": item.name}))
        elif item.pieces:
            says = "output_text" if item.kind == "message" else "reasoning_text"
            logprobs = {"logprobs": item.logprobs or []} if item.kind == "message" else {}
            events.append((f"response.{says}.done", {**item.where_part, "text": text, **logprobs}))
            events.append(("response.content_part.done", {**item.where_part, "part": item.part(text)}))
        events.append(("response.output_item.done", {"output_index": item.place, "item": item.encoded()}))

    def _take_back(self, item: Item, events: list[Event]) -> None:
        """End a call that is none. One that had ended already ends again, otherwise."""
        self._broken.add(item.place)
        if item is self.current:
            self.current = None
        item.status = "incomplete"
        events.append(("response.output_item.done", {"output_index": item.place, "item": item.encoded()}))


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _logprob(entry: TextLogprob) -> dict[str, Any]:
    return {**_token(entry.token, entry.logprob), "top_logprobs": [_token(token, value) for token, value in entry.top]}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "bytes": list(token.encode()), "logprob": logprob}
