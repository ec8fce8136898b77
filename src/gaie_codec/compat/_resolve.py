"""A server and its release -> the dialects it speaks, each with the snapshots that may fit.

For servers built on the smg packages a release does not decide the schema: its requirements are lower bounds, so what is installed
depends on the day of the installation. Hence three points: the oldest that is allowed, that of the release day, and today's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from .._errors import UsageError
from ._matrix import BadPair, Behaviour, Era, Installed, Matrix, Row, ServerRelease, SnapshotEntry, matrix
from ._versions import between, parse, within

PROTO: Final = "smg-grpc-proto"
SERVICER: Final = "smg-grpc-servicer"
_PACKAGE_TITLES: Final = {PROTO: "smg-grpc-proto", SERVICER: "smg-grpc-servicer"}


class Point(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One combination that may be installed. `exact` is whether the server's schema is the snapshot's own, not only near to it."""

    snapshot: str
    exact: bool
    schema: str | None = None
    servicer: str | None = None
    proto: str | None = None
    broken: tuple[str, ...] = ()
    """What does not work with this combination."""


class Support(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One dialect of one release. Where nothing else is known, `release_day` is the best guess and `floor` the safest."""

    dialect: str
    service: str
    floor: Point
    release_day: Point
    today: Point
    start: str = ""
    install: str = ""
    requires: str = ""
    refused: str = ""
    """Why this library does not speak to it, where it does not."""
    behaviours: tuple[Behaviour, ...] = ()
    bad_pairs: tuple[BadPair, ...] = ()
    """Those that can come about between floor and today."""


class Resolution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of one release. `assumed`: the release is not in the matrix, and `release`, the nearest before it, stands in."""

    server: str
    title: str
    version: str
    release: str
    assumed: bool
    dialects: tuple[Support, ...]
    uploaded: str = ""
    notes: tuple[str, ...] = ()

    def dialect(self, name: str) -> Support:
        """The entry of one dialect. Raises UsageError where this release does not speak it."""
        for support in self.dialects:
            if support.dialect == name:
                return support
        spoken = ", ".join(support.dialect for support in self.dialects) or "none"
        raise UsageError(f"{self.server} {self.release} does not speak {name}; its dialects: {spoken}")


def servers() -> tuple[str, ...]:
    """The names that `resolve` takes, aliases left out."""
    return (*matrix().servers, SERVICER, PROTO)


def resolve(*, server: str, version: str) -> Resolution:
    """What a release speaks, for example `resolve(server="vllm", version="0.31.0")`.

    A release that is not in the matrix resolves to the newest one before it, with `assumed=True`; a pre-release likewise. Raises
    UsageError for an unknown server, for what is no release number, and for a release older than all that are known.
    """
    data = matrix()
    name = server_name(server)
    known = _releases(data, name)
    release, notes = _nearest(name, version, [entry.version for entry in known])
    entry = next(entry for entry in known if entry.version == release)
    if entry.note:
        notes.append(entry.note)
    if name in data.servers:
        title = data.servers[name].title
        supports = tuple(_of_server(data, name, release, notes))
    else:
        title = _PACKAGE_TITLES[name]
        supports = tuple(_of_package(data, name, release))
    return Resolution(
        server=name,
        title=title,
        version=version,
        release=release,
        assumed=parse(version) != parse(release),
        dialects=supports,
        uploaded=entry.uploaded or "",
        notes=tuple(notes),
    )


def server_name(server: str) -> str:
    """The matrix's name for a server: case and aliases do not matter. Raises UsageError for one that is unknown."""
    wanted = server.strip().lower()
    for name, entry in matrix().servers.items():
        if wanted in (name, *entry.aliases):
            return name
    if wanted in _PACKAGE_TITLES:
        return wanted
    raise UsageError(f"no server {server[:60]!r} in the matrix; there are: {', '.join(servers())}")


def snapshot_for_proto(dialect: str, proto: str) -> SnapshotEntry | None:
    """The snapshot to use with an installed smg-grpc-proto, None where the dialect does not come from that package."""
    for entry in matrix().dialects[dialect].snapshots:
        if entry.smg_grpc_proto is not None and within(proto, entry.smg_grpc_proto):
            return entry
    return None


def _releases(data: Matrix, name: str) -> tuple[ServerRelease, ...]:
    if name in data.servers:
        return data.servers[name].releases
    packages = data.packages.servicer if name == SERVICER else data.packages.proto
    return tuple(ServerRelease(version=package.version, uploaded=package.uploaded) for package in packages)


def _nearest(name: str, version: str, known: list[str]) -> tuple[str, list[str]]:
    """The release to take for `version`, and what to say about that. `known` is sorted."""
    wanted = parse(version)
    before = [release for release in known if parse(release) <= wanted]
    if not before:
        first = parse(known[0])
        if wanted.is_prerelease and wanted.release == first.release:
            return known[0], [f"{version} is a pre-release of {known[0]}, the oldest release known, which stands in for it."]
        raise UsageError(f"{name} {version} is older than all releases in the matrix, which are {known[0]} to {known[-1]}")
    release = before[-1]
    if parse(release) == wanted:
        return release, []
    if release == known[-1]:
        return release, [f"{version} is newer than the matrix, whose newest release {release} stands in for it."]
    kind = "is a pre-release" if wanted.is_prerelease else "is not in the matrix"
    return release, [f"{version} {kind}; {release}, the newest known release before it, stands in for it."]


def _of_server(data: Matrix, name: str, release: str, notes: list[str]) -> Iterable[Support]:
    server = data.servers[name]
    for dialect, offer in server.dialects.items():
        row = next((row for row in offer.releases if row.version == release), None)
        if row is None:
            if parse(release) < parse(offer.releases[0].version):
                notes.append(f"{dialect} comes with {offer.releases[0].version}.")
            continue
        era = next(era for era in offer.eras if within(release, era.releases))
        yield _support(data, dialect, name, row, era, is_server=server.kind == "model server")


def _of_package(data: Matrix, name: str, release: str) -> Iterable[Support]:
    protos = data.packages.proto
    if name == SERVICER:
        package = next(package for package in data.packages.servicer if package.version == release)
        allowed = [proto for proto in protos if within(proto.version, package.proto)]
        of_the_day = [proto for proto in allowed if proto.uploaded <= package.uploaded]
        points = (allowed[0].version, of_the_day[-1].version, allowed[-1].version)
        engines = {"vllm.engine": package.vllm, "sglang.scheduler": package.sglang}
        requires = f"{PROTO}{package.proto}"
        servicer: str | None = release
    else:
        points = (release, release, release)
        engines = {"vllm.engine": "", "sglang.scheduler": ""}
        requires, servicer = "", None
    for dialect, engine in engines.items():
        if engine is None:
            continue
        found = [(proto, snapshot_for_proto(dialect, proto)) for proto in points]
        floor, day, today = (Installed(servicer, proto, entry.name) for proto, entry in found if entry is not None)
        row = Row(version=release, floor=floor, release_day=day, today=today)
        yield _support(data, dialect, name, row, Era(releases=f"=={release}", start="", requires=requires), is_server=name == SERVICER)


def _support(data: Matrix, dialect: str, server: str, row: Row, era: Era, *, is_server: bool) -> Support:
    offered = data.dialects[dialect]
    entries = {entry.name: entry for entry in offered.snapshots}
    pairs = [pair for pair in data.bad_pairs if is_server and dialect in pair.dialects]

    def point(installed: Installed | None) -> Point:
        if installed is None:
            entry = entries[row.snapshot or ""]
            return Point(snapshot=entry.name, exact=row.schema == entry.schema, schema=row.schema)
        entry = entries[installed.snapshot]
        return Point(
            snapshot=entry.name,
            exact=within(installed.proto, entry.exact or ""),
            schema=schema_of(data, dialect, installed.proto),
            servicer=installed.servicer,
            proto=installed.proto,
            broken=tuple(pair.effect for pair in pairs if _hits(pair, server, row.version, installed.servicer, installed.proto)),
        )

    floor, day, today = point(row.floor), point(row.release_day), point(row.today)
    entry = entries[day.snapshot]
    return Support(
        dialect=dialect,
        service=entry.service or offered.service,
        floor=floor,
        release_day=day,
        today=today,
        start=era.start,
        install=era.install or "",
        requires=era.requires or "",
        refused=entry.refused or "",
        behaviours=tuple(
            behaviour
            for behaviour in data.behaviours
            if behaviour.dialect == dialect and _applies(data, behaviour, server, row.version, floor, today, is_server=is_server)
        ),
        bad_pairs=tuple(pair for pair in pairs if _can_happen(data, pair, server, row.version, floor, today)),
    )


def schema_of(data: Matrix, dialect: str, proto: str) -> str | None:
    """The id of the schema that a release of smg-grpc-proto ships for a dialect."""
    for release in data.packages.proto:
        if release.version == proto:
            return release.vllm_engine if dialect == "vllm.engine" else release.sglang_scheduler
    return None


def _hits(pair: BadPair, server: str, release: str, servicer: str | None, proto: str) -> bool:
    version = servicer if pair.of == SERVICER else release if pair.of == server else None
    return version is not None and within(version, pair.releases) and within(proto, pair.smg_grpc_proto)


def _can_happen(data: Matrix, pair: BadPair, server: str, release: str, floor: Point, today: Point) -> bool:
    """Whether some combination between floor and today is the bad pair, the servicer's own requirement kept."""
    if floor.proto is None:
        return False
    protos = [proto.version for proto in data.packages.proto if between(proto.version, floor.proto, today.proto)]
    if pair.of == server != SERVICER:
        return any(_hits(pair, server, release, None, proto) for proto in protos)
    return any(
        _hits(pair, server, release, servicer.version, proto)
        for servicer in data.packages.servicer
        if floor.servicer and between(servicer.version, floor.servicer, today.servicer)
        for proto in protos
        if within(proto, servicer.proto)
    )


def _applies(data: Matrix, behaviour: Behaviour, server: str, release: str, floor: Point, today: Point, *, is_server: bool) -> bool:
    if behaviour.of == server:
        return between(release, behaviour.since, behaviour.until)
    if not is_server:
        return False
    if behaviour.of == SERVICER:
        if floor.servicer is None:
            return False
        possible = (entry.version for entry in data.packages.servicer if between(entry.version, floor.servicer, today.servicer))
        return any(between(version, behaviour.since, behaviour.until) for version in possible)
    return behaviour.of is None
