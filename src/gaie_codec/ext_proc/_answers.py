"""The response half of a stream: what the model server sends, as Envoy hands it over -> what Envoy is to do with it.

`Rewritten` holds the response headers back until the answer's status is known, which is at the first message or at the end, and never
sends a body before the first DATA came. What fails before that is one whole answer in the place of all else (ImmediateResponse).
`Untouched` passes everything on as it is and reads along. Facts about Envoy: docs/envoy.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from .. import (
    BodyChunk,
    BridgedResponse,
    Code,
    CodecError,
    ObservedResponse,
    Response,
    ResponseHead,
    Trailers,
    UpstreamStatusError,
    Usage,
    encode_error_response,
)
from ._reading import HttpReading, StatusReading
from ._wire import (
    MAX_BODY_BYTES,
    Pairs,
    buffered_answer,
    encode_mutation,
    headers_answer,
    immediate_answer,
    replaced_answer,
    streamed_answer,
    streamed_answers,
    trailers_answer,
)

Answers: TypeAlias = Sequence[Any]
"""ProcessingResponses."""

LATE: Final = "no answer within the gateway's deadline"
_MAX_GRPC_MESSAGE_BYTES: Final = 4096
_NOT_FOR_GRPC: Final = frozenset(
    ("content-length", "content-encoding", "grpc-status", "grpc-message", "grpc-status-details-bin", "grpc-encoding")
)
_NOT_FOR_HTTP: Final = _NOT_FOR_GRPC | {"trailer", "grpc-accept-encoding", "accept-encoding"}


class Rewritten:
    """An answer that is made anew: OpenAI JSON or SSE, or gRPC in the client's dialect.

    `set_headers` are to be on it whatever it says. `whole_bodies` is Envoy's mode BUFFERED. `is_chained` says that other filters have to
    see the answer, which an ImmediateResponse would pass by. `http_path` is the client's, and chooses the form of an error.
    """

    def __init__(
        self,
        reading: Response | BridgedResponse,
        *,
        set_headers: Sequence[tuple[str, str]] = (),
        whole_bodies: bool = False,
        is_chained: bool = False,
        is_grpc: bool = False,
        http_path: str = "",
    ) -> None:
        self._reading: Any = reading  # the outputs of both are taken alike
        self._set_headers = tuple(set_headers)
        self._whole_bodies = whole_bodies
        self._is_chained = is_chained and not whole_bodies and not is_grpc
        self._is_grpc = is_grpc
        self._http_path = http_path
        self._names: list[str] = []
        self._trailers: tuple[tuple[str, str], ...] = ()
        self._held: list[Any] = []
        self._late: CodecError | None = None  # after an answer that was complete but for its trailers
        self._has_data = False
        self._is_released = False
        self.status = 0
        self.bytes_sent = 0
        self.has_started = False
        self.goes_on = False
        """The answer is complete, and the model server is not: a stop string of ours, or a fault amid the stream."""
        self.is_over = False

    @property
    def error(self) -> CodecError | None:
        """What went wrong at the model server, or in reading it."""
        error: CodecError | None = self._reading.error
        return error or self._late

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        usage: Usage = self._reading.usage
        return usage

    @property
    def frames_received(self) -> int:
        """gRPC messages from the model server so far."""
        count: int = self._reading.frames_received
        return count

    def headers(self, fields: Pairs, status: int, *, end: bool) -> Answers:
        """Nothing is said yet, unless this is all there is."""
        self._names = [name for name, _ in fields]
        outputs = [*self._reading.receive_headers(fields, status=status)]
        if end and not self._reading.ended:
            outputs += self._reading.receive_trailers(fields)
        if end:
            return self._without_data(outputs)
        if self._reading.ended and not self._is_chained:
            return self._at_once(*self._taken(outputs))
        self._held = outputs
        return (headers_answer("response"),) if self._whole_bodies else ()

    def body(self, data: bytes, *, end: bool) -> Answers:
        """What the bytes bring."""
        self._has_data = True
        if self._reading.ended:
            held, self._held = self._held, []
            return self._stream(held, end=end)
        outputs: Sequence[Any] = self._reading.receive_data(data)
        if self._is_released and not end and len(outputs) == 1 and type(outputs[0]) is BodyChunk:  # most are
            piece = outputs[0].data
            if len(piece) <= MAX_BODY_BYTES:
                self.bytes_sent += len(piece)
                return (streamed_answer(piece),)
        if end and not self._reading.ended:
            outputs = (*outputs, *self._reading.receive_eof())
        if self._whole_bodies:
            # Envoy holds head and body until the trailers are answered, and sends these only after the body is: nothing of it is said now.
            self._held += outputs
            return self._at_once(*self._taken(self._held)) if self._reading.ended else (buffered_answer("response", b""),)
        return self._stream(outputs, end=end)

    def trailers(self, fields: Pairs) -> Answers:
        """The rest of the body, and an end without gRPC's trailers for who does not speak gRPC."""
        outputs, self._held = self._held, []
        if not self._reading.ended:
            outputs += self._reading.receive_trailers(fields)
            if self._whole_bodies:
                return self._at_once(*self._taken(outputs))
        if not self._has_data:
            return self._without_data(outputs)
        answers = [*self._stream(outputs, in_trailers=True)]
        if not self.is_over:
            kept = {name for name, _ in self._trailers}
            answers.append(trailers_answer("response", encode_mutation(self._trailers, (name for name, _ in fields if name not in kept))))
        return answers

    def too_late(self) -> Answers:
        """The deadline has passed. An answer that has begun ends with the error, and is then cut off, or `goes_on` where that must wait."""
        if self._reading.ended and not self._is_grpc:
            return self.cut() if self._is_released else self._at_once(*self._taken(self._held))
        if self._reading.ended:
            self._late = UpstreamStatusError(Code.DEADLINE_EXCEEDED, LATE)
            return self._at_once(None, b"")
        outputs = self._reading.receive_status(Code.DEADLINE_EXCEEDED, LATE)
        if not self._is_released or self._is_grpc:
            return self._at_once(*self._taken(outputs))
        answers = self._stream(outputs)
        # The model server's own deadline ends it in the same moment, and behind another filter an end must not cross its trailers.
        return answers if self._is_chained else (*answers, *self.cut())

    @property
    def may_cut(self) -> bool:
        """Whether the answer is complete without the model server's end, which a gRPC client's is not: its status is in the trailers."""
        return not self._is_grpc

    def cut(self) -> Answers:
        """Ends an answer that has begun while the model server goes on, which cancels its call. Where other filters are before this one,
        an end that crosses the model server's trailers never reaches the client (docs/envoy.md), so it is not the first thing to do."""
        self.is_over = True
        return tuple(streamed_answers("response", b"", end=True))

    def _stream(self, outputs: Iterable[Any], *, end: bool = False, in_trailers: bool = False) -> Answers:
        head, data = self._taken(outputs)
        goes_on = self._reading.ended and not (end or in_trailers)
        if not self._is_released:
            if self._reading.ended and (goes_on or self.error is not None) and not self._is_chained and not self._is_grpc:
                return self._at_once(head, data)
            if head is None:
                return ()
        self.goes_on = goes_on
        answers = [headers_answer("response", self._head_mutation(head))] if head is not None else []
        self._is_released = True
        if data:
            self.has_started = True
            self.bytes_sent += len(data)
        return [*answers, *streamed_answers("response", data, end=end)]

    def _without_data(self, outputs: Iterable[Any]) -> Answers:
        """The model server sent headers, and maybe trailers, but no body for which another could be sent."""
        head, data = self._taken(outputs)
        if not self._is_chained or head is None:
            return self._at_once(head, data)
        self.bytes_sent += len(data)
        return (replaced_answer(self._head_mutation(head), data),)

    def _taken(self, outputs: Iterable[Any]) -> tuple[ResponseHead | None, bytes]:
        head = None
        parts = []
        for out in outputs:
            if isinstance(out, BodyChunk):
                parts.append(out.data)
            elif isinstance(out, ResponseHead):
                head = out
                self.status = out.status
            elif isinstance(out, Trailers):
                self._trailers = out.headers
        return head, parts[0] if len(parts) == 1 else b"".join(parts)

    def _head_mutation(self, head: ResponseHead) -> Any:
        given = [(name, value) for name, value in (*head.headers, *self._set_headers) if name != "content-length"]
        names = {name for name, _ in given}
        unwanted = _NOT_FOR_GRPC if self._is_grpc else _NOT_FOR_HTTP
        return encode_mutation([(":status", str(head.status)), *given], (name for name in self._names if name in unwanted - names))

    def _at_once(self, head: ResponseHead | None, data: bytes) -> Answers:
        """The whole answer as an ImmediateResponse, which also ends the call to the model server."""
        self.is_over = True
        self.has_started = self.error is None
        self.bytes_sent += len(data)
        if head is None:  # what failed is a gRPC answer without a message
            head = ResponseHead(200, ())
        details = f"gaie_codec: {self.error.error_type}" if self.error is not None else "gaie_codec: complete"
        if self._is_grpc and self.error is not None:
            return (immediate_grpc_error(self.error),)
        if self._whole_bodies and self.error is not None:  # a stream, nothing of which has left
            self.status = self.error.http_status
            return (immediate_error(self.error, self._set_headers, self._http_path, flavor=self._reading.flavor),)
        headers = [(name, value) for name, value in (*head.headers, *self._set_headers) if name != "content-length"]
        return (immediate_answer(head.status, data, headers, details=details),)


