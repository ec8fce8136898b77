"""Protobuf descriptors -> `.proto` text: what `canonical.normalized` leaves of a file, and nothing of upstream's comments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .canonical import label, oneof_name, scope_of, type_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FieldDescriptorProto,
        FileDescriptorProto,
        ServiceDescriptorProto,
    )

__all__ = ["write_proto"]


def write_proto(file: FileDescriptorProto, header: str) -> str:
    """The text of one normalized file below a one-line comment. `vendoring` compiles what it writes and compares."""
    lines = [f"// {header}", "", 'syntax = "proto3";']
    if file.package:
        lines += ["", f"package {file.package};"]
    if file.dependency:
        lines += ["", *(f'import "{name}";' for name in file.dependency)]
    for service in file.service:
        lines += ["", *_service(service, file.package)]
    for enum in file.enum_type:
        lines += ["", *_enum(enum)]
    for message in file.message_type:
        lines += ["", *_message(message, f"{scope_of(file)}.{message.name}", file.package)]
    return re.sub(r"\{\n *\}", "{}", "\n".join(lines)) + "\n"


def _service(service: ServiceDescriptorProto, package: str) -> Iterator[str]:
    yield f"service {service.name} {{"
    for method in service.method:
        request = "stream " * method.client_streaming + _short(method.input_type, package)
        response = "stream " * method.server_streaming + _short(method.output_type, package)
        yield f"  rpc {method.name}({request}) returns ({response});"
    yield "}"


def _enum(enum: EnumDescriptorProto) -> Iterator[str]:
    yield f"enum {enum.name} {{"
    if enum.options.allow_alias:
        yield "  option allow_alias = true;"
    # An enum's reserved range includes its end, a message's does not.
    yield from _reserved([(span.start, span.end) for span in enum.reserved_range], enum.reserved_name)
    yield from (f"  {value.name} = {value.number};" for value in enum.value)
    yield "}"


def _message(message: DescriptorProto, scope: str, package: str) -> Iterator[str]:
    entries = {f"{scope}.{inner.name}": inner for inner in message.nested_type if inner.options.map_entry}

    def declaration(field: FieldDescriptorProto) -> str:
        if field.type_name in entries:
            key, value = (_short(type_name(part), package) for part in entries[field.type_name].field)
            return f"map<{key}, {value}> {field.name} = {field.number};"
        return " ".join(filter(None, [label(field), _short(type_name(field), package), field.name, "=", f"{field.number};"]))

    yield f"message {message.name} {{"
    yield from _reserved([(span.start, span.end - 1) for span in message.reserved_range], message.reserved_name)
    for enum in message.enum_type:
        yield from (f"  {line}" for line in _enum(enum))
    for inner in message.nested_type:
        if not inner.options.map_entry:
            yield from (f"  {line}" for line in _message(inner, f"{scope}.{inner.name}", package))
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


def _reserved(spans: Iterable[tuple[int, int]], names: Iterable[str]) -> Iterator[str]:
    if numbers := ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans):
        yield f"  reserved {numbers};"
    if quoted := ", ".join(f'"{name}"' for name in names):
        yield f"  reserved {quoted};"


def _short(name: str, package: str) -> str:
    """A type as text of `package` names it. Were protoc to find another type by that name, the round trip in `vendoring` would show it."""
    return name.removeprefix(".").removeprefix(f"{package}.")
