#!/usr/bin/env python3
"""Compiles src/gaie_codec/ext_proc/ext_proc.proto into _descriptor.py beside it. With --check it only says whether that is current."""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto

from gaie_codec.proto.compile import compile_folder, own_files

FOLDER = Path(__file__).resolve().parent.parent / "src/gaie_codec/ext_proc"
TARGET = FOLDER / "_descriptor.py"


def module() -> str:
    (file,) = own_files(compile_folder(FOLDER).file)
    # A message a line, so that a new field is a change of one line. Joined they are the file again.
    rest = FileDescriptorProto(name="gaie_codec/ext_proc.proto", package=file.package, dependency=file.dependency)
    pieces = [rest, *(FileDescriptorProto(message_type=[message]) for message in file.message_type), FileDescriptorProto(syntax=file.syntax)]
    lines = ['"""Generated from ext_proc.proto: its serialized FileDescriptorProto."""', "", "# ruff: noqa: E501", "", "FILE = ("]
    for piece in pieces:
        text = piece.SerializeToString().decode("latin-1").encode("unicode_escape").decode("ascii").replace('"', r"\x22")
        lines.append(f'    b"{text}"')
    return "\n".join([*lines, ")"]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text() != module() and f"{TARGET} is not current: run `make data`")
    TARGET.write_text(module())
