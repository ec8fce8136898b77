"""What is known of every snapshot, and of every published schema including those between two snapshots.

It comes from `proto_vendor/` and travels with the package as one JSON file, so `gaie-codec proto list` and `probe` need no checkout.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

import msgspec

from .. import UsageError

__all__ = ["Catalogue", "Provenance", "PublishedSchema", "catalogue", "provenance", "published"]

CATALOGUE_FILE: Final = "catalogue.json"


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a snapshot comes from: `provenance.json` of its folder."""

    dialect: str
    snapshot: str
    package: str
    version: str
    licence: str
    """SPDX identifier."""
    first_published: str
    """YYYY-MM-DD of the first release with this schema. It orders the snapshots of a dialect."""
    releases: tuple[str, ...]
    """Every published release with exactly this schema, such as `vllm-0.14.1`."""
    source_sha256: dict[str, str]
    """Hash by file name of what the text was written from."""
    schema_hash: str
    history_id: str
    """Its row in the upstream history, such as V23 or S20; empty for dialects that have none."""
    reconstructed: bool
    """No release ships this schema as a file: it was inferred from what a released server does."""
    refused: str
    """Why the library must not speak it to a server; empty for all the others."""
    note: str
    """What a maintainer should know; may be empty."""


class PublishedSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One schema of a dialect's history, vendored or not."""

    dialect: str
    history_id: str
    schema_hash: str
    first_published: str
    releases: tuple[str, ...]


class Catalogue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. Snapshots are in the order of `snapshots.SNAPSHOTS`, published schemas in that of the history."""

    snapshots: tuple[Provenance, ...]
    published: tuple[PublishedSchema, ...]


@cache
def catalogue() -> Catalogue:
    """The catalogue of this installation; read once."""
    data = resources.files("gaie_codec.snapshots").joinpath("_data", CATALOGUE_FILE).read_bytes()
    return msgspec.json.decode(data, type=Catalogue)


def provenance(dialect: str, snapshot: str) -> Provenance:
    """Where that snapshot comes from. Raises UsageError if there is none of that name."""
    for known in catalogue().snapshots:
        if (known.dialect, known.snapshot) == (dialect, snapshot):
            return known
    names = [f"{known.dialect} {known.snapshot}" for known in catalogue().snapshots]
    raise UsageError(f"no snapshot {dialect} {snapshot}; there are: {', '.join(names)}")


def published(dialect: str, schema_hash: str) -> PublishedSchema | None:
    """The published schema with that hash: what a server is, whose reflection or package gave the hash."""
    for known in catalogue().published:
        if (known.dialect, known.schema_hash) == (dialect, schema_hash):
            return known
    return None
