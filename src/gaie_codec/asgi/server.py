"""`gaie-codec serve`: one model server behind one HTTP port, with uvicorn.

Order of things: take the port (without listening, so that nobody waits in a queue), wait for the model server, learn its dialect if
that is left to it, its model and its tokenizer, listen, say so in one line. SIGTERM and SIGINT stop the listening; answers under way
get a bounded time to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from .. import Code, CodecError, Limits, ModelInfo, Transcoder, UpstreamStatusError, UsageError, adapters, snapshots
from ..probe import probe
from ..text.huggingface import HuggingFaceTokenizer
from ..tokenizer_sources import load_tokenizer, strftime_now
from .app import create_app
from .questions import fetch_model_info, fetch_tokenizer
from .upstream import Upstream

try:
    import uvicorn
except ModuleNotFoundError as error:
    raise ImportError("gaie_codec.asgi.server needs the package uvicorn: pip install gaie-codec[server]", name=error.name) from error

if TYPE_CHECKING:
    from ..adapters.base import Adapter

_LISTEN: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]*)):(\d{1,5})")
_RETRY_S: Final = 0.5

AUTO: Final = "auto"
"""Instead of a dialect: whatever the model server speaks."""

_Told = TypeVar("_Told")

_log = logging.getLogger("gaie_codec.asgi")


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
    passthrough: bool = True,
    generation_config: Literal["auto", "none"] = "auto",
    limits: Limits | None = None,
    request_timeout_s: float | None = 600.0,
    connect_timeout_s: float = 30.0,
    shutdown_timeout_s: int = 30,
    access_log: bool = False,
    log_level: str = "warning",
) -> None:
    """Serve until SIGTERM or SIGINT. Prints `ready http=HOST:PORT` to stdout once it accepts; port 0 takes a free one.

    `dialect` "auto" asks the model server what it speaks; `snapshot`, where given, is then one of that dialect. `tokenizer` is "server"
    (the model server's own, by GetTokenizer), "builtin", a directory or a model of the hub; `chat_template` is the text of one to use
    instead of the model's. `passthrough` False sends token ids also to a server that takes OpenAI JSON as it is. `generation_config`
    "auto" takes the sampling defaults of a tokenizer's model where the server cannot tell its own. Raises UsageError with one line that
    says what is in the way.
    """
    logging.basicConfig(level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    adapter = adapters.get(snapshots.load(dialect, snapshot)) if dialect != AUTO else None
    started = time.monotonic()
    with contextlib.closing(_bind(listen)) as listener:
        connection = Upstream(upstream)
        try:
            left_s = connect_timeout_s
            if adapter is None:
                adapter = await _detect_adapter(connection, snapshot, connect_timeout_s)
                left_s = max(1.0, connect_timeout_s - (time.monotonic() - started))
            model = await _await_model_info(connection, adapter, left_s, is_optional=tokenizer != "server")
            passes_through = passthrough and adapter.passthrough is not None
            chosen = None
            if tokenizer != "server" or adapter.tokenizer_path is not None or not passes_through:
                chosen = await _load_tokenizer(connection, adapter, tokenizer, chat_template, model)
            if chosen is not None:
                model = _completed(model, chosen, adapter, takes_defaults=generation_config == "auto" and not passes_through)
            transcoder = Transcoder(
                adapter.dialect,
                snapshot=adapter.snapshot.name,
                tokenizer=chosen,
                model=model,
                limits=limits,
                unsupported=unsupported,
                stop_holdback=stop_holdback,
                prompt_tokens_details=enable_prompt_tokens_details,
                passthrough=passthrough,
            )
            config = uvicorn.Config(
                create_app(connection, transcoder, request_timeout_s=request_timeout_s),
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
            await _Server(config).serve([listener])
        finally:
            await connection.close()


class _Server(uvicorn.Server):
    """uvicorn that says when it accepts, and whose end by a signal is an ordinary return instead of the signal once more."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            sys.stdout.write(f"ready http={f'[{host}]' if ':' in host else host}:{port}\n")
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


def _bind(listen: str) -> socket.socket:
    match = _LISTEN.fullmatch(listen)
    if match is None or int(match[3]) > 65535:
        raise UsageError(f"listen {listen}: not of the form HOST:PORT (an IPv6 address goes in brackets)")
    # asyncio sets TCP_NODELAY only where it sees the protocol's number; without it an answer waits 40 ms for the client's ACK.
    listener = socket.socket(socket.AF_INET6 if match[1] else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((match[1] or match[2], int(match[3])))
    except OSError as error:
        listener.close()
        raise UsageError(f"listen {listen}: {error.strerror or error}") from error
    return listener


async def _detect_adapter(upstream: Upstream, snapshot: str | None, timeout_s: float) -> Adapter:
    """Ask the server what it is; a snapshot that the user named goes before what it says."""
    try:
        report = await _await_answer(upstream, timeout_s, lambda limit_s: probe(upstream, timeout_s=limit_s))
    except CodecError as error:
        raise UsageError(f"upstream {error}") from error
    if not report.dialect:
        raise UsageError(f"upstream {upstream.target}: no model server that is known: {report.reason}; name its dialect")
    try:
        adapter = adapters.get(snapshots.load(report.dialect, snapshot if snapshot is not None else report.snapshot))
    except UsageError as error:
        raise UsageError(f"upstream {upstream.target} speaks {report.dialect}: {error}") from error
    if snapshot is not None:
        _log.info("dialect %s; snapshot %s as given, though %s", report.dialect, snapshot, report.reason)
    else:
        # A guess is worth a line by default, a certainty is not.
        level = logging.INFO if report.match == "exact" else logging.WARNING
        _log.log(level, "dialect %s, snapshot %s (%s): %s", report.dialect, report.snapshot, report.match, report.reason)
    return adapter


async def _await_model_info(upstream: Upstream, adapter: Adapter, timeout_s: float, *, is_optional: bool) -> ModelInfo:
    try:
        model = await _await_answer(upstream, timeout_s, lambda limit_s: fetch_model_info(upstream, adapter, timeout_s=limit_s))
    except CodecError as error:
        if error.code is Code.UNIMPLEMENTED:
            await _check_dialect(upstream, adapter)
        if not is_optional or error.code is not Code.UNIMPLEMENTED:
            raise UsageError(f"upstream {upstream.target}: no {adapter.dialect} model server: {error}") from error
        _log.warning("the model server has no GetModelInfo: its name, limits and sampling defaults are not known")
        return ModelInfo()
    if not adapter.info_paths:
        await _check_dialect(upstream, adapter)
    return model


async def _check_dialect(upstream: Upstream, adapter: Adapter) -> None:
    """Raise UsageError for a server that is known to speak another dialect; it has told nothing in the one that it was asked in."""
    with contextlib.suppress(CodecError):
        spoken = (await probe(upstream)).dialect
        if spoken not in ("", adapter.dialect):
            raise UsageError(f"upstream {upstream.target}: no {adapter.dialect} model server: it speaks {spoken}; --dialect auto sees that")


async def _await_answer(upstream: Upstream, timeout_s: float, ask: Callable[[float], Awaitable[_Told]]) -> _Told:
    """Ask until the model server answers: it may still be loading its weights. Raises UsageError after `timeout_s`."""
    give_up = time.monotonic() + timeout_s
    has_told = False
    while True:
        left_s = give_up - time.monotonic()
        try:
            return await ask(max(0.1, min(5.0, left_s)))
        except UpstreamStatusError as error:
            if error.code not in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
                raise
            if left_s <= _RETRY_S:
                raise UsageError(f"upstream {upstream.target}: no answer in {timeout_s:.3g} s: {error}") from error
        if not has_told:
            has_told = True
            _log.info("waiting for the model server at %s", upstream.target)
        await asyncio.sleep(_RETRY_S)


def _completed(model: ModelInfo, tokenizer: HuggingFaceTokenizer, adapter: Adapter, *, takes_defaults: bool) -> ModelInfo:
    """What the model's files tell where the server does not: the server knows best what it was started with."""
    defaults = model.default_sampling_params
    if not defaults and takes_defaults and not adapter.advertises_defaults:
        defaults = tokenizer.default_sampling_params
    return msgspec.structs.replace(
        model, max_model_len=model.max_model_len or tokenizer.max_model_len or 0, default_sampling_params=defaults
    )


async def _load_tokenizer(
    upstream: Upstream, adapter: Adapter, source: str, chat_template: str | None, model: ModelInfo
) -> HuggingFaceTokenizer:
    if source != "server":
        return load_tokenizer(source, chat_template=chat_template)
    try:
        files = await fetch_tokenizer(upstream, adapter)
        return HuggingFaceTokenizer.from_files(files, chat_template=chat_template, strftime_now=strftime_now)
    except (CodecError, UsageError) as error:
        # A server that was started with a hub id has no files to send, but it tells the id.
        known = model.tokenizer_path or model.model_path
        hint = f", such as --tokenizer {known}" if known else ""
        raise UsageError(f"upstream {upstream.target}: no tokenizer from the model server: {error}; name another source{hint}") from error
