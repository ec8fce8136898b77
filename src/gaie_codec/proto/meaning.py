"""Messages of two schemas compared by what they say: names and values, never numbers.

A scalar without presence always says something, its default included; one with presence may be absent. Both differ on the wire only in
what a zero means, which is why a comparison of bytes, or of the fields that are set, would overlook a change of presence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ..snapshots import is_repeated

__all__ = [
    "ABSENT",
    "AnyDescriptor",
    "AnyField",
    "Renames",
    "between",
    "copy_by_name",
    "differences",
    "is_map",
    "meaning",
    "samples",
    "shown",
]


class _Absent:
    def __repr__(self) -> str:
        return "absent"

    def __bool__(self) -> bool:
        return False


ABSENT: Final = _Absent()
"""Stands for a field that has presence and is not set."""

# The stubs tell upb's descriptors from the pure ones, so that neither fits where the other is named.
AnyDescriptor: TypeAlias = Any
AnyField: TypeAlias = Any

Renames: TypeAlias = Mapping[str, str]
"""Full name of a field in the sender's schema -> its plain name in the reader's."""

_MAX_SHOWN: Final = 40


def meaning(message: Message) -> dict[str, Any]:
    """What a message says, by field name; enum values by name too."""
    return {field.name: _said(message, field) for field in message.DESCRIPTOR.fields}


def _said(message: Message, field: AnyField) -> Any:
    value = getattr(message, field.name)
    if is_map(field):
        inner = field.message_type.fields_by_name["value"]
        return {key: _value(value[key], inner) for key in value}
    if is_repeated(field):
        return [_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return ABSENT
    return _value(value, field)


def _value(value: Any, field: AnyField) -> Any:
    if field.message_type is not None:
        return meaning(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else f"unknown value {value}"
    return value


def differences(sent: Message, read: Message, renames: Renames) -> Iterator[tuple[str, str]]:
    """(full name of the field, what is wrong) for everything that `read` does not say as `sent` does.

    Only `sent`'s fields count, and what `read` cannot name: a field that only `read` has must be empty.
    """
    found = list(between(meaning(sent), sent.DESCRIPTOR, meaning(read), read.DESCRIPTOR, renames))
    # Bytes that are left over follow from what was found; alone they are the only trace.
    yield from found or ((name, f"bytes of number {number} are left over") for name, number in _left_over(read))


def between(
    sent: dict[str, Any], schema: AnyDescriptor, read: dict[str, Any], reader: AnyDescriptor, renames: Renames
) -> Iterator[tuple[str, str]]:
    """The differences of two meanings, each with its schema."""
    names = {}
    for field in schema.fields:
        full_name = f"{schema.full_name}.{field.name}"
        names[renames.get(full_name, field.name)] = field.name
        there = reader.fields_by_name.get(renames.get(full_name, field.name))
        value = sent[field.name]
        if there is None:
            if not _is_nothing(value):
                yield full_name, f"sent {shown(value)}, and the reader has no such field"
        elif (
            field.message_type is None
            or there.message_type is None
            or is_map(field) != is_map(there)
            or is_repeated(field) != is_repeated(there)
        ):
            if not _same(value, read[there.name]):
                yield full_name, f"sent {shown(value)}, read {shown(read[there.name])}"
        else:
            yield from _nested(value, field, read[there.name], there, full_name, renames)
    for field in reader.fields:
        if field.name not in names and not _is_nothing(read[field.name]):
            yield f"{reader.full_name}.{field.name}", f"nothing sent, read {shown(read[field.name])}"


def _nested(value: Any, field: AnyField, other: Any, there: AnyField, full_name: str, renames: Renames) -> Iterator[tuple[str, str]]:
    entry, other_entry = field.message_type, there.message_type
    if is_map(field):
        entry, other_entry = entry.fields_by_name["value"].message_type, other_entry.fields_by_name["value"].message_type
        if entry is None or other_entry is None or value.keys() != other.keys():
            if not _same(value, other):
                yield full_name, f"sent {shown(value)}, read {shown(other)}"
            return
        pairs = [(value[key], other[key]) for key in value]
    elif is_repeated(field):
        if len(value) != len(other):
            yield full_name, f"sent {len(value)} of them, read {len(other)}"
        pairs = list(zip(value, other, strict=False))
    elif value is ABSENT or other is ABSENT:
        if value is not other:
            yield full_name, f"sent {shown(value)}, read {shown(other)}"
        return
    else:
        pairs = [(value, other)]
    for one, two in pairs:
        yield from between(one, entry, two, other_entry, renames)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if one is ABSENT or two is ABSENT:
        return one is two
    return type(one) is type(two) and (one == two or (one != one and two != two))  # a NaN is a NaN


def _is_nothing(value: Any) -> bool:
    return not value


def _left_over(message: Message) -> Iterator[tuple[str, int]]:
    unknown: Any = UnknownFieldSet(message)
    yield from ((message.DESCRIPTOR.full_name, field.field_number) for field in unknown)
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if is_map(field):
            inner = field.message_type.fields_by_name["value"].message_type
            children = list(value.values()) if inner is not None else []
        else:
            children = list(value) if is_repeated(field) else [value]
        for child in children:
            yield from _left_over(child)


def copy_by_name(source: Message, target: Message, renames: Renames) -> Iterator[tuple[str, str]]:
    """Say in `target` what `source` says, as code that knows names would; yields (full name, why) for what cannot be said."""
    for field in source.DESCRIPTOR.fields:
        value = getattr(source, field.name)
        full_name = f"{source.DESCRIPTOR.full_name}.{field.name}"
        there = target.DESCRIPTOR.fields_by_name.get(renames.get(full_name, field.name))
        if _is_nothing(value) if is_repeated(field) else field.has_presence and not source.HasField(field.name):
            continue
        if there is None:
            if field.has_presence or not _is_nothing(value):
                yield full_name, "cannot be sent: there is no field of that name"
            continue
        # Code that always writes a plain scalar writes its default too, but that must not take a oneof from another member.
        if not field.has_presence and _is_nothing(value) and there.containing_oneof is not None:
            continue
        try:
            yield from _copy_field(value, field, target, there, renames)
        except (TypeError, ValueError, AttributeError) as error:
            yield full_name, f"{shown(value)} cannot be sent as {_type_of(there)}: {type(error).__name__}"


def _copy_field(value: Any, field: AnyField, target: Message, there: AnyField, renames: Renames) -> Iterator[tuple[str, str]]:
    room: Any = getattr(target, there.name)
    if is_map(field):
        inner, inner_there = (one.message_type.fields_by_name["value"] for one in (field, there))
        for key in value:
            if inner.message_type is not None:
                yield from copy_by_name(value[key], room[key], renames)
            else:
                room[key] = _translated(value[key], inner, inner_there)
    elif is_repeated(field):
        for item in value:
            if field.message_type is not None:
                yield from copy_by_name(item, room.add(), renames)
            else:
                room.append(_translated(item, field, there))
    elif field.message_type is not None:
        room.SetInParent()
        yield from copy_by_name(value, room, renames)
    else:
        setattr(target, there.name, _translated(value, field, there))


def _translated(value: Any, field: AnyField, there: AnyField) -> Any:
    """An enum's value has the number that the other schema gives to its name."""
    if field.enum_type is None or there.enum_type is None or value not in field.enum_type.values_by_number:
        return value
    name = field.enum_type.values_by_number[value].name
    if name not in there.enum_type.values_by_name:
        raise ValueError(f"no value {name}")
    return there.enum_type.values_by_name[name].number


