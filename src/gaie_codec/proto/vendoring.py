"""A schema -> one folder of `proto_vendor/` -> the run-time data in `gaie_codec/snapshots/_data/`.

The text is the source of truth: the data is made by compiling it, never from the package it came from. Text is written from
descriptors, so it holds wire facts only. All functions take the root of a checkout, and write only below it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from .. import UsageError
from .canonical import normalized, schema_hash
from .catalogue import CATALOGUE_FILE, Catalogue, Provenance, PublishedSchema
from .compile import compile_folder, own_files
from .text import write_proto

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .compile import Schema

__all__ = ["DATA", "VENDOR", "check", "describe", "folder_of", "generate", "write_data", "write_snapshot"]

VENDOR: Final = "proto_vendor"
DATA: Final = "src/gaie_codec/snapshots/_data"
PUBLISHED: Final = f"{VENDOR}/published.json"
"""The hashes of all published schemas. Without it, there are none but the snapshots'."""


# Snapshot folders


def describe(
    schema: Schema,
    *,
    dialect: str,
    snapshot: str,
    package: str,
    version: str,
    first_published: str,
    releases: Sequence[str] = (),
    licence: str = "Apache-2.0",
    history_id: str = "",
    reconstructed: bool = False,
    refused: str = "",
    note: str = "",
) -> Provenance:
    """The provenance of a snapshot, with the hashes of the schema and of what it was read from."""
    return Provenance(
        dialect=dialect,
        snapshot=snapshot,
        package=package,
        version=version,
        licence=licence,
        first_published=first_published,
        releases=tuple(releases),
        source_sha256=dict(schema.sha256),
        schema_hash=schema_hash(normalized(schema.files)),
        history_id=history_id,
        reconstructed=reconstructed,
        refused=refused,
        note=note,
    )


def folder_of(root: Path, dialect: str, snapshot: str) -> Path:
    """Where a snapshot's text is, whether or not it exists."""
    return root.joinpath(VENDOR, *dialect.split("."), snapshot)


def write_snapshot(root: Path, schema: Schema, provenance: Provenance) -> Path:
    """Writes or replaces one folder, after the text has been compiled and compared with the schema.

    Raises UsageError, and leaves the folder as it was, for a schema that the text writer cannot express.
    """
    if not re.fullmatch(r"[a-z]+\.[a-z]+", provenance.dialect) or not re.fullmatch(r"[a-z0-9][A-Za-z0-9.-]*", provenance.snapshot):
        raise UsageError(f"{provenance.dialect!r} {provenance.snapshot!r}: want names such as vllm.engine and smg-0.4.28")
    files = normalized(schema.files)
    folder = folder_of(root, provenance.dialect, provenance.snapshot)
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "snapshot")
        for name, text in _texts(files, provenance).items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(text)
        written = {file.name: file for file in normalized(compile_folder(fresh).file)}
        if any(written[file.name] != file for file in own_files(files)):
            raise UsageError(f"{provenance.snapshot}: the text does not compile back to the same descriptors")
        (fresh / "provenance.json").write_bytes(_pretty(provenance))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)
    return folder


def _texts(files: Iterable[FileDescriptorProto], provenance: Provenance) -> dict[str, str]:
    header = f"Wire facts of {provenance.package} {provenance.version} ({provenance.licence}), written by gaie-codec from its descriptors."
    return {file.name: write_proto(file, header) for file in own_files(files)}


