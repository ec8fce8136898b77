"""gRPC response -> HTTP answer: the second half of the data path, from bytes cut anywhere.

Messages become events, events the deltas of choices, and deltas chunks or the parts of one JSON body. `_state` says what may come when;
whatever the server does wrong ends as an answer that a client understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from google.protobuf.message import DecodeError

from ._choices import Choice, Delta
from ._errors import (
    Code,
    CodecError,
    FramingError,
    MalformedMessageError,
    OutOfOrderError,
    TruncatedResponseError,
    UnsupportedEndpointError,
    UpstreamStatusError,
    UsageError,
)
from ._events import Event, InferenceRequest, TokensEvent, Usage
from ._framing import FrameDecoder
from ._metadata import Headers, as_mapping, check_headers, decode_status
from ._state import Input, State, next_state
from .openai import chat
from .openai.chat_response import ResponseEncoder, ResponseMeta, StreamEncoder, UnaryEncoder
from .openai.errors import encode_error

if TYPE_CHECKING:
    from ._transcoder import Transcoder
    from .adapters.base import Adapter

_STREAMING: Final = State.STREAMING  # a global costs half of the enum's attribute, per token


class ResponseHead(msgspec.Struct, frozen=True):
    """The HTTP status and headers to send. It comes first, and once."""

    status: int
    headers: tuple[tuple[str, str], ...]


class BodyChunk(msgspec.Struct, frozen=True):
    """Bytes of the HTTP body to send."""

    data: bytes


class EndOfBody(msgspec.Struct, frozen=True):
    """The body is complete. Nothing follows; a host may cancel an upstream call that is still open."""


Output: TypeAlias = ResponseHead | BodyChunk | EndOfBody


def encode_error_response(error: CodecError) -> tuple[Output, ...]:
    """A whole HTTP answer that reports `error` in OpenAI's form, such as one that `Transcoder.request` raised."""
    extra = (("allow", error.allow),) if isinstance(error, UnsupportedEndpointError) and error.allow else ()
    return encode_json_response(encode_error(error), status=error.http_status, headers=extra)


