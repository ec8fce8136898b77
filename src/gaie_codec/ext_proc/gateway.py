"""What all streams of an ext_proc shim share, as values and functions: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from .. import Limits
from .picking import Picker
from .servers import Server


class Declared(msgspec.Struct, frozen=True):
    """What the pool, or who runs the shim, says of the way to the model servers."""

    transcodes: bool = True
    """Whether OpenAI requests become gRPC, for servers that speak it."""

    reason: str = ""
    carries_grpc: bool = True
    """Whether gRPC can get there: it needs HTTP/2."""


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """What all streams of a shim share. The functions are asked anew for each request."""

    servers: Callable[[], Sequence[Server]]
    """The model servers that are ready."""

    picker: Picker | None = None
    """None only transcodes: another picker, before this filter, has named the model server, or Envoy knows of one only."""

    find: Callable[[str], Server | None] = lambda _: None
    """The model server at an address that another picker named."""

    declared: Callable[[], Declared] = Declared
    """What holds of the pool now."""

    models: Callable[[], bytes] | None = None
    """The body of `GET /v1/models`, for who wants it answered here."""

    fallbacks: int = 0
    """How many model servers to name after the first: for data planes that take a list."""

    forwarded: frozenset[str] = frozenset()
    """Request headers that a model server gets as metadata, besides trace context."""

    timeout_s: float | None = None
    """What the model server is told of the deadline."""

    flavor: Literal["vllm", "sglang"] = "vllm"
    """Whose errors are told, as by the transcoders, where a request reaches none."""

    limits: Limits = Limits()
