"""Fixtures: Envoys and servers which end with their test, and whose log is shown where it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import Envoy, ExtProcThread, Process


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start_envoy(cleanup: ExitStack, tmp_path: Path) -> Callable[..., Envoy]:
    """Start an Envoy; keywords as for `Envoy`."""
    number = 0

    def start(**options: Any) -> Envoy:
        nonlocal number
        number += 1
        envoy = Envoy(tmp_path / f"envoy{number}", **options)
        cleanup.callback(lambda: sys.stdout.write(envoy.log()))  # pytest shows it where the test fails
        cleanup.callback(envoy.stop)
        return envoy

    return start


@pytest.fixture
def start_ext_proc(cleanup: ExitStack) -> Callable[[Process], ExtProcThread]:
    """Start an ext_proc server that is one async function; see `ExtProcThread`."""

    def start(process: Process) -> ExtProcThread:
        server = ExtProcThread(process)
        cleanup.callback(server.stop)
        return server

    return start