def encode_json_response(body: bytes, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> tuple[Output, ...]:
    """A whole HTTP answer with a JSON body."""
    head = (("content-type", "application/json"), ("content-length", str(len(body))), *headers)
    return ResponseHead(status, head), BodyChunk(body), EndOfBody()


class Response:
    """gRPC response -> HTTP answer, from bytes cut anywhere.

    The `receive_*` methods return what to send and never raise on what the server sends: a broken upstream becomes the right HTTP
    answer, and `error` says what happened. They raise UsageError when called after the end of the response was received.
    `ended` is true once EndOfBody was returned.
    """

    __slots__ = (
        "_adapter",
        "_choices",
        "_count",
        "_decode",
        "_decode_tokens",
        "_encode_text",
        "_encoder",
        "_eof",
        "_frames",
        "_head_sent",
        "_is_plain",
        "_parse",
        "_prompt_token_ids",
        "_receive_plain",
        "_status_in_headers",
        "_unfinished",
        "_usage",
        "_wants_usage",
        "ended",
        "error",
        "state",
    )

    def __init__(self, transcoder: Transcoder, request: InferenceRequest, options: chat.ChatOptions, meta: ResponseMeta) -> None:
        adapter = transcoder.adapter
        self.state = State.AWAIT_HEADERS
        self.error: CodecError | None = None
        self.ended = False
        self._eof = False
        self._head_sent = False
        self._adapter: Adapter = adapter
        self._parse: Any = adapter.response_type.FromString
        self._decode = adapter.decode_response
        self._decode_tokens = adapter.decode_tokens
        self._is_plain = not options.is_detailed
        self._frames = FrameDecoder(max_message_bytes=transcoder.limits.max_message_bytes)
        self._encoder: ResponseEncoder = StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)
        self._choices = [
            Choice(
                index,
                request,
                transcoder.tokenizer,
                eos_token_ids=transcoder.eos_token_ids,
                stop_holdback=transcoder.stop_holdback,
            )
            for index in range(request.sampling.n)
        ]
        self._count = self._unfinished = len(self._choices)
        # Bound once: the per-token path is all attribute look-ups.
        self._receive_plain = [choice.receive_plain for choice in self._choices]
        self._encode_text = self._encoder.text
        self._usage = Usage(prompt_tokens=len(request.prompt_token_ids))
        self._wants_usage = options.continuous_usage
        self._prompt_token_ids = request.prompt_token_ids
        self._status_in_headers: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"<Response {self.state.name}, {self._unfinished} of {self._count} choices unfinished>"

    @property
    def usage(self) -> Usage:
        """Tokens so far; exact once the response has ended."""
        return self._usage_with(sum(choice.completion_tokens for choice in self._choices))

    def receive_headers(self, headers: Headers | Mapping[str, str] = (), *, status: int = 200) -> Sequence[Output]:
        """The response headers, `status` being the HTTP status. A grpc-status among them may be a trailers-only answer."""
        self._check_open()
        fields = as_mapping(headers)
        if "grpc-status" in fields:
            # Trailers-only, or a server that says it twice; which one is known when trailers or the end come.
            self._status_in_headers = fields
        else:
            fault = check_headers(status, fields)
            if fault is not None:
                return self._fail(fault, [])
        self._frames.encoding = fields.get("grpc-encoding", "identity")
        return self._advance(Input.HEADERS)

    def receive_data(self, data: bytes) -> Sequence[Output]:
        """Bytes of the response body, cut anywhere."""
        payload = self._frames.receive_whole(data)
        if payload is not None:
            return self.receive_message(payload)
        if self._eof:
            self._check_open()
        if self.ended:
            return ()
        parts: list[bytes] = []
        try:
            for payload in self._frames.receive_data(data):
                plain = self._plain(payload) if self.state is _STREAMING else None
                if plain is None:
                    self._message(payload, parts)
                else:
                    parts.append(plain)
        except CodecError as error:
            return self._fail(error, parts)
        return self._send(parts) if parts else ()

    def receive_message(self, message: bytes) -> Sequence[Output]:
        """One message without its frame, for hosts whose gRPC library took the frames away."""
        if self.state is _STREAMING:
            plain = self._plain(message)
            if plain is not None:
                return (BodyChunk(plain),) if plain else ()
        if self._eof:
            self._check_open()
        if self.ended:
            return ()
        parts: list[bytes] = []
        try:
            if len(message) > self._frames.max_message_bytes:
                raise FramingError(f"a message of {len(message)} bytes is over the limit of {self._frames.max_message_bytes}")
            self._message(message, parts)
        except CodecError as error:
            return self._fail(error, parts)
        return self._send(parts) if parts else ()

    def receive_trailers(self, trailers: Headers | Mapping[str, str]) -> Sequence[Output]:
        """The trailers, which end the response."""
        self._check_open()
        self._eof = True
        fields = as_mapping(trailers)
        # Some hosts report the end of a trailers-only answer as trailers that are empty.
        return self._close(decode_status(fields if "grpc-status" in fields else self._status_in_headers or fields))

    def receive_status(self, code: Code, detail: str = "") -> Sequence[Output]:
        """The end of the response, for hosts whose gRPC library decoded the trailers."""
        self._check_open()
        self._eof = True
        return self._close(None if code is Code.OK else UpstreamStatusError(code, detail))

    def receive_eof(self) -> Sequence[Output]:
        """The connection or stream ended without trailers."""
        self._check_open()
        self._eof = True
        if self._status_in_headers is not None:
            return self._close(decode_status(self._status_in_headers))
        if self.ended:
            return ()
        return self._fail(self._cut_short() or TruncatedResponseError("the response ended without a grpc-status"), [])

    def _check_open(self) -> None:
        if self._eof:
            raise UsageError("the end of this response was received already")

    def _plain(self, payload: bytes) -> bytes | None:
        """The per-token path: a message in mid-stream that brings nothing but tokens whose text the client gets. Else None."""
        if not self._is_plain:
            return None
        try:
            index, token_ids = self._decode_tokens(self._parse(payload))
        except DecodeError:
            return None
        if not token_ids or index >= self._count:
            return None
        text = self._receive_plain[index](token_ids)
        if text:
            return self._encode_text(index, text)
        return None if text is None else b""

    def _message(self, payload: bytes, parts: list[bytes]) -> None:
        try:
            message = self._parse(payload)
        except DecodeError:
            name = self._adapter.response_type.DESCRIPTOR.full_name
            raise MalformedMessageError(f"a payload of {len(payload)} bytes is no {name}") from None
        event = self._decode(message)
        if event is None:
            # An empty message is legal and says nothing, but it still has to come at its time.
            if next_state(self.state, Input.MESSAGE) is State.ERROR:
                raise self._out_of_order(Input.MESSAGE)
            return
        if event.index >= self._count:
            raise OutOfOrderError(f"a message for choice {event.index} of {self._count}")
        choice = self._choices[event.index]
        delta: Delta | None
        if isinstance(event, TokensEvent):
            delta = choice.receive_tokens(event)
            self._move(Input.MESSAGE, event, parts)
        else:
            delta = choice.receive_finish(event)
            self._unfinished -= 1
            self._move(Input.MESSAGE if self._unfinished else Input.LAST_FINISH, event, parts)
        if delta is not None:
            parts.append(self._encoder.delta(delta, self._usage_with(choice.completion_tokens) if self._wants_usage else None))

    def _move(self, received: Input, event: Event, parts: list[bytes]) -> None:
        state = next_state(self.state, received)
        if state is State.ERROR:
            raise self._out_of_order(received)
        self._see_prompt(event)
        if self.state is State.AWAIT_MESSAGE:
            parts.append(self._encoder.open(range(self._count), self._prompt_token_ids, self._usage))
        self.state = state

    def _see_prompt(self, event: Event) -> None:
        usage = self._usage
        if event.prompt_tokens not in (0, usage.prompt_tokens) or event.cached_tokens > usage.cached_tokens:
            self._usage = Usage(
                prompt_tokens=event.prompt_tokens or usage.prompt_tokens, cached_tokens=max(event.cached_tokens, usage.cached_tokens)
            )

    def _usage_with(self, completion_tokens: int) -> Usage:
        usage = self._usage
        return Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=completion_tokens, cached_tokens=usage.cached_tokens)

    def _out_of_order(self, received: Input) -> OutOfOrderError:
        return OutOfOrderError(f"{received.name} in state {self.state.name}")

    def _advance(self, received: Input) -> Sequence[Output]:
        state = next_state(self.state, received)
        if state is State.ERROR:
            return self._fail(self._out_of_order(received), [])
        self.state = state
        return ()

    def _close(self, status: UpstreamStatusError | None) -> Sequence[Output]:
        if self.ended:
            return ()
        fault = status if status is not None else self._cut_short()
        if fault is not None:
            return self._fail(fault, [])
        self.state = next_state(self.state, Input.STATUS_OK)
        return self._send([self._encoder.close(self.usage)], last=True)

    def _cut_short(self) -> CodecError | None:
        """Why grpc-status 0 would be a lie: an unfinished frame, or a choice without its finish."""
        try:
            self._frames.receive_eof()
        except TruncatedResponseError as error:
            return error
        if self.state is State.FINISHED:
            return None
        return TruncatedResponseError(f"the response ended before {self._unfinished} of {len(self._choices)} choices had finished")

    def _send(self, parts: list[bytes], *, last: bool = False) -> Sequence[Output]:
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._head_sent and not last:
            return (BodyChunk(data),) if data else ()
        if not self._encoder.streams:
            if not last:
                return ()
            self.ended = True
            return encode_json_response(data)
        outputs: list[Output] = []
        if not self._head_sent:
            self._head_sent = True
            outputs.append(ResponseHead(200, (("content-type", self._encoder.content_type), ("cache-control", "no-cache"))))
        if data:
            outputs.append(BodyChunk(data))
        if last:
            self.ended = True
            outputs.append(EndOfBody())
        return outputs

    def _fail(self, error: CodecError, parts: list[bytes]) -> Sequence[Output]:
        """End the answer with `error`: after the messages that came before it, in the form that the client can still be told."""
        if self.ended:
            return ()
        self.error = error
        received = Input.STATUS_ERROR if isinstance(error, UpstreamStatusError) else None
        self.state = next_state(self.state, received) if received is not None else State.ERROR
        if not self._encoder.streams or not (self._head_sent or parts):
            self.ended = True
            return encode_error_response(error)
        # Text that waited for its choice to end, or could still have become a stop string, was generated: the client gets it.
        for choice in self._choices:
            delta = choice.abandon()
            if delta is not None:
                parts.append(self._encoder.delta(delta, self._usage_with(choice.completion_tokens) if self._wants_usage else None))
        parts.append(self._encoder.error(error))
        return self._send(parts, last=True)
