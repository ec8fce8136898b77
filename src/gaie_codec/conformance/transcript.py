"""What a data plane and an EPP said to each other <-> JSON lines: the one thing that is judged, whether it was just driven or recorded.

One line is one thing that happened, in the order in which it did; streams may overlap. docs/conformance.md shows the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from google.protobuf import json_format, struct_pb2

from .. import MalformedRequestError
from ..ext_proc.messages import HeaderMap, HeaderValueOption, ProcessingRequest, ProcessingResponse

Sender: TypeAlias = Literal["envoy", "epp"]
Expectation: TypeAlias = Literal["", "endpoint", "503", "429"]

_CLASSES: Final = {"envoy": ProcessingRequest, "epp": ProcessingResponse}
# Envoy's own JSON has names where our copy of the message has numbers: "ServiceUnavailable".
_STATUS_NAMES: Final = {"".join(filter(str.isalpha, status.phrase)): int(status) for status in HTTPStatus}
_SECRETS: Final = frozenset(("authorization", "cookie", "set-cookie", "proxy-authorization", "x-api-key"))
_SHOWN: Final = 300


class StreamStart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a stream was meant, by whoever wrote its script. Recordings of real traffic have none."""

    expects: Expectation = ""
    """What the request deserves: an endpoint, or an ImmediateResponse of that status. Empty where that is the EPP's own business."""

    paced: bool = False
    """Each piece of the answer, which makes sense alone, was held until the one before was answered, or that had taken too long."""


class StreamEnd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a stream ended. `by` "envoy" with DEADLINE_EXCEEDED says that the data plane waited in vain: `details` says for what."""

    by: Sender
    status: str = "OK"
    details: str = ""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened: the start of a stream, a message, its end, or the answer to a health check."""

    stream: str = ""
    start: StreamStart | None = None
    sender: Sender | None = None
    message: Any = None
    """A ProcessingRequest from "envoy", a ProcessingResponse from "epp"."""
    end: StreamEnd | None = None
    health: HealthAnswer | None = None


class HealthAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What grpc.health.v1 said of a service: the name of a ServingStatus, or of a gRPC status where the call failed."""

    service: str
    status: str


Transcript: TypeAlias = tuple[Line, ...]


class _Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    stream: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    start: StreamStart | None = None
    sender: Sender | None = msgspec.field(name="from", default=None)
    message: dict[str, Any] | None = None
    end: StreamEnd | None = None
    health: HealthAnswer | None = None


def decode_transcript(lines: Iterable[bytes]) -> Transcript:
    """The transcript of JSON lines; blank ones are passed over. Raises MalformedRequestError, which names the line."""
    decoded = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            decoded.append(_decode(msgspec.json.decode(line, type=_Text)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, json_format.ParseError, ValueError) as error:
            raise MalformedRequestError(f"transcript line {number}: {error}") from None
    return tuple(decoded)


def encode_line(line: Line) -> bytes:
    """The line as JSON, with a line end."""
    message = _json(line.message) if line.message is not None else None
    text = _Text(stream=line.stream or None, start=line.start, sender=line.sender, message=message, end=line.end, health=line.health)
    return msgspec.json.encode(text) + b"\n"


def _json(message: Any) -> Any:
    try:
        return json_format.MessageToDict(message)
    except (ValueError, json_format.SerializeToJsonError):  # a number in a Struct for which JSON has no word
        copy = type(message)()
        copy.CopyFrom(message)
        structs = [copy.dynamic_metadata] if isinstance(copy, ProcessingResponse) else []
        structs += [*copy.metadata_context.filter_metadata.values(), *copy.attributes.values()] if not structs else []
        for struct in structs:
            struct.update(plain(struct))
        return json_format.MessageToDict(copy)


def plain(value: Any) -> Any:
    """A Struct, or what is in one, as Python has it; numbers that JSON has not become text."""
    if isinstance(value, struct_pb2.Struct):
        return {key: plain(inner) for key, inner in value.fields.items()}
    if isinstance(value, struct_pb2.ListValue):
        return [plain(inner) for inner in value.values]
    kind = value.WhichOneof("kind")
    inner = getattr(value, kind) if kind not in (None, "null_value") else None
    if kind in ("struct_value", "list_value"):
        return plain(inner)
    return inner if kind != "number_value" or math.isfinite(value.number_value) else str(inner)


def _decode(text: _Text) -> Line:
    kinds = [kind for kind in ("start", "message", "end", "health") if getattr(text, kind) is not None]
    if len(kinds) != 1:
        raise ValueError(f"one of start, message, end and health is needed, there {'are ' + ' and '.join(kinds) if kinds else 'is none'}")
    if (kinds == ["health"]) is (text.stream is not None):
        raise ValueError("no stream is named" if text.stream is None else "health checks belong to no stream")
    if (text.sender is None) is (text.message is not None):
        raise ValueError("a message says from whom it is, and nothing else does")
    message = None
    if text.message is not None:
        immediate = text.message.get("immediateResponse", text.message.get("immediate_response"))
        status = immediate.get("status") if isinstance(immediate, dict) else None
        if isinstance(status, dict) and status.get("code") in _STATUS_NAMES:
            status["code"] = _STATUS_NAMES[status["code"]]
        # Envoy's messages have fields that ours lack, and gain more.
        message = json_format.ParseDict(text.message, _CLASSES[text.sender or "epp"](), ignore_unknown_fields=True)
    return Line(stream=text.stream or "", start=text.start, sender=text.sender, message=message, end=text.end, health=text.health)


def brief(message: Any) -> str:
    """A message as one line of JSON: headers with values, bodies by their length, credentials left out."""
    return msgspec.json.encode(_brief(message)).decode()


def header_value(header: Any) -> str:
    """The value, wherever the sender has put it."""
    return str(header.raw_value.decode("latin-1") or header.value)


def _brief(message: Any) -> Any:
    if isinstance(message, struct_pb2.Struct):
        return plain(message)
    if isinstance(message, HeaderMap):
        return dict(_header(header) for header in message.headers)
    if isinstance(message, HeaderValueOption):
        name, value = _header(message.header)
        actions = HeaderValueOption.DESCRIPTOR.fields_by_name["append_action"].enum_type
        return {name: value, "append_action": _enum(actions, message.append_action)}
    return dict(_fields(message))


def _fields(message: Any) -> Iterator[tuple[str, Any]]:
    for field, value in message.ListFields():
        if isinstance(value, bytes):
            yield field.name, f"<{len(value)} bytes>"
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield field.name, {key: _brief(inner) for key, inner in value.items()}
        elif field.enum_type is not None:
            yield field.name, _enum(field.enum_type, value)
        elif isinstance(value, str | int | bool):
            yield field.name, value
        elif field.message_type is None:
            yield field.name, list(value)
        elif hasattr(value, "DESCRIPTOR"):
            yield field.name, _brief(value)
        else:
            yield field.name, [_brief(inner) for inner in value]


def _enum(enum: Any, number: int) -> Any:
    known = enum.values_by_number.get(number)
    return known.name if known is not None else number


def _header(header: Any) -> tuple[str, str]:
    value = header_value(header)
    if header.key.lower() in _SECRETS:
        return header.key, f"<{len(value)} characters>"
    return header.key, value if len(value) <= _SHOWN else f"{value[:_SHOWN]}... ({len(value)} characters)"