def immediate_error(error: CodecError, set_headers: Iterable[tuple[str, str]] = (), path: str = "", *, flavor: str = "vllm") -> Any:
    """The answer to an HTTP client, in the form that its path has, or OpenAI's in this flavor."""
    head, body, _ = encode_error_response(error, path, flavor=flavor)
    assert isinstance(head, ResponseHead)
    assert isinstance(body, BodyChunk)
    headers = [(name, value) for name, value in (*head.headers, *set_headers) if name != "content-length"]
    return immediate_answer(head.status, body.data, headers, details=f"gaie_codec: {error.error_type}")


def immediate_grpc_error(error: CodecError, set_headers: Iterable[tuple[str, str]] = ()) -> Any:
    """The answer to a gRPC client: Envoy makes trailers of the status, and the grpc-message of the body."""
    details = f"gaie_codec: {error.error_type}"
    # grpcio refuses trailers of more than 16 KB, and Envoy encodes a byte as up to three.
    message = error.message.encode("utf-8", "replace")[:_MAX_GRPC_MESSAGE_BYTES]
    return immediate_answer(error.http_status, message, set_headers, details=details, grpc_status=int(error.code))


class Untouched:
    """An answer that goes on as it came, byte for byte, while `reading` learns from it."""

    def __init__(
        self, reading: ObservedResponse | HttpReading | StatusReading, *, is_grpc: bool, whole_bodies: bool = False, http_path: str = ""
    ) -> None:
        self._reading = reading
        self._http_path = http_path
        self._whole_bodies = whole_bodies
        self._is_grpc = is_grpc
        self._late: CodecError | None = None
        self.status = 0
        self.bytes_sent = 0
        self.has_started = False
        self.goes_on = self.is_over = False
        self.may_cut = False

    @property
    def error(self) -> CodecError | None:
        """What the model server reported, or what is wrong with what it sent."""
        return self._late or self._reading.error

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self._reading.usage

    @property
    def frames_received(self) -> int:
        """gRPC messages from the model server so far, where they are read."""
        return self._reading.frames_received if isinstance(self._reading, ObservedResponse) else 0

    def headers(self, fields: Pairs, status: int, *, end: bool) -> Answers:
        """Unchanged."""
        self.status = status
        self._reading.receive_headers(fields, status=status)
        if end:
            self._reading.receive_trailers(fields)
        return (headers_answer("response"),)

    def body(self, data: bytes, *, end: bool) -> Answers:
        """Unchanged."""
        self.has_started = self.status == 200
        self.bytes_sent += len(data)
        self._reading.receive_data(data)
        if end:
            self._reading.receive_eof()
        return (buffered_answer("response"),) if self._whole_bodies else tuple(streamed_answers("response", data, end=end))

    def trailers(self, fields: Pairs) -> Answers:
        """Unchanged."""
        self._reading.receive_trailers(fields)
        return (trailers_answer("response"),)

    def too_late(self) -> Answers:
        """The deadline has passed: what has not begun becomes a status, what has begun is cut off."""
        self.is_over = True
        late = self._late = UpstreamStatusError(Code.DEADLINE_EXCEEDED, LATE)
        if not self.status:
            self.status = 200 if self._is_grpc else late.http_status
        return (immediate_grpc_error(late) if self._is_grpc else immediate_error(late, path=self._http_path),)


Answer: TypeAlias = Rewritten | Untouched
"""How one response is answered: each method takes what Envoy says and gives what to tell it. After `is_over` nothing more may be sent."""