def _type_of(field: AnyField) -> str:
    kind = field.message_type or field.enum_type
    return kind.full_name if kind is not None else _TYPE_NAMES[field.type]


_TYPE_NAMES: Final = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower() for name in dir(FieldDescriptor) if name.startswith("TYPE_")
}


def samples(field: AnyField) -> list[Any]:
    """Values of one scalar: its default, an ordinary one, and the ends of its range; every value of an enum."""
    if field.enum_type is not None:
        return [value.number for value in field.enum_type.values]
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return [b"", b"\x01"] if field.type == FieldDescriptor.TYPE_BYTES else ["", "a\u00e9"]
        case FieldDescriptor.CPPTYPE_BOOL:
            return [False, True]
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return [0.0, 0.5, -2.0]
        case FieldDescriptor.CPPTYPE_UINT32:
            return [0, 5, 2**32 - 1]
        case FieldDescriptor.CPPTYPE_UINT64:
            return [0, 5, 2**64 - 1]
        case FieldDescriptor.CPPTYPE_INT32:
            return [0, 5, -1, 2**31 - 1]
        case _:
            return [0, 5, -1, 2**63 - 1]


def is_map(field: AnyField) -> bool:
    """Whether a field is a map, which the wire holds as a repeated message."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def shown(value: Any) -> str:
    """A value as part of a line."""
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if not _is_nothing(inner)}
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"
