"""What several commands have: kinds of options, and how a shim is run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

import click


class _Seconds(click.FloatRange):
    """Up to ten weeks: nothing here waits longer, and timers have their limits."""

    def __init__(self, *, allows_zero: bool) -> None:
        super().__init__(min=0, min_open=not allows_zero, max=6_000_000)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        converted = super().convert(value, param, ctx)
        if not math.isfinite(converted):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return converted


def seconds(name: str, default: float, text: str, *, allows_zero: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A time; the parameter's name ends in `_s`."""
    kind = _Seconds(allows_zero=allows_zero)
    return click.option(
        name, f"{name[2:].replace('-', '_')}_s", type=kind, default=default, show_default=True, metavar="SECONDS", help=text
    )


def parsers(command: Callable[..., None]) -> Callable[..., None]:
    """How the model writes tool calls and reasoning."""
    for kind, what in (("reasoning", "reasoning"), ("tool-call", "tool calls")):
        command = click.option(
            f"--{kind}-parser",
            default="auto",
            show_default=True,
            metavar="NAME|auto|none",
            help=f"How the model writes {what}: docs/parsers.md. 'auto' is what the server tells, else what the chat template shows.",
        )(command)
    return command


flavor = click.option(
    "--flavor",
    type=click.Choice(("vllm", "sglang")),
    default="vllm",
    show_default=True,
    help="Whose OpenAI server answers and errors look like: docs/differences.md.",
)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Until it ends, or Ctrl-C before it minds signals itself."""
    try:
        asyncio.run(main)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
