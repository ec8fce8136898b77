"""A dialect and a snapshot -> what can be said to such a server and what not, each with a reason.

The facts are the adapters' own: `Adapter.carries` of this snapshot and of its siblings. So a new adapter or a new snapshot shows up
here without a word in this module.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, get_args, get_type_hints

import msgspec

from .. import adapters
from .._errors import UsageError
from .._events import Constraint, InferenceRequest, SamplingParams
from ..adapters.base import Adapter
from ..openai import chat, completions
from ..snapshots import SNAPSHOTS, load
from ._matrix import Behaviour, SnapshotEntry, matrix
from ._resolve import SERVICER
from ._versions import between, within

NEUTRAL_FIELDS: Final = (
    *(name for name in InferenceRequest.__struct_fields__ if name != "sampling"),
    *(name for name in SamplingParams.__struct_fields__ if name != "constraint"),
    *(f"constraint.{kind}" for kind in get_args(get_type_hints(Constraint)["kind"])),
)
"""Every field of a request, by the name that `Adapter.carries` uses."""


_UNLESS: Final = "unless JSON is passed through to a server that knows it (sglang.runtime)."
_REFUSED: Final = f"Refused by name, as the gateway does not support it yet, {_UNLESS}"
_REFUSED_TEMPLATE: Final = "Refused as untrusted: the model has a template, and there is no option to trust another."
_REFUSED_COMPLETIONS: Final = f"In /v1/completions it is refused by name, as the gateway does not support it there yet, {_UNLESS}"


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """A field that cannot be said, and why; `since` is the first later snapshot that can say it."""

    field: str
    reason: str
    since: str | None = None


class Features(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one snapshot of a dialect can say."""

    dialect: str
    snapshot: str
    service: str
    carries: tuple[str, ...]
    missing: tuple[Missing, ...]
    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of number fields, both allowed."""
    used_by: tuple[str, ...]
    """The releases that may need this snapshot, such as `vllm 0.24.0`."""
    behaviours: tuple[Behaviour, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether one neutral field reaches servers of a dialect. Without `snapshot` the verdict is about all of its snapshots."""

    dialect: str
    field: str
    can: bool
    reason: str
    snapshot: str | None = None
    since: str | None = None
    behaviours: tuple[Behaviour, ...] = ()


class Explanation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What becomes of one request field. `gateway` says so where no model server needs to know it, `refused` where requests with it
    are refused whatever the wire can carry."""

    field: str
    neutral: tuple[str, ...]
    verdicts: tuple[Verdict, ...] = ()
    gateway: str = ""
    refused: str = ""
    without_adapter: tuple[str, ...] = ()
    """Dialects that this library has no adapter for, so nothing can be said of them."""


def features(dialect: str, snapshot: str | None = None) -> Features:
    """What can be said to a server of this dialect and snapshot (without a name: the newest), and what not.

    Raises UsageError for an unknown dialect or snapshot, for a snapshot that is refused, and for a dialect without an adapter.
    """
    name = load(dialect, snapshot).name
    entry = snapshot_entry(dialect, name)
    if entry is not None and entry.refused:
        raise UsageError(f"{dialect} {name} is not spoken: {entry.refused}")
    adapter = _carried(dialect)[name]
    service = matrix().dialects[dialect].service if dialect in matrix().dialects else ""
    return Features(
        dialect=dialect,
        snapshot=name,
        service=(entry.service if entry is not None and entry.service else service),
        carries=_sorted(adapter.carries),
        missing=tuple(_missing(dialect, name, field) for field in NEUTRAL_FIELDS if field not in adapter.carries),
        ranges=dict(adapter.ranges),
        used_by=used_by(dialect, name),
        behaviours=_behaviours(dialect, name),
    )


def explain(field: str, *, dialect: str | None = None, snapshot: str | None = None) -> Explanation:
    """What becomes of a request field, by its OpenAI name or its neutral one: for all dialects, one, or one snapshot.

    Raises UsageError for an unknown field, naming those that are near.
    """
    if snapshot is not None and dialect is None:
        raise UsageError("a snapshot needs its dialect")
    if dialect is not None:
        load(dialect, snapshot)  # raises for what does not exist
    wanted = field.strip().lower()
    refused = _REFUSED if wanted in chat.REFUSED else _REFUSED_COMPLETIONS if wanted in completions.REFUSED else ""
    if wanted == "chat_template":
        refused = _REFUSED_TEMPLATE
    if refused and wanted not in NEUTRAL_FIELDS:
        return Explanation(field=field, neutral=(), refused=refused)
    names, gateway = _neutral(field)
    if gateway:
        return Explanation(field=field, neutral=(), gateway=gateway)
    dialects = tuple(SNAPSHOTS) if dialect is None else (dialect,)
    spoken = [name for name in dialects if name in adapters.DIALECTS]
    if dialect is not None and not spoken:
        _carried(dialect)  # raises, naming the dialect
    return Explanation(
        field=field,
        neutral=names,
        refused=refused,
        verdicts=tuple(_verdict(spoken_dialect, snapshot, name) for spoken_dialect in spoken for name in names),
        without_adapter=tuple(name for name in dialects if name not in spoken),
    )


def snapshot_entry(dialect: str, snapshot: str) -> SnapshotEntry | None:
    """The matrix's entry for a snapshot, None for one that it does not know."""
    known = matrix().dialects.get(dialect)
    return next((entry for entry in known.snapshots if entry.name == snapshot), None) if known is not None else None


