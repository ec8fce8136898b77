"""Any message of any snapshot, from its descriptors alone."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from ..snapshots import Snapshot, is_repeated

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def messages(draw: DrawFn, snapshot: Snapshot, name: str, *, max_fields: int = 6, depth: int = 3) -> Message:
    """Messages of that name: up to `max_fields` fields set in each, messages within messages down to `depth`.

    Floats are exact in their width and never NaN; enums have declared values; text is Unicode. Of a oneof the last one drawn stays.
    Raises UsageError when drawn, if the snapshot has no such message.
    """
    return _filled(draw, snapshot.message(name).DESCRIPTOR, max_fields, depth)


def _filled(draw: DrawFn, descriptor: Any, max_fields: int, depth: int) -> Message:
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if depth or field.message_type is None]
    if not fields:
        return message
    for field in draw(st.lists(st.sampled_from(fields), max_size=max_fields, unique_by=lambda field: field.number)):
        _fill(draw, message, field, max_fields, depth - 1)
    return message


def _fill(draw: DrawFn, message: Message, field: Any, max_fields: int, depth: int) -> None:
    room: Any = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[part] for part in ("key", "value"))
        for drawn in draw(st.lists(_scalars(key), min_size=1, max_size=2, unique=True)):
            if value.message_type is not None:
                room[drawn].CopyFrom(_filled(draw, value.message_type, max_fields, depth))
            else:
                room[drawn] = draw(_scalars(value))
    elif field.message_type is not None:
        for _ in range(draw(st.integers(1, 2)) if is_repeated(field) else 1):
            inner = _filled(draw, field.message_type, max_fields, depth)
            if is_repeated(field):
                room.append(inner)
            else:
                room.CopyFrom(inner)
                room.SetInParent()
    elif is_repeated(field):
        room.extend(draw(st.lists(_scalars(field), min_size=1, max_size=3)))
    else:
        setattr(message, field.name, draw(_scalars(field)))


def _scalars(field: Any) -> SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return st.binary(max_size=8) if field.type == FieldDescriptor.TYPE_BYTES else _TEXT
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_FLOAT:
            return st.floats(width=32, allow_nan=False)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats(allow_nan=False)
        case FieldDescriptor.CPPTYPE_UINT32:
            return st.integers(0, 2**32 - 1)
        case FieldDescriptor.CPPTYPE_UINT64:
            return st.integers(0, 2**64 - 1)
        case FieldDescriptor.CPPTYPE_INT32:
            return st.integers(-(2**31), 2**31 - 1)
        case _:
            return st.integers(-(2**63), 2**63 - 1)
