"""A connection -> what the server there speaks, and its model.

The errors are for whoever configured the server's address: UsageError with one line that says what is in the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from .. import Code, CodecError, ModelInfo, UpstreamStatusError, UsageError, adapters, snapshots
from ..probe import probe
from .questions import fetch_model_info

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from .connection import Upstream

_RETRY_S: Final = 0.5

_Told = TypeVar("_Told")

_log = logging.getLogger("gaie_codec.upstream")


async def detect_adapter(upstream: Upstream, snapshot: str | None, timeout_s: float) -> Adapter:
    """Ask the server what it is; a snapshot that the user named goes before what it says."""
    try:
        report = await await_answer(upstream, timeout_s, lambda limit_s: probe(upstream, timeout_s=limit_s))
    except CodecError as error:
        raise UsageError(f"upstream {error}") from error
    if not report.dialect:
        raise UsageError(f"upstream {upstream.target}: no model server that is known: {report.reason}; name its dialect")
    try:
        adapter = adapters.get(snapshots.load(report.dialect, snapshot if snapshot is not None else report.snapshot))
    except UsageError as error:
        raise UsageError(f"upstream {upstream.target} speaks {report.dialect}: {error}") from error
    if snapshot is not None:
        _log.info("%s: dialect %s; snapshot %s as given, though %s", upstream.target, report.dialect, snapshot, report.reason)
    else:
        # A guess is worth a line by default, a certainty is not.
        level = logging.INFO if report.match == "exact" else logging.WARNING
        told = (upstream.target, report.dialect, report.snapshot, report.match, report.reason)
        _log.log(level, "%s: dialect %s, snapshot %s (%s): %s", *told)
    return adapter


async def await_model_info(upstream: Upstream, adapter: Adapter, timeout_s: float, *, is_optional: bool) -> ModelInfo:
    """What the server says of its model, which is also the proof that it speaks the dialect.

    `is_optional` lets a server that has no GetModelInfo pass, with nothing known of its model.
    """
    try:
        model = await await_answer(upstream, timeout_s, lambda limit_s: fetch_model_info(upstream, adapter, timeout_s=limit_s))
    except CodecError as error:
        if error.code is Code.UNIMPLEMENTED:
            await check_dialect(upstream, adapter)
        if not is_optional or error.code is not Code.UNIMPLEMENTED:
            raise UsageError(f"upstream {upstream.target}: no {adapter.dialect} model server: {error}") from error
        _log.warning("%s has no GetModelInfo: its model's name, limits and sampling defaults are not known", upstream.target)
        return ModelInfo()
    if not adapter.info_paths:
        await check_dialect(upstream, adapter)
    return model


async def check_dialect(upstream: Upstream, adapter: Adapter) -> None:
    """Raise UsageError for a server that is known to speak another dialect; it has told nothing in the one that it was asked in."""
    with contextlib.suppress(CodecError):
        spoken = (await probe(upstream)).dialect
        if spoken not in ("", adapter.dialect):
            raise UsageError(f"upstream {upstream.target}: no {adapter.dialect} model server: it speaks {spoken}; dialect auto sees that")


async def await_answer(upstream: Upstream, timeout_s: float, ask: Callable[[float], Awaitable[_Told]]) -> _Told:
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
