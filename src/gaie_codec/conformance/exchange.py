"""A transcript -> its streams, each as the two halves of one HTTP exchange, with what the rules ask about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import msgspec

from ..ext_proc.messages import CommonResponse, HeaderValueOption, ProcessingMode
from .addresses import ENDPOINT, LB, SERVED, SUBSET, SUBSET_HINT, normal, split
from .transcript import HealthAnswer, Line, Sender, StreamEnd, StreamStart, Transcript, brief, header_value, plain

Side: TypeAlias = Literal["request", "response"]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What broke a rule, and where."""

    reason: str
    stream: str = ""
    number: int = 0
    """The place of the message in its stream, from 1; 0 where no message is to blame."""
    sender: str = ""
    message: str = ""
    """The message on one line; bodies are told by their length."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One message. `number` is its place in the stream, from 1."""

    number: int
    sender: Sender
    message: Any

    @property
    def kind(self) -> str:
        """Which message of the oneof it is, "" for none."""
        return self.message.WhichOneof("request" if self.sender == "envoy" else "response") or ""

    @property
    def part(self) -> Any:
        """That message."""
        return getattr(self.message, self.kind)


class Half:
    """The request or the response of an exchange."""

    def __init__(self, side: Side, entries: Iterable[Entry]) -> None:
        self.side: Final = side
        self.entries: Final = tuple(entry for entry in entries if entry.kind.startswith(side))

    def _all(self, sender: Sender, what: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.sender == sender and entry.kind == f"{self.side}_{what}")

    @cached_property
    def head(self) -> Entry | None:
        """The headers, as the data plane sent them."""
        return next(iter(self._all("envoy", "headers")), None)

    @cached_property
    def answer(self) -> Entry | None:
        """The EPP's answer to the headers."""
        return next(iter(self._all("epp", "headers")), None)

    @cached_property
    def bodies_in(self) -> tuple[Entry, ...]:
        """Body messages of the data plane."""
        return self._all("envoy", "body")

    @cached_property
    def bodies_out(self) -> tuple[Entry, ...]:
        """Body messages of the EPP."""
        return self._all("epp", "body")

    @cached_property
    def trailers_in(self) -> Entry | None:
        """Trailers of the data plane."""
        return next(iter(self._all("envoy", "trailers")), None)

    @cached_property
    def trailers_out(self) -> Entry | None:
        """The EPP's answer to them."""
        return next(iter(self._all("epp", "trailers")), None)

    @property
    def is_bodyless(self) -> bool:
        """The headers end the stream."""
        return self.head is not None and self.head.part.end_of_stream

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """Headers by lower-case name; of one that is there twice the last."""
        return {header.key.lower(): header_value(header) for header in self.head.part.headers.headers} if self.head is not None else {}

    @cached_property
    def changed(self) -> Mapping[str, str]:
        """The headers that go on, after the EPP's changes."""
        headers = dict(self.headers)
        if self.answer is not None:
            change = self.answer.part.response.header_mutation
            for name in change.remove_headers:
                headers.pop(name.lower(), None)
            for option in change.set_headers:
                _set(headers, option)
        return headers

    @property
    def sets(self) -> tuple[tuple[Entry, Any], ...]:
        """Every HeaderValueOption that the EPP sent for this half, with its message."""
        answers = ((entry, mutation_of(entry)) for entry in self.entries if entry.sender == "epp")
        return tuple((entry, option) for entry, change in answers if change is not None for option in change.set_headers)

    @property
    def body_in(self) -> bytes:
        """The body as it came."""
        return b"".join(entry.part.body for entry in self.bodies_in)

    @property
    def body_out(self) -> bytes:
        """The body that goes on."""
        if self.is_replaced and self.answer is not None:
            return bytes(self.answer.part.response.body_mutation.body)
        return b"".join(streamed(entry).body for entry in self.bodies_out)

    @property
    def is_replaced(self) -> bool:
        """The answer to the headers holds the whole body (CONTINUE_AND_REPLACE), and nothing else is answered."""
        return self.answer is not None and self.answer.part.response.status == CommonResponse.CONTINUE_AND_REPLACE

    @property
    def ends_in(self) -> tuple[Entry, ...]:
        """Body messages of the data plane that say end of stream: more than one where Envoy repeats itself."""
        return tuple(entry for entry in self.bodies_in if entry.part.end_of_stream)

    @property
    def ends_out(self) -> tuple[Entry, ...]:
        """Body messages of the EPP that say so."""
        return tuple(entry for entry in self.bodies_out if streamed(entry).end_of_stream)

    @property
    def is_complete(self) -> bool:
        """The data plane has nothing left to wait for."""
        if self.answer is None:
            return False
        if self.is_replaced or self.is_bodyless:
            return True
        return self.trailers_out is not None if self.trailers_in is not None else bool(self.ends_out)


