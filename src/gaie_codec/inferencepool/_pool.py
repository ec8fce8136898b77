"""What a manifest declares, and what is said about it, as values."""

from __future__ import annotations

import re
from typing import Final, Literal, TypeAlias

import msgspec

from .. import UsageError

RELEASES: Final = ("1.0", "1.1", "1.2", "1.3", "1.4", "1.5", "1.6")
"""The GAIE releases whose CRD is known, oldest first. Patch releases did not change it."""

AppProtocol: TypeAlias = Literal["http", "kubernetes.io/h2c"]
FailureMode: TypeAlias = Literal["FailOpen", "FailClose"]

_RELEASE: Final = re.compile(r"v?(\d{1,4}\.\d{1,4})(\.\d{1,4})?([-.]?(rc|alpha|beta)[-.]?\d{1,4})?", re.ASCII)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to say about a manifest."""

    pool: str
    """NAMESPACE/NAME, or NAME alone without a namespace, or "document 2" without a name. Before it the kind, if it is another."""

    path: str
    """Such as `spec.targetPorts[2].number`; empty for the manifest as a whole."""

    severity: Literal["error", "note"]
    message: str
    releases: str = ""
    """The GAIE releases for which it holds, as a range such as `<1.4`; empty: all of them."""


class EndpointPickerRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where the gateway finds the endpoint picker, with the CRD's defaults filled in."""

    name: str
    group: str = ""
    kind: str = "Service"
    port: int | None = None
    """The port of the service, not of its pods."""

    failure_mode: FailureMode = "FailClose"


class InferencePool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool without errors, with the CRD's defaults filled in."""

    name: str
    """Empty where `metadata.generateName` leaves it to the API server."""

    namespace: str
    """Empty where the manifest leaves it to whoever applies it."""

    selector: dict[str, str]
    """Labels that a pod must have, all of them."""

    target_ports: tuple[int, ...]
    app_protocol: AppProtocol = "http"
    declared_at: Literal["spec.appProtocol", "spec.targetPorts[].appProtocol", ""] = ""
    """Where the manifest says the protocol; empty where it is the default. The second is proposal-2162's shape."""

    picker: EndpointPickerRef | None = None
    accepted_since: str = ""
    """The first of RELEASES whose CRD accepts the manifest, and so do all after it; empty if none does."""


def release_index(gaie_version: str | None) -> int | None:
    """Where in RELEASES a version such as `1.4`, `v1.4.0` or `1.5.0-rc.1` belongs; None for None. Raises UsageError."""
    if gaie_version is None:
        return None
    match = _RELEASE.fullmatch(gaie_version.strip())
    if match is None or match[1] not in RELEASES:
        raise UsageError(f"no rules for GAIE {gaie_version[:40]!r}; there are those of {', '.join(RELEASES)}")
    return RELEASES.index(match[1])
