"""A reflected schema, an engine's version, or methods and fields that were seen -> the snapshot to speak, and how sure that is.

Schemas are compared as sets of wire facts: this message has a field of that number, name and type; this service has that method. A
snapshot whose facts the server has all of can be spoken to it without a surprise.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from .. import snapshots
from ..proto.canonical import canonical, schema_hash
from ..proto.catalogue import catalogue, provenance, published
from ._report import Basis, Match

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..snapshots import Snapshot

_SHOWN: Final = 3
_VERSION: Final = re.compile(r"(?P<number>\d{1,9}\.\d{1,9}\.\d{1,9})(?P<before>\.?(?:a|b|rc|dev)\d*)?")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of a ProbeReport."""

    snapshot: str
    match: Match
    basis: Basis
    reason: str
    releases: tuple[str, ...] = ()
    schema_hash: str = ""
    unknown: tuple[str, ...] = ()


# Reflection


def match_schema(dialect: str, files: Sequence[FileDescriptorProto]) -> Verdict:
    """The snapshot that a reflected schema is, or has all of. Raises UsageError if files are missing."""
    digest = schema_hash(files)
    for known in catalogue().snapshots:
        if (known.dialect, known.schema_hash) == (dialect, digest):
            return Verdict(
                snapshot=known.snapshot,
                match="exact",
                basis="reflection",
                reason=f"the server reflects exactly the schema {known.snapshot}",
                releases=known.releases,
                schema_hash=digest,
            )
    names = snapshots.SNAPSHOTS[dialect]
    reflected = _facts(files)
    lacks = {name: _snapshot_facts(dialect, name) - reflected for name in names}
    taken = {place for fact in reflected for place in _places(fact)}

    def distance(name: str) -> tuple[int, int, int]:
        # A fact that the server has otherwise garbles messages, one that it lacks is not heard, one more of its own does no harm.
        contradicted = sum(not taken.isdisjoint(_places(fact)) for fact in lacks[name])
        return contradicted, len(lacks[name]), len(reflected - _snapshot_facts(dialect, name))

    nearest = min(names, key=distance)
    unknown = _described(reflected - _snapshot_facts(dialect, nearest))
    release = published(dialect, digest)
    match: Match
    if lacks[nearest]:
        match = "near"
        reason = f"nearest to {nearest}, of which it lacks or has otherwise: {_listed(_described(lacks[nearest]))}"
    elif nearest == names[-1]:
        match = "newer"
        reason = f"newer than {nearest}: {_counted(unknown)} unknown: {_listed(unknown)}"
    else:
        match = "between"
        following = names[names.index(nearest) + 1]
        reason = f"between {nearest} and {following}: {_counted(unknown)} more than {nearest}: {_listed(unknown)}"
        reason += f"; {following} has besides {_listed(_described(lacks[following]))}"
    if release is not None:
        reason = f"the schema of {release.releases[0]}, {reason}"
    return Verdict(
        snapshot=nearest,
        match=match,
        basis="reflection",
        reason=reason,
        releases=release.releases if release is not None else (),
        schema_hash=digest,
        unknown=unknown,
    )


@cache
def _snapshot_facts(dialect: str, name: str) -> frozenset[tuple[str, ...]]:
    return _facts(_files(snapshots.load(dialect, name)))


def _files(snapshot: Snapshot) -> list[FileDescriptorProto]:
    files: dict[str, FileDescriptorProto] = {}

    def add(descriptor: Any) -> None:
        if descriptor.name not in files:
            files[descriptor.name] = FileDescriptorProto()
            descriptor.CopyToProto(files[descriptor.name])
            for dependency in descriptor.dependencies:
                add(dependency)

    for service in snapshot.services:
        add(snapshot.pool.FindServiceByName(service).file)
    return list(files.values())


def _facts(files: Sequence[FileDescriptorProto]) -> frozenset[tuple[str, ...]]:
    form = canonical(files)
    facts = {("field", name, number, *field) for name, fields in form["messages"].items() for number, field in fields.items()}
    facts |= {("message", name) for name in form["messages"]}
    facts |= {("value", name, value, str(number)) for name, values in form["enums"].items() for value, number in values.items()}
    facts |= {("method", name, method, *map(str, m)) for name, methods in form["services"].items() for method, m in methods.items()}
    return frozenset(facts)


