"""One gRPC response, from bytes cut anywhere -> events, in the order that the state table allows.

What the server says wrongly is raised as a CodecError; whoever reads decides what becomes of it. Choices without an index get the
place in which they first came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from ._errors import (
    Code,
    CodecError,
    FramingError,
    MalformedMessageError,
    OutOfOrderError,
    TruncatedResponseError,
    UpstreamStatusError,
    UsageError,
    as_code,
)
from ._events import BodyEvent, EmbeddingEvent, ErrorEvent, Event, FinishEvent, PromptEvent, PromptLogprob, TokensEvent
from ._framing import FrameDecoder
from ._metadata import Headers, as_mapping, check_headers, decode_status
from ._state import Input, State, next_state

if TYPE_CHECKING:
    from .adapters.base import Adapter

_STREAMING: Final = State.STREAMING  # a global costs half of the enum's attribute, per message


class CallReader:
    """Reads the response of one call to `path` which has `choices` choices, or for a passed-through body none that are known."""

    __slots__ = (
        "_decode",
        "_ended_here",
        "_finished",
        "_is_unary_n",
        "_places",
        "_status_in_headers",
        "adapter",
        "cached_tokens",
        "choices",
        "eof",
        "frames",
        "parse",
        "prompt_logprobs",
        "prompt_tokens",
        "reasoning_tokens",
        "response_type",
        "state",
    )

    def __init__(self, adapter: Adapter, path: str, *, choices: int, is_streamed: bool, max_message_bytes: int) -> None:
        self.adapter = adapter
        self.state = State.AWAIT_HEADERS
        self.eof = False
        self.choices = choices
        self.prompt_tokens = 0
        self.prompt_logprobs: tuple[PromptLogprob, ...] = ()
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.frames = FrameDecoder(max_message_bytes=max_message_bytes)
        self.response_type: Any = adapter.snapshot.method_at(path).response
        self.parse: Any = self.response_type.FromString
        passthrough = adapter.passthrough
        self._decode: Any = adapter.decode_response
        if passthrough is not None and path in passthrough.paths.values():
            self._decode = lambda message: (passthrough.decode_response(message),)
        if adapter.embed is not None and path == adapter.embed.path:
            self._decode = adapter.embed.decode_response
        self._finished: set[int] = set()
        self._ended_here = False  # a choice whose tokens may still come
        self._places: dict[str, int] = {}
        self._is_unary_n = adapter.streams_several and choices > 1 and not is_streamed
        self._status_in_headers: dict[str, str] | None = None

    @property
    def unfinished(self) -> int:
        """Choices that have not finished."""
        return self.choices - len(self._finished)

    def check_open(self) -> None:
        """Raise UsageError when the end of the response was received already."""
        if self.eof:
            raise UsageError("the end of this response was received already")

    def receive_headers(self, headers: Headers | Mapping[str, str], status: int) -> None:
        """The response headers, `status` being the HTTP status. A grpc-status among them may be a trailers-only answer. Informational
        ones (1xx) say nothing of the response."""
        self.check_open()
        if 100 <= status < 200:
            return
        fields = as_mapping(headers)
        if "grpc-status" in fields:
            # Trailers-only, or a server that says it twice; which one is known when trailers or the end come.
            self._status_in_headers = fields
        else:
            fault = check_headers(status, fields)
            if fault is not None:
                raise fault
        self.frames.encoding = fields.get("grpc-encoding", "identity")
        self._advance(Input.HEADERS)

    def receive_data(self, data: bytes) -> Iterator[bytes]:
        """The payloads that `data` completes; none of a call that is not needed any longer."""
        for payload in () if self.state is State.CLOSED else self.frames.receive_data(data):
            yield payload
            if self.state is State.CLOSED:
                return  # what follows is not looked at, so that it may be broken

    def receive_message(self, payload: bytes) -> Sequence[Event]:
        """The events of one message; none of a call that is not needed any longer."""
        if self.state is State.CLOSED:
            return ()
        if len(payload) > self.frames.max_message_bytes:
            raise FramingError(f"a message of {len(payload)} bytes is over the limit of {self.frames.max_message_bytes}")
        try:
            message = self.parse(payload)
        except DecodeError:
            raise MalformedMessageError(f"a payload of {len(payload)} bytes is no {self.response_type.DESCRIPTOR.full_name}") from None
        events: Sequence[Event] = self._decode(message)
        if not events and next_state(self.state, Input.MESSAGE) is State.ERROR:
            # An empty message is legal and says nothing, but it still has to come at its time.
            raise self._out_of_order(Input.MESSAGE)
        return events

    def place(self, event: TokensEvent | FinishEvent) -> int:
        """Which of the choices the event is about. Raises OutOfOrderError for one that was not asked for."""
        index = event.index
        if event.choice_id:
            index = self._places.setdefault(event.choice_id, len(self._places))
        elif self._is_unary_n and index in self._finished:
            # All say index 0; they come in order.
            index = next((other for other in range(self.choices) if other not in self._finished), index)
        if index >= self.choices:
            raise OutOfOrderError(f"a message for choice {index} of {self.choices}")
        return index

    def accept(self, event: Event, index: int = 0) -> None:
        """Count the event in; raises OutOfOrderError where it has no place, UpstreamStatusError for an error that it brings."""
        if isinstance(event, TokensEvent) and self.state is _STREAMING:  # most are
            self._see_prompt(event)
            return
        if isinstance(event, ErrorEvent):
            raise UpstreamStatusError(event.code, event.message)
        received = Input.MESSAGE
        if isinstance(event, FinishEvent | EmbeddingEvent):
            self._finished.add(index)
            if not self.unfinished:
                received = Input.ENOUGH if self._ended_here else Input.LAST_FINISH
        elif isinstance(event, BodyEvent) and event.is_last:
            received = Input.LAST_FINISH
        state = next_state(self.state, received)
        if state is State.ERROR:
            raise self._out_of_order(received)
        if isinstance(event, PromptEvent):  # nothing is generated yet: what fails now can still be told by the HTTP status
            self._see_prompt(event)
            return
        if isinstance(event, TokensEvent | FinishEvent):
            self._see_prompt(event)
        elif isinstance(event, EmbeddingEvent):
            self.prompt_tokens, self.cached_tokens = event.prompt_tokens, event.cached_tokens
        self.state = state

    def end_choice(self, index: int) -> None:
        """A choice has ended by our own knowledge. After the last one the state is CLOSED, and the call is not needed any longer."""
        self._finished.add(index)
        self._ended_here = True
        if not self.unfinished:
            self._advance(Input.ENOUGH)

    def receive_trailers(self, trailers: Headers | Mapping[str, str]) -> None:
        """The trailers, which end the response. Raises what they, or their coming too early, mean."""
        fields = as_mapping(trailers)
        # Some hosts report the end of a trailers-only answer as trailers that are empty.
        self._close(decode_status(fields if "grpc-status" in fields else self._status_in_headers or fields))

    def receive_status(self, code: int, detail: str) -> None:
        """Likewise, for hosts whose gRPC library decoded the trailers."""
        known = as_code(code)
        self._close(None if known is Code.OK else UpstreamStatusError(known, detail))

    def receive_eof(self) -> None:
        """The connection or stream ended without trailers."""
        if self._status_in_headers is not None:
            self._close(decode_status(self._status_in_headers))
        elif self.state is State.FINISHED:
            self._close(None)
        elif self.state is not State.CLOSED:
            raise self._cut_short() or TruncatedResponseError("the response ended without a grpc-status")

    def fail(self, error: CodecError) -> None:
        """Go to the state that `error` leads to."""
        self.state = next_state(self.state, Input.STATUS_ERROR) if isinstance(error, UpstreamStatusError) else State.ERROR

    def _see_prompt(self, event: PromptEvent | TokensEvent | FinishEvent) -> None:
        if event.prompt_tokens:
            self.prompt_tokens = event.prompt_tokens
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        if event.cached_tokens > self.cached_tokens:
            self.cached_tokens = event.cached_tokens
        if not isinstance(event, PromptEvent) and event.reasoning_tokens > self.reasoning_tokens:
            self.reasoning_tokens = event.reasoning_tokens

    def _advance(self, received: Input) -> None:
        state = next_state(self.state, received)
        if state is State.ERROR:
            raise self._out_of_order(received)
        self.state = state

    def _close(self, status: UpstreamStatusError | None) -> None:
        if self.state is State.CLOSED:
            return
        if self.state is State.FINISHED and self._status_in_headers is None:
            # Every choice has its finish, which is what makes an answer complete: no end that comes later takes it back, but one that
            # contradicts a status in the headers.
            status = None
        if status is not None and self.adapter.decode_status is not None:
            status = UpstreamStatusError(*self.adapter.decode_status(status.code, status.words))
        fault = status if status is not None else self._cut_short()
        if fault is not None:
            raise fault
        self._advance(Input.STATUS_OK)

    def _cut_short(self) -> CodecError | None:
        """Why grpc-status 0 would be a lie: an unfinished frame, or a choice without its finish."""
        try:
            self.frames.receive_eof()
        except TruncatedResponseError as error:
            return error
        if self.state is State.FINISHED:
            return None
        return TruncatedResponseError(f"the response ended before {self.unfinished} of {self.choices} choices had finished")

    def _out_of_order(self, received: Input) -> OutOfOrderError:
        return OutOfOrderError(f"{received.name} in state {self.state.name}")
