"""What model servers send, what networks and faults make of it, and what a client then sees.

A `Script` is what a server generates, free of any wire. `events_of` tells it in one `Convention`, as one server of token ids or another
would; `told` tells it as servers of one adapter's dialect do, for each of the calls that a request takes. `frames_of` puts the events on
the wire with an adapter; `partitions` and `damaged` do to bytes what happens to bytes. `answer_to` plays streams into a `Call` and holds
the answer against the contract that every answer keeps. Nothing here knows a particular dialect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from gaie_codec import (
    BodyChunk,
    Call,
    CancelCall,
    CodecError,
    Constraint,
    EndOfBody,
    FinishEvent,
    InferenceRequest,
    PromptEvent,
    ResponseHead,
    SSEDecoder,
    State,
    TokenLogprob,
    TokensEvent,
    UpstreamCall,
    Usage,
    encode_frame,
)
from gaie_codec._conventions import Teller
from gaie_codec.adapters import base
from gaie_codec.adapters.base import Adapter
from gaie_codec.adapters.wire import regex_of_choices
from gaie_codec.text import Tokenizer

Event = TokensEvent | FinishEvent | PromptEvent

OK_TRAILERS = (("grpc-status", "0"),)


# What a server generates


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a choice: the tokens it gains, and their log probabilities where the script has any."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class ScriptedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """All that one choice generates, and how it ends."""

    pieces: tuple[Piece, ...]
    finish_reason: str = "stop"
    matched_stop: str | int | None = None

    @property
    def token_ids(self) -> list[int]:
        """Every token of the choice."""
        return [token_id for piece in self.pieces for token_id in piece.token_ids]


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """All that a request generates. `turns` says which choice takes the next step, when several interleave."""

    choices: tuple[ScriptedChoice, ...]
    turns: tuple[int, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Convention(msgspec.Struct, frozen=True, kw_only=True):
    """How a server tells a script: what `completion_tokens` counts, and what the finish repeats.

    "unary" has no chunks at all: the finish brings everything. "tail" leaves the last piece out of the chunks and repeats the rest.
    """

    counts: Literal["delta", "cumulative"] = "delta"
    repeats: Literal["last", "all", "nothing", "tail", "unary"] = "last"


CONVENTIONS = tuple(
    Convention(counts=counts, repeats=repeats)
    for counts in ("delta", "cumulative")
    for repeats in ("last", "all", "nothing", "tail", "unary")
)
"""Those of the servers there are, and their neighbours."""


@st.composite
def scripts(
    draw: DrawFn,
    *,
    token_ids: SearchStrategy[int],
    n: int = 1,
    logprobs: bool = False,
    finish_reasons: Sequence[str] = ("stop", "length"),
    matched_stops: Sequence[str | int] = (),
    max_pieces: int = 6,
) -> Script:
    """Scripts with `n` choices of up to `max_pieces` steps with up to three tokens each."""
    piece = st.lists(token_ids, max_size=3).map(lambda ids: _piece(ids, logprobs=logprobs))
    choice = st.builds(
        ScriptedChoice,
        pieces=st.lists(piece, max_size=max_pieces).map(tuple),
        finish_reason=st.sampled_from(finish_reasons),
        matched_stop=st.sampled_from((None, *matched_stops)),
    )
    choices = tuple(draw(st.lists(choice, min_size=n, max_size=n)))
    steps = [index for index, choice in enumerate(choices) for _ in range(len(choice.pieces) + 1)]
    return Script(
        choices=choices,
        turns=tuple(draw(st.permutations(steps))) if n > 1 else tuple(steps),
        prompt_tokens=draw(st.integers(0, 50)),
        cached_tokens=draw(st.integers(0, 50)),
    )


def _piece(token_ids: list[int], *, logprobs: bool) -> Piece:
    # Halves are exact in every float format. The alternatives are neighbours, one of them impossible.
    entries = tuple(
        TokenLogprob(token_id=token_id, logprob=-0.5 * place, top=((token_id, -0.5 * place), (token_id + 1, float("-inf"))))
        for place, token_id in enumerate(token_ids)
    )
    return Piece(token_ids=tuple(token_ids), logprobs=entries if logprobs else ())


def events_of(script: Script, convention: Convention) -> list[Event]:
    """The events that a server with this convention sends."""
    events: list[Event] = []
    done = [0] * len(script.choices)
    for index in script.turns:
        choice = script.choices[index]
        step = done[index]
        done[index] += 1
        if step < len(choice.pieces):
            if convention.repeats != "unary" and not (convention.repeats == "tail" and step == len(choice.pieces) - 1):
                events.append(_tokens(script, index, step, convention))
        else:
            events.append(_finish(script, index, convention))
    return events


def _tokens(script: Script, index: int, step: int, convention: Convention) -> TokensEvent:
    choice = script.choices[index]
    counted = choice.pieces[: step + 1] if convention.counts == "cumulative" else choice.pieces[step : step + 1]
    return TokensEvent(
        index=index,
        token_ids=list(choice.pieces[step].token_ids),
        logprobs=choice.pieces[step].logprobs,
        prompt_tokens=script.prompt_tokens,
        completion_tokens=sum(len(piece.token_ids) for piece in counted),
        cached_tokens=script.cached_tokens,
    )


def _finish(script: Script, index: int, convention: Convention) -> FinishEvent:
    choice = script.choices[index]
    match convention.repeats:
        case "last":
            repeated = choice.pieces[-1:]
        case "nothing":
            repeated = ()
        case _:
            repeated = choice.pieces
    counted = choice.pieces if convention.counts == "cumulative" else repeated
    return FinishEvent(
        index=index,
        token_ids=[token_id for piece in repeated for token_id in piece.token_ids],
        logprobs=tuple(entry for piece in repeated for entry in piece.logprobs),
        finish_reason=choice.finish_reason,
        matched_stop=choice.matched_stop,
        prompt_tokens=script.prompt_tokens,
        completion_tokens=sum(len(piece.token_ids) for piece in counted),
        cached_tokens=script.cached_tokens,
    )


# As a server of one dialect tells it


def neighbours(adapter: Adapter) -> tuple[base.Convention, ...]:
    """The convention of the dialect, and what servers of it are known to do, or may do, instead."""
    own = adapter.convention
    if own.names_choices:  # SGLang streams incrementally when it is told to
        return own, msgspec.structs.replace(own, is_cumulative=False)
    if own.joins_finish:
        return (own,)
    repeats: tuple[Any, ...] = ("last", "all", "nothing")
    return tuple(msgspec.structs.replace(own, counts=counts, repeats=repeated) for counts in ("delta", "total") for repeated in repeats)


def told(
    script: Script,
    call: UpstreamCall,
    adapter: Adapter,
    tokenizer: Tokenizer,
    *,
    convention: base.Convention | None = None,
    streams: bool | None = None,
    joined: bool = True,
) -> list[Event]:
    """The part of the script that answers one call. `joined` brings the last tokens with the finish, where the convention can.

    `streams` None is what the call asks for. The text of a server that sends text is that of the tokens, stop strings and all.
    """
    request = call.inference if streams is None else msgspec.structs.replace(call.inference, stream=streams)
    sends_text = adapter.sends_text or (request.prompt_text is not None and adapter.answers_text_with_text)
    teller = Teller(convention or adapter.convention, request, sends_text=sends_text)
    prompt: dict[str, Any] = {"prompt_tokens": script.prompt_tokens, "cached_tokens": script.cached_tokens}
    choices = range(call.first_index, call.first_index + call.choices)
    skips = request.sampling.skip_special_tokens
    detokenizers = {index: tokenizer.detokenizer(request.prompt_token_ids, skip_special_tokens=skips) for index in choices}
    done = dict.fromkeys(choices, 0)
    events: list[Event] = []

    def tokens(index: int, step: int) -> TokensEvent:
        piece = script.choices[index].pieces[step]
        text = detokenizers[index].decode(piece.token_ids) if sends_text else None
        return TokensEvent(index=index - choices.start, token_ids=list(piece.token_ids), text=text, logprobs=piece.logprobs, **prompt)

    for index in script.turns:
        if index not in choices:
            continue
        choice, step = script.choices[index], done[index]
        done[index] += 1
        is_last = step == len(choice.pieces) - 1
        if step < len(choice.pieces) and not (joined and is_last):
            events += teller.gain(tokens(index, step))
        elif step == len(choice.pieces):
            finish = FinishEvent(
                index=index - choices.start, finish_reason=choice.finish_reason, matched_stop=choice.matched_stop, **prompt
            )
            last = tokens(index, step - 1) if joined and choice.pieces else None
            events += teller.finish(finish, last=last)
    return [_without_ids(event) for event in events] if _leaves_ids_out(adapter, request) else events


def _leaves_ids_out(adapter: Adapter, request: InferenceRequest) -> bool:
    return "return_token_ids" in adapter.sends and not request.return_token_ids and request.sampling.logprobs is None


def _without_ids(event: Event) -> Event:
    return event if isinstance(event, PromptEvent) else msgspec.structs.replace(event, token_ids=[])


def streams_of(script: Script, call: Call, tokenizer: Tokenizer, *, encoding: str = "identity", **how: Any) -> list[bytes]:
    """The response bodies that bring the script, one for each call."""
    adapter = call.transcoder.adapter
    return [frames_of(adapter, told(script, one, adapter, tokenizer, **how), encoding=encoding) for one in call.calls]


# What of a request comes back from the wire


_ANY_OBJECT = '{"type": "object"}'


def as_read(adapter: Adapter, request: InferenceRequest) -> InferenceRequest:
    """What the adapter decodes of a request that it encoded: all but what this wire has no place for, with what an unset field means."""
    sampling = request.sampling
    changed: dict[str, Any] = {
        name: _default(type(sampling), name) for name in adapter.emulates if name in type(sampling).__struct_fields__
    }
    if sampling.temperature is None and adapter.dialect in ("vllm.inference", "sglang.scheduler"):
        changed["temperature"] = 1.0  # always sent
    if sampling.max_tokens is None and adapter.default_max_tokens is not None:
        changed["max_tokens"] = adapter.default_max_tokens  # what the server takes it for
    if sampling.prompt_logprobs is not None and adapter.dialect.startswith("sglang."):
        # One number for both: as many of the likeliest, and those of the output come besides.
        changed["prompt_logprobs"] = changed["logprobs"] = max(sampling.logprobs or 0, sampling.prompt_logprobs)
    constraint = sampling.constraint
    if constraint is not None and constraint.kind == "choice" and "constraint.choice" in adapter.emulates:
        changed["constraint"] = Constraint(kind="regex", value=regex_of_choices(constraint.value))
    if constraint == Constraint(kind="json_schema", value=_ANY_OBJECT) and "constraint.json_object" in adapter.emulates:
        changed["constraint"] = Constraint(kind="json_object")  # how such a server is asked for one
    outer = {
        name: _default(InferenceRequest, name)
        for name in adapter.emulates
        if name in InferenceRequest.__struct_fields__ and name != "prompt_text"
    }
    if request.sampling.logprobs is not None:
        outer["return_token_ids"] = False  # ids come with them
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, **changed), **outer)


def _default(kind: type[msgspec.Struct], name: str) -> Any:
    return next(field.default for field in msgspec.structs.fields(kind) if field.name == name) if name != "trace_headers" else {}


# On the wire


def messages_of(adapter: Adapter, events: Iterable[Event]) -> list[bytes]:
    """One message for each event."""
    return [adapter.encode_response(event).SerializeToString() for event in events]


def frames_of(adapter: Adapter, events: Iterable[Event], *, encoding: str = "identity") -> bytes:
    """The body of a gRPC response that brings these events."""
    return b"".join(encode_frame(message, encoding=encoding) for message in messages_of(adapter, events))


@st.composite
def partitions(draw: DrawFn, data: bytes, *, max_cuts: int = 12) -> list[bytes]:
    """`data` in pieces, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=max_cuts)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def single_bytes(data: bytes) -> list[bytes]:
    """`data` byte by byte: the finest partition."""
    return [data[place : place + 1] for place in range(len(data))]


