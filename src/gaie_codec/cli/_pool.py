"""`gaie-codec pool check`: is this InferencePool valid, for which GAIE, and would it be transcoded for?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from .. import CodecError

if TYPE_CHECKING:
    from ..inferencepool import Finding, InferencePool


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """What `--format json` says of one file."""

    file: str
    valid: bool
    pools: tuple[InferencePool, ...] = ()
    findings: tuple[Finding, ...] = ()
    error: str = ""


@click.group("pool")
def pool() -> None:
    """Look at InferencePool manifests of the Gateway API Inference Extension (GAIE)."""


@pool.command("check")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--gaie-version", metavar="1.N", help="The release whose rules hold.  [default: the newest, with notes about the others]")
@click.option("--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True)
@click.pass_context
def check(ctx: click.Context, files: tuple[str, ...], gaie_version: str | None, form: str) -> None:
    """Validate InferencePools in YAML or JSON; `-` is standard input.

    Other kinds in a file are skipped and named. Exit status 0: every pool is valid. 1: one is not, or a file has none. 2: a file cannot be
    read, or is neither YAML nor JSON.
    """
    results = [_check(name, gaie_version) for name in files]
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(results), indent=2).decode())
    for result in results:
        if result.error:
            click.echo(f"gaie-codec: {result.file}: {result.error}", err=True)
        elif form == "table":
            _show(result)
    if any(result.error for result in results):
        ctx.exit(2)
    if not all(result.valid for result in results):
        ctx.exit(1)


def _check(name: str, gaie_version: str | None) -> _File:
    from ..inferencepool import MAX_BYTES, decode_pools

    # A name that is no UTF-8 reaches us with surrogates, which JSON and terminals do not take.
    shown = name.encode(errors="backslashreplace").decode()
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        pools, findings = decode_pools(data, gaie_version=gaie_version)
    except (OSError, ValueError) as error:
        return _File(file=shown, valid=False, error=getattr(error, "strerror", None) or str(error))
    except CodecError as error:
        return _File(file=shown, valid=False, error=" ".join(str(error).split()))
    is_valid = all(finding.severity != "error" for finding in findings)
    return _File(file=shown, valid=is_valid, pools=pools, findings=findings)


def _show(result: _File) -> None:
    for finding in result.findings:
        whose = f"; GAIE {finding.releases}" if finding.releases else ""
        _line(result.file, finding.pool, finding.path, f"{finding.severity}: {finding.message}{whose}")
    for each in result.pools:
        label = "/".join(part for part in (each.namespace, each.name) if part)
        accepted = f"GAIE {each.accepted_since} and later accept it" if each.accepted_since else "no GAIE release accepts it"
        protocol = f"{each.app_protocol} ({each.declared_at or 'the default'})"
        mode = "pass through" if each.app_protocol == "http" else "transcode if the model server speaks gRPC"
        _line(result.file, label, f"valid; {accepted}; {protocol}: {mode}")


def _line(*parts: str) -> None:
    click.echo(": ".join(part for part in parts if part))
