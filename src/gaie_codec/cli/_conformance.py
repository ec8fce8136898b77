"""`gaie-codec conformance`: does this EPP keep the rules? Exit status 0 if none is broken, 1 if one is, 2 where there is no EPP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import click

from .. import UsageError
from ..adapters import DIALECTS

if TYPE_CHECKING:
    from ..conformance import Line, Transcript


@click.command("conformance")
@click.option("--ext-proc", metavar="HOST:PORT", help="The EPP to drive.")
@click.option("--transcript", "recorded", type=click.File("rb"), help="A recording to judge instead, as JSON lines; - for stdin.")
@click.option("--record", type=click.File("wb"), help="Write what is said to this file. It holds every header as it is.")
@click.option("--endpoint", "endpoints", multiple=True, metavar="IP:PORT", help="An endpoint of the EPP's pool; may be repeated.")
@click.option("--health", default="", metavar="HOST:PORT", help="Where grpc.health.v1 is.  [default: the port of ext_proc]")
@click.option("--tls", is_flag=True, help="The EPP speaks TLS; its certificate is not looked at.")
@click.option("--model", default="conformance", show_default=True, help="The model that requests name.")
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="One more header of every request; may be repeated.")
@click.option("--dialect", type=click.Choice(DIALECTS), default="vllm.engine", show_default=True, help="What the gRPC client speaks.")
@click.option("--snapshot", help="Which version of the schema it speaks.  [default: the newest]")
@click.option("--expect-no-endpoint", is_flag=True, help="The pool has no ready endpoint: everything is to be refused with 503.")
@click.option("--expect-shed", is_flag=True, help="The pool is saturated: everything is to be refused with 429.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True, max=3600),
    default=5.0,
    show_default=True,
    help="Seconds that the EPP may take to answer a message.",
)
@click.option("--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True)
@click.pass_context
def conformance_command(ctx: click.Context, /, recorded: BinaryIO | None, record: BinaryIO | None, form: str, **options: Any) -> None:
    """Hold an EPP, ours or any other, against the Endpoint Picker Protocol and what Envoy takes.

    Plays the data plane and the model server to it over ext_proc, or judges a recording. Exit status 1: a rule is broken, and the message
    that broke it is shown. 2: there is no EPP, or the recording cannot be read.
    """
    from ..conformance import check, decode_transcript
    from ..conformance.report import encode_json, make_report, table

    if (options["ext_proc"] is None) is (recorded is None):
        raise UsageError("one of --ext-proc and --transcript is needed, and not both")
    if options["expect_no_endpoint"] and options["expect_shed"]:
        raise UsageError("--expect-no-endpoint and --expect-shed exclude each other")
    check((), pool=options["endpoints"])  # before anything is played
    if recorded is not None:
        if options["expect_no_endpoint"] or options["expect_shed"]:
            raise UsageError("--expect-no-endpoint and --expect-shed are for --ext-proc: a recording is judged by what is in it")
        target = getattr(recorded, "name", "-")
        transcript = decode_transcript(recorded)
    else:
        target = options["ext_proc"]
        transcript = _drive(record, **options)
    if not any(line.stream for line in transcript):
        raise UsageError(f"{target}: no stream in it")
    report = make_report(target, transcript, check(transcript, pool=options["endpoints"]))
    if form == "json":
        click.echo(encode_json(report).decode())
    else:
        for line in table(report):
            click.echo(line)
        if report.failed and any("ImmediateResponse 404" in fault.reason for one in report.rules for fault in one.faults):
            click.echo("gaie-codec: the EPP answers 404; if it does not know the model, name one that it does with --model", err=True)
    if report.failed:
        ctx.exit(1)


def _drive(record: BinaryIO | None, *, headers: tuple[str, ...], expect_no_endpoint: bool, expect_shed: bool, **options: Any) -> Transcript:
    from ..conformance import encode_line
    from ..conformance.driver import Options, run

    pairs = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon:
            raise UsageError(f"header {header!r}: not of the form NAME:VALUE")
        pairs.append((name.strip(), value.strip()))

    def write(line: Line) -> None:
        if record is not None:
            record.write(encode_line(line))

    expects: Literal["endpoint", "no-endpoint", "shed"] = "no-endpoint" if expect_no_endpoint else "shed" if expect_shed else "endpoint"
    return run(Options(headers=tuple(pairs), expects=expects, **options), observe=write)
