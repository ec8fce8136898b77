"""`gaie-codec ext-proc`: the endpoint picker for Envoy."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click

from ..adapters import DIALECTS
from ._options import flavor, parsers, run, seconds

_PICKERS = ("round-robin", "least-inflight", "prefix", "none")


@click.command("ext-proc")
@click.option("--listen", default="127.0.0.1:9002", show_default=True, metavar="HOST:PORT", help="For Envoy. Port 0 takes a free one.")
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="HOST:PORT[,dialect=D][,snapshot=S][,model=NAME]",
    help="A model server; repeatable. Without a dialect it is probed; 'http' speaks OpenAI HTTP itself.",
)
@click.option("--endpoints", "endpoints_file", metavar="FILE", help="More of them, one a line; read again when it changes.")
@click.option(
    "--picker", type=click.Choice(_PICKERS), default="least-inflight", show_default=True, help="'none' leaves that to an EPP before."
)
@click.option("--dialect", type=click.Choice(("auto", "http", *DIALECTS)), help="With --picker none: of model servers that are not listed.")
@click.option("--snapshot", help="With --dialect: which version of the schema they speak.  [default: the newest]")
@click.option(
    "--pool", metavar="FILE", help="InferencePool manifest, whose appProtocol says whether to transcode; read again when it changes."
)
@click.option("--pool-name", metavar="[NAMESPACE/]NAME", help="Which pool, where the file has several.")
@click.option("--transcode", metavar="auto|on|off", help="Above the pool.  [default: GAIE_CODEC_TRANSCODE, or auto]")
@click.option(
    "--tokenizer",
    default="server",
    show_default=True,
    metavar="server|DIR|HUB_ID|builtin",
    help="'server' asks each model server for its own.",
)
@click.option("--chat-template", "template_file", type=click.File("r", encoding="utf-8"), help="Jinja file to use instead of the model's.")
@click.option(
    "--unsupported",
    type=click.Choice(("reject", "drop")),
    default="reject",
    show_default=True,
    help="Request fields that a server cannot be told; dropped ones are named in x-gaie-codec-dropped.",
)
@click.option("--passthrough/--no-passthrough", default=True, show_default=True, help="Whether sglang.runtime gets OpenAI JSON as it is.")
@click.option(
    "--stop-holdback",
    type=click.Choice(("prefix", "window")),
    default="prefix",
    show_default=True,
    help="'window' cuts chunks around stop strings just as vLLM does.",
)
@parsers
@flavor
@click.option(
    "--generation-config",
    type=click.Choice(("auto", "none")),
    default="auto",
    show_default=True,
    help="'auto' takes sampling defaults from the tokenizer's model where a server cannot tell its own.",
)
@click.option("--enable-prompt-tokens-details", "prompt_tokens_details", is_flag=True, help="Show cached_tokens in usage.")
@click.option("--return-tokens-as-token-ids", is_flag=True, help="Log probabilities name tokens as token_id:N.")
@click.option("--serve-models", "serves_models", is_flag=True, help="Answer GET /v1/models and /v1/models/{id} here.")
@click.option(
    "--fallbacks",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Name more endpoints after the first; not for ORIGINAL_DST.",
)
@click.option(
    "--forward-header", "forward_headers", multiple=True, metavar="NAME", help="A request header to send on as metadata; repeatable."
)
@seconds("--request-timeout", 600.0, "Deadline of a whole answer.")
@seconds("--check-interval", 5.0, "Between health checks of a model server.")
@seconds("--loads-interval", 1.0, "Between questions for its load (GetLoads).")
@seconds("--drain-delay", 0.0, "After a signal, how long streams are still accepted: in Kubernetes some 5 s.", allows_zero=True)
@seconds("--shutdown-timeout", 30.0, "After that, how long streams may take to end.")
@click.option("--metrics-listen", metavar="HOST:PORT", help="Where Prometheus may scrape.  [default: nowhere]")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="Private key, PEM; Envoy then needs TLS towards this port.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="Certificate chain, PEM.")
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error")),
    default="warning",
    show_default=True,
    help="'info' has a line for each request.",
)
def ext_proc(
    picker: str,
    template_file: Any,
    transcode: str | None,
    tls_key: str | None,
    tls_cert: str | None,
    log_level: str,
    **options: Any,
) -> None:
    """Pick a model server for each request of an Envoy, and transcode OpenAI HTTP to what it speaks: an endpoint picker over ext_proc.

    `envoy-config` prints an Envoy to go with it. With --picker none it only transcodes, behind another endpoint picker.
    """
    from ..ext_proc.app import run_ext_proc
    from ..ext_proc.endpoints import TranscoderOptions
    from ..ext_proc.picking import PICKERS
    from ..inferencepool import transcode_override

    if (tls_key is None) != (tls_cert is None):
        raise click.UsageError("--tls-key and --tls-cert go together")
    for name in ("dialect", "snapshot"):
        if picker != "none" and options[name] is not None:
            raise click.UsageError(f"--{name} is for --picker none; an endpoint has its own: --endpoint HOST:PORT,{name}=...")
    if picker == "none" and options["fallbacks"]:
        raise click.UsageError("--fallbacks is for a picker, and --picker none has none")
    logging.basicConfig(level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transcoder_options = TranscoderOptions(
        chat_template=template_file.read() if template_file is not None else None,
        **{name: options.pop(name) for name in TranscoderOptions.__struct_fields__ if name in options},
    )
    run(
        run_ext_proc(
            picker=PICKERS[picker]() if picker != "none" else None,
            override=transcode_override(transcode, os.environ),
            options=transcoder_options,
            tls=(tls_key, tls_cert) if tls_key is not None and tls_cert is not None else None,
            **options,
        )
    )
