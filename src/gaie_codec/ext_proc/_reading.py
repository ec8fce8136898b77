"""What an answer that passes by says of itself: the usage of its JSON or SSE, cut anywhere, or the status of a gRPC call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from .. import CodecError, SSEDecoder, TruncatedResponseError, Usage
from .._metadata import check_headers, decode_status

# A longer body is not worth the memory: what is read here only counts.
_MAX_BODY_BYTES: Final = 16 * 1024 * 1024


# What is no count is not counted.
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count = 0
    completion_tokens: _Count | None = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    # As responses and messages have it, the latter without those of the cache.
    input_tokens: _Count = 0
    output_tokens: _Count | None = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count | None = None


class _Response(msgspec.Struct):
    usage: _Usage | None = None


class _Body(_Response):
    response: _Response | None = None


_decode: Final = msgspec.json.Decoder(_Body).decode


class HttpReading:
    """Reads one response. `error` is there for a status from 500 on; a body that is not what it says just has no usage."""

    def __init__(self) -> None:
        self.error: CodecError | None = None
        self.usage = Usage()
        self._events: SSEDecoder | None = None
        self._body: bytearray | None = None

    def receive_headers(self, headers: Iterable[tuple[str, str]], *, status: int) -> None:
        """The status and the headers."""
        fields = dict(headers)
        kind = fields.get("content-type", "").partition(";")[0].strip().lower()
        if status >= 500:
            self.error = check_headers(status, fields)
        if status != 200 or fields.get("content-encoding", "identity") != "identity":
            return
        if kind == "text/event-stream":
            self._events = SSEDecoder()
        elif kind == "application/json":
            self._body = bytearray()

    def receive_data(self, data: bytes) -> None:
        """Bytes of the body, cut anywhere."""
        if self._events is not None:
            try:
                for event in self._events.receive_data(data):
                    if '"usage"' in event.data:
                        self._read(event.data)
            except CodecError:  # an event that is longer than any of ours
                self._events = None
        elif self._body is not None:
            self._body += data
            if len(self._body) > _MAX_BODY_BYTES:
                self._body = None

    def receive_eof(self) -> None:
        """The body is complete."""
        if self._body:
            self._read(self._body)
            self._body = None

    def receive_trailers(self, _: Any) -> None:
        """Likewise."""
        self.receive_eof()

    def _read(self, text: str | bytearray) -> None:
        try:
            body = _decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return
        told = body.usage if body.response is None else body.response.usage
        if told is not None:
            apart = told.cache_read_input_tokens or 0
            prompt = told.prompt_tokens_details or told.input_tokens_details or _Details()
            completion = told.completion_tokens_details or told.output_tokens_details or _Details()
            self.usage = Usage(
                prompt_tokens=told.prompt_tokens or told.input_tokens + apart,
                completion_tokens=told.completion_tokens or told.output_tokens or 0,
                cached_tokens=prompt.cached_tokens or apart,
                reasoning_tokens=completion.reasoning_tokens or 0,
            )


class StatusReading:
    """Reads how a gRPC call ended, and nothing else of it."""

    def __init__(self) -> None:
        self.error: CodecError | None = None
        self.usage = Usage()
        self._is_told = False

    def receive_headers(self, headers: Iterable[tuple[str, str]], *, status: int) -> None:
        """The status may be among them."""
        fields = dict(headers)
        self.error = check_headers(status, fields) if "grpc-status" not in fields else decode_status(fields)
        self._is_told = "grpc-status" in fields or self.error is not None

    def receive_data(self, data: bytes) -> None:
        """Not looked at."""

    def receive_eof(self) -> None:
        """The end, without trailers."""
        if not self._is_told:
            self.error = TruncatedResponseError("the response ended without a grpc-status")

    def receive_trailers(self, trailers: Iterable[tuple[str, str]]) -> None:
        """The status, if the headers had none."""
        if not self._is_told:
            self._is_told, self.error = True, decode_status(dict(trailers))
