"""Server-sent events: text <-> bytes, as OpenAI clients speak them.

Encoding is what vLLM writes: `data: <one line>` and a blank line. Decoding follows the WHATWG HTML standard, section "Interpreting an
event stream": LF, CR or CRLF, a BOM at the start, comments, several data lines, fields other than data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from ._errors import MalformedMessageError, TruncatedResponseError

DATA: Final = b"data: "
END: Final = b"\n\n"
DONE: Final = b"data: [DONE]\n\n"
CONTENT_TYPE: Final = "text/event-stream; charset=utf-8"
DEFAULT_MAX_EVENT_BYTES: Final = 64 * 1024 * 1024


def encode_event(data: bytes, name: str = "") -> bytes:
    """One event whose data is `data`, which must not hold a line break; JSON never does. `name` is its `event` field, if it has one."""
    return b"event: %b\n%b%b%b" % (name.encode(), DATA, data, END) if name else DATA + data + END


class ServerSentEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One dispatched event. `event` is "message" where the stream names none; `id` is the last one seen."""

    data: str
    event: str = "message"
    id: str = ""


class SSEDecoder:
    """Bytes, cut anywhere, to events. An event that the stream does not end with a blank line is not dispatched.

    `max_event_bytes` is for one event, comments before it included, without line ends.
    """

    __slots__ = ("_at_start", "_buffer", "_data", "_event", "_id", "_size", "_skip_lf", "max_event_bytes")

    def __init__(self, *, max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        self._buffer: list[bytes] = []  # the pieces of a line that has not ended yet
        self._size = 0
        self._data: list[str] = []
        self._event = ""
        self._id = ""
        self._at_start = True
        self._skip_lf = False  # the last byte was CR: an LF that comes next belongs to it

    def receive_data(self, data: bytes) -> Iterator[ServerSentEvent]:
        """Yield each event that a blank line completes. Raises MalformedMessageError when one event outgrows the limit."""
        if not data:
            return
        if self._skip_lf and data.startswith(b"\n"):
            data = data[1:]
        self._skip_lf = data.endswith(b"\r")
        # bytes.splitlines breaks at LF, CR and CRLF and at nothing else, which is just what the standard wants.
        for line in data.splitlines(keepends=True):
            self._size += len(line.rstrip(b"\r\n"))
            if self._size > self.max_event_bytes:
                raise MalformedMessageError(f"an event of more than {self.max_event_bytes} bytes")
            self._buffer.append(line)
            if not line.endswith((b"\n", b"\r")):
                return
            whole = b"".join(self._buffer).rstrip(b"\r\n")
            self._buffer.clear()
            if not whole:
                self._size = 0
            event = self._line(whole)
            if event is not None:
                yield event

    def receive_eof(self) -> None:
        """Raise TruncatedResponseError when the stream ended inside an event."""
        if self._buffer or self._data:
            raise TruncatedResponseError("the event stream ended inside an event")

    def _line(self, raw: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw:
            event = ServerSentEvent(data="\n".join(self._data), event=self._event or "message", id=self._id) if self._data else None
            self._data, self._event = [], ""
            return event
        name, _, value = raw.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None