class Exchange:
    """One stream: what each side sent, how it ended, and what was picked."""

    def __init__(self, name: str, lines: Iterable[tuple[int, Line]]) -> None:
        """`lines` are those of the stream, each with its place in the transcript."""
        places = tuple(lines)
        self.name: Final = name
        self.start: Final = next((line.start for _, line in places if line.start is not None), StreamStart())
        self.end: Final[StreamEnd | None] = next((line.end for _, line in places if line.end is not None), None)
        said = [line for _, line in places if line.message is not None and line.sender is not None]
        self.entries: Final = tuple(
            Entry(number=number, sender=line.sender or "epp", message=line.message) for number, line in enumerate(said, start=1)
        )
        self.span: Final = (places[0][0], places[-1][0]) if places else (0, 0)
        self.request: Final = Half("request", self.entries)
        self.response: Final = Half("response", self.entries)

    @property
    def halves(self) -> tuple[Half, Half]:
        """Request and response."""
        return self.request, self.response

    @cached_property
    def immediate(self) -> Entry | None:
        """The first ImmediateResponse."""
        return next((entry for entry in self.entries if entry.kind == "immediate_response"), None)

    @property
    def refusal(self) -> Entry | None:
        """An ImmediateResponse in the place of a choice: before the response began."""
        return self.immediate if self.response.head is None else None

    @property
    def answers(self) -> tuple[Entry, ...]:
        """All that the EPP sent."""
        return tuple(entry for entry in self.entries if entry.sender == "epp")

    @property
    def is_full_duplex(self) -> bool:
        """Bodies are streamed both ways; so it is where the first message does not tell."""
        first = next((entry.message for entry in self.entries if entry.sender == "envoy"), None)
        if first is None or not first.HasField("protocol_config"):
            return True
        modes = {first.protocol_config.request_body_mode, first.protocol_config.response_body_mode}
        return modes == {ProcessingMode.FULL_DUPLEX_STREAMED}

    @property
    def said_endpoint(self) -> tuple[str | None, str | None]:
        """What was picked: as the header has it, and as the dynamic metadata has it. None where it is missing."""
        if self.request.answer is None:
            return None, None
        answer = self.request.answer
        set_headers = answer.part.response.header_mutation.set_headers
        header = next((header_value(option.header) for option in set_headers if option.header.key.lower() == ENDPOINT), None)
        return header, _told(answer.message.dynamic_metadata, LB, ENDPOINT)

    @property
    def picked(self) -> tuple[str, ...]:
        """The endpoints, best first."""
        header, metadata = self.said_endpoint
        return tuple(normal(endpoint) for endpoint in (header or metadata or "").split(",") if endpoint.strip())

    @cached_property
    def subset(self) -> Any:
        """The subset that the data plane asks for: a list, a text, or None for none."""
        for entry in self.entries:
            if entry.sender == "envoy" and entry.kind.startswith("request"):
                hint = entry.message.metadata_context.filter_metadata
                if SUBSET_HINT in hint and SUBSET in hint[SUBSET_HINT]:
                    asked = plain(hint[SUBSET_HINT])[SUBSET]
                    return asked if isinstance(asked, list) else str(asked)
        return None

    @property
    def subset_list(self) -> tuple[str, ...] | None:
        """The subset where it is a list, as it should be."""
        return tuple(normal(str(endpoint)) for endpoint in self.subset) if isinstance(self.subset, list) else None

    @property
    def served(self) -> tuple[Entry, str] | None:
        """The endpoint that the data plane says has answered, and its message."""
        for entry in self.response.entries:
            filters = entry.message.metadata_context.filter_metadata if entry.sender == "envoy" else {}
            if LB in filters and SERVED in filters[LB]:
                return entry, str(filters[LB][SERVED])
        return None

    @property
    def is_complete(self) -> bool:
        """All that the data plane sent is answered, and it has sent all."""
        return self.immediate is not None or (self.request.is_complete and self.response.is_complete)

    @property
    def is_grpc_in(self) -> bool:
        """The client speaks gRPC."""
        return self.request.headers.get("content-type", "").startswith("application/grpc")

    @property
    def is_grpc_out(self) -> bool:
        """The model server is spoken to in gRPC."""
        return self.request.changed.get("content-type", "").startswith("application/grpc")

    @property
    def is_plain(self) -> bool:
        """Nothing is special about it, so that no other rule is the one to blame."""
        request, response = self.request, self.response
        return not (
            request.trailers_in is not None
            or len(request.ends_in) > 1
            or request.is_bodyless
            or self.subset is not None
            or self.start.expects in ("503", "429")
            or "?" in request.headers.get(":path", "")
            or response.is_bodyless
            or not response.headers.get(":status", "200").startswith("2")
        )

    @property
    def hung(self) -> bool:
        """The data plane waited in vain."""
        return self.end is not None and self.end.by == "envoy" and self.end.status == "DEADLINE_EXCEEDED"

    def unfinished(self) -> Fault | None:
        """What kept the exchange from its end, if that was the EPP: it hung, failed, or left early."""
        if self.end is None or self.is_complete or (self.end.by == "envoy" and not self.hung):
            return None
        after = self.entries[-1] if self.entries else None
        if self.hung:
            sent = [entry for entry in self.entries if entry.sender == "envoy"]
            return self.fault(f"no answer: {self.end.details or 'the data plane waited in vain'}", sent[-1] if sent else None)
        how = "" if self.end.status == "OK" else f" with {self.end.status}" + (f" ({self.end.details})" if self.end.details else "")
        return self.fault(f"the EPP ended the stream{how} before everything was answered; the last message was this", after)

    def fault(self, reason: str, entry: Entry | None = None) -> Fault:
        """A fault in this stream."""
        if entry is None:
            return Fault(reason=reason, stream=self.name)
        return Fault(reason=reason, stream=self.name, number=entry.number, sender=entry.sender, message=brief(entry.message))


