"""What a user names -> schemas, one for each dialect in it: a snapshot, a file, a folder or a published package."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from .. import UsageError
from ..snapshots import SNAPSHOTS, Snapshot, _data
from .compile import Schema, own_files, read_schema, select
from .download import download

__all__ = ["PACKAGES", "Candidate", "read_candidates", "read_pair", "snapshot_schema"]

PACKAGES: Final = MappingProxyType(
    {
        "vllm.engine": "vllm.grpc.engine",
        "vllm.inference": "vllm",
        "sglang.scheduler": "sglang.grpc.scheduler",
        "sglang.runtime": "sglang.runtime.v1",
        "sglang.api": "sglang.api.v1",
    }
)
"""The protobuf package of every dialect's services, by which a dialect is known in a schema."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One dialect's schema, and the name that the user gave it. `dialect` is empty for a schema that is of none."""

    dialect: str
    name: str
    schema: Schema

    @property
    def snapshot(self) -> Snapshot:
        """The schema as a `Snapshot`, with a pool of its own: a new one each time."""
        return Snapshot(self.dialect, self.name, [file.SerializeToString() for file in self.schema.files])


def snapshot_schema(dialect: str, name: str) -> Schema:
    """The descriptors of a snapshot. Raises UsageError if there is none."""
    if name not in SNAPSHOTS.get(dialect, ()):
        raise UsageError(f"{dialect} has no snapshot {name!r}; there are: {', '.join(SNAPSHOTS.get(dialect, ()))}")
    data = import_module(f"{_data.__name__}.{_data.MODULES[dialect][name]}")
    return Schema(set=FileDescriptorSet(file=[FileDescriptorProto.FromString(file) for file in data.FILES]), sha256={})


def read_candidates(source: str, *, dialect: str | None = None) -> list[Candidate]:
    """The schemas of every known dialect in `source`, or of `dialect` alone.

    A schema that declares none of that dialect's services is taken whole, because they may have been renamed. Raises UsageError, in one
    line, for what is neither a snapshot nor can be read, and where no dialect is known and none was given.
    """
    named = [known for known, names in SNAPSHOTS.items() if source in names and dialect in (None, known)]
    if named:
        return [Candidate(dialect=known, name=source, schema=snapshot_schema(known, source)) for known in named]
    schema = _read(source, dialect)
    found = _dialects(schema)
    if dialect is not None:
        part = select(schema, [PACKAGES[dialect]]) if dialect in found else schema
        return [Candidate(dialect=dialect, name=source, schema=part)]
    if not found:
        services = [f"{file.package}.{service.name}" for file in schema.files for service in file.service]
        listed = f"it declares {', '.join(services)}" if services else "it declares no service"
        raise UsageError(f"{source}: of no known dialect ({listed}); say which with --dialect: {', '.join(PACKAGES)}")
    return [Candidate(dialect=one, name=source, schema=select(schema, [PACKAGES[one]])) for one in found]


def read_pair(one: str, other: str, *, dialect: str | None = None) -> list[tuple[Candidate, Candidate]]:
    """Two sources, dialect by dialect; two schemas of no known dialect make one pair."""
    sides = []
    for source in (one, other):
        try:
            sides.append(read_candidates(source, dialect=dialect))
        except UsageError as error:
            if "of no known dialect" not in str(error):
                raise
            sides.append([Candidate(dialect="", name=source, schema=_read(source, dialect))])
    pairs = [(before, after) for before in sides[0] for after in sides[1] if before.dialect == after.dialect]
    if not pairs:
        known = [", ".join(candidate.dialect or "an unknown one" for candidate in side) for side in sides]
        raise UsageError(f"{one} and {other} have no dialect in common: {known[0]} against {known[1]}")
    return pairs


def _dialects(schema: Schema) -> list[str]:
    declared = {file.package for file in schema.files if file.service}
    return [dialect for dialect, package in PACKAGES.items() if package in declared]


def _read(source: str, dialect: str | None) -> Schema:
    if Path(source).exists():
        schema = read_schema(Path(source))
    elif "==" in source:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                schema = read_schema(download(source, Path(scratch)))
            except UsageError as error:
                # The user named a package and knows nothing of where it was unpacked.
                raise UsageError(str(error).replace(f"{scratch}/unpacked", source).replace(scratch, source)) from None
    else:
        of = f" of {dialect}" if dialect else ""
        raise UsageError(
            f"{source}: neither a file or folder, nor PACKAGE==VERSION, nor a snapshot{of} (`gaie-codec proto list` shows them)"
        )
    if not any(file.message_type or file.service for file in own_files(schema.files)):
        raise UsageError(f"{source}: the schema declares no message and no service")
    return schema
