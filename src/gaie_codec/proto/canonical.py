"""Protobuf descriptors -> the wire facts in them, in a canonical form that has a hash.

A wire fact is what two sides must agree on: packages, messages, field names, numbers, types and labels, oneofs, enums, reservations,
services. `normalized` drops everything else and `schema_hash` compares schemas from different sources, whether text, a generated
module or server reflection. docs/protos.md defines the form.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto

from .. import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WELL_KNOWN: Final = "google/protobuf/"
"""protoc brings these files along. They are never vendored as text."""


def schema_hash(files: Sequence[FileDescriptorProto]) -> str:
    """SHA-256 of the canonical form, in hexadecimal. Files may be in any order; raises UsageError if an imported one is missing."""
    return hashlib.sha256(json.dumps(canonical(files), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def canonical(files: Sequence[FileDescriptorProto]) -> dict[str, dict[str, Any]]:
    """`{"messages": ..., "enums": ..., "services": ...}` of the main files and all that they reach.

    Main files are those that no other file imports, and those that declare services.
    """
    imported = {name for file in files for name in file.dependency}
    types: dict[str, DescriptorProto | EnumDescriptorProto] = {}
    services: dict[str, dict[str, Any]] = {}
    waiting: list[str] = []
    for file in files:
        declared = dict(named_types(scope_of(file), file.message_type, file.enum_type))
        types |= declared
        if file.name in imported and not file.service:
            continue
        waiting += declared
        for service in file.service:
            services[f"{scope_of(file)}.{service.name}"[1:]] = {
                method.name: [method.input_type[1:], method.output_type[1:], method.client_streaming, method.server_streaming]
                for method in service.method
            }
            waiting += [name for method in service.method for name in (method.input_type, method.output_type)]
    messages: dict[str, dict[str, Any]] = {}
    enums: dict[str, dict[str, int]] = {}
    while waiting:
        name = waiting.pop()
        if name not in types:
            raise UsageError(f"the schema uses {name.removeprefix('.')}, which none of its files declares")
        found = types[name]
        if isinstance(found, EnumDescriptorProto):
            enums[name[1:]] = {value.name: value.number for value in found.value}
        elif name[1:] not in messages:
            waiting += [field.type_name for field in found.field if field.type_name]
            messages[name[1:]] = {
                str(field.number): [field.name, type_name(field), label(field), oneof_name(found, field)] for field in found.field
            }
    return {"messages": messages, "enums": enums, "services": services}


def normalized(files: Iterable[FileDescriptorProto]) -> list[FileDescriptorProto]:
    """Copies without what is no wire fact: comments, language options, JSON names, deprecation marks.

    Raises UsageError for anything else that the text writer has no words for (extensions, other options, proto2) rather than lose it.
    """
    copies = []
    for original in files:
        file = FileDescriptorProto()
        file.CopyFrom(original)
        file.ClearField("source_code_info")
        file.ClearField("options")
        if file.syntax != "proto3" or file.extension or file.public_dependency or file.weak_dependency:
            raise UsageError(f"{file.name}: only proto3 without extensions and without public or weak imports is supported")
        for message in walk_messages(file.message_type):
            for field in message.field:
                field.ClearField("json_name")
            # protoc appends an entry type where it meets the map field, so their place depends on how the text is laid out.
            nested = sorted(message.nested_type, key=lambda inner: inner.name)
            del message.nested_type[:]
            message.nested_type.extend(nested)
            if message.extension or message.extension_range:
                raise UsageError(f"{file.name}: message {message.name} has extensions")
            _drop_deprecated(file, message, *message.field, *message.oneof_decl)
        for enum in walk_enums(file):
            _drop_deprecated(file, enum, *enum.value)
        for service in file.service:
            _drop_deprecated(file, service, *service.method)
        copies.append(file)
    return copies


def _drop_deprecated(file: FileDescriptorProto, *elements: Any) -> None:
    for element in elements:
        for option, _ in element.options.ListFields():
            if option.name == "deprecated":
                element.options.ClearField("deprecated")
            elif option.name not in ("map_entry", "allow_alias"):
                raise UsageError(f"{file.name}: {element.name} has option {option.name}, which the text writer does not know")
        if not element.options.ListFields():
            element.ClearField("options")


def walk_messages(messages: Iterable[DescriptorProto]) -> Iterator[DescriptorProto]:
    """All messages and those within, outer ones first. Map entries are among them."""
    for message in messages:
        yield message
        yield from walk_messages(message.nested_type)


def walk_enums(file: FileDescriptorProto) -> Iterator[EnumDescriptorProto]:
    """All enums of a file, wherever they are declared."""
    yield from file.enum_type
    for message in walk_messages(file.message_type):
        yield from message.enum_type


def scope_of(file: FileDescriptorProto) -> str:
    """What the full name of a type of that file begins with: `.vllm.grpc.engine`, or nothing for a file without package."""
    return f".{file.package}" if file.package else ""


def named_types(
    scope: str, messages: Iterable[DescriptorProto], enums: Iterable[EnumDescriptorProto]
) -> Iterator[tuple[str, DescriptorProto | EnumDescriptorProto]]:
    """Every type below `scope` (such as `.vllm.grpc.engine`) with its full name."""
    yield from ((f"{scope}.{enum.name}", enum) for enum in enums)
    for message in messages:
        yield f"{scope}.{message.name}", message
        yield from named_types(f"{scope}.{message.name}", message.nested_type, message.enum_type)


def label(field: FieldDescriptorProto) -> str:
    """`repeated`, `optional` where presence is explicit, or nothing."""
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return "repeated"
    return "optional" if field.proto3_optional else ""


def type_name(field: FieldDescriptorProto) -> str:
    """A scalar's name in proto, or the full name of a message or an enum, without leading dot."""
    return field.type_name.removeprefix(".") or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def oneof_name(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """The oneof that a field belongs to, or nothing."""
    # protoc models `optional` as a oneof of one; those do not count.
    real = field.HasField("oneof_index") and not field.proto3_optional
    return message.oneof_decl[field.oneof_index].name if real else ""
