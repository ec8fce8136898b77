"""Text -> which model servers there are: `HOST:PORT[,dialect=D][,snapshot=S][,model=NAME]`, alone or one a line in a file."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from .. import UsageError, adapters, snapshots
from ..upstream import parse_target
from .picking import encode_address

AUTO: Final = "auto"
"""Instead of a dialect: whatever the model server speaks."""

HTTP: Final = "http"
"""Instead of a dialect: OpenAI HTTP, which needs no transcoding."""

_KEYS: Final = ("dialect", "snapshot", "model")
_RESOLVE_TIMEOUT_S: Final = 10.0


class EndpointSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model server, as it was configured."""

    target: str
    """HOST:PORT, an IPv6 address in brackets."""

    dialect: str = AUTO
    """One of ours, "auto", or "http" for a server that speaks OpenAI HTTP itself."""

    snapshot: str | None = None
    """None is the newest, or with "auto" the one that is found."""

    model: str = ""
    """What it has to serve: known from here where it does not tell, else it is not ready unless it tells the same."""

    @property
    def is_name(self) -> bool:
        """Whether the host has to be looked up: its addresses may change."""
        host = self.target.rpartition(":")[0]
        return not host.startswith("[") and re.fullmatch(r"[0-9.]+", host) is None

    def __str__(self) -> str:
        told = {"dialect": self.dialect if self.dialect != AUTO else "", "snapshot": self.snapshot, "model": self.model}
        return ",".join((self.target, *(f"{key}={value}" for key, value in told.items() if value)))


def check_dialect(dialect: str, snapshot: str | None) -> None:
    """Raise UsageError for a dialect or a snapshot that does not exist."""
    if dialect == HTTP:
        if snapshot is not None:
            raise UsageError("a model server with dialect http has no snapshot")
    elif dialect != AUTO:
        if dialect not in adapters.DIALECTS:
            raise UsageError(f"no dialect {dialect!r}; there are {', '.join((*adapters.DIALECTS, HTTP, AUTO))}")
        adapters.get(snapshots.load(dialect, snapshot))


def decode_endpoint(text: str) -> EndpointSpec:
    """One model server. Raises UsageError, naming the text."""
    target, *settings = text.split(",")
    told: dict[str, str] = {}
    try:
        for setting in settings:
            key, separator, value = setting.partition("=")
            if not separator or not value or key not in _KEYS:
                raise UsageError(f"{setting!r} is none of {', '.join(f'{one}=...' for one in _KEYS)}")
            if key in told:
                raise UsageError(f"{key} is there twice")
            told[key] = value
        check_dialect(told.get("dialect", AUTO), told.get("snapshot"))
    except UsageError as error:
        raise UsageError(f"endpoint {text}: {error}") from error
    try:
        target = parse_target(target)
    except UsageError as error:
        raise UsageError(f"endpoint {text}: not of the form HOST:PORT (an IPv6 address goes in brackets)") from error
    return EndpointSpec(target=target, dialect=told.get("dialect", AUTO), snapshot=told.get("snapshot"), model=told.get("model", ""))


def decode_endpoints(text: str) -> tuple[EndpointSpec, ...]:
    """One model server a line; empty lines and what follows a # are passed over. Raises UsageError, naming the line."""
    specs = []
    for number, line in enumerate(text.splitlines(), 1):
        told = line.partition("#")[0].strip()
        if told:
            try:
                specs.append(decode_endpoint(told))
            except UsageError as error:
                raise UsageError(f"line {number}: {error}") from error
    return tuple(specs)


def read_endpoints(path: str | os.PathLike[str]) -> tuple[EndpointSpec, ...]:
    """Those of a file. Raises UsageError, naming the file and the line."""
    try:
        return decode_endpoints(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"endpoints file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"endpoints file {path}: not UTF-8") from error
    except UsageError as error:
        raise UsageError(f"endpoints file {path}: {error}") from error


async def resolve(specs: tuple[EndpointSpec, ...]) -> dict[str, EndpointSpec]:
    """By IP:PORT, names being looked up: all addresses of a name, IPv4 where it has such. Raises UsageError for a name that leads nowhere,
    and for two that lead to one place."""
    found: dict[str, EndpointSpec] = {}
    for spec, addresses in zip(specs, await asyncio.gather(*map(_resolve, specs)), strict=True):
        for address in addresses:
            if address in found:
                other = found[address]
                raise UsageError(f"endpoint {spec}: there twice" if spec == other else f"endpoint {spec}: the same place as {other}")
            found[address] = spec
    return found


async def resolve_again(specs: tuple[EndpointSpec, ...], before: Mapping[str, EndpointSpec]) -> tuple[dict[str, EndpointSpec], list[str]]:
    """Likewise for what was resolved `before`, and what is wrong: a name that leads nowhere keeps its addresses, of two that lead to one
    place the first has it."""
    found: dict[str, EndpointSpec] = {}
    faults = []
    for spec, answer in zip(specs, await asyncio.gather(*map(_resolve, specs), return_exceptions=True), strict=True):
        if isinstance(answer, UsageError):
            faults.append(str(answer))
        elif isinstance(answer, BaseException):
            raise answer
        addresses = answer if isinstance(answer, tuple) else tuple(address for address, other in before.items() if other == spec)
        for address in addresses:
            found.setdefault(address, spec)
    return found, faults


async def _resolve(spec: EndpointSpec) -> tuple[str, ...]:
    host, _, number = spec.target.rpartition(":")
    host, port = host.removeprefix("[").removesuffix("]"), int(number)
    if "%" in host:
        raise UsageError(f"endpoint {spec}: an address with a zone means nothing to a gateway")
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
            entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        families = {entry[0] for entry in entries}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        # In one order, whatever that of the answers is today.
        return tuple(sorted({encode_address(str(entry[4][0]), port) for entry in entries if entry[0] == family}))
    except (OSError, UnicodeError, TimeoutError) as error:  # the idna codec raises UnicodeError for a label that is too long
        raise UsageError(f"endpoint {spec}: the host name cannot be resolved") from error
