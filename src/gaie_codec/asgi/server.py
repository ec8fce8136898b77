"""`gaie-codec serve`: one model server behind one HTTP port, with uvicorn.

Order of things: take the port (without listening, so that nobody waits in a queue), wait for the model server, learn its dialect if
that is left to it, its model and its tokenizer, listen, say so in one line. SIGTERM and SIGINT stop the listening; answers under way
get a bounded time to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Collection, Generator
from typing import Final, Literal

from .. import Limits, adapters, snapshots
from ..telemetry.tracing import Tracing
from ..upstream import Upstream
from ..upstream.discovery import await_model_info, detect_adapter
from ..upstream.listen import bind
from ..upstream.transcoders import TranscoderOptions, Transcoders
from .app import create_app
from .cors import allow_origins

try:
    import uvicorn
except ModuleNotFoundError as error:
    raise ImportError("gaie_codec.asgi.server needs the package uvicorn: pip install gaie-codec[server]", name=error.name) from error

AUTO: Final = "auto"
"""Instead of a dialect: whatever the model server speaks."""


async def run_serve(
    *,
    upstream: str,
    dialect: str,
    snapshot: str | None = None,
    tokenizer: str = "server",
    chat_template: str | None = None,
    listen: str = "127.0.0.1:8000",
    unsupported: Literal["reject", "drop"] = "reject",
    stop_holdback: Literal["prefix", "window"] = "prefix",
    enable_prompt_tokens_details: bool = False,
    return_tokens_as_token_ids: bool = False,
    passthrough: bool = True,
    generation_config: Literal["auto", "none"] = "auto",
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    flavor: Literal["vllm", "sglang"] = "vllm",
    limits: Limits | None = None,
    metrics_listen: str | None = None,
    request_timeout_s: float | None = 600.0,
    connect_timeout_s: float = 30.0,
    shutdown_timeout_s: int = 30,
    access_log: bool = False,
    allowed_origins: Collection[str] = (),
    log_level: str = "warning",
) -> None:
    """Serve until SIGTERM or SIGINT. Prints `ready http=HOST:PORT` to stdout once it accepts; port 0 takes a free one.

    `dialect` "auto" asks the model server what it speaks; `snapshot`, where given, is then one of that dialect. `tokenizer` is "server"
    (the model server's own, by GetTokenizer), "builtin", a directory or a model of the hub; `chat_template` is the text of one to use
    instead of the model's. `passthrough` False sends token ids also to a server that takes OpenAI JSON as it is. `generation_config`
    "auto" takes the sampling defaults of a tokenizer's model where the server cannot tell its own. The parsers and `flavor` are as
    `Transcoder` takes them. `allowed_origins` are those of web pages whose scripts may ask, "*" for any. `metrics_listen` is where
    Prometheus scrapes, as HOST:PORT; it then ends the line as ` metrics=HOST:PORT`. Raises UsageError with one line that says what is in
    the way.
    """
    logging.basicConfig(level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    adapter = adapters.get(snapshots.load(dialect, snapshot)) if dialect != AUTO else None
    options = TranscoderOptions(
        tokenizer=tokenizer,
        chat_template=chat_template,
        unsupported=unsupported,
        stop_holdback=stop_holdback,
        prompt_tokens_details=enable_prompt_tokens_details,
        return_tokens_as_token_ids=return_tokens_as_token_ids,
        passthrough=passthrough,
        generation_config=generation_config,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        flavor=flavor,
        limits=limits if limits is not None else Limits(),
    )
    transcoders = Transcoders(options)
    await transcoders.load()
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as cleanup:
        listener = cleanup.enter_context(contextlib.closing(bind(listen)))
        connection = Upstream(upstream)
        cleanup.push_async_callback(connection.close)
        telemetry = None
        if metrics_listen is not None:
            from ..telemetry.exporting import Exporter  # its package is an extra

            telemetry = await cleanup.enter_async_context(Exporter(metrics_listen))
        left_s = connect_timeout_s
        if adapter is None:
            adapter = await detect_adapter(connection, snapshot, connect_timeout_s)
            left_s = max(1.0, connect_timeout_s - (time.monotonic() - started))
        model = await await_model_info(connection, adapter, left_s, is_optional=not transcoders.asks_for_tokenizers)
        transcoder = await transcoders.make(connection, adapter, model)
        if telemetry is not None:
            telemetry.scrape(connection, adapter, endpoint=connection.target, model=next(iter(model.names), ""))
        app = create_app(
            connection,
            transcoder,
            request_timeout_s=request_timeout_s,
            metrics=telemetry.metrics if telemetry is not None else None,
            tracing=Tracing(),
        )
        config = uvicorn.Config(
            allow_origins(app, allowed_origins) if allowed_origins else app,
            interface="asgi3",
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level=log_level.lower(),
            access_log=access_log,
            server_header=False,
            proxy_headers=False,
            # uvicorn's 5 s is also when httpx, and with it the openai SDK, lets go of a connection: a race for the next request.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=shutdown_timeout_s,
        )
        if access_log:
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # asked for, whatever level the rest has
        await _Server(config, f" metrics={telemetry.address}" if telemetry is not None else "").serve([listener])


class _Server(uvicorn.Server):
    """uvicorn that says when it accepts, and whose end by a signal is an ordinary return instead of the signal once more."""

    def __init__(self, config: uvicorn.Config, also: str) -> None:
        super().__init__(config)
        self._also = also  # what else there is to say then

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            sys.stdout.write(f"ready http={f'[{host}]' if ':' in host else host}:{port}{self._also}\n")
        sys.stdout.flush()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
