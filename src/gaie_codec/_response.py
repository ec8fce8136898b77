"""gRPC responses -> one HTTP answer: the second half of the data path, from bytes cut anywhere.

Messages become events (`_reader`), events the deltas of choices, and deltas chunks or the parts of one JSON body. A request that took
several calls has one answer all the same: the choices of each call have their places in it. Whatever the servers do wrong ends as an
answer that a client understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from ._choices import Choice, Delta
from ._errors import CodecError, UsageError
from ._events import BodyEvent, EmbeddingEvent, Event, FinishEvent, TokensEvent, Usage
from ._metadata import Headers
from ._outputs import BodyChunk, CancelCall, EndOfBody, Output, ResponseHead, encode_error_response, encode_whole_response
from ._parts import PartsStage
from ._per_token import Plain, parsed, plain_nothing, plain_text, plain_tokens
from ._prompt_texts import PromptTexts
from ._reader import CallReader
from ._state import State
from ._text_choice import TextChoice

if TYPE_CHECKING:
    from ._calls import Call
    from .openai.endpoint import ResponseEncoder, VectorEncoder

_STREAMING: Final = State.STREAMING  # a global costs half of the enum's attribute, per token


class _Upstream:
    """One of the calls: its reader, and those of the answer's choices that it brings."""

    __slots__ = ("choices", "is_cancelled", "number", "plain", "prompt", "reader")

    def __init__(self, number: int, reader: CallReader, choices: list[Choice] | list[TextChoice], prompt: int, plain: Plain) -> None:
        self.number = number
        self.is_cancelled = False
        self.reader = reader
        self.choices = choices
        self.prompt = prompt  # calls for choices of the same prompt share its number
        self.plain = plain


