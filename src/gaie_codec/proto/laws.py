"""The laws of an upgrade: our adapter and a server of the candidate schema must mean the same.

Bytes go both ways between classes of the newest snapshot and of the candidate, each pool its own. The other side's code is imitated in
two ways: it reads and writes fields by name, as generated code does, and it is our adapter itself, built from the candidate's
descriptors. A law collects every field that fails, each with the first example, instead of stopping at the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .. import BodyEvent, CodecError, Event, InferenceRequest, ModelInfo, Transcoder, UsageError
from ..adapters.base import Adapter
from ..snapshots import Snapshot, is_repeated
from ..testing import ByteTokenizer, event_streams, inference_requests, openai_requests
from .meaning import AnyDescriptor, AnyField, Renames, copy_by_name, differences, is_map, samples
from .report import Finding, Law

__all__ = ["Bench", "run_laws", "types_of", "variants"]


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """The two sides. `theirs` is None where our adapter cannot be built on the candidate, and `obstacle` says why."""

    baseline: Snapshot
    candidate: Snapshot
    ours: Adapter | None
    theirs: Adapter | None
    obstacle: str = ""
    renames: Renames
    max_examples: int
    seed: int

    def other_type(self, message: Message) -> type[Message] | None:
        """The candidate's class for one of our messages, None where it has no message of that name."""
        # By full name: the type of a method that was renamed is still the type.
        try:
            return self.candidate.message(message.DESCRIPTOR.full_name)
        except UsageError:
            return None

    def back(self) -> Renames:
        """The renames as the candidate sees them."""
        return {f"{name.rpartition('.')[0]}.{new}": name.rpartition(".")[2] for name, new in self.renames.items()}


def run_laws(bench: Bench, seen: Callable[[Message], None]) -> tuple[Law, ...]:
    """All laws but the witness's. `seen` gets every message of the candidate that the laws made with the adapter."""
    laws = [_fields(bench)]
    if bench.ours is None:
        laws += [Law(name=name, claim=claim, skipped=bench.obstacle) for name, claim in _CLAIMS.items()]
    else:
        laws += [_requests(bench), _responses(bench), _codec(bench, seen)]
    return tuple(laws)


_CLAIMS = {
    "requests": "every request means the same on both sides",
    "responses": "every answer of such a server is decoded to the same events",
    "codec": "the adapter on the candidate keeps what it keeps today",
}


class _Findings:
    """The first finding for every field, in the order of their discovery."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def add(self, direction: str, found: Iterable[tuple[str, str]]) -> None:
        for field, text in found:
            self._first.setdefault(field, f"{direction}: {text}" if direction else text)

    def add_message(self, bench: Bench, message: Message, decode: Callable[[Any], Any]) -> None:
        """What is wrong with one of our messages on its way to the candidate, and with the candidate's own of the same content."""
        other_type = bench.other_type(message)
        if other_type is None:
            self.add("", [(message.DESCRIPTOR.full_name, "the candidate has no such message")])
            return
        _both_ways(bench, message, other_type, self, message.DESCRIPTOR.full_name)
        sent = other_type()
        if not list(copy_by_name(message, sent, bench.renames)):
            self.add(_TO_US, _decoded(decode, message, sent, type(message)))

    def all(self) -> tuple[Finding, ...]:
        return tuple(Finding(field=field, text=text) for field, text in self._first.items())


_TO_SERVER = "ours -> candidate"
_TO_US = "candidate -> ours"


# Every field by itself: no chance involved


def _fields(bench: Bench) -> Law:
    findings = _Findings()
    tried = 0
    for name, descriptor in types_of(bench.baseline).items():
        try:
            other_type = bench.candidate.message(name)
        except UsageError:
            continue
        for field, message in variants(descriptor):
            tried += 1
            _both_ways(bench, message, other_type, findings, f"{name}.{field}" if field else name)
    return Law(name="fields", claim="every value of every field means the same on both sides", examples=tried, findings=findings.all())


def _both_ways(bench: Bench, message: Message, other_type: type[Message], findings: _Findings, subject: str) -> None:
    try:
        findings.add(_TO_SERVER, differences(message, read := other_type.FromString(message.SerializeToString()), bench.renames))
        again = type(message).FromString(read.SerializeToString())
        findings.add("ours -> candidate -> ours", differences(message, again, {}))
    except DecodeError:
        findings.add(_TO_SERVER, [(subject, "the reader cannot parse it")])
    other = other_type()
    lost = list(copy_by_name(message, other, bench.renames))
    findings.add(_TO_US, lost)
    if not lost:
        try:
            findings.add(_TO_US, differences(message, type(message).FromString(other.SerializeToString()), {}))
        except DecodeError:
            findings.add(_TO_US, [(subject, "the reader cannot parse it")])


