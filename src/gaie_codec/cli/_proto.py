"""`gaie-codec proto`: look at schemas, compare two, hold a new one against the library, and vendor it."""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from .. import UsageError, snapshots
from ..proto.catalogue import Provenance, catalogue, provenance
from ..proto.diff import Change, compare, worst
from ..proto.report import describe_changes, encode_json, encode_table
from ..proto.sources import PACKAGES, read_candidates, read_pair, snapshot_schema

_dialect = click.option("--dialect", type=click.Choice(tuple(PACKAGES)), help="The protocol.  [default: as the services' names tell]")
_format = click.option("--format", "output", type=click.Choice(("table", "json")), default="table", show_default=True)

_SOURCES = "a snapshot's name, a .proto file, a folder, a descriptor set or PACKAGE==VERSION (fetched with pip)"


@click.group()
def proto() -> None:
    """Schemas of the model servers: which there are, what changed, what a new one breaks."""


@proto.command("list")
@_dialect
@_format
def list_(dialect: str | None, output: str) -> None:
    """List the snapshots, oldest first, and where they come from."""
    known = [one for one in catalogue().snapshots if dialect in (None, one.dialect)]
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(known), indent=2))
        return
    rows = [("dialect", "snapshot", "package", "published", "releases", "schema hash", "")]
    for one in known:
        releases = one.releases[0] + (f" +{len(one.releases) - 1}" if len(one.releases) > 1 else "") if one.releases else ""
        package = f"{one.package} {one.version}"
        rows.append((one.dialect, one.snapshot, package, one.first_published, releases, one.schema_hash[:12], _remarks(one)))
    _table(rows)


def _remarks(one: Provenance) -> str:
    said = ["reconstructed"] if one.reconstructed else []
    return ", ".join(said + (["refused"] if one.refused else []))


@proto.command()
@click.argument("snapshot")
@click.option("--dialect", type=click.Choice(tuple(PACKAGES)), required=True, help="The protocol.")
def show(snapshot: str, dialect: str) -> None:
    """Print the .proto text of SNAPSHOT, written from its descriptors."""
    from ..proto.canonical import normalized
    from ..proto.compile import own_files
    from ..proto.text import write_proto

    schema = snapshot_schema(dialect, snapshot)
    known = provenance(dialect, snapshot)
    for file in own_files(normalized(schema.files)):
        click.echo(write_proto(file, f"{file.name} of {known.package} {known.version} ({known.licence})"))


@proto.command(
    short_help="Classify every change from one schema to another.",
    help=f"Classify every change from A to B, each {_SOURCES}. Exit status 1 if one is breaking.",
)
@click.argument("a")
@click.argument("b")
@_dialect
@_format
def diff(a: str, b: str, dialect: str | None, output: str) -> None:
    pairs = [(before, compare(before.schema.files, after.schema.files)) for before, after in read_pair(a, b, dialect=dialect)]
    if output == "json":
        shown = [
            {"dialect": before.dialect, "from": a, "to": b, "severity": worst(changes), "changes": msgspec.to_builtins(changes)}
            for before, changes in pairs
        ]
        click.echo(json.dumps(shown, indent=2))
    else:
        for before, changes in pairs:
            click.echo(f"{before.dialect + ': ' if before.dialect else ''}{a} -> {b}: {worst(changes) or 'the same schema'}")
            for line in describe_changes(changes):
                click.echo(f"  {line}")
    if any(change.severity.is_breaking for _, changes in pairs for change in changes):
        sys.exit(1)


@proto.command(
    short_help="Hold a new schema against the library.",
    help=f"Hold SOURCE ({_SOURCES}) against the newest snapshot of its dialect and against the adapter that has to speak it."
    " Exit status 1 if something is wrong.",
)
@click.argument("source")
@_dialect
@_format
@click.option("--max-examples", type=click.IntRange(min=1), default=100, show_default=True, help="For each law that draws examples.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same report.")
def check(source: str, dialect: str | None, output: str, max_examples: int, seed: int) -> None:
    from ..proto.check import check as run_check

    reports = [run_check(one, max_examples=max_examples, seed=seed) for one in read_candidates(source, dialect=dialect)]
    if output == "json":
        click.echo(encode_json(reports))
    else:
        click.echo("\n\n".join("\n".join(encode_table(report)) for report in reports))
    if not all(report.is_clean for report in reports):
        sys.exit(1)