class Evidence:
    """All that is judged: exchanges, health, and the pool if it is known."""

    def __init__(self, transcript: Transcript, pool: Iterable[str] = ()) -> None:
        """`pool` are the addresses that the EPP may choose from, without which some rules cannot be judged."""
        named: dict[str, list[tuple[int, Line]]] = {}
        for place, line in enumerate(transcript):
            if line.health is None:
                named.setdefault(line.stream, []).append((place, line))
        self.exchanges: Final = tuple(Exchange(name, lines) for name, lines in named.items())
        self.health: Final[tuple[HealthAnswer, ...]] = tuple(line.health for line in transcript if line.health is not None)
        self.pool: Final = frozenset(map(normal, pool))

    @cached_property
    def known(self) -> frozenset[str]:
        """Endpoints of the pool: those that were named, or those that were picked where nothing limited the choice."""
        return self.pool or frozenset(
            endpoint for exchange in self.exchanges if exchange.subset is None for endpoint in exchange.picked if split(endpoint)
        )

    def overlapping(self, exchange: Exchange) -> tuple[Exchange, ...]:
        """The other streams that were open while this one was."""
        first, last = exchange.span
        return tuple(other for other in self.exchanges if other is not exchange and other.span[0] < last and first < other.span[1])


def mutation_of(entry: Entry) -> Any:
    """The HeaderMutation of an EPP's answer, None for what can have none."""
    part = entry.part if entry.kind else None
    if part is None:
        return None
    if entry.kind == "immediate_response":
        return part.headers
    return part.header_mutation if entry.kind.endswith("trailers") else part.response.header_mutation


def streamed(entry: Entry) -> Any:
    """The StreamedBodyResponse of an EPP's body message, an empty one where it has none."""
    return entry.part.response.body_mutation.streamed_response


def _set(headers: dict[str, str], option: Any) -> None:
    name = option.header.key.lower()
    if option.append_action == HeaderValueOption.ADD_IF_ABSENT and name in headers:
        return
    if option.append_action == HeaderValueOption.OVERWRITE_IF_EXISTS and name not in headers:
        return
    headers[name] = header_value(option.header)


def _told(metadata: Any, namespace: str, key: str) -> str | None:
    if namespace not in metadata or not hasattr(metadata[namespace], "fields") or key not in metadata[namespace]:
        return None
    value = metadata[namespace][key]
    return value if isinstance(value, str) else None
