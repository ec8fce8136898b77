"""gRPC in one dialect -> gRPC out in another: a client of one model server talks to a different one.

It falls out of the neutral vocabulary: requests are decoded by one adapter and encoded by the other, answers the other way round, told
as a server of the client's dialect tells them. A field that the way through the vocabulary would lose is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from . import adapters, snapshots
from ._calls import UpstreamCall, check_calls, plan, plan_embeddings
from ._choices import Choice
from ._conventions import Teller
from ._errors import (
    CodecError,
    MalformedMessageError,
    MalformedRequestError,
    RequestError,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    UsageError,
)
from ._events import EmbeddingEvent, Event, FinishEvent, InferenceRequest, ModelInfo, TokensEvent, Usage
from ._fit import fit, fit_embedding
from ._framing import encode_frame
from ._grpc_in import decode_embed_request, decode_request, only_message, parse_message, parse_request, unread
from ._metadata import Headers, as_mapping, encode_grpc_message
from ._outputs import BodyChunk, CancelCall, EndOfBody, ResponseHead
from ._reader import CallReader
from ._state import State
from ._tally import Tally
from ._text_choice import TextChoice
from ._transcoder import Limits
from .adapters.base import Adapter, EmbedCoder

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from .text import Tokenizer

_HEAD: Final = ResponseHead(200, (("content-type", "application/grpc"),))


class Trailers(msgspec.Struct, frozen=True):
    """The trailers to send: grpc-status, and grpc-message where there is one."""

    headers: tuple[tuple[str, str], ...]


GrpcOutput: TypeAlias = ResponseHead | BodyChunk | Trailers | EndOfBody | CancelCall


class Bridge:
    """Calls of `inbound` clients answered by an `outbound` server. Holds no per-request state.

    Both are names of dialects or adapters; of a name the snapshot may be given, the newest is the default. `tokenizer` is needed where
    clients expect text of a server that sends ids, or where the server knows no stop strings. Raises UsageError.
    """

    def __init__(
        self,
        inbound: str | Adapter,
        outbound: str | Adapter,
        *,
        inbound_snapshot: str | None = None,
        outbound_snapshot: str | None = None,
        tokenizer: Tokenizer | None = None,
        model: ModelInfo | None = None,
        limits: Limits | None = None,
        unsupported: Literal["reject", "drop"] = "reject",
    ) -> None:
        self.inbound = _adapter(inbound, inbound_snapshot)
        self.outbound = _adapter(outbound, outbound_snapshot)
        if self.inbound.sends_text and not self.outbound.sends_text and tokenizer is None:
            raise UsageError(f"{self.inbound.dialect} clients expect text, and {self.outbound.dialect} sends ids: a tokenizer is needed")
        self.tokenizer = tokenizer
        self.limits = limits if limits is not None else Limits()
        self.unsupported = unsupported
        known = model.eos_token_ids if model is not None else ()
        self.eos_token_ids = (tokenizer.eos_token_ids if tokenizer is not None else frozenset()).union(known)

    def request(self, path: str, headers: Headers | Mapping[str, str], body: bytes) -> BridgedCall:
        """Decode a framed request and encode the calls to make of it. Raises RequestError; `encode_grpc_error` answers with it."""
        fields = as_mapping(headers)
        return self.request_message(path, fields, only_message(body, fields, self.limits.max_message_bytes))

    def request_message(self, path: str, headers: Headers | Mapping[str, str], message: bytes) -> BridgedCall:
        """Likewise for one message without its frame."""
        fields = as_mapping(headers)
        embed = self.inbound.embed
        if embed is not None and path == embed.path:
            return self._embed(embed, fields, parse_message(self.inbound, path, message))
        parsed = parse_request(self.inbound, path, message)
        if path not in self.inbound.generate_paths:
            raise MalformedRequestError(f"{path} passes OpenAI JSON through; a Transcoder answers that")
        dropped = self._dropped(self.inbound, parsed)
        asked = decode_request(self.inbound, path, parsed, fields)
        fitted, lost = fit(self.outbound, self._adapted(asked), drops=self.unsupported == "drop")
        if fitted.sampling.stop and not self.outbound.ends_at_stop_strings and self.tokenizer is None:
            raise UnsupportedFieldError(f"`stop` needs a tokenizer in front of {self.outbound.dialect}", param="stop")
        check_calls(self.outbound, [fitted], self.limits.max_calls)
        return BridgedCall(self, path, asked, plan(self.outbound, [fitted]), dropped + lost)

    def _embed(self, embed: EmbedCoder, headers: Mapping[str, str], parsed: Any) -> BridgedCall:
        if self.outbound.embed is None:
            raise UnsupportedEndpointError(f"{self.outbound.dialect} has no method that embeds")
        dropped = self._dropped(embed, parsed)
        asked = decode_embed_request(embed, parsed, headers)
        fitted, lost = fit_embedding(self.outbound, asked, drops=self.unsupported == "drop")
        return BridgedCall(self, embed.path, asked, plan_embeddings(self.outbound, [fitted]), dropped + lost)

    def _dropped(self, coder: Adapter | EmbedCoder, parsed: Any) -> tuple[str, ...]:
        """What the way through the vocabulary loses. Raises UnsupportedFieldError unless that is allowed."""
        lost = tuple(unread(coder, parsed))
        if lost and self.unsupported == "reject":
            raise UnsupportedFieldError(f"{lost[0]} cannot be sent to a server of {self.outbound.dialect}", param=lost[0])
        return lost

    def _adapted(self, request: InferenceRequest) -> InferenceRequest:
        wants_ids = not self.inbound.sends_text or request.return_token_ids
        if wants_ids and request.prompt_text is not None and self.outbound.answers_text_with_text:
            raise UnsupportedFieldError(f"a text prompt brings no token ids from {self.outbound.dialect}", param="prompt_text")
        # The answer is counted by its ids, also where the client gets text alone.
        return msgspec.structs.replace(request, return_token_ids=True)


class BridgedCall:
    """All calls to make for one request of a client, and how to answer it."""

    __slots__ = ("_bridge", "calls", "dropped", "inference", "path")

    def __init__(
        self, bridge: Bridge, path: str, inference: InferenceRequest, calls: tuple[UpstreamCall, ...], dropped: tuple[str, ...]
    ) -> None:
        self._bridge = bridge
        self.path = path
        self.inference = inference
        self.calls = calls
        self.dropped = dropped

    def response(self, *, framed: bool = True) -> BridgedResponse:
        """The maker of the answer. `framed` False gives bare messages, for hosts whose gRPC library adds the frames."""
        return BridgedResponse(self._bridge, self, framed=framed)


class _Progress:
    """One choice of the answer: its ids by the tally, its text by the text stage where text is expected."""

    def __init__(self, bridge: Bridge, index: int, request: InferenceRequest) -> None:
        out = bridge.outbound
        self.tally = Tally(index, out.counts)
        self.text: Choice | TextChoice | None = None
        plain = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, logprobs=None))
        if out.sends_text or (request.prompt_text is not None and out.answers_text_with_text):
            self.text = TextChoice(index, plain, bridge.tokenizer, out, eos_token_ids=bridge.eos_token_ids)
        elif bridge.tokenizer is not None:
            self.text = Choice(index, plain, bridge.tokenizer, out, eos_token_ids=bridge.eos_token_ids)

    def receive(self, event: TokensEvent | FinishEvent, reader: CallReader) -> tuple[TokensEvent, FinishEvent | None]:
        """What is new, and the end if this is it. Of the prompt both say what `reader` has learned so far."""
        before = self.tally.completion_tokens
        token_ids, entries = self.tally.take(event)
        delta = None
        prompt: dict[str, Any] = {
            "prompt_tokens": reader.prompt_tokens,
            "cached_tokens": reader.cached_tokens,
            "reasoning_tokens": event.reasoning_tokens,
            "prompt_logprobs": reader.prompt_logprobs,
        }
        text = self.text
        if text is not None:
            delta = text.receive_finish(event) if isinstance(event, FinishEvent) else text.receive_tokens(event)
            token_ids = token_ids[: max(0, text.completion_tokens - before)] if text.ended_here else token_ids
        gained = TokensEvent(
            index=self.tally.index,
            token_ids=list(token_ids),
            text=delta.text if delta is not None else "",
            logprobs=tuple(entries[: len(token_ids)]),
            **prompt,
        )
        reason = delta.finish_reason if delta is not None else event.finish_reason if isinstance(event, FinishEvent) else None
        if reason is None or self.tally.finished:
            return gained, None
        self.tally.finished = True
        ended = event if isinstance(event, FinishEvent) else FinishEvent()
        matched = delta.stop_reason if delta is not None else ended.matched_stop
        return gained, FinishEvent(
            index=self.tally.index,
            finish_reason=reason,
            matched_stop=matched,
            kv_transfer_params=ended.kv_transfer_params,
            **prompt,
        )


class BridgedResponse:
    """Answers of the outbound server -> the answer that the client expects. The contract is that of `Response`, with `Trailers`."""

    __slots__ = ("_adapter", "_calls", "_cancelled", "_choices", "_framed", "_head_sent", "_readers", "_teller", "ended", "error")

    def __init__(self, bridge: Bridge, call: BridgedCall, *, framed: bool) -> None:
        self._adapter = bridge.inbound
        self._framed = framed
        self._calls = call.calls
        self._head_sent = False
        self._cancelled: set[int] = set()
        self.ended = False
        self.error: CodecError | None = None
        self._teller = Teller(bridge.inbound.convention, call.inference, sends_text=bridge.inbound.sends_text)
        self._readers = [
            CallReader(
                bridge.outbound,
                one.path,
                choices=one.choices,
                is_streamed=one.inference.stream,
                max_message_bytes=bridge.limits.max_message_bytes,
            )
            for one in call.calls
        ]
        self._choices = [[_Progress(bridge, one.first_index + place, one.inference) for place in range(one.choices)] for one in call.calls]

    @property
    def usage(self) -> Usage:
        """Tokens so far; exact once the response has ended. The calls share one prompt."""
        return Usage(
            prompt_tokens=max(reader.prompt_tokens for reader in self._readers),
            completion_tokens=sum(choice.tally.completion_tokens for choices in self._choices for choice in choices),
            cached_tokens=max(reader.cached_tokens for reader in self._readers),
            reasoning_tokens=sum(reader.reasoning_tokens for reader in self._readers),
        )

    @property
    def frames_received(self) -> int:
        """Frames that `receive_data` has decoded."""
        return sum(reader.frames.count for reader in self._readers)

    def receive_headers(self, headers: Headers | Mapping[str, str] = (), *, status: int = 200, call: int = 0) -> Sequence[GrpcOutput]:
        """The response headers of one call."""
        return self._receive(call, lambda _: self._readers[call].receive_headers(headers, status))

    def receive_data(self, data: bytes, *, call: int = 0) -> Sequence[GrpcOutput]:
        """Bytes of the response body of one call, cut anywhere."""

        def read(parts: list[bytes]) -> None:
            for payload in self._readers[call].receive_data(data):
                self._message(call, payload, parts)

        return self._receive(call, read)

    def receive_message(self, message: bytes, *, call: int = 0) -> Sequence[GrpcOutput]:
        """One message of one call, without its frame."""
        return self._receive(call, lambda parts: self._message(call, message, parts))

    def receive_trailers(self, trailers: Headers | Mapping[str, str], *, call: int = 0) -> Sequence[GrpcOutput]:
        """The trailers of one call."""
        return self._receive(call, lambda _: self._readers[call].receive_trailers(trailers), is_last=True)

    def receive_status(self, code: int, detail: str = "", *, call: int = 0) -> Sequence[GrpcOutput]:
        """The end of one call, for hosts whose gRPC library decoded the trailers."""
        return self._receive(call, lambda _: self._readers[call].receive_status(code, detail), is_last=True)

    def receive_eof(self, *, call: int = 0) -> Sequence[GrpcOutput]:
        """The connection of one call ended without trailers."""
        return self._receive(call, lambda _: self._readers[call].receive_eof(), is_last=True)

    def _receive(self, call: int, read: Callable[[list[bytes]], None], *, is_last: bool = False) -> Sequence[GrpcOutput]:
        if not 0 <= call < len(self._readers):
            raise UsageError(f"call {call} of {len(self._readers)}")
        reader = self._readers[call]
        reader.check_open()
        reader.eof = is_last
        if self.ended:
            return ()
        parts: list[bytes] = []
        outputs: list[GrpcOutput] = []
        try:
            read(parts)
        except CodecError as error:
            self.error = error
            reader.fail(error)
        if parts:
            outputs += self._head()
            outputs.append(BodyChunk(b"".join(map(encode_frame, parts)) if self._framed else parts[0]))
            if not self._framed:
                outputs += [BodyChunk(part) for part in parts[1:]]
        if self.error is not None:
            return [*outputs, *self._head(), Trailers(_status(self.error)), *self._end()]
        if reader.state is State.CLOSED:
            if all(other.state is State.CLOSED for other in self._readers):
                return [*outputs, *self._head(), Trailers((("grpc-status", "0"),)), *self._end()]
            if not reader.eof and call not in self._cancelled:
                self._cancelled.add(call)
                outputs.append(CancelCall(call))
        return outputs

    def _head(self) -> list[GrpcOutput]:
        is_first, self._head_sent = not self._head_sent, True
        return [_HEAD] if is_first else []

    def _end(self) -> list[GrpcOutput]:
        self.ended = True
        return [EndOfBody()]

    def _message(self, call: int, payload: bytes, parts: list[bytes]) -> None:
        reader = self._readers[call]
        for event in reader.receive_message(payload):
            if not isinstance(event, TokensEvent | FinishEvent):
                reader.accept(event)
                if isinstance(event, EmbeddingEvent):
                    assert self._adapter.embed is not None
                    parts.append(self._encode(self._adapter.embed.encode_response, event))
                continue
            place = reader.place(event)
            choice = self._choices[call][place]
            reader.accept(event, place)
            gained, ended = choice.receive(event, reader)
            told: list[Event] = []
            if ended is not None:
                has_gained = gained.token_ids or gained.text
                told += self._teller.finish(ended, last=gained if has_gained else None)
                if isinstance(event, TokensEvent):
                    reader.end_choice(place)
            elif gained.token_ids or gained.text:
                told += self._teller.gain(gained)
            parts += [self._encode(self._adapter.encode_response, one) for one in told]

    def _encode(self, encode: Callable[[Any], Message], event: Event) -> bytes:
        try:
            return bytes(encode(event).SerializeToString(deterministic=True))
        except (ValueError, TypeError):  # a number that the client's wire has no room for
            raise MalformedMessageError(f"what the server sent cannot be told to a client of {self._adapter.dialect}") from None


def encode_grpc_error(error: RequestError) -> tuple[GrpcOutput, ...]:
    """A whole gRPC answer, trailers only, that reports an error which `Bridge.request` raised."""
    return ResponseHead(200, (*_HEAD.headers, *_status(error))), EndOfBody()


def _status(error: CodecError) -> tuple[tuple[str, str], ...]:
    return (("grpc-status", str(int(error.code))), ("grpc-message", encode_grpc_message(error.message)))


def _adapter(dialect: str | Adapter, snapshot: str | None) -> Adapter:
    return dialect if isinstance(dialect, Adapter) else adapters.get(snapshots.load(dialect, snapshot))
