"""`gaie-codec compat`: which servers can this gateway talk to, and what can it not say to them?"""

from __future__ import annotations

from typing import Any

import click
import msgspec

from .. import UsageError, compat
from ..compat import report
from ..compat.blocks import Block, Text, as_markdown, as_text
from ..snapshots import SNAPSHOTS


@click.command("compat")
@click.option("--server", metavar="NAME", help="vllm, sglang, gaie, llm-d-router, smg-grpc-servicer or smg-grpc-proto.")
@click.option("--version", metavar="RELEASE", help="A release of --server.")
@click.option("--dialect", metavar="DIALECT", help="One protocol: its snapshots, what they carry, how servers behave.")
@click.option("--snapshot", metavar="SNAPSHOT", help="One snapshot of --dialect: what can be said, what not, and why.")
@click.option(
    "--explain", "field", metavar="FIELD", help="What becomes of a request field, such as logit_bias; for all dialects, or those chosen."
)
@click.option("--format", "form", type=click.Choice(("table", "json", "markdown")), default="table", show_default=True)
def compat_command(
    server: str | None, version: str | None, dialect: str | None, snapshot: str | None, field: str | None, form: str
) -> None:
    """Show the compatibility matrix, or what it says of one release, dialect, snapshot or request field.

    Without options: all servers, by release.
    """
    if version is not None and server is None:
        raise UsageError("--version needs --server: whose release is it?")
    if server is not None and snapshot is not None:
        raise UsageError("--snapshot is chosen by --server and --version, or by you with --dialect, not by both")
    if snapshot is not None and dialect is None:
        dialect = _dialect_of(snapshot)
    value, blocks = _explain(field, server, version, dialect, snapshot) if field is not None else _show(server, version, dialect, snapshot)
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    else:
        click.echo(as_markdown(blocks) if form == "markdown" else as_text(blocks), nl=False)


def _show(server: str | None, version: str | None, dialect: str | None, snapshot: str | None) -> tuple[Any, list[Block]]:
    if server is not None and version is not None:
        found = compat.resolve(server=server, version=version)
        if dialect is not None:
            found = msgspec.structs.replace(found, dialects=(found.dialect(dialect),))
        return found, report.of_resolution(found)
    if server is not None:
        name = compat.server_name(server)
        if name not in compat.matrix().servers:
            raise UsageError(f"--server {name} needs --version")
        entry = compat.matrix().servers[name]
        if dialect is not None:
            raise UsageError("--server with --dialect needs --version")
        return entry, report.of_server(name)
    if dialect is not None and snapshot is not None:
        said = compat.features(dialect, snapshot)
        return said, report.of_features(said)
    if dialect is not None:
        blocks = report.of_dialect(dialect)
        data = compat.matrix()
        behaviours = [item for item in data.behaviours if item.dialect == dialect]
        return {"dialect": dialect, **msgspec.to_builtins(data.dialects[dialect]), "behaviours": behaviours}, blocks
    return compat.matrix(), report.overview()


def _explain(field: str, server: str | None, version: str | None, dialect: str | None, snapshot: str | None) -> tuple[Any, list[Block]]:
    if server is None:
        found = compat.explain(field, dialect=dialect, snapshot=snapshot)
        return found, report.of_explanations([found])
    if version is None:
        raise UsageError("--explain with --server needs --version")
    release = compat.resolve(server=server, version=version)
    supports = release.dialects if dialect is None else (release.dialect(dialect),)
    values = []
    blocks: list[Block] = [Text(note) for note in release.notes]
    for support in supports:
        if support.refused:
            raise UsageError(f"{support.dialect} {support.floor.snapshot} is not spoken: {support.refused}")
        for name in dict.fromkeys((support.floor.snapshot, support.release_day.snapshot, support.today.snapshot)):
            if not compat.speaks(support.dialect):
                blocks.append(Text(f"{support.dialect} {name}: this library has no adapter for it yet."))
                continue
            values.append(compat.explain(field, dialect=support.dialect, snapshot=name))
    return values, blocks + report.of_explanations(values)


def _dialect_of(snapshot: str) -> str:
    found = [dialect for dialect, names in SNAPSHOTS.items() if snapshot in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"several dialects have a snapshot {snapshot}: add --dialect {' or --dialect '.join(found)}")
    raise UsageError(f"no dialect has a snapshot {snapshot[:40]!r}; gaie-codec compat lists them")
