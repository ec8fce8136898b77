"""Protobuf descriptors -> the wire facts in them, as `.proto` text and as a hash.

A wire fact is what two sides must agree on: packages, messages, field names, numbers, types and labels, oneofs, enums, reservations,
services. `normalized` drops everything else, `render` writes the rest, `schema_hash` compares schemas from different sources.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


def normalized(files: Iterable[FileDescriptorProto]) -> list[FileDescriptorProto]:
    """Copies without what is no wire fact: comments, language options, JSON names, deprecation marks.

    Anything else that the text writer has no words for (extensions, other options, proto2) ends the run rather than be lost.
    """
    copies = []
    for original in files:
        file = FileDescriptorProto()
        file.CopyFrom(original)
        file.ClearField("source_code_info")
        file.ClearField("options")
        if file.syntax != "proto3" or file.extension or file.public_dependency or file.weak_dependency:
            sys.exit(f"{file.name}: only proto3 without extensions and without public or weak imports is supported")
        for message in walk_messages(file.message_type):
            for field in message.field:
                field.ClearField("json_name")
            # protoc appends an entry type where it meets the map field, so their place depends on how the text is laid out.
            nested = sorted(message.nested_type, key=lambda inner: inner.name)
            del message.nested_type[:]
            message.nested_type.extend(nested)
            if message.extension or message.extension_range:
                sys.exit(f"{file.name}: message {message.name} has extensions")
            drop_deprecated(file, message, *message.field, *message.oneof_decl)
        for enum in walk_enums(file):
            drop_deprecated(file, enum, *enum.value)
        for service in file.service:
            drop_deprecated(file, service, *service.method)
        copies.append(file)
    return copies


def drop_deprecated(file: FileDescriptorProto, *elements: Any) -> None:
    for element in elements:
        for option, _ in element.options.ListFields():
            if option.name == "deprecated":
                element.options.ClearField("deprecated")
            elif option.name not in ("map_entry", "allow_alias"):
                sys.exit(f"{file.name}: {element.name} has option {option.name}, which the text writer does not know")
        if not element.options.ListFields():
            element.ClearField("options")


def walk_messages(messages: Iterable[DescriptorProto]) -> Iterator[DescriptorProto]:
    for message in messages:
        yield message
        yield from walk_messages(message.nested_type)


def walk_enums(file: FileDescriptorProto) -> Iterator[EnumDescriptorProto]:
    yield from file.enum_type
    for message in walk_messages(file.message_type):
        yield from message.enum_type


# The schema hash


def schema_hash(files: Sequence[FileDescriptorProto]) -> str:
    """SHA-256 of the canonical form, which docs/protos.md defines."""
    return hashlib.sha256(json.dumps(canonical(files), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def canonical(files: Sequence[FileDescriptorProto]) -> dict[str, dict[str, Any]]:
    imported = {name for file in files for name in file.dependency}
    types: dict[str, DescriptorProto | EnumDescriptorProto] = {}
    services: dict[str, dict[str, Any]] = {}
    waiting: list[str] = []
    for file in files:
        declared = dict(named_types(f".{file.package}", file.message_type, file.enum_type))
        types |= declared
        if file.name in imported:
            continue
        waiting += declared
        for service in file.service:
            services[f"{file.package}.{service.name}"] = {
                method.name: [method.input_type[1:], method.output_type[1:], method.client_streaming, method.server_streaming]
                for method in service.method
            }
            waiting += [name for method in service.method for name in (method.input_type, method.output_type)]
    messages: dict[str, dict[str, Any]] = {}
    enums: dict[str, dict[str, int]] = {}
    while waiting:
        name = waiting.pop()
        found = types[name]
        if isinstance(found, EnumDescriptorProto):
            enums[name[1:]] = {value.name: value.number for value in found.value}
        elif name[1:] not in messages:
            waiting += [field.type_name for field in found.field if field.type_name]
            messages[name[1:]] = {
                str(field.number): [field.name, type_name(field), label(field), oneof_name(found, field)] for field in found.field
            }
    return {"messages": messages, "enums": enums, "services": services}


def named_types(
    scope: str, messages: Iterable[DescriptorProto], enums: Iterable[EnumDescriptorProto]
) -> Iterator[tuple[str, DescriptorProto | EnumDescriptorProto]]:
    yield from ((f"{scope}.{enum.name}", enum) for enum in enums)
    for message in messages:
        yield f"{scope}.{message.name}", message
        yield from named_types(f"{scope}.{message.name}", message.nested_type, message.enum_type)


# The text


def render(file: FileDescriptorProto, header: str) -> str:
    lines = [f"// {header}", "", 'syntax = "proto3";', "", f"package {file.package};"]
    if file.dependency:
        lines += ["", *(f'import "{name}";' for name in file.dependency)]
    for service in file.service:
        lines += ["", *render_service(service, file.package)]
    for enum in file.enum_type:
        lines += ["", *render_enum(enum)]
    for message in file.message_type:
        lines += ["", *render_message(message, f".{file.package}.{message.name}", file.package)]
    return re.sub(r"\{\n *\}", "{}", "\n".join(lines)) + "\n"


def render_service(service: ServiceDescriptorProto, package: str) -> Iterator[str]:
    yield f"service {service.name} {{"
    for method in service.method:
        request = "stream " * method.client_streaming + short(method.input_type, package)
        response = "stream " * method.server_streaming + short(method.output_type, package)
        yield f"  rpc {method.name}({request}) returns ({response});"
    yield "}"


def render_enum(enum: EnumDescriptorProto) -> Iterator[str]:
    yield f"enum {enum.name} {{"
    if enum.options.allow_alias:
        yield "  option allow_alias = true;"
    # An enum's reserved range includes its end, a message's does not.
    yield from render_reserved([(span.start, span.end) for span in enum.reserved_range], enum.reserved_name)
    yield from (f"  {value.name} = {value.number};" for value in enum.value)
    yield "}"


def render_message(message: DescriptorProto, scope: str, package: str) -> Iterator[str]:
    entries = {f"{scope}.{inner.name}": inner for inner in message.nested_type if inner.options.map_entry}

    def declaration(field: FieldDescriptorProto) -> str:
        if field.type_name in entries:
            key, value = (short(type_name(part), package) for part in entries[field.type_name].field)
            return f"map<{key}, {value}> {field.name} = {field.number};"
        return " ".join(filter(None, [label(field), short(type_name(field), package), field.name, "=", f"{field.number};"]))

    yield f"message {message.name} {{"
    yield from render_reserved([(span.start, span.end - 1) for span in message.reserved_range], message.reserved_name)
    for enum in message.enum_type:
        yield from (f"  {line}" for line in render_enum(enum))
    for inner in message.nested_type:
        if not inner.options.map_entry:
            yield from (f"  {line}" for line in render_message(inner, f"{scope}.{inner.name}", package))
    opened = set()
    for field in message.field:
        name = oneof_name(message, field)
        if not name:
            yield f"  {declaration(field)}"
        elif name not in opened:
            opened.add(name)
            yield f"  oneof {name} {{"
            yield from (f"    {declaration(member)}" for member in message.field if oneof_name(message, member) == name)
            yield "  }"
    yield "}"


def render_reserved(spans: Iterable[tuple[int, int]], names: Iterable[str]) -> Iterator[str]:
    if numbers := ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans):
        yield f"  reserved {numbers};"
    if quoted := ", ".join(f'"{name}"' for name in names):
        yield f"  reserved {quoted};"


def label(field: FieldDescriptorProto) -> str:
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return "repeated"
    return "optional" if field.proto3_optional else ""


def type_name(field: FieldDescriptorProto) -> str:
    return field.type_name.removeprefix(".") or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def short(name: str, package: str) -> str:
    """A type as text of `package` names it. Were protoc to find another type by that name, the round trip in `write_text` would show it."""
    return name.removeprefix(".").removeprefix(f"{package}.")


def oneof_name(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    # protoc models `optional` as a oneof of one; those do not count.
    real = field.HasField("oneof_index") and not field.proto3_optional
    return message.oneof_decl[field.oneof_index].name if real else ""