def _pretty(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


# Run-time data


def write_data(root: Path) -> None:
    """Replaces all run-time data by what the snapshot folders say."""
    outputs, _ = generate(root)
    folder = root / DATA
    folder.mkdir(parents=True, exist_ok=True)
    for path in _present(folder):
        path.unlink()
    for name, text in outputs.items():
        (folder / name).write_text(text)


def check(root: Path) -> list[str]:
    """What differs between the snapshot folders and the data; a line each, none if all is current."""
    outputs, problems = generate(root)
    present = {path.name: path.read_text() for path in _present(root / DATA)}
    for name in sorted(outputs.keys() | present.keys()):
        if outputs.get(name) != present.get(name):
            state = "missing" if name not in present else "stale" if name not in outputs else "differs"
            problems.append(f"{DATA}/{name}: {state}")
    return problems


def _present(folder: Path) -> list[Path]:
    return [*folder.glob("*.py"), *folder.glob("*.json")]


def generate(root: Path) -> tuple[dict[str, str], list[str]]:
    """The text of every file in the data package, and what is wrong with the folders they come from."""
    outputs: dict[str, str] = {}
    problems: list[str] = []
    index: dict[str, list[str]] = {}
    folders = _snapshot_folders(root)
    published_file = root / PUBLISHED
    published = msgspec.json.decode(published_file.read_bytes(), type=tuple[PublishedSchema, ...]) if published_file.exists() else ()
    with ThreadPoolExecutor() as threads:  # each is a protoc process to wait for
        compiled = list(threads.map(lambda entry: normalized(compile_folder(entry[0]).file), folders))
    for (folder, provenance), files in zip(folders, compiled, strict=True):
        where = folder.relative_to(root).as_posix()
        for name, text in _texts(files, provenance).items():
            if (folder / name).read_text() != text:
                problems.append(f"{where}/{name}: not laid out as the tool writes it")
        problems += [f"{where}/provenance.json: {fault}" for fault in _faults(root, folder, provenance, schema_hash(files), published)]
        module = re.sub(r"[^0-9a-z_]", "_", f"{provenance.dialect}__{provenance.snapshot}")
        if f"{module}.py" in outputs:
            raise UsageError(f"{where}: another snapshot already has the module name {module}")
        outputs[f"{module}.py"] = _data_module(files, where, provenance.refused)
        index.setdefault(provenance.dialect, []).append(f'        "{provenance.snapshot}": "{module}",')
    lines = ['"""Generated from proto_vendor/: which module holds which snapshot, a dialect\'s oldest first."""', "", "MODULES = {"]
    for dialect, entries in index.items():
        lines += [f'    "{dialect}": {{', *entries, "    },"]
    outputs["__init__.py"] = "\n".join([*lines, "}"]) + "\n"
    catalogue = Catalogue(snapshots=tuple(provenance for _, provenance in folders), published=published)
    outputs[CATALOGUE_FILE] = _pretty(catalogue).decode()
    return outputs, problems


def _faults(root: Path, folder: Path, provenance: Provenance, computed: str, published: Iterable[PublishedSchema]) -> Iterator[str]:
    if computed != provenance.schema_hash:
        yield "schema_hash is not that of the text"
    if folder != folder_of(root, provenance.dialect, provenance.snapshot):
        yield "names another folder"
    for known in published:
        if (known.dialect, known.history_id) == (provenance.dialect, provenance.history_id):
            facts = (known.schema_hash, known.first_published, known.releases)
            if facts != (provenance.schema_hash, provenance.first_published, provenance.releases):
                yield f"does not agree with {known.history_id} in {PUBLISHED}"


def _snapshot_folders(root: Path) -> list[tuple[Path, Provenance]]:
    """Folders with their provenance, by dialect and then by age. Versions decide where two schemas came out on one day."""
    found = []
    for path in (root / VENDOR).rglob("provenance.json"):
        try:
            found.append((path.parent, msgspec.json.decode(path.read_bytes(), type=Provenance)))
        except msgspec.MsgspecError as error:
            raise UsageError(f"{path}: {error}") from None

    def age(entry: tuple[Path, Provenance]) -> tuple[str, str, list[int]]:
        facts = entry[1]
        return facts.dialect, facts.first_published, [int(part) for part in re.findall(r"\d+", facts.version)]

    return sorted(found, key=age)


def _data_module(files: Iterable[FileDescriptorProto], where: str, refused: str) -> str:
    lines = [f'"""Generated from {where}: serialized FileDescriptorProtos, dependencies first."""']
    lines += ["", "# ruff: noqa: E501", "", f"REFUSED = {_quoted(refused)}", "", "FILES = ("]
    for file in files:
        lines += ["    (", *(f"        b{_quoted(piece.decode('latin-1'))}" for piece in _pieces(file)), "    ),"]
    return "\n".join([*lines, ")"]) + "\n"


def _pieces(file: FileDescriptorProto) -> Iterator[bytes]:
    """One piece for each message, enum and service, so that a new field is a change of one line. Joined they are the file again."""
    rest = FileDescriptorProto(name=file.name, package=file.package, dependency=file.dependency)
    yield rest.SerializeToString()
    yield from (FileDescriptorProto(message_type=[message]).SerializeToString() for message in file.message_type)
    yield from (FileDescriptorProto(enum_type=[enum]).SerializeToString() for enum in file.enum_type)
    yield from (FileDescriptorProto(service=[service]).SerializeToString() for service in file.service)
    yield FileDescriptorProto(syntax=file.syntax).SerializeToString()


def _quoted(text: str) -> str:
    # Not repr: it changes the kind of quote with the content, and ruff format would change it back.
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', r"\x22") + '"'
