#!/usr/bin/env python3
"""Vendor model-server schemas: a published schema -> `proto_vendor/` text -> `gaie_codec/snapshots/_data/` modules.

    vendor.py write-text   one schema (.proto files or a FileDescriptorSet) becomes one snapshot folder
    vendor.py write-data   every snapshot folder becomes one Python module, plus the index
    vendor.py check        both again, in memory; lists what differs from the files and exits 1

The text is the source of truth: `write-data` compiles it with the protoc of grpcio-tools and never looks at the package it came
from. Text is written from descriptors, so it holds wire facts only and none of upstream's comments. docs/protos.md has examples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc
from proto_text import normalized, render, schema_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("src/gaie_codec/snapshots/_data")

# protoc brings these along. They are not vendored as text, but the run-time data holds them: a private pool starts empty.
WELL_KNOWN = "google/protobuf/"


# Descriptors


def read_sources(sources: Sequence[Path]) -> tuple[list[FileDescriptorProto], list[Path]]:
    """The files of a schema, dependencies first, and what was read: `.proto` files of one folder, or one FileDescriptorSet."""
    first = sources[0]
    if first.suffix != ".proto":
        return normalized(FileDescriptorSet.FromString(first.read_bytes()).file), [first]
    files = compile_text(first.parent, [source.name for source in sources])
    return files, [first.parent / file.name for file in own_files(files)]


def compile_text(folder: Path, names: Iterable[str]) -> list[FileDescriptorProto]:
    well_known = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "set.binpb")
        command = ["protoc", f"-I{folder}", f"-I{well_known}", "--include_imports", f"--descriptor_set_out={out}", *sorted(names)]
        if protoc.main(command):
            sys.exit(f"protoc does not accept {folder}")
        return normalized(FileDescriptorSet.FromString(out.read_bytes()).file)


def own_files(files: Iterable[FileDescriptorProto]) -> list[FileDescriptorProto]:
    return [file for file in files if not file.name.startswith(WELL_KNOWN)]


# Snapshot folders


def write_text(arguments: argparse.Namespace) -> None:
    files, sources = read_sources(arguments.sources)
    folder = arguments.root / "proto_vendor" / arguments.dialect.replace(".", "/") / arguments.snapshot
    provenance = {
        "dialect": arguments.dialect,
        "snapshot": arguments.snapshot,
        "package": arguments.package,
        "version": arguments.version,
        "licence": arguments.licence,
        "first_published": arguments.first_published,
        "releases": arguments.releases,
        "source_sha256": {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources},
        "schema_hash": schema_hash(files),
        "reconstructed": arguments.reconstructed,
    }
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "snapshot")
        for name, text in texts(files, provenance).items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(text)
        written = {file.name: file for file in compile_text(fresh, proto_names(fresh))}
        if any(written[file.name] != file for file in own_files(files)):
            sys.exit(f"{arguments.snapshot}: the text does not compile back to the same descriptors")
        (fresh / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)


def texts(files: Iterable[FileDescriptorProto], provenance: dict[str, Any]) -> dict[str, str]:
    header = "Written by tools/vendor.py from {package} {version} ({licence}).".format_map(provenance)
    return {file.name: render(file, header) for file in own_files(files)}


def proto_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.proto"))


# Run-time data


def generate(root: Path) -> tuple[dict[str, str], list[str]]:
    """The text of every file in the data package, and what is wrong with the folders they come from."""
    outputs: dict[str, str] = {}
    problems: list[str] = []
    index: dict[str, list[str]] = {}
    for folder, provenance in snapshot_folders(root):
        files = compile_text(folder, proto_names(folder))
        where = folder.relative_to(root).as_posix()
        for name, text in texts(files, provenance).items():
            if (folder / name).read_text() != text:
                problems.append(f"{where}/{name}: not as write-text lays it out")
        if schema_hash(files) != provenance["schema_hash"]:
            problems.append(f"{where}/provenance.json: schema_hash is not that of the text")
        dialect, snapshot = provenance["dialect"], provenance["snapshot"]
        module = re.sub(r"[^0-9a-z_]", "_", f"{dialect}__{snapshot}")
        if f"{module}.py" in outputs:
            sys.exit(f"{where}: another snapshot already has the module name {module}")
        outputs[f"{module}.py"] = data_module(files, where)
        index.setdefault(dialect, []).append(f'        "{snapshot}": "{module}",')
    lines = ['"""Generated by tools/vendor.py: which module holds which snapshot, a dialect\'s oldest first."""', "", "MODULES = {"]
    for dialect, entries in index.items():
        lines += [f'    "{dialect}": {{', *entries, "    },"]
    outputs["__init__.py"] = "\n".join([*lines, "}"]) + "\n"
    return outputs, problems


