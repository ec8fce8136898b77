"""Endpoints as the Endpoint Picker Protocol writes them, and the names under which it does.

Of its own, apart from what our EPP does with them: what judges must not share the mistakes of what is judged.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

ENDPOINT: Final = "x-gateway-destination-endpoint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
SERVED: Final = "x-gateway-destination-endpoint-served"
LB: Final = "envoy.lb"
SUBSET_HINT: Final = "envoy.lb.subset_hint"

_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")


def split(endpoint: str) -> tuple[str, int] | None:
    """IP and port of `IP:PORT`, an IPv6 address in brackets; None for anything else."""
    match = _ADDRESS.fullmatch(endpoint)
    if match is None or not 1 <= int(match[3]) <= 65535:
        return None
    try:
        address = ipaddress.IPv6Address(match[1]) if match[1] else ipaddress.IPv4Address(match[2])
    except ValueError:
        return None
    return str(address), int(match[3])


def normal(endpoint: str) -> str:
    """The endpoint in the one way to write it; what is none stays as it is, without spaces around it."""
    parts = split(endpoint.strip())
    if parts is None:
        return endpoint.strip()
    return f"[{parts[0]}]:{parts[1]}" if ":" in parts[0] else f"{parts[0]}:{parts[1]}"
