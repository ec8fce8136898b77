"""grpc-in-grpc-out: what a gRPC call between a client and its model server says, for a host that passes the bytes on untouched.

    observer = Observer("sglang.scheduler", snapshot="smg-0.4.28")
    call = observer.request(path, headers, body)      # call.inference: prompt, ids, limits, stream
    response = call.response()
    response.receive_data(chunk) ...                  # beside passing them on; response.usage, finish_reasons, error

Counts come from all messages, never from the last alone: the same proto is filled with counts per message or so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from . import adapters, snapshots
from ._errors import CodecError
from ._events import BodyEvent, Event, FinishEvent, InferenceRequest, ModelInfo, TokensEvent, Usage
from ._grpc_in import decode_embed_request, decode_request, only_message, parse_message, parse_request
from ._metadata import Headers, as_mapping
from ._reader import CallReader
from ._state import State
from ._tally import Tally
from ._transcoder import Limits
from .adapters.base import Adapter
from .openai import passthrough, passthrough_response
from .openai.endpoint import Asked, ResponseMeta
from .openai.passthrough import PassthroughOptions

if TYPE_CHECKING:
    from .openai.passthrough_response import PassthroughBody, PassthroughStream

_META = ResponseMeta(id="", created=0)
_NO_MODEL = ModelInfo()


class Observer:
    """Reads calls of one dialect at one snapshot. Holds no per-request state; share it between threads.

    `dialect` is a name or an adapter of your own; `snapshot` None is the newest. Raises UsageError.
    """

    def __init__(self, dialect: str | Adapter, *, snapshot: str | None = None, limits: Limits | None = None) -> None:
        self.adapter = dialect if isinstance(dialect, Adapter) else adapters.get(snapshots.load(dialect, snapshot))
        self.limits = limits if limits is not None else Limits()

    @property
    def paths(self) -> tuple[str, ...]:
        """The gRPC paths that generate or embed; other calls have nothing to observe."""
        way, embed = self.adapter.passthrough, self.adapter.embed
        bodies = way.paths.values() if way is not None else ()
        return (*self.adapter.generate_paths, *bodies, *((embed.path,) if embed is not None else ()))

    def request(self, path: str, headers: Headers | Mapping[str, str], body: bytes | Iterable[bytes]) -> ObservedCall:
        """What a call asks for: `body` is framed, whole or in pieces cut anywhere.

        Raises UnsupportedEndpointError for a path that is not in `paths`, MalformedRequestError for what no server would take.
        """
        fields = as_mapping(headers)
        return self.request_message(path, fields, only_message(body, fields, self.limits.max_message_bytes))

    def request_message(self, path: str, headers: Headers | Mapping[str, str], message: bytes) -> ObservedCall:
        """Likewise for one message without its frame."""
        fields = as_mapping(headers)
        embed = self.adapter.embed
        if embed is not None and path == embed.path:
            return ObservedCall(self, path, decode_embed_request(embed, parse_message(self.adapter, path, message), fields), None)
        parsed = parse_request(self.adapter, path, message)
        if path in self.adapter.generate_paths:
            return ObservedCall(self, path, decode_request(self.adapter, path, parsed, fields), None)
        way = self.adapter.passthrough
        assert way is not None
        kind = next(kind for kind, known in way.paths.items() if known == path)
        data, told = way.decode_request(parsed)
        decoded = passthrough.decode_request(kind, data, Asked(request_id="", model=_NO_MODEL), None)
        return ObservedCall(self, path, msgspec.structs.replace(decoded.inference, trace_headers=told), decoded.options)


class ObservedCall:
    """One call as its client made it."""

    __slots__ = ("_observer", "_options", "inference", "path")

    def __init__(self, observer: Observer, path: str, inference: InferenceRequest, options: PassthroughOptions | None) -> None:
        self._observer = observer
        self._options = options
        self.path = path
        self.inference = inference

    def __repr__(self) -> str:
        return f"<ObservedCall {self.inference.request_id} to {self.path}>"

    def response(self) -> ObservedResponse:
        """The reader of the answer."""
        return ObservedResponse(self._observer, self.path, self.inference, self._options)


class ObservedResponse:
    """What the answer to a call says, whatever the partition of its bytes.

    The `receive_*` methods return the events that came, and never raise on what the server sends: after a fault `error` says what it
    was, and nothing more is read. They raise UsageError when called after the end was received. `usage` is exact once the response has
    ended; of a passed-through body it is what the server reports, 0 where it reports nothing.
    """

    __slots__ = ("_body", "_reader", "_tallies", "error")

    def __init__(self, observer: Observer, path: str, request: InferenceRequest, options: PassthroughOptions | None) -> None:
        adapter = observer.adapter
        n = request.sampling.n
        self.error: CodecError | None = None
        self._reader = CallReader(adapter, path, choices=n, is_streamed=request.stream, max_message_bytes=observer.limits.max_message_bytes)
        self._tallies = [Tally(index, adapter.counts) for index in range(n)]
        self._body: PassthroughStream | PassthroughBody | None = (
            None if options is None else passthrough_response.make_encoder(options, _META)
        )

    @property
    def state(self) -> State:
        """Where the response is."""
        return self._reader.state

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to learn."""
        return self._reader.state in (State.CLOSED, State.ERROR)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        if self._body is not None:
            return self._body.reported_usage or Usage()
        reader = self._reader
        return Usage(
            prompt_tokens=reader.prompt_tokens,
            completion_tokens=sum(tally.completion_tokens for tally in self._tallies),
            cached_tokens=reader.cached_tokens,
            reasoning_tokens=reader.reasoning_tokens,
        )

    @property
    def finish_reasons(self) -> dict[int, str]:
        """How each choice that has finished did, by its index."""
        if self._body is not None:
            return dict(self._body.finish_reasons)
        return {tally.index: tally.finish_reason for tally in self._tallies if tally.finish_reason is not None}

    @property
    def frames_received(self) -> int:
        """Frames that `receive_data` has decoded."""
        return self._reader.frames.count

    def receive_headers(self, headers: Headers | Mapping[str, str] = (), *, status: int = 200) -> Sequence[Event]:
        """The response headers, `status` being the HTTP status."""
        return self._receive(lambda _: self._reader.receive_headers(headers, status))

    def receive_data(self, data: bytes) -> Sequence[Event]:
        """Bytes of the response body, cut anywhere."""

        def read(events: list[Event]) -> None:
            for payload in self._reader.receive_data(data):
                self._message(payload, events)

        return self._receive(read)

    def receive_message(self, message: bytes) -> Sequence[Event]:
        """One message without its frame."""
        return self._receive(lambda events: self._message(message, events))

    def receive_trailers(self, trailers: Headers | Mapping[str, str]) -> Sequence[Event]:
        """The trailers, which end the response."""
        return self._receive(lambda _: self._reader.receive_trailers(trailers), is_last=True)

    def receive_status(self, code: int, detail: str = "") -> Sequence[Event]:
        """The end of the response, for hosts whose gRPC library decoded the trailers."""
        return self._receive(lambda _: self._reader.receive_status(code, detail), is_last=True)

    def receive_eof(self) -> Sequence[Event]:
        """The connection or stream ended without trailers, or the client left."""
        return self._receive(lambda _: self._reader.receive_eof(), is_last=True)

    def _receive(self, read: Callable[[list[Event]], None], *, is_last: bool = False) -> Sequence[Event]:
        self._reader.check_open()
        self._reader.eof = is_last
        events: list[Event] = []
        if self.error is None:
            try:
                read(events)
            except CodecError as error:
                self.error = error
                self._reader.fail(error)
        return events

    def _message(self, payload: bytes, events: list[Event]) -> None:
        for event in self._reader.receive_message(payload):
            events.append(event)
            place = 0
            if isinstance(event, TokensEvent | FinishEvent):
                place = self._reader.place(event)
                tally = self._tallies[place]
                tally.take(event)
                if isinstance(event, FinishEvent):
                    tally.finished, tally.finish_reason = True, event.finish_reason
            elif isinstance(event, BodyEvent) and self._body is not None:
                self._body.body(event)
                if event.is_last:
                    self._body.check_complete()
            self._reader.accept(event, place)