class Response:
    """gRPC responses -> one HTTP answer, from bytes cut anywhere.

    The `receive_*` methods return what to send and never raise on what a server sends: a broken upstream becomes the right HTTP
    answer, and `error` says what happened. They raise UsageError when called after the end of that response was received. `call` is the
    place in `Call.calls` of the call that the bytes belong to. `ended` is true once EndOfBody was returned, `flavor` the transcoder's.
    """

    __slots__ = (
        "_choices",
        "_encoder",
        "_head_sent",
        "_http_path",
        "_is_open",
        "_prompt_texts",
        "_prompt_token_ids",
        "_stages",
        "_upstreams",
        "_wants_usage",
        "ended",
        "error",
        "flavor",
    )

    def __init__(self, call: Call, encoder: ResponseEncoder) -> None:
        transcoder = call.transcoder
        adapter = transcoder.adapter
        self.error: CodecError | None = None
        self.ended = False
        self._http_path = call.http_path
        self._head_sent = self._is_open = False
        self.flavor = transcoder.flavor.name
        is_plain = not encoder.is_detailed and call.has_choices
        self._encoder = encoder
        self._stages = [] if call.output is None else [self._stage(call, index) for index in range(sum(one.choices for one in call.calls))]
        takes_ids = any(stage.takes_ids for stage in self._stages)
        encode = parsed(self._stages, encoder) if self._stages else encoder.text
        self._choices: list[Choice | TextChoice] = []
        self._prompt_texts: dict[int, PromptTexts] = {}
        self._upstreams: list[_Upstream] = []
        for number, upstream in enumerate(call.calls):
            reader = CallReader(
                adapter,
                upstream.path,
                choices=upstream.choices,
                is_streamed=upstream.inference.stream,
                max_message_bytes=transcoder.limits.max_message_bytes,
            )
            if upstream.inference.sampling.prompt_logprobs is not None and transcoder.tokenizer is not None:
                texts = PromptTexts(upstream.inference, reader, transcoder.tokenizer)
                self._prompt_texts |= {upstream.first_index + place: texts for place in range(upstream.choices)}
            choices: Any = [self._choice(call, upstream, place) for place in range(upstream.choices)] if call.has_choices else []
            self._choices += choices
            plain: Plain = plain_nothing
            stages = self._stages[upstream.first_index : upstream.first_index + upstream.choices]
            if upstream.choices > 1 and adapter.convention.names_choices:
                pass  # which one a message is about takes a look at all of it
            elif is_plain and adapter.decode_tokens is not None and not takes_ids:
                plain = plain_tokens(reader, choices, encode, upstream.first_index, stages)
            elif is_plain and adapter.decode_text is not None and not any(stage.needs_ids for stage in stages):
                plain = plain_text(reader, choices, encode, upstream.first_index, stages)
            self._upstreams.append(_Upstream(number, reader, choices, upstream.prompt, plain))
        self._wants_usage = encoder.wants_usage
        self._prompt_token_ids = [prompt.prompt_token_ids for prompt in call.prompts]

    def _stage(self, call: Call, index: int) -> PartsStage:
        transcoder = call.transcoder
        assert call.output is not None
        return PartsStage(
            index,
            call.output,
            request_id=call.id,
            tokenizer=transcoder.tokenizer,
            eos_token_ids=transcoder.eos_token_ids,
            has_stops=bool(call.inference.sampling.stop),
        )

    def _choice(self, call: Call, upstream: Any, place: int) -> Choice | TextChoice:
        transcoder, request = call.transcoder, upstream.inference
        adapter = transcoder.adapter
        sends_text = adapter.sends_text or (request.prompt_text is not None and adapter.answers_text_with_text)
        kind: Any = TextChoice if sends_text else Choice
        choice: Choice | TextChoice = kind(
            upstream.first_index + place,
            request,
            transcoder.tokenizer,
            adapter,
            eos_token_ids=transcoder.eos_token_ids,
            stop_holdback=transcoder.stop_holdback,
        )
        if self._encoder.shows_ids:
            choice.show_ids()
        return choice

    def __repr__(self) -> str:
        states = ", ".join(upstream.reader.state.name for upstream in self._upstreams)
        return f"<Response {states}, {sum(not choice.finished for choice in self._choices)} of {len(self._choices)} choices unfinished>"

    @property
    def state(self) -> State:
        """Where the response is: of several calls that which is furthest behind."""
        states = [upstream.reader.state for upstream in self._upstreams]
        if self.ended:  # one call's end may be that of all
            return State.ERROR if State.ERROR in states else State.CLOSED
        return min(states, key=lambda state: state.value)

    @property
    def usage(self) -> Usage:
        """Tokens so far; exact once the response has ended."""
        passed_through = self._encoder.reported_usage
        if passed_through is not None:
            return passed_through
        return self._usage_with(sum(choice.completion_tokens for choice in self._choices))

    @property
    def frames_received(self) -> int:
        """Frames that `receive_data` has decoded."""
        return sum(upstream.reader.frames.count for upstream in self._upstreams)

    def receive_headers(self, headers: Headers | Mapping[str, str] = (), *, status: int = 200, call: int = 0) -> Sequence[Output]:
        """The response headers, `status` being the HTTP status. A grpc-status among them may be a trailers-only answer."""
        upstream = self._upstream(call)
        upstream.reader.check_open()
        if self.ended:
            return ()
        try:
            upstream.reader.receive_headers(headers, status)
        except CodecError as error:
            return self._fail(upstream, error, [])
        return ()

    def receive_data(self, data: bytes, *, call: int = 0) -> Sequence[Output]:
        """Bytes of the response body, cut anywhere."""
        upstream = self._upstream(call) if call else self._upstreams[0]
        reader = upstream.reader
        payload = reader.frames.receive_whole(data)
        if payload is not None:
            if reader.state is _STREAMING:
                plain = upstream.plain(payload)
                if plain is not None:
                    return (BodyChunk(plain),) if plain else ()
            return self.receive_message(payload, call=call)
        if reader.eof:
            reader.check_open()
        if self.ended:
            return ()
        parts: list[bytes] = []
        try:
            for payload in reader.receive_data(data):
                plain = upstream.plain(payload) if reader.state is _STREAMING else None
                if plain is None:
                    self._message(upstream, payload, parts)
                else:
                    parts.append(plain)
        except CodecError as error:
            return self._fail(upstream, error, parts)
        return self._send(upstream, parts)

    def receive_message(self, message: bytes, *, call: int = 0) -> Sequence[Output]:
        """One message without its frame, for hosts whose gRPC library took the frames away."""
        upstream = self._upstream(call) if call else self._upstreams[0]
        reader = upstream.reader
        if reader.state is _STREAMING:
            plain = upstream.plain(message)
            if plain is not None:
                return (BodyChunk(plain),) if plain else ()
        if reader.eof:
            reader.check_open()
        if self.ended:
            return ()
        parts: list[bytes] = []
        try:
            self._message(upstream, message, parts)
        except CodecError as error:
            return self._fail(upstream, error, parts)
        return self._send(upstream, parts)

    def receive_trailers(self, trailers: Headers | Mapping[str, str], *, call: int = 0) -> Sequence[Output]:
        """The trailers, which end the response."""
        return self._close(call, lambda reader: reader.receive_trailers(trailers))

    def receive_status(self, code: int, detail: str = "", *, call: int = 0) -> Sequence[Output]:
        """The end of the response, for hosts whose gRPC library decoded the trailers."""
        return self._close(call, lambda reader: reader.receive_status(code, detail))

    def receive_eof(self, *, call: int = 0) -> Sequence[Output]:
        """The connection or stream ended without trailers."""
        return self._close(call, lambda reader: reader.receive_eof())

    def _upstream(self, call: int) -> _Upstream:
        if not 0 <= call < len(self._upstreams):
            raise UsageError(f"call {call} of {len(self._upstreams)}")
        return self._upstreams[call]

    def _message(self, upstream: _Upstream, payload: bytes, parts: list[bytes]) -> None:
        for event in upstream.reader.receive_message(payload):
            self._event(upstream, event, parts)

    def _event(self, upstream: _Upstream, event: Event, parts: list[bytes]) -> None:
        reader = upstream.reader
        if isinstance(event, TokensEvent):
            place = reader.place(event)
            choice = upstream.choices[place]
            delta = choice.receive_tokens(event)
            reader.accept(event, place)
            if choice.ended_here:
                reader.end_choice(place)
        elif isinstance(event, FinishEvent):
            place = reader.place(event)
            choice = upstream.choices[place]
            delta = choice.receive_finish(event)
            reader.accept(event, place)
        elif isinstance(event, EmbeddingEvent):
            reader.accept(event)
            cast("VectorEncoder", self._encoder).embedding(upstream.prompt, event)
            return
        else:
            piece = self._encoder.body(event) if isinstance(event, BodyEvent) else b""
            reader.accept(event)
            parts.append(piece)
            if isinstance(event, BodyEvent) and event.is_last:
                self._encoder.check_complete()
            return
        if not self._is_open:
            self._is_open = True
            parts.append(self._encoder.open(range(len(self._choices)), self._prompt_token_ids, self._usage_with(0)))
        if delta is not None:
            self._tell(choice, delta, parts)

    def _tell(self, choice: Choice | TextChoice, delta: Delta, parts: list[bytes]) -> None:
        deltas = self._stages[delta.index].receive(delta) if self._stages else (delta,)
        if self._prompt_texts:
            deltas = [self._prompt_texts[one.index].attach(one) for one in deltas]
        usage = self._usage_with(choice.completion_tokens) if self._wants_usage else None
        parts += [self._encoder.delta(one, usage) for one in deltas]

    def _usage_with(self, completion_tokens: int) -> Usage:
        """Each prompt counts once, however many calls were made for its choices. Until a server tells, it is as long as we made it."""
        counted = sum(stage.reasoning_tokens for stage in self._stages)
        if len(self._upstreams) == 1:
            reader = self._upstreams[0].reader
            return Usage(
                prompt_tokens=reader.prompt_tokens or len(self._prompt_token_ids[0]),
                completion_tokens=completion_tokens,
                cached_tokens=reader.cached_tokens,
                reasoning_tokens=reader.reasoning_tokens or counted,
            )
        told = [(0, 0)] * len(self._prompt_token_ids)
        for upstream in self._upstreams:
            known, cached = told[upstream.prompt]
            told[upstream.prompt] = max(known, upstream.reader.prompt_tokens), max(cached, upstream.reader.cached_tokens)
        return Usage(
            prompt_tokens=sum(known or len(ids) for (known, _), ids in zip(told, self._prompt_token_ids, strict=True)),
            completion_tokens=completion_tokens,
            cached_tokens=sum(cached for _, cached in told),
            reasoning_tokens=sum(upstream.reader.reasoning_tokens for upstream in self._upstreams) or counted,
        )

    def _close(self, call: int, receive: Any) -> Sequence[Output]:
        upstream = self._upstream(call)
        reader = upstream.reader
        reader.check_open()
        reader.eof = True
        if self.ended:
            return ()
        try:
            receive(reader)
        except CodecError as error:
            return self._fail(upstream, error, [])
        return self._send(upstream, [])

    def _send(self, upstream: _Upstream, parts: list[bytes]) -> Sequence[Output]:
        """What goes out after `parts`; the end too, when all calls are closed."""
        is_closed = upstream.reader.state is State.CLOSED
        if is_closed and all(other.reader.state is State.CLOSED for other in reversed(self._upstreams)):  # which mostly end in order
            parts.append(self._encoder.close(self.usage))
            return self._emit(parts, last=True)
        outputs = self._emit(parts) if parts else ()
        if is_closed and not upstream.reader.eof and not upstream.is_cancelled:
            upstream.is_cancelled = True
            return (*outputs, CancelCall(upstream.number))
        return outputs

    def _emit(self, parts: list[bytes], *, last: bool = False) -> Sequence[Output]:
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._head_sent and not last:
            return (BodyChunk(data),) if data else ()
        if not self._encoder.streams:
            if not last:
                return ()
            self.ended = True
            headers: tuple[tuple[str, str], ...] = getattr(self._encoder, "headers", ())  # of a VectorEncoder
            return encode_whole_response(data, self._encoder.content_type, headers=headers)
        outputs: list[Output] = []
        if not self._head_sent and (data or last or self._is_open):
            self._head_sent = True
            outputs.append(ResponseHead(200, (("content-type", self._encoder.content_type), ("cache-control", "no-cache"))))
        if data:
            outputs.append(BodyChunk(data))
        if last:
            self.ended = True
            outputs.append(EndOfBody())
        return outputs

    def _fail(self, upstream: _Upstream, error: CodecError, parts: list[bytes]) -> Sequence[Output]:
        """End the answer with `error`: after the messages that came before it, in the form that the client can still be told."""
        if self.ended:
            return ()
        upstream.reader.fail(error)
        self.error = error
        for other in self._upstreams:  # they may still bring tokens, which nobody waits for
            other.plain = plain_nothing
        if not self._encoder.streams or not (self._head_sent or any(parts)):
            self.ended = True
            return encode_error_response(error, self._http_path, flavor=self.flavor)
        # Text that waited for its choice to end, or could still have become a stop string, was generated: the client gets it.
        for choice in self._choices:
            delta: Delta | None = choice.abandon()
            if delta is not None:
                self._tell(choice, delta, parts)
            if self._stages and not choice.finished:
                parts += [self._encoder.delta(one, None) for one in self._stages[choice.index].abandon()]
        parts.append(self._encoder.error(error))
        return self._emit(parts, last=True)
