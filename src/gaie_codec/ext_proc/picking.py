"""Which model server answers a request: candidates in, the ones to use out, best first.

A picker is a plain function `picker(request, candidates) -> candidates`. It is only ever given candidates that may be chosen: ready ones,
inside the subset that the data plane asked for, whose model server can be told what the request says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from .. import Code, CodecError, InferenceRequest


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One model server, as it is at the moment of the choice. Numbers that the server does not tell are 0."""

    address: str
    """IP:PORT, an IPv6 address in brackets."""

    dialect: str
    """One of ours, or "http" for a model server that speaks OpenAI HTTP itself."""

    snapshot: str = ""
    model: str = ""
    in_flight: int = 0
    """Requests that this process has sent to it and that have not ended."""

    waiting: int = 0
    """Requests in its queue, as it tells (GetLoads)."""

    running: int = 0
    kv_cache_usage: float = 0.0
    """From 0 to 1."""


Picker: TypeAlias = Callable[[InferenceRequest, Sequence[Candidate]], Sequence[Candidate]]
"""Chooses; an empty answer is 503. Raises `RequestShedError` for 429."""


class NoEndpointError(CodecError):
    """No model server is there for the request: 503."""

    code = Code.UNAVAILABLE
    http_status = 503
    error_type = "ServiceUnavailableError"


class RequestShedError(CodecError):
    """A picker drops the request rather than let it wait: 429."""

    code = Code.RESOURCE_EXHAUSTED
    http_status = 429
    error_type = "RateLimitError"
