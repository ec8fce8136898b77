"""Two schemas -> every change between them, each with the harm that it does.

Wire-breaking: one side cannot read the other's bytes, or reads another field out of them, or calls a path that is not there.
Semantic-breaking: the bytes are accepted and mean something else (presence, oneofs, removed fields, ranges of integers). Source-only:
only code that spells names notices. Additive: old peers need not know. The classes are those of the published history
(docs/upgrading-protos.md); names decide what a field is, numbers what its bytes are, so a moved number shows up under both.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto

from .canonical import canonical, label, named_types, oneof_name, type_name

__all__ = ["Change", "Severity", "compare", "worst"]


class Severity(enum.StrEnum):
    """The harm of a change, the worst first."""

    WIRE = "wire-breaking"
    SEMANTIC = "semantic-breaking"
    SOURCE = "source-only"
    ADDITIVE = "additive"

    @property
    def is_breaking(self) -> bool:
        """Whether peers of the two schemas may misunderstand each other."""
        return self in (Severity.WIRE, Severity.SEMANTIC)


_RANK: Final = {severity: place for place, severity in enumerate(Severity)}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change. `subject` is the full name of what changed, as the old schema has it, or the new one where the old has nothing;
    `renamed_to` is set for a field that only got another name."""

    severity: Severity
    subject: str
    text: str
    renamed_to: str | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


def compare(old: Sequence[FileDescriptorProto], new: Sequence[FileDescriptorProto]) -> tuple[Change, ...]:
    """Every change from one schema to the other, the worst first. Raises UsageError where a schema lacks a file that it imports."""
    before, after = _Schema(old), _Schema(new)
    changes = [*_services(before, after), *_messages(before, after), *_enums(before, after)]
    return tuple(sorted(changes, key=lambda change: _RANK[change.severity]))


def worst(changes: Sequence[Change]) -> Severity | None:
    """The worst severity among them; None for no change at all."""
    return min((change.severity for change in changes), key=_RANK.__getitem__, default=None)


class _Schema:
    """What can be reached in a schema, by full name."""

    def __init__(self, files: Sequence[FileDescriptorProto]) -> None:
        facts = canonical(files)
        every: dict[str, Any] = {}
        for file in files:
            every |= {name[1:]: found for name, found in named_types(f".{file.package}", file.message_type, file.enum_type)}
        self.shapes: Mapping[str, Mapping[str, Sequence[str]]] = facts["messages"]
        self.messages: dict[str, DescriptorProto] = {name: every[name] for name in self.shapes}
        self.enums: dict[str, EnumDescriptorProto] = {name: every[name] for name in facts["enums"]}
        self.services: Mapping[str, Mapping[str, Sequence[Any]]] = facts["services"]
        fields = (field.type_name[1:] for message in self.messages.values() for field in message.field)
        methods = (name for service in self.services.values() for method in service.values() for name in method[:2])
        self.referenced = {*fields, *methods}

    def is_entry(self, name: str) -> bool:
        return name in self.messages and self.messages[name].options.map_entry

    def shape(self, name: str, seen: tuple[str, ...] = ()) -> Any:
        """All that two types must share to be one type under two names."""
        if name in self.enums:
            return {value.number: value.name for value in self.enums[name].value}
        if name not in self.messages or name in seen:
            return name if name not in seen else seen.index(name)
        return {number: [field[0], self.shape(field[1], (*seen, name)), *field[2:]] for number, field in self.shapes[name].items()}


# Services


def _services(old: _Schema, new: _Schema) -> Iterator[Change]:
    gone = [name for name in old.services if name not in new.services]
    fresh = [name for name in new.services if name not in old.services]
    for name in gone:
        heir = next((other for other in fresh if old.services[name].keys() <= new.services[other].keys()), None)
        text = f"service renamed to {heir}: the path of every call changes" if heir else "service removed"
        yield Change(severity=Severity.WIRE, subject=name, text=text)
        fresh = [other for other in fresh if other != heir]
    for name in fresh:
        yield Change(severity=Severity.ADDITIVE, subject=name, text=f"service added: {', '.join(new.services[name])}")
    for name in old.services:
        if name in new.services:
            yield from _methods(old, new, name)


def _methods(old: _Schema, new: _Schema, service: str) -> Iterator[Change]:
    before, after = old.services[service], new.services[service]
    for name, (request, response, *streams) in before.items():
        subject = f"{service}.{name}"
        if name not in after:
            yield Change(severity=Severity.WIRE, subject=subject, text="method removed")
            continue
        new_request, new_response, *new_streams = after[name]
        for role, one, other in (("request", request, new_request), ("response", response, new_response)):
            if one != other:
                same = old.shape(one) == new.shape(other)
                text = f"{role} type {one} -> {other}" + (" (the same fields)" if same else "")
                yield Change(severity=Severity.SOURCE if same else Severity.WIRE, subject=subject, text=text)
        for side, was, now in zip(("client", "server"), streams, new_streams, strict=True):
            if was != now:
                yield Change(severity=Severity.WIRE, subject=subject, text=f"{side} streaming {'added' if now else 'removed'}")
    for name, (request, response, *streams) in after.items():
        if name not in before:
            arrow = "stream " * streams[0] + request, "stream " * streams[1] + response
            yield Change(severity=Severity.ADDITIVE, subject=f"{service}.{name}", text="method added ({}) returns ({})".format(*arrow))


