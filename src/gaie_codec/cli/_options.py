"""What several commands have: kinds of options, and how a shim is run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import click


def seconds(name: str, default: float, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A time; the parameter's name ends in `_s`."""
    kind = click.FloatRange(min=0, min_open=True)
    return click.option(
        name, f"{name[2:].replace('-', '_')}_s", type=kind, default=default, show_default=True, metavar="SECONDS", help=text
    )


def run(main: Coroutine[Any, Any, None]) -> None:
    """Until it ends, or Ctrl-C before it minds signals itself."""
    try:
        asyncio.run(main)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
