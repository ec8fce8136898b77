"""The upgrade harness: a candidate schema against the newest snapshot of its dialect, and against the adapter that has to speak it.

The classification says what changed, the laws say what of it the codec notices, the witness says that we read the schema right, and the
rest says what a maintainer has to do. Deterministic for a seed. docs/upgrading-protos.md walks through a report.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from .. import UsageError, adapters, snapshots
from ..adapters.base import Adapter
from ..snapshots import is_repeated
from .canonical import normalized, schema_hash
from .catalogue import provenance, published
from .diff import Change, compare
from .meaning import AnyDescriptor, AnyField, is_map, samples
from .report import Law, Report
from .sources import Candidate, snapshot_schema

__all__ = ["check"]

_MAX_SEEN: Final = 200


def check(candidate: Candidate, *, max_examples: int = 100, seed: int = 0, witness: bool = True) -> Report:
    """Everything there is to say about one candidate. Raises UsageError if hypothesis is not installed.

    `witness=False` leaves betterproto2 out, which takes a second to generate its classes.
    """
    try:
        from .laws import Bench, run_laws
        from .witness import run_witness
    except ModuleNotFoundError as error:
        raise UsageError(f"proto check needs the package {error.name}: pip install gaie-codec[proto]") from error
    baseline = snapshots.load(candidate.dialect)
    changes = compare(snapshot_schema(baseline.dialect, baseline.name).files, candidate.schema.files)
    snapshot = candidate.snapshot
    ours, theirs, obstacle = _adapters(baseline, snapshot)
    renames = {change.subject: change.renamed_to for change in changes if change.renamed_to}
    bench = Bench(
        baseline=baseline,
        candidate=snapshot,
        ours=ours,
        theirs=theirs,
        obstacle=obstacle,
        renames=renames,
        max_examples=max_examples,
        seed=seed,
    )
    seen: list[Message] = []
    laws = run_laws(bench, lambda message: seen.append(message) if len(seen) < _MAX_SEEN else None)
    laws += (run_witness(snapshot, candidate.schema.set, seen),) if witness else ()
    added = [change.subject for change in changes if change.text.startswith(("field ", "method added"))]
    used = _used(ours, baseline, snapshot) if ours is not None else frozenset()
    near = [name for name in added if name.rpartition(".")[0] in used and name.rpartition(".")[0] not in snapshot.services]
    unmapped = [name for name in near if _field(snapshot, name) is not None and not _is_mapped(theirs, _field(snapshot, name), seen)]
    new_methods = [name for name in added if name.rpartition(".")[0] in snapshot.services]
    digest = schema_hash(normalized(candidate.schema.files))
    return Report(
        dialect=candidate.dialect,
        candidate=candidate.name,
        schema_hash=digest,
        known_as=_known_as(candidate.dialect, digest, baseline.name),
        baseline=baseline.name,
        seed=seed,
        changes=changes,
        laws=laws,
        unmapped=tuple(unmapped + new_methods),
        unused=tuple(name for name in added if name not in near and name not in new_methods and _field(snapshot, name) is not None),
        to_do=tuple(_to_do(candidate, baseline.name, ours, changes, laws, unmapped)),
    )


def _adapters(baseline: snapshots.Snapshot, candidate: snapshots.Snapshot) -> tuple[Adapter | None, Adapter | None, str]:
    if baseline.dialect not in adapters.DIALECTS:
        return None, None, f"there is no adapter for {baseline.dialect} yet"
    ours = adapters.get(baseline)
    try:
        return ours, adapters.get(candidate), ""
    except Exception as error:  # an adapter may stumble over anything in a schema that it was not written for
        return ours, None, f"the adapter cannot be built on the candidate: {' '.join(str(error).split())}"


def _known_as(dialect: str, digest: str, baseline: str) -> str:
    known = published(dialect, digest)
    if known is None:
        return ""
    is_older = known.first_published < provenance(dialect, baseline).first_published
    return f"{known.releases[0] if known.releases else known.history_id}, {known.first_published}" + f", before {baseline}" * is_older


# What is new and who minds


def _used(adapter: Adapter, baseline: snapshots.Snapshot, candidate: snapshots.Snapshot) -> frozenset[str]:
    """Full names of the messages that the codec sends or receives: those of the paths in the adapter."""
    bodies = adapter.passthrough.paths.values() if adapter.passthrough is not None else ()
    embed = adapter.embed.path if adapter.embed is not None else None
    named = (*adapter.generate_paths, *adapter.info_paths, *bodies, embed, adapter.tokenizer_path, adapter.health_path)
    paths = [path for path in named if path is not None]
    found: set[str] = set()
    for snapshot in (baseline, candidate):
        for path in paths:
            _, service, method = path.split("/")
            if service in snapshot.services and snapshot.has_method(service, method):
                found |= set(_reach(snapshot.method(service, method).request.DESCRIPTOR))
                found |= set(_reach(snapshot.method(service, method).response.DESCRIPTOR))
    return frozenset(found)


def _reach(descriptor: AnyDescriptor, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    if descriptor.full_name not in seen:
        yield descriptor.full_name
        for field in descriptor.fields:
            if field.message_type is not None:
                yield from _reach(field.message_type, seen | {descriptor.full_name})


def _field(snapshot: snapshots.Snapshot, name: str) -> AnyField | None:
    message, _, field = name.rpartition(".")
    try:
        return snapshot.message(message).DESCRIPTOR.fields_by_name.get(field)
    except UsageError:
        return None


def _is_mapped(adapter: Adapter | None, field: AnyField | None, seen: Iterable[Message]) -> bool:
    """Whether the adapter writes the field in any message it made, or decodes a message differently when the field is set."""
    if adapter is None or field is None:
        return False
    requests = {adapter.snapshot.method_at(path).request.DESCRIPTOR.full_name for path in adapter.generate_paths}
    for message in seen:
        decode: Any = adapter.decode_request if message.DESCRIPTOR.full_name in requests else adapter.decode_response
        altered = type(message)()
        altered.CopyFrom(message)
        for place in _places(altered, field.containing_type.full_name):
            if any(known.number == field.number for known, _ in place.ListFields()):
                return True
            _set(place, field)
        try:
            if decode(altered) != decode(message):
                return True
        except Exception:  # it was read, and its value was not liked
            return True
    return False


def _places(message: Message, full_name: str) -> Iterator[Message]:
    if message.DESCRIPTOR.full_name == full_name:
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not is_map(field):
            for child in value if is_repeated(field) else (value,):
                yield from _places(child, full_name)


def _set(message: Message, field: AnyField, depth: int = 3) -> None:
    """Give a field a value that is not its default, and what is in it too."""
    room: Any = getattr(message, field.name)
    if is_map(field):
        key, value = (field.message_type.fields_by_name[part] for part in ("key", "value"))
        if value.message_type is None:
            room[samples(key)[-1]] = samples(value)[-1]
        else:
            room[samples(key)[-1]].SetInParent()
    elif field.message_type is not None:
        inner = room.add() if is_repeated(field) else room
        inner.SetInParent()
        for nested in field.message_type.fields if depth else ():
            _set(inner, nested, depth - 1)
    elif is_repeated(field):
        room.append(samples(field)[-1])
    else:
        setattr(message, field.name, samples(field)[-1])


# What to do about it


def _to_do(
    candidate: Candidate, baseline: str, ours: Adapter | None, changes: tuple[Change, ...], laws: tuple[Law, ...], unmapped: list[str]
) -> Iterator[str]:
    if not changes:
        if candidate.name.replace("==", "-") not in (baseline, *provenance(candidate.dialect, baseline).releases):
            yield f"The schema is that of {baseline}: add the release to `releases` in its provenance.json, nothing else."
        return
    source = _Source(ours) if ours is not None else None
    broken = {change.subject: None for change in changes if change.severity.is_breaking}
    broken |= {finding.field: None for law in laws for finding in law.findings}
    if source is not None:
        renamed = [change.subject for change in changes if change.renamed_to]
        for word in dict.fromkeys(name.rpartition(".")[2] for name in (*broken, *renamed)):
            if places := source.places(word):
                yield f"{word}: see {'; '.join(places)}"
        for name in unmapped:
            near = source.place_near(name, candidate)
            yield f"{name}: read or write it{f' near {near}' if near else ''}, or list it as not read with the reason"
    if broken:
        yield "Meaning changed: ask the descriptors (`snapshot.has_field`) so that old snapshots keep working; fork only if that fails."
    yield f"Vendor it: {_vendor_command(candidate)}"
    yield "Put the line that it prints into compat_matrix.yaml, run `make test`, and say in CHANGELOG.md what can be said now."


def _vendor_command(candidate: Candidate) -> str:
    package, _, version = candidate.name.partition("==")
    name = f"smg-{version}" if package == "smg-grpc-proto" else version or "NAME"
    origin = "" if version else " --package PACKAGE --version VERSION"
    return f"gaie-codec proto vendor {candidate.name}{origin} --dialect {candidate.dialect} --name {name}"


class _Source:
    """The text of an adapter's modules: that of its requests, and that of its answers."""

    def __init__(self, adapter: Adapter) -> None:
        self._lines: dict[str, list[str]] = {}
        for function in (adapter.encode_request, adapter.decode_response):
            file = Path(inspect.getsourcefile(sys.modules[function.__module__]) or "")
            parts = file.parts
            path = "/".join(parts[parts.index("src") :]) if "src" in parts else str(file)
            self._lines[path] = file.read_text().splitlines() if file.is_file() else []

    def places(self, word: str) -> list[str]:
        """Where a name is used: of each module the first few lines."""
        pattern = re.compile(rf"\.{re.escape(word)}\b")
        found = []
        for path, lines in self._lines.items():
            numbers = [str(number) for number, line in enumerate(lines, 1) if pattern.search(line)][:4]
            if numbers:
                found.append(f"{path}:{', '.join(numbers)}")
        return found

    def place_near(self, name: str, candidate: Candidate) -> str:
        """Where the fields just before it in the message are used, "" if nowhere."""
        message, _, field = name.rpartition(".")
        try:
            fields = [one.name for one in candidate.snapshot.message(message).DESCRIPTOR.fields]
        except UsageError:
            return ""
        before = fields[: fields.index(field)] if field in fields else fields
        return next((places[0].partition(",")[0] for one in reversed(before) if (places := self.places(one))), "")