def used_by(dialect: str, snapshot: str) -> tuple[str, ...]:
    """Releases of servers that may need a snapshot: at their floor, on their release day, or today."""
    found = []
    for name, server in matrix().servers.items():
        for row in server.dialects[dialect].releases if dialect in server.dialects else ():
            points = [point.snapshot for point in (row.floor, row.release_day, row.today) if point is not None]
            if snapshot in (row.snapshot, *points):
                found.append(f"{name} {row.version}")
    return tuple(found)


def since(dialect: str, field: str) -> str | None:
    """The first snapshot from which on, up to the newest, a dialect carries a field; None where the newest does not."""
    first = None
    for name, adapter in _carried(dialect).items():
        if field not in adapter.carries:
            first = None
        elif first is None:
            first = name
    return first


def speaks(dialect: str) -> bool:
    """Whether this library has an adapter for a dialect."""
    return dialect in adapters.DIALECTS


@cache
def _carried(dialect: str) -> Mapping[str, Adapter]:
    """The adapters of a dialect by snapshot, oldest first, without the snapshots that are refused."""
    if dialect not in adapters.DIALECTS:
        raise UsageError(f"there is no adapter for {dialect} yet; there are adapters for: {', '.join(adapters.DIALECTS)}")
    found = {}
    for name in SNAPSHOTS[dialect]:
        entry = snapshot_entry(dialect, name)
        if entry is None or not entry.refused:
            found[name] = adapters.get(load(dialect, name))
    return found


def _missing(dialect: str, snapshot: str, field: str) -> Missing:
    if field == "n":
        return Missing(field=field, since=since(dialect, field), reason="not on this wire: the gateway makes one call for each choice")
    names = tuple(_carried(dialect))
    later = [name for name in names[names.index(snapshot) + 1 :] if field in _carried(dialect)[name].carries]
    if later:
        return Missing(field=field, since=later[0], reason=f"not in this snapshot; from {later[0]} on")
    if any(field in adapter.carries for adapter in _carried(dialect).values()):
        return Missing(field=field, reason="not in this snapshot, only in older ones")
    if any(_has_field(adapter.request_type.DESCRIPTOR, field) for adapter in _carried(dialect).values()):
        return Missing(field=field, reason="the schema has a field for it, but no answer that would serve: never sent")
    return Missing(field=field, reason="no field in any snapshot of this dialect")