@proto.command(
    short_help="Write a schema to proto_vendor/ as a snapshot.",
    help="Write SOURCE (PACKAGE==VERSION, or files with --package and --version) to proto_vendor/ as a snapshot; needs a checkout.",
)
@click.argument("source")
@_dialect
@click.option("--name", required=True, help="Of the snapshot, such as smg-0.4.28.")
@click.option("--package", help="Where files come from.  [default: as in SOURCE]")
@click.option("--version", help="Its version.  [default: as in SOURCE]")
@click.option("--first-published", metavar="YYYY-MM-DD", help="Orders the snapshots.  [default: the day the package was built]")
@click.option("--licence", default="Apache-2.0", show_default=True, help="SPDX identifier.")
def vendor(
    source: str, dialect: str | None, name: str, package: str | None, version: str | None, first_published: str | None, licence: str
) -> None:
    from ..proto.vendoring import describe, write_data, write_snapshot

    root = _checkout()
    if "==" in source and not Path(source).exists():
        package, version = package or source.partition("==")[0], version or source.partition("==")[2]
    if not package or not version:
        raise UsageError("say with --package and --version where the files come from")
    candidates = read_candidates(source, dialect=dialect)
    if len(candidates) > 1:
        raise UsageError(f"{source} holds several dialects; choose one with --dialect: {', '.join(one.dialect for one in candidates)}")
    candidate = candidates[0]
    if candidate.dialect not in PACKAGES:
        raise UsageError(f"{source}: say which dialect it is with --dialect")
    facts = describe(
        candidate.schema,
        dialect=candidate.dialect,
        snapshot=name,
        package=package,
        version=version,
        first_published=_day(first_published, source),
        releases=(f"{package}-{version}",),
        licence=licence,
    )
    twin = next((one for one in catalogue().snapshots if (one.dialect, one.schema_hash) == (facts.dialect, facts.schema_hash)), None)
    if twin is not None and twin.snapshot != name:
        raise UsageError(
            f"the schema is that of {twin.dialect} {twin.snapshot}; add {facts.releases[0]} to `releases` in its provenance.json"
        )
    newest = snapshots.SNAPSHOTS[facts.dialect][-1]
    changes = compare(snapshot_schema(facts.dialect, newest).files, candidate.schema.files)
    folder = write_snapshot(root, candidate.schema, facts)
    write_data(root)
    click.echo(f"wrote {folder.relative_to(root)} and the run-time data", err=True)
    click.echo(_matrix_entry(facts, changes))


def _checkout() -> Path:
    root = Path(snapshots.__file__).resolve().parents[3]
    if not (root / "proto_vendor").is_dir() or not (root / "pyproject.toml").is_file():
        raise UsageError("vendoring writes to a checkout of gaie-codec, and this one is an installed package")
    return root


def _day(given: str | None, source: str) -> str:
    if given is not None:
        import datetime

        try:
            return datetime.date.fromisoformat(given).isoformat()
        except ValueError:
            raise UsageError(f"--first-published {given!r} is not YYYY-MM-DD") from None
    if "==" in source:
        from ..proto.download import download

        with tempfile.TemporaryDirectory() as scratch:
            download(source, Path(scratch))
            dates = [entry.date_time for wheel in Path(scratch).glob("*.whl") for entry in zipfile.ZipFile(wheel).infolist()]
        # Reproducible builds write a day of long ago.
        if dates and max(dates)[0] > 2024:
            return "{:04}-{:02}-{:02}".format(*max(dates)[:3])
    raise UsageError("say with --first-published YYYY-MM-DD when this schema came out")


def _matrix_entry(facts: Provenance, changes: Sequence[Change]) -> str:
    """What to complete and to put into compat_matrix.yaml."""
    ranges = f', smg_grpc_proto: ">={facts.version}", exact: "=={facts.version}"' if facts.package == "smg-grpc-proto" else ""
    added = [change.subject for change in changes if change.text.startswith(("field ", "method added"))]
    return "\n".join(
        (
            f"# compat_matrix.yaml, last of dialects.{facts.dialect}.snapshots; the ranges of the one before it end here",
            f"      - {{name: {facts.snapshot}, published: {facts.first_published}{ranges},",
            '         adds: "..."}',
            *(f"         # {name}" for name in added),
        )
    )


def _table(rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