def types_of(snapshot: Snapshot) -> dict[str, AnyDescriptor]:
    """Every message that a method of the snapshot can carry, by full name; without map entries and the well-known ones."""
    found: dict[str, AnyDescriptor] = {}
    waiting: list[AnyDescriptor] = []
    for name in snapshot.services:
        for method in snapshot.pool.FindServiceByName(name).methods:
            waiting += [method.input_type, method.output_type]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in found or descriptor.full_name.startswith("google.protobuf."):
            continue
        if not descriptor.GetOptions().map_entry:
            found[descriptor.full_name] = descriptor
        waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    return dict(sorted(found.items()))


def variants(descriptor: AnyDescriptor) -> Iterator[tuple[str, Message]]:
    """The empty message, then each field alone with each of its sample values."""
    message_type = GetMessageClass(descriptor)
    yield "", message_type()
    for field in descriptor.fields:
        for value in _values(field):
            message = message_type()
            room: Any = getattr(message, field.name)
            if is_map(field):
                inner = field.message_type.fields_by_name["value"]
                key = samples(field.message_type.fields_by_name["key"])[1]
                if inner.message_type is not None:
                    room[key].SetInParent()
                else:
                    room[key] = value
            elif field.message_type is not None:
                (room.add() if is_repeated(field) else room).SetInParent()
            elif is_repeated(field):
                room.append(value)
            else:
                setattr(message, field.name, value)
            yield field.name, message


def _values(field: AnyField) -> Sequence[Any]:
    inner = field.message_type.fields_by_name["value"] if is_map(field) else field
    return [None] if inner.message_type is not None else samples(inner)


# What the codec really sends