@st.composite
def damaged(draw: DrawFn, data: bytes, *, max_faults: int = 3) -> bytes:
    """`data` with one or more faults: bytes changed, lost, added, doubled or cut off."""
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, max_faults))):
        start = draw(st.integers(0, len(broken)))
        end = draw(st.integers(start, min(len(broken), start + 8)))
        match draw(st.sampled_from(("change", "lose", "add", "double", "cut"))):
            case "change" if start < len(broken):
                broken[start] ^= draw(st.integers(1, 255))
            case "lose":
                del broken[start:end]
            case "add":
                broken[start:start] = draw(st.binary(min_size=1, max_size=8))
            case "double":
                broken[start:start] = broken[start:end]
            case "cut":
                del broken[start:]
    return bytes(broken)


# What a client sees


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP answer put together from outputs, and what the response says about itself afterwards."""

    status: int
    headers: dict[str, str]
    body: bytes
    error: CodecError | None
    usage: Usage

    @property
    def same(self) -> tuple[Any, ...]:
        """What must not depend on how the bytes were cut."""
        return self.status, self.headers, self.body, type(self.error), str(self.error), self.usage

    @property
    def json(self) -> Any:
        """The body of an answer that is no stream."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The chunks of a stream, decoded; "[DONE]" stands for itself."""
        decoder = SSEDecoder()
        events = [event.data for event in decoder.receive_data(self.body)]
        decoder.receive_eof()
        return [data if data == "[DONE]" else json.loads(data) for data in events]

    def content(self, index: int = 0) -> str:
        """The text of one choice, of a stream or not."""
        if self.headers["content-type"] == "application/json":
            return str(self.json["choices"][index]["message"]["content"])
        return "".join(
            choice["delta"].get("content") or ""
            for event in self.events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
            if choice["index"] == index
        )


