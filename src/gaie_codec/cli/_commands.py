"""The command tree, and the one place where errors become exit status 2 and a line on stderr."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from .. import CodecError, ModelInfo, UsageError, __version__
from ..adapters import DIALECTS
from ._compat import compat_command
from ._conformance import conformance_command
from ._envoy_config import envoy_config_command
from ._ext_proc import ext_proc
from ._options import flavor, parsers, run, seconds
from ._pool import pool
from ._probe import probe_command
from ._proto import proto
from ._transcode import transcode

_EXTRAS = {
    "conformance": "ext-proc",
    "envoy-config": "pool",
    "ext-proc": "ext-proc",
    "pool": "pool",
    "probe": "grpc",
    "proto": "proto",
    "serve": "server",
    "sim": "sim",
    "transcode": "tokenizers",
}


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (CodecError, UsageError) as error:
            param = getattr(error, "param", None)
            text = " ".join(str(error).split())
            raise click.ClickException(f"{param}: {text}" if param and param not in text else text) from error
        except UnicodeError as error:
            raise click.ClickException("an argument is not valid UTF-8") from error
        except BrokenPipeError:  # whoever reads has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the interpreter flushes it on its way out
            ctx.exit(141)  # as a process that SIGPIPE ended
        except OSError as error:
            raise click.ClickException(f"{error.filename or 'input and output'}: {error.strerror or error}") from error
        except ImportError as error:
            # What is missing first is seldom all that the command needs.
            extra = _EXTRAS.get(ctx.invoked_subcommand or "", "all")
            raise click.ClickException(f"{str(error).partition(': pip install')[0]}: pip install gaie-codec[cli,{extra}]") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gaie-codec")
def cli() -> None:
    """Transcode between the OpenAI HTTP API and the gRPC protocols of model servers."""


cli.add_command(transcode)
cli.add_command(compat_command)
cli.add_command(probe_command)
cli.add_command(conformance_command)
cli.add_command(proto)
cli.add_command(pool)
cli.add_command(envoy_config_command)
cli.add_command(ext_proc)


@cli.command()
@click.option("--dialect", type=click.Choice(DIALECTS), default="vllm.engine", show_default=True, help="The protocol to speak.")
@click.option("--snapshot", help="Which version of the schema to speak.  [default: the newest]")
@click.option("--listen", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="Port 0 takes a free one.")
@click.option("--tokenizer", default="builtin", show_default=True, metavar="DIR|builtin", help="Tokenizer of the simulated model.")
@click.option("--script", type=click.File("rb"), help="JSON with how to answer; see the documentation of gaie_codec.sim.")
@click.option("--model", default="sim", show_default=True, help="The served model name.")
def sim(dialect: str, snapshot: str | None, listen: str, tokenizer: str, script: Any, model: str) -> None:
    """Run a simulated model server: deterministic, scriptable answers over real gRPC."""
    from ..sim import SimServer, decode_script
    from ..sim import run as run_sim

    answer = decode_script(script.read()) if script is not None else None
    served = ModelInfo(model_path=tokenizer, tokenizer_path=tokenizer, served_model_name=model)
    run(run_sim(SimServer(dialect, snapshot=snapshot, tokenizer=tokenizer, model=served, script=answer), listen))


@cli.command()
@click.option("--upstream", required=True, metavar="grpc://HOST:PORT", help="The model server.")
@click.option(
    "--dialect", type=click.Choice(("auto", *DIALECTS)), default="auto", show_default=True, help="What it speaks; auto probes it."
)
@click.option("--snapshot", help="Which version of the schema it speaks.  [default: the newest, or what the probe finds]")
@click.option(
    "--tokenizer",
    default="server",
    show_default=True,
    metavar="server|DIR|HUB_ID|builtin",
    help="'server' asks the model server for its own.",
)
@click.option("--listen", default="127.0.0.1:8000", show_default=True, metavar="HOST:PORT", help="Port 0 takes a free one.")
@click.option(
    "--unsupported",
    type=click.Choice(("reject", "drop")),
    default="reject",
    show_default=True,
    help="What to do with request fields that this server cannot be told; dropped ones are named in x-gaie-codec-dropped.",
)
@click.option("--metrics-listen", metavar="HOST:PORT", help="Where Prometheus scrapes metrics.  [default: nowhere]")
@seconds("--request-timeout", 600.0, "Deadline of a whole answer.")
@seconds("--connect-timeout", 30.0, "How long to wait for the model server at the start.")
@click.option("--chat-template", "template_file", type=click.File("r", encoding="utf-8"), help="Jinja file to use instead of the model's.")
@click.option("--enable-prompt-tokens-details", is_flag=True, help="Show cached_tokens in usage.")
@click.option("--return-tokens-as-token-ids", is_flag=True, help="Log probabilities name tokens as token_id:N.")
@click.option(
    "--stop-holdback",
    type=click.Choice(("prefix", "window")),
    default="prefix",
    show_default=True,
    help="'window' cuts chunks around stop strings just as vLLM does, at the price of latency.",
)
@click.option(
    "--passthrough/--no-passthrough",
    default=True,
    show_default=True,
    help="Whether a server that takes OpenAI JSON as it is (sglang.runtime) gets it, instead of token ids.",
)
@parsers
@flavor
@click.option(
    "--generation-config",
    type=click.Choice(("auto", "none")),
    default="auto",
    show_default=True,
    help="'auto' takes sampling defaults from the tokenizer's model where the server cannot tell its own.",
)
@click.option(
    "--allowed-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let scripts of web pages from there ask (CORS); '*' is any; repeatable.  [default: none]",
)
@click.option("--access-log", is_flag=True, help="A line on stderr for each request.")
@click.option("--log-level", type=click.Choice(("debug", "info", "warning", "error")), default="warning", show_default=True)
def serve(template_file: Any, **options: Any) -> None:
    """Serve the OpenAI HTTP API in front of one model server."""
    from ..asgi.server import run_serve

    run(run_serve(chat_template=template_file.read() if template_file is not None else None, **options))
