"""A file -> its pool, once or for as long as somebody asks.

A ConfigMap mount changes a file by pointing a symbolic link elsewhere, editors by renaming, `kubectl cp` by writing in place. All of
these change what `stat` says of the path, so that is asked, and the file read only when it differs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from .. import CodecError, MalformedRequestError, UsageError
from ._documents import MAX_BYTES
from ._pool import InferencePool, release_index
from ._rules import decode_pools

_log = logging.getLogger("gaie_codec.inferencepool")

_Signature: TypeAlias = tuple[int, int, int, int]
_GONE: Final = (0, 0, 0, 0)


def load_pool(path: str | os.PathLike[str], *, name: str | None = None, gaie_version: str | None = None) -> InferencePool:
    """The pool that a file describes; `name` (NAME or NAMESPACE/NAME) chooses where it describes several.

    Raises MalformedRequestError for text that is no manifest or has errors (the first, and how many more), UsageError for a file that
    cannot be read, a version without rules, and a choice that does not lead to one pool.
    """
    release_index(gaie_version)
    return _decode(os.fspath(path), _read(os.fspath(path))[1], name, gaie_version)


class WatchedPool:
    """A file's pool, read again when the file has changed, at most every `interval_s` seconds of `clock`.

    Raises what `load_pool` raises when it is made. Later, while the file is gone or has errors, the last good pool stays, `problem` says
    what is wrong, and the logger gaie_codec.inferencepool says so once per change. Without threads: whoever asks pays for the stat.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        gaie_version: str | None = None,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        release_index(gaie_version)
        self._path = os.fspath(path)
        self._name = name
        self._gaie_version = gaie_version
        self._interval_s = interval_s
        self._clock = clock
        self._asked_at = clock()
        self._problem = ""
        self._signature, data = _read(self._path)
        self._pool = _decode(self._path, data, name, gaie_version)

    @property
    def problem(self) -> str:
        """What is wrong with the file as it was last read; empty if nothing is."""
        return self._problem

    def current(self) -> InferencePool:
        """The pool as of now, for a request that begins now. Never raises for what became of the file."""
        now = self._clock()
        if now - self._asked_at >= self._interval_s:
            self._asked_at = now
            if _sign(self._path) != self._signature:
                self._reload()
        return self._pool

    def _reload(self) -> None:
        before, self._signature = self._signature, _GONE
        try:
            self._signature, data = _read(self._path)
            pool = _decode(self._path, data, self._name, self._gaie_version)
        except (CodecError, UsageError) as error:
            # What cannot be opened is tried again each time, and told once.
            if self._signature != before or str(error) != self._problem:
                _log.warning("%s; the pool stays as it was", error)
            self._problem = str(error)
            return
        if self._problem:
            _log.info("%s: can be used again", self._path)
        self._problem = ""
        if pool != self._pool:
            _log.info("%s: changed; appProtocol was %s, is %s", self._path, self._pool.app_protocol, pool.app_protocol)
        self._pool = pool


def _sign(path: str) -> _Signature:
    try:
        return _signature(os.stat(path))
    except OSError:
        return _GONE


def _signature(stat: os.stat_result) -> _Signature:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: str) -> tuple[_Signature, bytes]:
    """The bytes, and the signature of the very file that they are from, taken first: what is written meanwhile is read next time."""
    try:
        with open(path, "rb") as file:
            return _signature(os.fstat(file.fileno())), file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _decode(path: str, data: bytes, name: str | None, gaie_version: str | None) -> InferencePool:
    try:
        pools, findings = decode_pools(data, gaie_version=gaie_version)
    except CodecError as error:
        raise MalformedRequestError(f"{path}: {error.message}") from None
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        first = ": ".join(filter(None, (path, errors[0].pool, errors[0].path, errors[0].message)))
        raise MalformedRequestError(first + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""), param=errors[0].path or None)
    chosen = [pool for pool in pools if name is None or name in (pool.name, f"{pool.namespace}/{pool.name}")]
    if len(chosen) != 1:
        names = ", ".join("/".join(filter(None, (pool.namespace, pool.name))) for pool in pools)
        raise UsageError(f"{path}: {'several pools' if name is None else f'not one pool named {name[:60]!r}'}; there are {names}")
    return chosen[0]
