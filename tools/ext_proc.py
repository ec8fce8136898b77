#!/usr/bin/env python3
"""Compiles src/gaie_codec/ext_proc/ext_proc.proto into _descriptor.py beside it.

ext_proc.py                    writes it
ext_proc.py --check            says whether it is current
ext_proc.py --check-published  compares names, numbers and types with Envoy's own protos, as package xds-protos has them
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from gaie_codec.proto.compile import compile_folder, own_files
from gaie_codec.proto.download import download

FOLDER = Path(__file__).resolve().parent.parent / "src/gaie_codec/ext_proc"
TARGET = FOLDER / "_descriptor.py"
PUBLISHED = "xds-protos==1.85.0"
MODULES = (
    "envoy/service/ext_proc/v3/external_processor",
    "envoy/extensions/filters/http/ext_proc/v3/processing_mode",
    "envoy/config/core/v3/base",
    "envoy/type/v3/http_status",
)


def compiled() -> FileDescriptorProto:
    (file,) = own_files(compile_folder(FOLDER).file)
    file.name = "gaie_codec/ext_proc.proto"
    return file


def module() -> str:
    file = compiled()
    # A message a line, so that a new field is a change of one line. Joined they are the file again.
    rest = FileDescriptorProto(name=file.name, package=file.package, dependency=file.dependency)
    pieces = [rest, *(FileDescriptorProto(message_type=[message]) for message in file.message_type)]
    lines = ['"""Generated from ext_proc.proto: its serialized FileDescriptorProto."""', "", "# ruff: noqa: E501", "", "FILE = ("]
    for piece in (*pieces, FileDescriptorProto(syntax=file.syntax)):
        text = piece.SerializeToString().decode("latin-1").encode("unicode_escape").decode("ascii").replace('"', r"\x22")
        lines.append(f'    b"{text}"')
    return "\n".join([*lines, ")"]) + "\n"


def published() -> dict[str, DescriptorProto]:
    """Envoy's messages by their own names, nested ones as well."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        package = download(PUBLISHED, Path(scratch))
        for name in MODULES:
            for node in ast.walk(ast.parse((package / f"{name}_pb2.py").read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile":
                    found |= dict(_messages(FileDescriptorProto.FromString(ast.literal_eval(node.args[0])).message_type))
    return found


def _messages(messages: Iterable[DescriptorProto]) -> Iterator[tuple[str, DescriptorProto]]:
    for message in messages:
        yield message.name, message
        yield from _messages(message.nested_type)


def check_published() -> list[str]:
    theirs = published()
    faults = []
    for name, message in _messages(compiled().message_type):
        fields = {field.name: field for field in theirs[name].field}
        enums = {enum.name: {value.name: value.number for value in enum.value} for enum in theirs[name].enum_type}
        faults += [f"{name}.{field.name} is another field at Envoy" for field in message.field if not _same(field, fields.get(field.name))]
        faults += [
            f"{name}.{enum.name} has other values at Envoy"
            for enum in message.enum_type
            if {value.name: value.number for value in enum.value} != enums.get(enum.name)
        ]
    return faults


def _same(ours: FieldDescriptorProto, theirs: FieldDescriptorProto | None) -> bool:
    if theirs is None:
        return False
    # A status code is a number here, and an enum there: the same on the wire.
    kinds = {ours.type, theirs.type} - {FieldDescriptorProto.TYPE_INT32, FieldDescriptorProto.TYPE_ENUM}
    short = ours.type_name.rpartition(".")[2] == theirs.type_name.rpartition(".")[2] or ours.type == FieldDescriptorProto.TYPE_INT32
    return ours.number == theirs.number and ours.label == theirs.label and len(kinds) <= 1 and short


if __name__ == "__main__":
    if "--check-published" in sys.argv:
        found = check_published()
        print("\n".join(found) or f"ext_proc.proto is what {PUBLISHED} has")
        sys.exit(bool(found))
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text() != module() and f"{TARGET.name} is not current: run `make data`")
    TARGET.write_text(module())