def _explore(bench: Bench, examples: SearchStrategy[Any], run: Callable[[Any], None], findings: _Findings) -> None:
    """Runs deterministic examples. Nothing is shrunk: the findings name fields, and the first example is small."""

    @seed(bench.seed)
    @settings(
        max_examples=bench.max_examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def example(drawn: Any) -> None:
        try:
            run(drawn)
        except CodecError:
            pass  # the adapter refuses it today, as it may
        except Exception as error:  # today's adapter on today's schema: our bug, to be reported like any other finding
            findings.add("", [("adapter", f"fails on today's schema: {type(error).__name__}: {' '.join(str(error).split())[:120]}")])

    example()


def _inferences(adapter: Adapter) -> SearchStrategy[InferenceRequest]:
    """What reaches an adapter: from an OpenAI body through the transcoder, or drawn from all that the adapter carries."""
    # With a context length, without which some servers cannot be asked for as much as there is room.
    transcoder = Transcoder(
        adapter, tokenizer=ByteTokenizer(), model=ModelInfo(max_model_len=100_000), unsupported="drop", passthrough=False
    )

    def through(body: dict[str, Any]) -> InferenceRequest | None:
        try:
            call = transcoder.request("POST", "/v1/chat/completions", {}, json.dumps(body).encode(), request_id="r")
        except CodecError:
            return None  # this dialect cannot be asked that
        return call.calls[0].inference

    from_openai: SearchStrategy[Any] = openai_requests().map(through).filter(lambda request: request is not None)
    return inference_requests(adapter) | from_openai


def _exchanges(adapter: Adapter) -> SearchStrategy[tuple[InferenceRequest, list[Any]]]:
    def several(request: InferenceRequest) -> InferenceRequest:
        # So that the places of choices are told, where there can be several.
        sampling = msgspec.structs.replace(request.sampling, n=2) if "n" in adapter.carries else request.sampling
        return msgspec.structs.replace(request, sampling=sampling, stream=True)

    requests = inference_requests(adapter)
    return (requests | requests.map(several)).flatmap(lambda request: st.tuples(st.just(request), event_streams(request, adapter)))


_BODIES: SearchStrategy[BodyEvent] = st.builds(
    BodyEvent, data=st.binary(max_size=20), http_status=st.sampled_from((None, 200, 400, 503)), is_last=st.booleans()
)
_HEADERS: SearchStrategy[dict[str, str]] = st.dictionaries(st.sampled_from(("traceparent", "x-request-id")), st.text("abc", max_size=5))


def _requests(bench: Bench) -> Law:
    ours = bench.ours
    assert ours is not None
    findings = _Findings()
    tried = 0

    def hold(message: Message, decode: Callable[[Any], Any]) -> None:
        nonlocal tried
        tried += 1
        findings.add_message(bench, message, decode)

    _explore(bench, _inferences(ours), lambda request: hold(ours.encode_request(request), ours.decode_request), findings)
    way = ours.passthrough
    if way is not None:
        sent = st.tuples(st.binary(max_size=20), _HEADERS)
        _explore(bench, sent, lambda pair: hold(way.encode_request(*pair), way.decode_request), findings)
    return Law(name="requests", claim=_CLAIMS["requests"], examples=tried, findings=findings.all())


def _responses(bench: Bench) -> Law:
    ours = bench.ours
    assert ours is not None
    findings = _Findings()
    tried = 0

    def hold(messages: Iterable[Message], decode: Callable[[Any], Any]) -> None:
        nonlocal tried
        tried += 1
        for message in messages:
            findings.add_message(bench, message, decode)

    _explore(bench, _exchanges(ours), lambda pair: hold(map(ours.encode_response, pair[1]), ours.decode_response), findings)
    way = ours.passthrough
    if way is not None:
        told = st.tuples(_BODIES, st.sampled_from(sorted(way.paths.values())))
        _explore(bench, told, lambda pair: hold([way.encode_response(*pair)], way.decode_response), findings)
    return Law(name="responses", claim=_CLAIMS["responses"], examples=tried, findings=findings.all())


def _decoded(decode: Callable[[Any], Any], message: Message, sent: Message, message_type: type[Message]) -> Iterator[tuple[str, str]]:
    """What our adapter decodes from the other side's bytes, against what it decodes from its own."""
    expected = decode(message)
    try:
        got = decode(message_type.FromString(sent.SerializeToString()))
    except (CodecError, DecodeError) as error:
        yield message.DESCRIPTOR.full_name, f"our adapter refuses it: {type(error).__name__}"
        return
    yield from _unequal(expected, got)


def _unequal(expected: Any, got: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(expected, msgspec.Struct) and type(expected) is type(got):
        for name in expected.__struct_fields__:
            yield from _unequal(getattr(expected, name), getattr(got, name), f"{path}.{name}" if path else name)
    elif isinstance(expected, tuple) and isinstance(got, tuple) and len(expected) == len(got) and not path:
        for one, other in zip(expected, got, strict=True):
            yield from _unequal(one, other)
    elif expected != got:
        yield path or type(expected).__name__, f"should decode to {expected!r:.60}, decodes to {got!r:.60}"


# Our adapter, built from the candidate's descriptors


def _codec(bench: Bench, seen: Callable[[Message], None]) -> Law:
    ours, theirs = bench.ours, bench.theirs
    claim = _CLAIMS["codec"]
    if ours is None or theirs is None:
        return Law(name="codec", claim=claim, findings=(Finding(field="adapter", text=bench.obstacle),))
    findings = _Findings()
    lost = sorted(ours.carries - theirs.carries)
    findings.add("", ((name, "the adapter cannot carry it any more") for name in lost))
    tried = 0

    def run(exchange: tuple[InferenceRequest, list[Any]]) -> None:
        nonlocal tried
        tried += 1
        request, events = exchange
        _compare(lambda side: side.encode_request(request), lambda side: side.decode_request, request)
        for event in events:
            hold(event)

    def hold(event: Event) -> None:
        _compare(lambda side: side.encode_response(event), lambda side: side.decode_response, (event,))

    def _compare(encode: Callable[[Adapter], Message], decode: Callable[[Adapter], Callable[[Any], Any]], value: Any) -> None:
        kept = _through(ours, encode, decode)[1]
        try:
            message, got = _through(theirs, encode, decode)
            seen(message)
        except Exception as error:  # whatever an adapter does on a schema that it was not written for
            findings.add("", [(_named_in(error), f"the adapter fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}")])
            return
        # Where the candidate lets the adapter keep more than today, it may.
        if got != value:
            findings.add("", _unequal(kept, got))

    _explore(bench, _exchanges(ours), run, findings)
    return Law(name="codec", claim=claim, examples=tried, findings=findings.all())


def _through(side: Adapter, encode: Callable[[Adapter], Message], decode: Callable[[Adapter], Callable[[Any], Any]]) -> tuple[Message, Any]:
    message = encode(side)
    return message, decode(side)(type(message).FromString(message.SerializeToString()))


def _named_in(error: Exception) -> str:
    return str(getattr(error, "name", None) or "adapter")