# Messages


def _messages(old: _Schema, new: _Schema) -> Iterator[Change]:
    for name in old.messages:
        if name in new.messages:
            yield from _fields(old, new, name)
        elif not old.is_entry(name):
            used = name in old.referenced
            text = "message removed" if used else "message removed, which nothing used"
            yield Change(severity=Severity.SEMANTIC if used else Severity.SOURCE, subject=name, text=text)
    for name, message in new.messages.items():
        if name not in old.messages and not new.is_entry(name):
            listed = ", ".join(f"{_spelled(message, field)}={field.number}" for field in message.field)
            yield Change(severity=Severity.ADDITIVE, subject=name, text=f"message added ({listed})")


def _fields(old: _Schema, new: _Schema, name: str) -> Iterator[Change]:
    was, now = old.messages[name], new.messages[name]
    old_names, new_names = ({field.name: field for field in message.field} for message in (was, now))
    old_numbers, new_numbers = ({field.number: field for field in message.field} for message in (was, now))
    for field in was.field:
        subject = f"{name}.{field.name}"
        moved, heir = new_names.get(field.name), new_numbers.get(field.number)
        if moved is not None and moved.number != field.number:
            retyped = "" if _type(field) == _type(moved) else f" ({_type(field)} -> {_type(moved)})"
            yield Change(severity=Severity.WIRE, subject=subject, text=f"renumbered {field.number} -> {moved.number}{retyped}")
        if heir is not None and heir.name != field.name:
            if moved is not None or heir.name in old_names:
                text = f"number {field.number} reused: {_spelled(was, field)} -> {_spelled(now, heir)}"
                yield Change(severity=Severity.WIRE, subject=subject, text=text)
            else:
                text = f"number {field.number} renamed {field.name} -> {heir.name}"
                yield Change(severity=Severity.SOURCE, subject=subject, text=text, renamed_to=heir.name)
                yield from _field(old, new, was, field, now, heir, subject)
        elif heir is not None:
            yield from _field(old, new, was, field, now, heir, subject)
        elif moved is None:
            kept = any(span.start <= field.number < span.end for span in now.reserved_range)
            text = f"field {_spelled(was, field)} = {field.number} removed (number {'reserved' if kept else 'NOT reserved'})"
            yield Change(severity=Severity.SEMANTIC, subject=subject, text=text)
    for field in now.field:
        if field.number not in old_numbers and field.name not in old_names:
            subject, text = f"{name}.{field.name}", f"field {_spelled(now, field)} = {field.number} added"
            if any(span.start <= field.number < span.end for span in was.reserved_range):
                text += ", on a number that was reserved: peers older than both schemas read it as what it was"
                yield Change(severity=Severity.SEMANTIC, subject=subject, text=text)
            else:
                yield Change(severity=Severity.ADDITIVE, subject=subject, text=text)


def _field(
    old: _Schema,
    new: _Schema,
    was: DescriptorProto,
    before: FieldDescriptorProto,
    now: DescriptorProto,
    after: FieldDescriptorProto,
    subject: str,
) -> Iterator[Change]:
    """What changed in a field that kept its number."""
    old_type, new_type = type_name(before), type_name(after)
    if old_type != new_type or before.type != after.type:
        severity, why = _retyped(old, new, before, after)
        yield Change(severity=severity, subject=subject, text=f"type {old_type} -> {new_type} ({why})")
    old_label, new_label = label(before), label(after)
    old_oneof, new_oneof = oneof_name(was, before), oneof_name(now, after)
    if "repeated" in (old_label, new_label) and old_label != new_label:
        severity, why = _requantified(before, after)
        yield Change(severity=severity, subject=subject, text=f"{old_label or 'singular'} -> {new_label or 'singular'} ({why})")
    elif old_oneof != new_oneof and bool(old_oneof) != bool(new_oneof):
        text = f"moved {f'into oneof {new_oneof}' if new_oneof else f'out of oneof {old_oneof}'} (same bytes; presence and clearing differ)"
        yield Change(severity=Severity.SEMANTIC, subject=subject, text=text)
    elif old_oneof != new_oneof:
        siblings = [
            {field.name for field in message.field if oneof_name(message, field) == oneof_name(message, own)}
            for message, own in ((was, before), (now, after))
        ]
        renamed = siblings[0] <= siblings[1]
        severity = Severity.SOURCE if renamed else Severity.SEMANTIC
        yield Change(severity=severity, subject=subject, text=f"oneof {old_oneof} -> {new_oneof}{' (renamed)' if renamed else ''}")
    elif old_label != new_label and FieldDescriptorProto.TYPE_MESSAGE not in (before.type, after.type):
        gained = new_label == "optional"
        text = (
            "presence added: a default that is sent differs from nothing sent"
            if gained
            else "presence removed: a default that was sent is now the same as nothing sent"
        )
        yield Change(severity=Severity.SEMANTIC, subject=subject, text=text)
    if before.default_value != after.default_value:
        text = f"default {before.default_value or 'none'} -> {after.default_value or 'none'}"
        yield Change(severity=Severity.SEMANTIC, subject=subject, text=text)
    if before.name == after.name and _json_name(before) != _json_name(after):
        yield Change(severity=Severity.SOURCE, subject=subject, text=f"JSON name {_json_name(before)} -> {_json_name(after)}")


