"""`gaie-codec probe`: what is this server? Exit status 0 for a known dialect, 1 for a server that is none, 2 where there is none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..probe import ProbeReport


@click.command("probe")
@click.argument("target", metavar="grpc://HOST:PORT")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True, max=3600),
    default=5.0,
    show_default=True,
    help="Seconds that all of it may take.",
)
@click.option("--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True)
@click.pass_context
def probe_command(ctx: click.Context, target: str, timeout_s: float, form: str) -> None:
    """Ask a gRPC server what it is: dialect, snapshot, versions, model, health.

    Nothing that it asks changes the server or makes it generate. Exit status 1: it answers, but is no known model server. 2: nothing
    answers, or what answers is not gRPC.
    """
    report = asyncio.run(_probe(target, timeout_s))
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        rows = list(_rows(report))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            click.echo(f"{name:{width}}  {_printable(value)}".rstrip())
    if not report.dialect:
        ctx.exit(1)


async def _probe(target: str, timeout_s: float) -> ProbeReport:
    from ..probe import probe
    from ..upstream import Upstream

    upstream = Upstream(target)
    try:
        return await probe(upstream, timeout_s=timeout_s)
    finally:
        await upstream.close()


def _rows(report: ProbeReport) -> Iterator[tuple[str, str]]:
    yield "target", report.target
    if not report.dialect:
        yield "dialect", f"unknown: {report.reason}"
        yield "services", ", ".join(report.services) or "not listed: no reflection"
        yield from (("note", note) for note in report.notes)
        return
    yield "dialect", report.dialect
    yield "snapshot", f"{report.snapshot} ({report.match}, by {report.basis})"
    yield "because", report.reason
    if report.refused:
        yield "refused", report.refused
    if report.releases:
        yield "schema of", ", ".join(report.releases)
    yield "engine", " ".join(filter(None, (report.engine, report.engine_version or "of unknown version")))
    if report.proto_version:
        yield "proto version", report.proto_version
    yield "reflection", report.reflection or "none"
    yield "services", ", ".join(report.services) or "not listed"
    yield "health", f"{report.health} ({report.health_basis})"
    yield "model", ", ".join(filter(None, (report.model, *report.aliases))) or "not told"
    if report.model_path not in ("", report.model):
        yield "model path", report.model_path
    yield "context length", f"{report.max_model_len} tokens" if report.max_model_len else "not told"
    yield "tokenizer", _tokenizer(report)
    yield from _cannot_say(report)
    yield from (("note", note) for note in report.notes)


def _tokenizer(report: ProbeReport) -> str:
    sources = ["GetTokenizer"] if report.has_tokenizer_stream else []
    sources += [report.tokenizer_path] if report.tokenizer_path else []
    return ", ".join(sources) or "not told"


def _cannot_say(report: ProbeReport) -> Iterator[tuple[str, str]]:
    if report.cannot_say is not None:
        yield "cannot say", ", ".join(missing.field for missing in report.cannot_say) or "nothing is missing"
    elif not report.refused:
        yield "cannot say", f"not known: this library has no adapter for {report.dialect} yet"


def _printable(text: str) -> str:
    """A server's words, without what a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
