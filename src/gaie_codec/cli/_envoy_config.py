"""`gaie-codec envoy-config`: a bootstrap for Envoy which has our ext_proc server in it."""

from __future__ import annotations

from typing import Any

import click
import msgspec


@click.command("envoy-config")
@click.option("--listen", required=True, metavar="HOST:PORT", help="Where clients connect; an IP address. Port 0 takes a free one.")
@click.option("--ext-proc", required=True, metavar="HOST:PORT", help="The ext_proc server.")
@click.option("--ext-proc-tls", is_flag=True, help="It speaks TLS; its certificate is not checked.")
@click.option("--behind", metavar="HOST:PORT", help="Another endpoint picker that sees requests first and chooses the model server.")
@click.option("--behind-tls", is_flag=True, help="That one speaks TLS; its certificate is not checked.")
@click.option("--upstream", metavar="HOST:PORT", help="The one model server.  [default: the one that the endpoint picker names]")
@click.option(
    "--destination",
    type=click.Choice(("header", "metadata")),
    default="header",
    show_default=True,
    help="Where the endpoint picker names it: header x-gateway-destination-endpoint, or metadata envoy.lb.",
)
@click.option(
    "--upstream-protocol",
    type=click.Choice(("h2c", "http")),
    default="h2c",
    show_default=True,
    help="'http' for model servers that speak HTTP/1.1.",
)
@click.option(
    "--body-mode",
    type=click.Choice(("full-duplex", "buffered")),
    default="full-duplex",
    show_default=True,
    help="'buffered' cannot stream.",
)
@click.option("--admin", metavar="HOST:PORT", help="Envoy's admin port; an IP address.  [default: none]")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Seconds for a whole answer; 0: no bound."
)
@click.option(
    "--stream-idle-timeout",
    "stream_idle_timeout_s",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Seconds of silence, as before an answer that is not streamed; 0: no bound.",
)
@click.option("--access-log", is_flag=True, help="A line of JSON on stdout for each request.")
@click.option("--format", "form", type=click.Choice(("yaml", "json")), default="yaml", show_default=True)
def envoy_config_command(form: str, **options: Any) -> None:
    """Print a bootstrap for Envoy: HTTP in, an ext_proc server asked about every request, model servers behind."""
    from ..ext_proc.envoy_config import envoy_config

    settings = envoy_config(**options)
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(settings), indent=2).decode())
        return
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError("YAML needs the package pyyaml: pip install gaie-codec[pool], or take --format json", name=error.name) from error
    # Without aliases, which not every reader of YAML takes: through JSON, no part is there twice.
    click.echo(yaml.safe_dump(msgspec.json.decode(msgspec.json.encode(settings)), sort_keys=False, width=120), nl=False)
