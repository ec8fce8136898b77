"""Which request headers reach the model server, and what the Endpoint Picker Protocol's own are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from .. import UsageError
from .._metadata import is_metadata_value
from .picking import DESTINATION

DROP_REASON: Final = "x-llm-d-request-dropped-reason"

# The newer name first: it wins over the one that it replaces.
OBJECTIVE: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
FAIRNESS_ID: Final = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
MODEL_REWRITE: Final = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
# Of pickers and for pickers, by their prefix: some are newer than any list.
_CONTROL_PREFIXES: Final = ("x-gateway-", "x-llm-d-", "x-slo-")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_HOP_BY_HOP: Final = frozenset(
    (
        "connection",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
# Who asked, from where. x-envoy-* are Envoy's own, which it would not let go of.
_KEPT_PREFIXES: Final = (":", "x-envoy-")
_KEPT: Final = frozenset(("host", "user-agent", "x-request-id", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", DESTINATION))
# gRPC servers refuse a call with more than some 8 or 16 KB of metadata, and clients choose the length of some.
_MAX_KEPT_CHARS: Final = 2048


def check_forwardable(name: str) -> str:
    """The name in lower case. Raises UsageError for a header that no model server may get: of HTTP itself, of gRPC, of pickers."""
    lower = name.lower()
    of_http = lower in _HOP_BY_HOP or lower in ("host", "accept-encoding") or lower.startswith("content-")
    if of_http or not _TOKEN.fullmatch(lower) or lower.startswith(("grpc-", *_CONTROL_PREFIXES)):
        raise UsageError(f"forward header {name!r}: no header that a model server may get")
    return lower


def to_remove(names: Iterable[str]) -> Iterator[str]:
    """What no model server gets, whatever it speaks: meant for the picker, or for one hop."""
    unwanted = _HOP_BY_HOP - {"te", "trailer"}
    return (name for name in dict.fromkeys(names) if name in unwanted or (name.startswith(_CONTROL_PREFIXES) and name != DESTINATION))


def to_remove_for_grpc(headers: Mapping[str, str], forwarded: frozenset[str], replaced: Iterable[str]) -> Iterator[str]:
    """What a request that becomes gRPC leaves behind: all that it would turn into metadata, credentials and grpc-* too, and what gRPC
    cannot carry.

    `forwarded` are further names that stay; `replaced` are set anew.
    """
    stays, anew = _KEPT | forwarded, {*replaced}
    for name, value in headers.items():
        can_stay = name in stays and len(value) <= _MAX_KEPT_CHARS and is_metadata_value(value)
        if not can_stay and name not in anew and not name.startswith(_KEPT_PREFIXES):
            yield name


def first_of(names: Iterable[str], headers: Mapping[str, str]) -> str:
    """The value of the first that is there; "" if none is."""
    return next((headers[name] for name in names if headers.get(name)), "")
