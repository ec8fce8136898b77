"""One ext_proc stream without I/O: ProcessingRequests in, ProcessingResponses out.

    processor = Processor(gateway, own_id=uuid4().hex, created=int(time()))
    for message in stream:
        send(processor.receive(message))

The request is held until it is whole, then decoded, a model server is picked, and what has become of it goes back; `_answers` does
the response. The order of what is sent, and what may be sent when, is that of docs/envoy.md. Times, ids and logs are the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import unquote

from .. import (
    BodyChunk,
    Code,
    CodecError,
    RequestError,
    RequestTooLargeError,
    ResponseHead,
    UpstreamStatusError,
    Usage,
    encode_answer_headers,
)
from ..openai import models
from ._answers import LATE, Answer, Answers, Rewritten, Untouched, immediate_error, immediate_grpc_error
from ._headers import DROP_REASON
from ._modes import Mode, is_grpc
from ._plans import Incoming, Plan, generates
from ._reading import HttpReading
from ._routing import Local, Offer, answer_locally, choose, find_eligible, make_offers
from ._wire import (
    BODY_MODES,
    BUFFERED,
    FULL_DUPLEX,
    buffered_answer,
    decode_headers,
    encode_mutation,
    headers_answer,
    immediate_answer,
    streamed_answers,
    trailers_answer,
)
from .gateway import Declared, Gateway
from .picking import DESTINATION, NoEndpointError, RequestShedError, decode_subset, served_endpoint
from .servers import Server, Spoken

_METADATA_NAMESPACE: Final = "envoy.lb"
Prepared: TypeAlias = Sequence[Offer] | Local | CodecError
"""A decoded request, its answer where no model server is needed, or what is wrong with it."""

_EndedBy: TypeAlias = Literal["headers", "body", "trailers"]


class _Phase(Enum):
    """Of the request."""

    AWAIT_HEADERS = auto()
    AWAIT_BODY = auto()
    PASSING = auto()
    """Routed by its headers; the body goes through as it comes."""
    ROUTED = auto()


class Processor:
    """Answers the messages of one stream. `own_id` is unique; `created` is in seconds since the epoch.

    `receive` never raises on what the data plane, the client or the model server sends. After `is_over` nothing more is to be sent, and
    the host may close the stream; until then it must not. With `defers_over`, a request of more bytes than that is not decoded within
    `receive`: `deferred` is true, and the host gives what `prepare` returns (in a thread, if it likes) to `resume` for the answers.
    `on_headers` is called once the request's headers are known, before anything is made of them.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        own_id: str,
        created: int,
        defers_over: int | None = None,
        on_headers: Callable[[Processor], None] | None = None,
    ) -> None:
        self._gateway = gateway
        self._own_id = own_id
        self._created = created
        self._defers_over = defers_over
        self._on_headers = on_headers
        self._request_mode = self._response_mode = FULL_DUPLEX
        self._is_first = True
        self._phase = _Phase.AWAIT_HEADERS
        self._fields: dict[str, str] = {}
        self._is_grpc = False
        self._subset: frozenset[str] | None = None
        self._body: list[bytes] = []
        self._sent = b""
        self._size = 0
        self._ended_by: _EndedBy = "body"
        self._eligible: Sequence[Spoken] = ()
        self._declared = Declared()
        # Until a server is picked, whatever comes as a response is Envoy's own and goes on as it is.
        self._answer: Answer = Untouched(HttpReading(), is_grpc=False)
        self._error: CodecError | None = None
        self._status = 0
        self._response_is_open = self._is_answer_complete = False
        self.bytes_received = 0
        """Of the model server's body."""
        self.deferred = False
        self.is_over = False
        self.mode = ""
        self.plan: Plan | None = None
        """How the request goes on, once it is routed."""
        self.server: Server | None = None
        """The model server that was picked first."""
        self.served = ""
        """The address that the data plane says has answered."""
        self.trace_headers: dict[str, str] = {}
        """What the model server is told of the trace instead of what the client says; for `on_headers` to set."""

    # What happened, for logs and metrics

    @property
    def error(self) -> CodecError | None:
        """Why the request failed, whoever is at fault."""
        return self._error or self._answer.error

    @property
    def status(self) -> int:
        """The HTTP status of the answer; 0 while there is none."""
        return self._status or self._answer.status

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self._answer.usage

    @property
    def bytes_sent(self) -> int:
        """Of the body that the client gets."""
        return self._answer.bytes_sent

    @property
    def frames_received(self) -> int:
        """gRPC messages from the model server."""
        return self._answer.frames_received

    @property
    def has_started(self) -> bool:
        """Whether a byte of the answer's body has gone out."""
        return self._answer.has_started

    @property
    def is_answer_complete(self) -> bool:
        """Whether the answer has been passed on to its end; if the stream ends before, the client has gone, or Envoy has."""
        return self._is_answer_complete or self.is_over or self._answer.goes_on

    @property
    def request_id(self) -> str:
        """The client's own, or ours."""
        return self.plan.request_id if self.plan is not None else self._fields.get("x-request-id", self._own_id)

    @property
    def method(self) -> str:
        """Of the request."""
        return self._fields.get(":method", "")

    @property
    def path(self) -> str:
        """Of the request, without its query."""
        return self._fields.get(":path", "").partition("?")[0]

    @property
    def headers(self) -> dict[str, str]:
        """Of the request, names in lower case."""
        return self._fields

    @property
    def request_bytes(self) -> int:
        """Length of the request's body so far."""
        return self._size

    # The stream

    def receive(self, message: Any) -> Answers:
        """One ProcessingRequest."""
        if self.is_over:  # Envoy may still deliver what it had queued
            return ()
        answer = self._answer
        try:
            if self._response_is_open and message.HasField("response_body"):  # most are
                body = message.response_body
                data, end = body.body, body.end_of_stream
                self.bytes_received += len(data)
                if end:
                    self._end_response()
                answers = answer.body(data, end=end)
            else:
                answers = self._receive(message)
                answer = self._answer
        except CodecError as error:
            return self._refuse(error)
        if answer.is_over:
            self.is_over = True
        return answers

    def prepare(self) -> Prepared:
        """Decode the request. It changes nothing and looks at nothing that changes, so that it may run in a thread."""
        try:
            incoming = self._incoming()
            return answer_locally(incoming, self._eligible, created=self._created) or make_offers(incoming, self._eligible)
        except CodecError as error:
            return error

    def resume(self, prepared: Prepared) -> Answers:
        """Pick a model server, and say what goes to it."""
        self.deferred = False
        try:
            if isinstance(prepared, CodecError):
                raise prepared
            if isinstance(prepared, Local):
                head, body = prepared.outputs[0], prepared.outputs[1]
                assert isinstance(head, ResponseHead)
                assert isinstance(body, BodyChunk)
                return self._locally(body.data, head.headers)
            return self._route(prepared)
        except CodecError as error:
            return self._refuse(error)

    def too_late(self) -> Answers:
        """The host's deadline has passed. Gives the last messages, unless the answer `goes_on`; then the next call does."""
        if self.is_over:
            return ()
        if self._is_answer_complete:  # all is said
            self.is_over = True
            return ()
        if self.plan is not None:
            answers = self._answer.too_late()
            self.is_over = self._answer.is_over
            return answers
        if self._phase is _Phase.ROUTED:
            return self._refuse(UpstreamStatusError(Code.DEADLINE_EXCEEDED, LATE))
        late = RequestError("the request was not complete within the gateway's deadline")
        late.http_status, late.error_type = 408, "RequestTimeoutError"
        return self._refuse(late)

    @property
    def goes_on(self) -> bool:
        """The client has its answer, and the model server goes on: end it by `abort` and give it a moment, then `cut` if it may be."""
        return self._answer.goes_on and not (self._is_answer_complete or self.is_over)

    @property
    def abort(self) -> tuple[str, bytes] | None:
        """Path and message of the call that ends a model server's work on this request; None where there is no such."""
        return self.plan.abort if self.plan is not None else None

    @property
    def may_cut(self) -> bool:
        """Whether `cut` is allowed; else the model server's own end has to come."""
        return self._answer.may_cut

    def cut(self) -> Answers:
        """End an answer whose model server goes on."""
        self.is_over = True
        return self._answer.cut() if isinstance(self._answer, Rewritten) else ()

    def fail(self) -> Answers:
        """A bug was met: an answer that says no more than that, if one can still be given."""
        return () if self.is_over else self._refuse(CodecError("Internal server error"))

    def _receive(self, message: Any) -> Answers:
        kind = message.WhichOneof("request")
        if message.HasField("metadata_context"):
            self._read_metadata(message.metadata_context)
        if kind == "request_headers":
            self._read_headers(message.request_headers.headers)
        if self._is_first:
            self._is_first = False
            self._check_modes(message)
        if kind == "request_headers":
            return self._request_headers(message.request_headers)
        if kind == "request_body":
            return self._request_body(message.request_body)
        if kind == "request_trailers":
            return self._request_trailers()
        return self._response(kind, message) if kind is not None else ()

    def _read_metadata(self, metadata: Any) -> None:
        subset = decode_subset(metadata)
        if subset is not None:
            self._subset = subset
        self.served = served_endpoint(metadata) or self.served

    def _check_modes(self, message: Any) -> None:
        if message.observability_mode:
            raise CodecError("observability_mode is for servers that are not listened to; this one picks and transcodes")
        if not message.HasField("protocol_config"):  # a data plane that does not tell: there is one mode that all have
            return
        config = message.protocol_config
        self._request_mode, self._response_mode = config.request_body_mode, config.response_body_mode
        for direction, mode in (("request", self._request_mode), ("response", self._response_mode)):
            if mode not in (FULL_DUPLEX, BUFFERED):
                name = BODY_MODES.Name(mode) if mode in BODY_MODES.values() else str(mode)
                raise CodecError(f"{direction}_body_mode is {name}; this ext_proc server needs FULL_DUPLEX_STREAMED, or BUFFERED")
        self._answer = Untouched(HttpReading(), is_grpc=False, whole_bodies=self._response_mode == BUFFERED, http_path=self.path)

    # The request

    def _read_headers(self, header_map: Any) -> None:
        if self._phase is not _Phase.AWAIT_HEADERS:
            return
        self._fields = dict(decode_headers(header_map))
        if self._on_headers is not None:
            self._on_headers(self)
        self._is_grpc = is_grpc(self._fields.get("content-type", ""))

    def _request_headers(self, headers: Any) -> Answers:
        if self._phase is not _Phase.AWAIT_HEADERS:
            return ()
        self._phase = _Phase.AWAIT_BODY
        if self._gateway.models is not None and self.method in ("GET", "HEAD"):
            if self.path == models.PATH:
                return self._locally(self._gateway.models())
            if self.path.startswith(models.ENTRY_PREFIX):
                return self._locally(models.encode_model(self._gateway.models(), unquote(self.path.removeprefix(models.ENTRY_PREFIX))))
        # A gRPC call that does not generate is not read, and its request may go on while it is answered.
        if headers.end_of_stream or (self._is_grpc and not self._is_read()):
            self._phase = _Phase.ROUTED if headers.end_of_stream else _Phase.PASSING
            return self._complete("headers")
        return (headers_answer("request"),) if self._request_mode == BUFFERED else ()

    def _is_read(self) -> bool:
        return generates(self.path) or any(one.observer and self.path in one.observer.paths for one in self._gateway.servers())

    def _request_body(self, body: Any) -> Answers:
        if self._phase is _Phase.PASSING:
            if body.end_of_stream:
                self._phase = _Phase.ROUTED
            if self._request_mode == BUFFERED:
                return (buffered_answer("request"),)
            return tuple(streamed_answers("request", body.body, end=body.end_of_stream))
        if self._phase is not _Phase.AWAIT_BODY:  # the end of the body, said twice: Envoy #46237
            return ()
        self._size += len(body.body)
        if self._size > self._gateway.limits.max_request_bytes:
            raise RequestTooLargeError(f"the body is over the limit of {self._gateway.limits.max_request_bytes} bytes")
        if body.body:
            self._body.append(body.body)
        if not body.end_of_stream and self._request_mode != BUFFERED:
            return ()
        self._phase = _Phase.ROUTED
        return self._complete("body")

    def _request_trailers(self) -> Answers:
        phase, self._phase = self._phase, _Phase.ROUTED
        if phase is _Phase.AWAIT_BODY:
            return self._complete("trailers")
        # In mode BUFFERED they come after a body that was whole already.
        return (trailers_answer("request"),) if phase is _Phase.PASSING or self._request_mode == BUFFERED else ()

    def _locally(self, body: bytes, headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),)) -> Answers:
        self.mode, self._status, self.is_over = Mode.LOCAL, 200, True
        told = [(name, value) for name, value in headers if name != "content-length"]  # which Envoy writes
        answer = immediate_answer(200, body, (*told, *encode_answer_headers(self.request_id)), details="gaie_codec: local")
        return (answer,)

    def _complete(self, ended_by: _EndedBy) -> Answers:
        self._ended_by = ended_by
        self._sent = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._eligible = self._find_eligible()
        if self._defers_over is not None and self._size > self._defers_over:
            self.deferred = True
            return ()
        return self.resume(self.prepare())

    def _find_eligible(self) -> Sequence[Spoken]:
        self._declared = self._gateway.declared()
        if self._is_grpc and not self._declared.carries_grpc:
            raise NoEndpointError(f"gRPC does not get to the model servers: {self._declared.reason}")
        return find_eligible(self._gateway, self._fields, self._subset)

    def _incoming(self) -> Incoming:
        return Incoming(
            method=self.method,
            path=self.path,
            headers={**self._fields, **self.trace_headers},
            body=self._sent,
            own_id=self._own_id,
            is_grpc=self._is_grpc,
            transcodes=self._declared.transcodes,
            declared=self._declared.reason,
            forwarded=self._gateway.forwarded,
            timeout_s=self._gateway.timeout_s,
            is_chained=self._gateway.picker is None,
        )

    def _route(self, offers: Sequence[Offer]) -> Answers:
        self.server, self.plan, destination = choose(self._gateway, self._fields, offers)
        self.mode = self.plan.mode
        self._answer = self.plan.answer(self._created, self._response_mode == BUFFERED)
        return self._send(self.plan, destination)

    def _send(self, plan: Plan, destination: str) -> Answers:
        """Headers, then the body, then what ended it: all that was held back."""
        headers = {**self.trace_headers, **dict(plan.set_headers)}
        if destination:
            headers[DESTINATION] = destination
        mutation = encode_mutation(headers.items(), (name for name in plan.remove if name not in headers))
        if self._request_mode == BUFFERED and self._ended_by == "body":
            first = buffered_answer("request", plan.body, mutation, reroute=True)
        else:
            first = headers_answer("request", mutation, reroute=True)
        if destination:
            first.dynamic_metadata.update({_METADATA_NAMESPACE: {DESTINATION: destination}})
        if first.HasField("request_body") or self._ended_by == "headers":
            return (first,)
        body = plan.body if plan.body is not None else self._sent
        rest = streamed_answers("request", body, end=self._ended_by == "body")
        return (first, *rest, trailers_answer("request")) if self._ended_by == "trailers" else (first, *rest)

    # The response

    def _response(self, kind: str, message: Any) -> Answers:
        """All of it but the bodies."""
        if kind == "response_headers":
            if self._response_is_open or self._is_answer_complete:
                return ()
            self._response_is_open = True
            if message.response_headers.end_of_stream:
                self._end_response()
            return self._response_headers(message.response_headers)
        if not self._response_is_open:
            if self._is_answer_complete:  # its end, said twice
                return ()
            raise CodecError(f"{kind} came before response_headers")
        self._end_response()
        return self._answer.trailers(decode_headers(message.response_trailers.trailers))

    def _response_headers(self, headers: Any) -> Answers:
        if self.plan is None:  # what is still to come of the request goes nowhere
            self._phase = _Phase.ROUTED
            self._body.clear()
        fields = decode_headers(headers.headers)
        status = dict(fields).get(":status", "")
        known = len(status) == 3 and status.isascii() and status.isdecimal()
        return self._answer.headers(fields, int(status) if known else 0, end=headers.end_of_stream)

    def _end_response(self) -> None:
        self._response_is_open, self._is_answer_complete = False, True

    def _refuse(self, error: CodecError) -> Answers:
        self.is_over, self._error = True, error
        self._status = 200 if self._is_grpc else error.http_status
        reason = ((DROP_REASON, error.reason),) if isinstance(error, NoEndpointError | RequestShedError) else ()
        if self._is_grpc:
            return (immediate_grpc_error(error, reason),)
        return (immediate_error(error, (*encode_answer_headers(self.request_id), *reason), self.path, flavor=self._gateway.flavor),)