def answer_to(call: Call, pieces: Iterable[bytes], **how: Any) -> Answer:
    """Play one response: bytes in `pieces` (or messages, when not `framed`), then `trailers`, or for None the end without any.

    AssertionError when the outputs break the contract: the head first and once, the end once and last, `ended` and `state` in step.
    """
    return answer_to_all(call, [pieces], **how)


def answer_to_all(
    call: Call,
    streams: Sequence[Iterable[bytes]],
    *,
    order: Iterable[int] | None = None,
    obeys_cancel: bool = True,
    trailers: Iterable[tuple[str, str]] | Mapping[str, str] | None = OK_TRAILERS,
    headers: Iterable[tuple[str, str]] | Mapping[str, str] = (),
    status: int = 200,
    framed: bool = True,
    created: int = 1700000000,
) -> Answer:
    """Likewise for a request that takes several calls. `order` says which of them brings its next piece; what it leaves over comes in the
    order of the calls. A host that does not obey a CancelCall feeds what the server had sent already."""
    response = call.response(created=created)
    outputs: list[Any] = []
    cancelled: set[int] = set()
    waiting = [list(pieces) for pieces in streams]
    assert len(waiting) == len(call.calls)

    def take(received: Sequence[Any]) -> None:
        for output in received:
            if isinstance(output, CancelCall):
                assert output.call not in cancelled, "cancelled twice"
                cancelled.add(output.call)
            else:
                outputs.append(output)

    def feed(place: int) -> None:
        piece = waiting[place].pop(0)
        if place in cancelled and obeys_cancel:
            return
        was_ended = response.ended
        received = response.receive_data(piece, call=place) if framed else response.receive_message(piece, call=place)
        assert not (was_ended and received), "output after the end"
        take(received)

    for place in range(len(waiting)):
        take(response.receive_headers(headers, status=status, call=place))
    for place in order or ():
        if waiting[place]:
            feed(place)
    for place, pieces in enumerate(waiting):
        while pieces:
            feed(place)
        take(response.receive_eof(call=place) if trailers is None else response.receive_trailers(trailers, call=place))

    assert response.ended
    assert response.state in (State.CLOSED, State.ERROR)
    assert [type(output) for output in outputs if not isinstance(output, BodyChunk)] == [ResponseHead, EndOfBody]
    head = outputs[0]
    assert isinstance(head, ResponseHead)
    assert isinstance(outputs[-1], EndOfBody)
    fields = dict(head.headers)
    body = b"".join(output.data for output in outputs if isinstance(output, BodyChunk))
    assert "content-length" not in fields or int(fields["content-length"]) == len(body)
    return Answer(status=head.status, headers=fields, body=body, error=response.error, usage=response.usage)
