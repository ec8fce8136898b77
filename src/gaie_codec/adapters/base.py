"""What an adapter is: one model-server dialect at one snapshot, as a frozen record of plain functions and facts.

An adapter module offers `adapter(snapshot) -> Adapter`. It asks the snapshot's descriptors which fields exist; the host of the adapter
refuses by name what `carries` leaves out, so no adapter ever drops a field. Facts say how the server speaks where the schema does not;
with them one core reads all servers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from google.protobuf.message import Message

from .._errors import Code
from .._events import BodyEvent, Capacity, EmbeddingEvent, ErrorEvent, Event, InferenceRequest, Loads, ModelInfo
from ..snapshots import Snapshot


class Convention(msgspec.Struct, frozen=True, kw_only=True):
    """How a server tells what it generates, for whoever has to speak like one (`_conventions.Teller`)."""

    counts: Literal["delta", "total"] = "delta"
    """What `completion_tokens` of a message counts: its own tokens, or those of the choice so far."""

    repeats: Literal["last", "all", "nothing"] = "last"
    """Which ids a finish of its own repeats."""

    is_cumulative: bool = False
    """Each message repeats everything so far."""

    joins_finish: bool = False
    """The finish comes in the message of the last tokens."""

    announces_prompt: bool = False
    """A message about the prompt comes before all others."""

    names_choices: bool = False
    """Several choices are told apart by `choice_id`."""


class RequestCoder(msgspec.Struct, frozen=True, kw_only=True):
    """The request half of an adapter whose requests have a module of their own. The fields are those of `Adapter`."""

    sends: Mapping[str, str]
    emulates: Mapping[str, str]
    also_reads: frozenset[str]
    ranges: Mapping[str, tuple[float, float]]
    encode: Callable[[InferenceRequest], Message]
    decode: Callable[[Any], InferenceRequest]


class Passthrough(msgspec.Struct, frozen=True, kw_only=True):
    """The methods of a server that takes OpenAI JSON as it is, by kind of request: chat, completions, embeddings, ..."""

    paths: Mapping[str, str]
    fields: Mapping[str, frozenset[str]]
    """What the server reads of each kind of body; it passes over all else."""
    encode_request: Callable[[bytes, Mapping[str, str]], Message]
    """A JSON body, and the HTTP headers that go along."""
    decode_request: Callable[[Any], tuple[bytes, dict[str, str]]]
    decode_response: Callable[[Any], BodyEvent]
    encode_response: Callable[[BodyEvent, str], Message]
    """An event of a call to the path."""


class EmbedCoder(msgspec.Struct, frozen=True, kw_only=True):
    """The method of a server that embeds one prompt: token ids in, a vector out, by one call that is not streamed."""

    path: str
    sends: Mapping[str, str]
    """As `Adapter.sends`, below the request of `path`."""
    emulates: Mapping[str, str]
    also_reads: frozenset[str] = frozenset()
    """Wire fields that change nothing in the vector."""
    ranges: Mapping[str, tuple[float, float]] = {}
    encode_request: Callable[[InferenceRequest], Message]
    decode_request: Callable[[Any], InferenceRequest]
    decode_response: Callable[[Any], Sequence[EmbeddingEvent | ErrorEvent]]
    encode_response: Callable[[EmbeddingEvent], Message]


class LoadsCoder(msgspec.Struct, frozen=True, kw_only=True):
    """The half of an adapter that is about loads. The fields are those of `Adapter`."""

    path: str | None = None
    request: bytes = b""
    decode: Callable[[Any], Loads] | None = None
    encode: Callable[[Loads], Message] | None = None
    capacity_path: str | None = None
    decode_capacity: Callable[[Any], Capacity] | None = None
    encode_capacity: Callable[[Capacity], Message] | None = None


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """One dialect at one snapshot."""

    dialect: str
    snapshot: Snapshot

    generate_path: str
    """The gRPC path of a streaming generation, such as `/vllm.grpc.engine.VllmEngine/Generate`."""

    generate_paths: tuple[str, ...]
    """Every path that takes what `encode_request` makes; `path_for` chooses."""

    path_for: Callable[[InferenceRequest], str]

    info_paths: tuple[str, ...]
    """Paths whose answers `decode_model_info` takes, as many as there are; their requests have no fields. The first is there in every
    release."""

    tokenizer_path: str | None = None
    """The path of the server's GetTokenizer stream, None where the snapshot has none."""

    advertises_defaults: bool = False
    """The server tells its model's own sampling parameters, so that none told means none."""

    health_path: str | None = None
    """The path of a HealthCheck that is cheap, None where there is none and grpc.health.v1 has to do. An answer without a field `healthy`
    says so by its status."""

    loads_path: str | None = None
    """The path of GetLoads, whose answer `decode_loads` takes; None where the snapshot has none."""

    loads_request: bytes = b""
    """What to ask there, as a serialized message."""

    capacity_path: str | None = None
    """The path of the answer that `decode_capacity` takes, None where none tells of it. The request has no fields."""

    abort_path: str | None = None
    """The path of Abort, for hosts that cannot just cancel a call; None where the snapshot has none."""

    request_type: type[Message]
    response_type: type[Message]
    """Of `generate_path`."""

    sends: Mapping[str, str]
    """Fields of InferenceRequest and SamplingParams, and kinds of constraint as `constraint.<kind>`, with the wire field of each as a
    dotted path below the request."""

    emulates: Mapping[str, str]
    """Likewise for what has no field of its own on this wire, with how it is done instead."""

    also_reads: frozenset[str] = frozenset()
    """Wire fields that `decode_request` reads besides those of `sends`, or that change nothing in what is generated."""

    carries: frozenset[str]
    """What can be said: the keys of `sends` and `emulates`."""

    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of sampling fields whose type on the wire is narrower than OpenAI's."""

    sends_text: bool = False
    """The server detokenizes; else text is the gateway's work."""

    answers_text_with_text: bool = False
    """The server sends text, and no ids, when the prompt is text."""

    sends_final_text: bool = False
    """Text that came stays: the server holds back what may become a stop string. Else it may be shortened at the end."""

    ends_at_stop_strings: bool = True
    """The server knows stop strings. Else the gateway ends the choice."""

    echoes_prompt: bool = False
    """The text of an answer that ends with its first token is the prompt's, by a mistake of the server."""

    names_eos: bool = False
    """An end by EOS has `matched_stop` set to the EOS id."""

    default_max_tokens: int | None = None
    """What the server takes unset `max_tokens` for; None where that is the rest of the context."""

    counts: Literal["ids", "delta", "total"] = "ids"
    """How completion tokens are counted: by ids, which always come, or as reported, per message or for the choice so far."""

    streams_several: bool = False
    """More than one choice has to be asked for with `stream`, also for a unary answer."""

    convention: Convention = Convention()

    encode_request: Callable[[InferenceRequest], Message]
    decode_request: Callable[[Any], InferenceRequest]
    encode_metadata: Callable[[InferenceRequest], tuple[tuple[str, str], ...]]
    """The call's metadata."""
    decode_response: Callable[[Any], Sequence[Event]]
    """One message to its events, none for a message that says nothing."""
    decode_tokens: Callable[[Any], tuple[int, Sequence[int]]] | None = None
    """The per-token path where the server sends ids: index and ids, of the message or of the choice so far as `convention` has it; no
    ids for a message that brings no tokens, or more than them. The rest of it is not looked at."""
    decode_text: Callable[[Any], tuple[int, str, int] | None] | None = None
    """The per-token path where the server sends text: index, text and number of tokens, of the message or of the choice so far as
    `convention` has it; None for a message that says more."""
    encode_response: Callable[[Event], Message]
    decode_status: Callable[[Code, str], tuple[Code, str]] | None = None
    """What a status other than OK means, where the server hides another one in it."""
    decode_model_info: Callable[[Mapping[str, Any]], ModelInfo]
    """Answers by path; a server may leave some out."""
    encode_abort: Callable[[str], Message] | None = None
    """The request of `abort_path` for a request's id."""
    encode_model_info: Callable[[ModelInfo], Mapping[str, Message]]

    decode_loads: Callable[[Any], Loads] | None = None
    encode_loads: Callable[[Loads], Message] | None = None
    decode_capacity: Callable[[Any], Capacity] | None = None
    encode_capacity: Callable[[Capacity], Message] | None = None

    passthrough: Passthrough | None = None
    embed: EmbedCoder | None = None
    """None where the snapshot has no such method."""