def snapshot_folders(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folders with their provenance, by dialect and then by age. Versions decide where two schemas came out on one day."""
    found = [(path.parent, json.loads(path.read_text())) for path in (root / "proto_vendor").rglob("provenance.json")]

    def age(entry: tuple[Path, dict[str, Any]]) -> tuple[str, str, list[int]]:
        facts = entry[1]
        return facts["dialect"], facts["first_published"], [int(part) for part in re.findall(r"\d+", facts["version"])]

    return sorted(found, key=age)


def data_module(files: Iterable[FileDescriptorProto], where: str) -> str:
    lines = [f'"""Generated by tools/vendor.py from {where}: serialized FileDescriptorProtos, dependencies first."""']
    lines += ["", "# ruff: noqa: E501", "", "FILES = ("]
    for file in files:
        lines += ["    (", *(f"        {literal(piece)}" for piece in pieces(file)), "    ),"]
    return "\n".join([*lines, ")"]) + "\n"


def pieces(file: FileDescriptorProto) -> Iterator[bytes]:
    """One piece for each message, enum and service, so that a new field is a change of one line. Joined they are the file again."""
    rest = FileDescriptorProto(name=file.name, package=file.package, dependency=file.dependency)
    yield rest.SerializeToString()
    yield from (FileDescriptorProto(message_type=[message]).SerializeToString() for message in file.message_type)
    yield from (FileDescriptorProto(enum_type=[enum]).SerializeToString() for enum in file.enum_type)
    yield from (FileDescriptorProto(service=[service]).SerializeToString() for service in file.service)
    yield FileDescriptorProto(syntax=file.syntax).SerializeToString()


def literal(data: bytes) -> str:
    # Not repr: it changes the kind of quote with the content, and ruff format would change it back.
    escaped = data.decode("latin-1").encode("unicode_escape").decode("ascii")
    return 'b"' + escaped.replace('"', r"\x22") + '"'


def write_data(arguments: argparse.Namespace) -> None:
    outputs, _ = generate(arguments.root)
    folder = arguments.root / DATA
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.py"):
        path.unlink()
    for name, text in outputs.items():
        (folder / name).write_text(text)


def check(arguments: argparse.Namespace) -> None:
    outputs, problems = generate(arguments.root)
    present = {path.name: path.read_text() for path in (arguments.root / DATA).glob("*.py")}
    for name in sorted(outputs.keys() | present.keys()):
        if outputs.get(name) != present.get(name):
            state = "missing" if name not in present else "stale" if name not in outputs else "differs"
            problems.append(f"{DATA}/{name}: {state}")
    if problems:
        sys.exit("\n".join([*problems, "run: python tools/vendor.py write-data"]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to work on (default: this one)")
    commands = parser.add_subparsers(required=True)

    text = commands.add_parser("write-text", help="write or replace one folder of proto_vendor")
    text.add_argument("dialect", help="such as vllm.engine")
    text.add_argument("snapshot", help="such as smg-0.4.28: after the first release with this schema")
    text.add_argument("sources", type=Path, nargs="+", help="the main .proto files, or a serialized FileDescriptorSet")
    text.add_argument("--package", required=True, help="the published package that the source comes from")
    text.add_argument("--version", required=True)
    text.add_argument("--licence", default="Apache-2.0", help="SPDX identifier (default: %(default)s)")
    text.add_argument("--first-published", required=True, metavar="YYYY-MM-DD", help="orders the snapshots of a dialect")
    text.add_argument("--releases", nargs="+", default=[], help="every release with this schema, such as vllm-0.14.1")
    text.add_argument("--reconstructed", action="store_true", help="no release ships this schema; it was inferred")
    text.set_defaults(run=write_text)
    commands.add_parser("write-data", help="write the run-time modules").set_defaults(run=write_data)
    commands.add_parser("check", help="fail if the folders, the modules or their hashes have drifted").set_defaults(run=check)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