def _has_field(message: Any, name: str) -> bool:
    """Whether a request, or the sampling parameters in it, has a field of that very name."""
    fields = [*message.fields, *(inner for outer in message.fields if outer.message_type for inner in outer.message_type.fields)]
    return any(field.name == name for field in fields)


def _verdict(dialect: str, snapshot: str | None, field: str) -> Verdict:
    about = tuple(item for item in _behaviours(dialect, snapshot) if field in item.fields)
    if snapshot is not None:
        said = features(dialect, snapshot)
        if field in said.carries:
            low_high = said.ranges.get(field)
            emulated = _carried(dialect)[snapshot].emulates.get(field)
            reason = f"values {low_high[0]} to {low_high[1]}" if low_high else "carried"
            reason = f"emulated: {emulated}" if emulated else reason
            return Verdict(dialect=dialect, snapshot=snapshot, field=field, can=True, reason=reason, behaviours=about)
        lack = next((item for item in said.missing if item.field == field), None) or _missing(dialect, snapshot, field)
        return Verdict(dialect=dialect, snapshot=snapshot, field=field, can=False, reason=lack.reason, since=lack.since, behaviours=about)
    names = tuple(_carried(dialect))
    first = since(dialect, field)
    if first is None:
        return Verdict(dialect=dialect, field=field, can=False, reason=_missing(dialect, names[-1], field).reason, behaviours=about)
    reason = "in every snapshot" if first == names[0] else f"from {first} on, not in {', '.join(names[: names.index(first)])}"
    if emulated := _carried(dialect)[names[-1]].emulates.get(field):
        reason += f"; emulated: {emulated}"
    return Verdict(dialect=dialect, field=field, can=True, reason=reason, since=first, behaviours=about)


def _behaviours(dialect: str, snapshot: str | None) -> tuple[Behaviour, ...]:
    """What the matrix says of servers that speak a dialect, or of those that may speak a snapshot of it."""
    return tuple(
        item
        for item in matrix().behaviours
        if item.dialect == dialect and (snapshot is None or item.of is None or _concerns(item, dialect, snapshot))
    )


def _concerns(item: Behaviour, dialect: str, snapshot: str) -> bool:
    if item.of != SERVICER:
        users = (user.rpartition(" ") for user in used_by(dialect, snapshot))
        return any(server == item.of and between(version, item.since, item.until) for server, _, version in users)
    entry = snapshot_entry(dialect, snapshot)
    protos = [proto.version for proto in matrix().packages.proto if entry is not None and within(proto.version, entry.smg_grpc_proto or "")]
    return any(
        between(servicer.version, item.since, item.until) and any(within(proto, servicer.proto) for proto in protos)
        for servicer in matrix().packages.servicer
    )


def _neutral(field: str) -> tuple[tuple[str, ...], str]:
    """The neutral fields behind a name, or the sentence that tells what the gateway does with it."""
    data = matrix()
    wanted = field.strip()
    for name in (wanted, wanted.lower(), wanted.lower().replace("-", "_")):
        if name in NEUTRAL_FIELDS:
            return (name,), ""
        if name in data.openai_fields:
            return data.openai_fields[name], ""
        for group in data.gateway_fields:
            if name in group.names:
                return (), group.why
    by_gateway = [name for group in data.gateway_fields for name in group.names]
    known = [*NEUTRAL_FIELDS, *data.openai_fields, *chat.REFUSED, *completions.REFUSED, *by_gateway]
    short = {name.rpartition(".")[2]: name for name in known}
    near = dict.fromkeys(short[name] for name in difflib.get_close_matches(wanted.lower(), list(short), n=5, cutoff=0.5))
    hint = f"near it: {', '.join(near)}" if near else "gaie-codec compat --dialect D lists the fields of a dialect"
    raise UsageError(f"no request field {wanted[:60]!r}; {hint}")


def _sorted(names: frozenset[str]) -> tuple[str, ...]:
    order = {name: place for place, name in enumerate(NEUTRAL_FIELDS)}
    return tuple(sorted(names, key=lambda name: (order.get(name, len(order)), name)))