def find_abort(
    snapshot: Snapshot, service: str, fields: Callable[[str], Mapping[str, Any]]
) -> tuple[str | None, Callable[[str], Message] | None]:
    """`abort_path` and `encode_abort` of a service; `fields` are those of the request for a request's id."""
    if service not in snapshot.services or not snapshot.has_method(service, "Abort"):
        return None, None
    method = snapshot.method(service, "Abort")
    request_type: Any = method.request
    return method.path, lambda request_id: request_type(**fields(request_id))


def trace_metadata(request: InferenceRequest) -> tuple[tuple[str, str], ...]:
    """The `encode_metadata` of servers that read trace context from metadata."""
    return tuple(request.trace_headers.items())


def existing(request_type: type[Message], fields: Mapping[str, str]) -> dict[str, str]:
    """Those of `fields` whose wire field the request has in this snapshot."""
    return {name: path for name, path in fields.items() if has_path(request_type, path)}


def has_path(message_type: type[Message], path: str) -> bool:
    """Whether a dotted path of field names leads anywhere below the message."""
    descriptor: Any = message_type.DESCRIPTOR
    for name in path.split("."):
        field = descriptor.fields_by_name.get(name) if descriptor is not None else None
        if field is None:
            return False
        descriptor = field.message_type
    return True