def _places(fact: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """What no second fact of the same schema can have: a field's number and its name, and so on."""
    kind, owner, *rest = fact
    return tuple((kind, owner, str(position), part) for position, part in enumerate(rest[:2] if kind == "field" else rest[:1]))


def _described(facts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Facts as a reader names them: `GenerateRequest.priority=12`, `rpc GetLoads`, `Modality.AUDIO`; of a message its fields, if any."""
    facts = list(facts)
    with_fields = {fact[1] for fact in facts if fact[0] == "field"}
    texts = set()
    for kind, owner, *rest in facts:
        short = owner.rpartition(".")[2]
        match kind:
            case "field":
                texts.add(f"{short}.{rest[1]}={rest[0]}")
            case "method":
                texts.add(f"rpc {rest[0]}")
            case "value":
                texts.add(f"{short}.{rest[0]}")
            case _ if owner not in with_fields:
                texts.add(f"message {short}")
    return tuple(sorted(texts))


# The engine's version


def match_version(dialect: str, engine: str, version: str) -> Verdict | None:
    """The snapshot of that engine's release, None if its version does not decide.

    It does where the engine carries the schema itself: native servers, and those that were in the engine's tree.
    """
    release = f"{engine}-{version}"
    for known in catalogue().snapshots:
        if known.dialect == dialect and release in known.releases:
            reason = f"the schema that {engine} {version} carries"
            return Verdict(snapshot=known.snapshot, match="exact", basis="engine version", reason=reason, releases=known.releases)
    names = snapshots.SNAPSHOTS[dialect]
    match = _VERSION.match(version)
    if match is None or any(_VERSION.fullmatch(name) is None for name in names):
        return None
    number = _number(version)
    # 0.33.0rc1 came before 0.33.0, and so did 0.33.0.dev5.
    older = [name for name in names if _number(name) < number or (_number(name) == number and not match["before"])]
    if not older:
        return None
    is_newest = older[-1] == names[-1]
    reason = f"{engine} {version} is {'newer than' if is_newest else 'no known release; it came after'} {older[-1]}"
    return Verdict(snapshot=older[-1], match="newer" if is_newest else "floor", basis="engine version", reason=reason)


def _number(version: str) -> tuple[int, ...]:
    match = _VERSION.match(version)
    return tuple(map(int, match["number"].split("."))) if match else ()


# Methods and fields


# Between the snapshots of some dialects lie published schemas that are none. What appeared first in one of those proves no more than
# that the server is newer than the snapshot before; these appeared first in the snapshot itself. Source: upstream's history.
_FIRST_IN: Final = MappingProxyType(
    {
        ("vllm.engine", "smg-0.4.4"): frozenset(f"GetModelInfoResponse.{number}" for number in range(7, 14)),
        ("vllm.engine", "smg-0.4.8"): frozenset({"GetModelInfoResponse.14"}),
        ("vllm.engine", "smg-0.4.11"): frozenset({"GetServerInfoResponse.9"}),
        ("vllm.engine", "smg-0.4.13"): frozenset({"GetServerInfoResponse.10"}),
        ("vllm.engine", "smg-0.4.28"): frozenset({"GetServerInfoResponse.25"}),
        ("sglang.scheduler", "intree-0.5.3.post2"): frozenset({"GetModelInfo", "GetServerInfo"}),
        ("sglang.scheduler", "intree-0.5.8"): frozenset({"GetLoads"}),
        ("sglang.scheduler", "smg-0.4.4"): frozenset({"GetServerInfoResponse.10"}),
        ("sglang.scheduler", "smg-0.4.14"): frozenset({"ListLoadedLoRAAdapters"}),
    }
)


def find_floor(dialect: str, methods: Iterable[str], messages: Mapping[str, Message]) -> Verdict:
    """The newest snapshot that a server surely has all of.

    `methods` are the paths that are there, `messages` their answers as the newest snapshot decodes them.
    """
    names = snapshots.SNAPSHOTS[dialect]
    methods = tuple(methods)
    seen = {item for message in messages.values() for item in _fields_set(message)}
    lacks = {name: _missing(snapshots.load(dialect, name), methods, seen) for name in names}
    first = next((name for name in names if not lacks[name]), None)
    told = f"{_number_of('method', len(methods))} and {_number_of('field', len(seen))}"
    if first is None:
        newest = names[-1]
        reason = f"newer than {newest}, which lacks of what was seen: {_listed(lacks[newest])}"
        return Verdict(snapshot=newest, match="newer", basis="methods and fields", reason=reason, unknown=lacks[newest])
    place = names.index(first)
    items = {f"{message.rpartition('.')[2]}.{number}" for message, number in seen} | {path.rpartition("/")[2] for path in methods}
    if place and _has_gap(dialect, names[place - 1], first) and not items & _FIRST_IN.get((dialect, first), frozenset()):
        reason = f"newer than {names[place - 1]}, as {told} show; not surely {first}, because there are schemas between the two"
        return Verdict(snapshot=names[place - 1], match="floor", basis="methods and fields", reason=reason)
    reason = f"at least {first}, as {told} show"
    return Verdict(snapshot=first, match="floor", basis="methods and fields", reason=reason)


def _missing(snapshot: Snapshot, methods: Iterable[str], seen: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    missing = []
    for path in methods:
        _, service, method = path.split("/")
        if service not in snapshot.services or not snapshot.has_method(service, method):
            missing.append(f"rpc {method}")
    for message, number in seen:
        try:
            is_known = number in snapshot.pool.FindMessageTypeByName(message).fields_by_number
        except KeyError:
            is_known = False
        if not is_known:
            missing.append(f"{message.rpartition('.')[2]}.{number}")
    return tuple(sorted(missing))


def _has_gap(dialect: str, older: str, newer: str) -> bool:
    """Whether schemas have been published between two neighbouring snapshots."""
    hashes = [known.schema_hash for known in catalogue().published if known.dialect == dialect]
    ends = [provenance(dialect, name).schema_hash for name in (older, newer)]
    return all(end in hashes for end in ends) and hashes.index(ends[1]) - hashes.index(ends[0]) > 1


def _fields_set(message: Message) -> Iterator[tuple[str, int]]:
    """Every field that an answer brought, those that its class does not know among them: (message, number)."""
    name = message.DESCRIPTOR.full_name
    if name.startswith("google.protobuf."):
        return
    unknown: Any = UnknownFieldSet(message)
    yield from ((name, field.field_number) for field in unknown)
    for field, value in message.ListFields():
        yield name, field.number
        if field.message_type is None:
            continue
        parts = (value,) if isinstance(value, Message) else value.values() if field.message_type.GetOptions().map_entry else value
        for part in parts:
            if isinstance(part, Message):  # a map's values may be scalars
                yield from _fields_set(part)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _counted(names: Iterable[str]) -> str:
    """`2 fields, 1 method`, from names as `_described` writes them."""
    counts = Counter("method" if name.startswith("rpc ") else "field" if "=" in name else "name" for name in names)
    return ", ".join(_number_of(kind, count) for kind, count in sorted(counts.items()))


def _number_of(kind: str, count: int) -> str:
    return f"{count} {kind}" + ("" if count == 1 else "s")