_Type = FieldDescriptorProto
_GROUPS: Final = (
    (
        "the same varint, other ranges",
        (_Type.TYPE_INT32, _Type.TYPE_INT64, _Type.TYPE_UINT32, _Type.TYPE_UINT64, _Type.TYPE_BOOL, _Type.TYPE_ENUM),
    ),
    ("the same zigzag varint, other ranges", (_Type.TYPE_SINT32, _Type.TYPE_SINT64)),
    ("the same 4 bytes, other signs", (_Type.TYPE_FIXED32, _Type.TYPE_SFIXED32)),
    ("the same 8 bytes, other signs", (_Type.TYPE_FIXED64, _Type.TYPE_SFIXED64)),
    ("the same bytes, checked for UTF-8 on one side only", (_Type.TYPE_STRING, _Type.TYPE_BYTES)),
    ("a message is its serialized bytes", (_Type.TYPE_MESSAGE, _Type.TYPE_BYTES)),
)
_LENGTH_DELIMITED: Final = (_Type.TYPE_STRING, _Type.TYPE_BYTES, _Type.TYPE_MESSAGE)


def _retyped(old: _Schema, new: _Schema, before: FieldDescriptorProto, after: FieldDescriptorProto) -> tuple[Severity, str]:
    if before.type == after.type:
        if old.shape(type_name(before)) == new.shape(type_name(after)):
            return (
                Severity.SOURCE,
                "another name for the same fields" if before.type == _Type.TYPE_MESSAGE else "another name for the same values",
            )
        if before.type == _Type.TYPE_ENUM:
            return Severity.SEMANTIC, "the same numbers mean other values"
        return Severity.WIRE, "another message"
    for why, group in _GROUPS:
        if before.type in group and after.type in group:
            return Severity.SEMANTIC, why
    return Severity.WIRE, "other bytes"


def _requantified(before: FieldDescriptorProto, after: FieldDescriptorProto) -> tuple[Severity, str]:
    # Numbers are packed when repeated, so the two do not even share a wire type.
    if before.type in _LENGTH_DELIMITED and after.type in _LENGTH_DELIMITED:
        return Severity.SEMANTIC, "the last of several wins, or messages are merged"
    return Severity.WIRE, "repeated numbers are packed"


def _type(field: FieldDescriptorProto) -> str:
    return " ".join(filter(None, (label(field), type_name(field))))


def _spelled(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    oneof = oneof_name(message, field)
    return f"{_type(field)} {field.name}" + (f" [oneof {oneof}]" if oneof else "")


def _json_name(field: FieldDescriptorProto) -> str:
    head, *rest = field.name.split("_")
    return field.json_name or head + "".join(part[:1].upper() + part[1:] for part in rest)


# Enums


def _enums(old: _Schema, new: _Schema) -> Iterator[Change]:
    for name in old.enums:
        if name in new.enums:
            yield from _values(old.enums[name], new.enums[name], name)
        else:
            used = name in old.referenced
            yield Change(severity=Severity.SEMANTIC if used else Severity.SOURCE, subject=name, text="enum removed")
    for name, enumeration in new.enums.items():
        if name not in old.enums:
            listed = ", ".join(f"{value.name}={value.number}" for value in enumeration.value)
            yield Change(severity=Severity.ADDITIVE, subject=name, text=f"enum added ({listed})")


def _values(was: EnumDescriptorProto, now: EnumDescriptorProto, name: str) -> Iterator[Change]:
    before, after = ({value.name: value.number for value in enumeration.value} for enumeration in (was, now))
    for value, number in before.items():
        subject = f"{name}.{value}"
        heirs = [other for other, there in after.items() if there == number and other not in before]
        if value in after:
            if after[value] != number:
                yield Change(severity=Severity.SEMANTIC, subject=subject, text=f"enum value renumbered {number} -> {after[value]}")
        elif heirs:
            yield Change(severity=Severity.SOURCE, subject=subject, text=f"enum value {number} renamed {value} -> {heirs[0]}")
        else:
            taken = next((other for other, there in after.items() if there == number), None)
            text = f"enum value {number} removed" + (f"; the number is now {taken}" if taken else "")
            yield Change(severity=Severity.SEMANTIC, subject=subject, text=text)
    for value, number in after.items():
        if value not in before and number not in before.values():
            yield Change(severity=Severity.ADDITIVE, subject=f"{name}.{value}", text=f"enum value {number} added")
