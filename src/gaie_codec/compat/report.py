"""The matrix, or an answer from it, as headings, sentences and tables.

The command line and docs/compatibility.md are the same blocks, written in two ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .. import adapters
from .._errors import UsageError
from ..snapshots import SNAPSHOTS, load
from ._features import NEUTRAL_FIELDS, Explanation, Features, since, used_by
from ._matrix import BadPair, Behaviour, Row, ServerDialect, matrix
from ._resolve import Point, Resolution, Support
from ._versions import parse, within
from .blocks import Block, Command, Heading, Table, Text

_BY_CALLS = "never; one call for each choice is made"


def overview() -> list[Block]:
    """Every server with the snapshots of its releases, and every dialect with its service."""
    data = matrix()
    blocks: list[Block] = []
    for name, server in data.servers.items():
        rows = [row for dialect in server.dialects for row in _spans(name, dialect)]
        blocks += [
            Heading(f"{server.title} ({name}; {server.kind})"),
            _table(("releases", "dialect", "floor", "release day", "today"), rows),
        ]
    services = [(dialect, entry.service, ", ".join(step.name for step in entry.snapshots)) for dialect, entry in data.dialects.items()]
    blocks += [Heading("Dialects"), _table(("dialect", "service", "snapshots"), services)]
    blocks.append(
        Text(
            "floor: the oldest that the release's requirements allow. release day: what pip installed when it came out. "
            f"today: what pip installs on {data.today}."
        )
    )
    return blocks


def of_server(name: str) -> list[Block]:
    """One server, release by release."""
    server = matrix().servers[name]
    blocks: list[Block] = [Heading(server.title)]
    for dialect, offer in server.dialects.items():
        blocks.append(Heading(dialect, 3))
        blocks += _starts(server.kind, offer)
        blocks.append(_release_table(name, dialect, offer.releases))
    noted = [(release.version, release.note) for release in server.releases if release.note]
    return blocks + ([Heading("Notes", 3), _table(("release", "note"), noted)] if noted else [])


def _starts(kind: str, offer: ServerDialect) -> list[Block]:
    """How the server is started, and what it requires, with the release that each begins with."""
    starts: dict[str, str] = {}
    requires: dict[str, str] = {}
    for era in offer.eras:
        first = next(row.version for row in offer.releases if within(row.version, era.releases))
        starts.setdefault(era.start, first)
        if era.requires:
            requires.setdefault(era.requires, first)
    if kind != "model server":
        return [Text(f"From {first} on: {start}.") for start, first in starts.items()]
    blocks: list[Block] = [Command(f"{start}   # from {first} on") for start, first in starts.items()]
    if requires:
        blocks.append(Text(f"Requires {', '.join(f'{package} from {first} on' for package, first in requires.items())}."))
    return blocks


def of_resolution(found: Resolution) -> list[Block]:
    """One release."""
    when = f" ({found.uploaded[:10]})" if found.uploaded else ""
    blocks: list[Block] = [Heading(f"{found.title} {found.release}{when}")]
    blocks += [Text(note) for note in found.notes]
    if not found.dialects:
        blocks.append(Text("It speaks no dialect that this library knows."))
    for support in found.dialects:
        blocks += _of_support(support)
    return blocks


def of_dialect(dialect: str) -> list[Block]:
    """One dialect: its snapshots, its fields, its behaviours."""
    data = matrix()
    if dialect not in data.dialects:
        raise UsageError(f"no dialect {dialect!r}; there are: {', '.join(data.dialects)}")
    entry = data.dialects[dialect]
    blocks: list[Block] = [Heading(dialect), Text(f"Service {entry.service}. {entry.summary}")]
    rows = [(step.name, step.published, step.adds, _used(dialect, step.name)) for step in entry.snapshots]
    blocks.append(_table(("snapshot", "since", "what it adds", "needed for"), rows))
    blocks += [Text(f"{step.name} is refused: {step.refused}.") for step in entry.snapshots if step.refused]
    blocks += _fields(dialect)
    blocks += _behaviours(item for item in data.behaviours if item.dialect == dialect)
    return blocks


def of_features(found: Features) -> list[Block]:
    """One snapshot."""
    blocks: list[Block] = [Heading(f"{found.dialect} {found.snapshot}"), Text(f"Service {found.service}.")]
    users = _used(found.dialect, found.snapshot)
    if users:
        blocks.append(Text(f"Needed for: {users}."))
    blocks += [Heading("What can be said", 3), Text(", ".join(found.carries) + ".")]
    if found.ranges:
        blocks.append(_table(("field", "lowest", "highest"), [(name, str(low), str(high)) for name, (low, high) in found.ranges.items()]))
    if found.missing:
        blocks += [Heading("What cannot be said", 3), _table(("field", "why"), [(item.field, item.reason) for item in found.missing])]
    return blocks + _behaviours(found.behaviours)


def of_explanations(several_found: Sequence[Explanation]) -> list[Block]:
    """One request field, looked up in one place or in several."""
    if not several_found:
        return []
    found = several_found[0]
    if found.gateway:
        return [Heading(found.field), Text(f"No model server needs it. {found.gateway}")]
    blocks: list[Block] = [Heading(found.field)]
    if found.refused:
        blocks.append(Text(found.refused))
    if found.neutral and found.neutral != (found.field,):
        blocks.append(Text(f"Carried by: {', '.join(found.neutral)}."))
    several = len(found.neutral) > 1
    verdicts = [item for each in several_found for item in each.verdicts]
    rows = []
    for item in verdicts:
        where = f"{item.dialect} {item.snapshot}" if item.snapshot else item.dialect
        rows.append((where, *([item.field] if several else []), "yes" if item.can else "no", item.reason))
    if rows:
        blocks.append(_table(("dialect", *(["field"] if several else []), "can be sent", "why"), rows))
    typed = [name for name in dict.fromkeys(item.dialect for item in verdicts) if adapters.get(load(name)).passthrough is not None]
    if typed:
        blocks.append(Text(f"{', '.join(typed)}: as typed calls. JSON that is passed through may say whatever that server reads."))
    if found.without_adapter:
        blocks.append(Text(f"No adapter yet, so nothing is known: {', '.join(found.without_adapter)}."))
    about = {item.id: item for verdict in verdicts for item in verdict.behaviours}
    return blocks + _behaviours(about.values(), with_dialect=True)


def document() -> list[Block]:
    """docs/compatibility.md."""
    data = matrix()
    blocks: list[Block] = [
        Heading("Compatibility", 1),
        Text("Generated from [compat_matrix.yaml](../compat_matrix.yaml) by `python tools/compat.py write`; do not edit."),
        Text(
            "Which model servers can this library talk to, in which [snapshot](protos.md) of their schema, and what can they not be told? "
            "The same answers come from the command line and from Python:"
        ),
        Command("gaie-codec compat --server vllm --version 0.31.0"),
        Command("gaie-codec compat --dialect vllm.engine --snapshot smg-0.4.8"),
        Command("gaie-codec compat --explain logit_bias"),
        Text(
            "`gaie_codec.compat.resolve(server=..., version=...)`, `features(dialect, snapshot)` and `explain(field)` return frozen values."
            " A release that is not listed resolves to the newest listed one before it and says so (`assumed`)."
        ),
        Text(
            "Servers built on the smg packages do not pin them: the engine's version alone does not say which schema is spoken. So there "
            "are three columns. The floor is the oldest combination that the requirements allow, release day what pip installed when the "
            f"release came out, today what pip installs on {data.today}. A cell reads: smg-grpc-servicer / smg-grpc-proto, snapshot to "
            "use. A tilde before the snapshot says that the server's schema is not just the snapshot's; it is then the nearest that fits. "
            "Where nothing else is known, take release day."
        ),
    ]
    for name in data.servers:
        blocks += of_server(name)
    blocks += [
        Heading("Combinations that do not work"),
        Text("pip installs them without complaint."),
        _bad_pairs(data.bad_pairs),
        Heading("Dialects"),
        Text("What each snapshot adds, which request fields reach the wire, and how servers behave beyond what their schema says."),
    ]
    for dialect in data.dialects:
        first, *rest = of_dialect(dialect)
        blocks += [Heading(dialect, 3) if isinstance(first, Heading) else first, *rest]
    blocks += [
        Heading("The smg packages"),
        _table(
            ("smg-grpc-proto", "uploaded", "vllm.engine", "sglang.scheduler"),
            [(entry.version, entry.uploaded[:10], entry.vllm_engine, entry.sglang_scheduler) for entry in data.packages.proto],
        ),
        _table(
            ("smg-grpc-servicer", "uploaded", "smg-grpc-proto", "vLLM", "SGLang"),
            [
                (entry.version, entry.uploaded[:10], _range(entry.proto), _range(entry.vllm or ""), _range(entry.sglang or ""))
                for entry in data.packages.servicer
            ],
        ),
    ]
    return blocks


def _of_support(support: Support) -> list[Block]:
    blocks: list[Block] = [Heading(f"{support.dialect}: {support.service}", 3)]
    if support.refused:
        blocks.append(Text(f"Not spoken: {support.refused}."))
    blocks += [Command(line) for line in (support.install, support.start) if line]
    points = (("floor", support.floor), ("release day", support.release_day), ("today", support.today))
    if support.floor == support.today == support.release_day:
        blocks.append(Text(f"Snapshot {support.today.snapshot}{'' if support.today.exact else ', the nearest to its schema'}."))
    else:
        rows = [(name, point.servicer or "the engine's", point.proto or "", _fit(point), "; ".join(point.broken)) for name, point in points]
        broken = any(row[-1] for row in rows)
        headers = ("", "servicer", "smg-grpc-proto", "snapshot", "does not work")
        blocks.append(_table(headers if broken else headers[:-1], rows if broken else [row[:-1] for row in rows]))
    if support.requires:
        blocks.append(Text(f"Requires {support.requires}."))
    if support.bad_pairs:
        blocks.append(_bad_pairs(support.bad_pairs))
    return blocks + _behaviours(support.behaviours, heading=False)


def _fit(point: Point) -> str:
    if point.exact or point.schema is None:
        return point.snapshot
    return f"{point.snapshot}, the nearest to schema {point.schema}"


def _bad_pairs(pairs: Iterable[BadPair]) -> Table:
    rows = [(f"{pair.of} {_range(pair.releases)}", _range(pair.smg_grpc_proto), ", ".join(pair.dialects), pair.effect) for pair in pairs]
    return _table(("combination of", "with smg-grpc-proto", "dialects", "effect"), rows)


def _behaviours(items: Iterable[Behaviour], *, heading: bool = True, with_dialect: bool = False) -> list[Block]:
    rows = [(*([item.dialect] if with_dialect else []), item.releases or "all", item.effect) for item in items]
    if not rows:
        return []
    table = _table((*(["dialect"] if with_dialect else []), "releases", "behaviour"), rows)
    return [Heading("Behaviour that the schema does not show", 3 if with_dialect else 4), table] if heading else [table]


def _fields(dialect: str) -> list[Block]:
    if dialect not in adapters.DIALECTS:
        return [Text("This library has no adapter for it yet.")]
    refused = {step.name for step in matrix().dialects[dialect].snapshots if step.refused}
    first = next(name for name in SNAPSHOTS[dialect] if name not in refused)
    groups: dict[str, list[str]] = {}
    for field in NEUTRAL_FIELDS:
        start = since(dialect, field)
        never = _BY_CALLS if field == "n" else "never"
        groups.setdefault(never if start is None else "in every snapshot" if start == first else f"from {start} on", []).append(field)
    order = ["in every snapshot", *(f"from {name} on" for name in SNAPSHOTS[dialect]), _BY_CALLS, "never"]
    return [_table(("can be said", "request fields"), [(key, ", ".join(groups[key])) for key in order if key in groups])]


def _release_table(server: str, dialect: str, rows: Sequence[Row]) -> Table:
    uploaded = {release.version: (release.uploaded or "")[:10] for release in matrix().servers[server].releases}
    entries = {step.name: step for step in matrix().dialects[dialect].snapshots}
    if all(row.snapshot for row in rows):
        body = [
            (row.version, uploaded[row.version], ("" if row.schema == entries[row.snapshot or ""].schema else "~ ") + str(row.snapshot))
            for row in rows
        ]
        return _table(("release", "date", "snapshot"), body)
    cells = [(row.version, uploaded[row.version], *_points(dialect, row)) for row in rows]
    return _table(("release", "date", "floor", "release day", "today"), cells)


def _points(dialect: str, row: Row) -> Iterable[str]:
    """The three cells of a row: servicer / proto, snapshot."""
    entries = {step.name: step for step in matrix().dialects[dialect].snapshots}
    for point in (row.floor, row.release_day, row.today):
        if point is None:
            entry = entries[row.snapshot or ""]
            yield ("" if row.schema == entry.schema else "~ ") + entry.name
        else:
            is_exact = within(point.proto, entries[point.snapshot].exact or "")
            yield f"{point.servicer or 'own'} / {point.proto}, {'' if is_exact else '~ '}{point.snapshot}"


def _spans(server: str, dialect: str) -> list[tuple[str, ...]]:
    """Consecutive releases with the same three snapshots, in one line."""
    spans: list[tuple[list[str], tuple[str, str, str]]] = []
    for row in matrix().servers[server].dialects[dialect].releases:
        own = row.snapshot or ""
        floor, day, today = (point.snapshot if point is not None else own for point in (row.floor, row.release_day, row.today))
        if spans and spans[-1][1] == (floor, day, today):
            spans[-1][0].append(row.version)
        else:
            spans.append(([row.version], (floor, day, today)))
    return [(_span(versions), dialect, *points) for versions, points in spans]


def _span(versions: Sequence[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


def _used(dialect: str, snapshot: str) -> str:
    """Who needs a snapshot, runs of releases in one."""
    by_server: dict[str, list[str]] = {}
    for user in used_by(dialect, snapshot):
        server, _, version = user.rpartition(" ")
        by_server.setdefault(server, []).append(version)
    found = []
    for server, versions in by_server.items():
        known = [row.version for row in matrix().servers[server].dialects[dialect].releases]
        runs: list[list[str]] = []
        for version in sorted(versions, key=parse):
            if runs and known.index(version) == known.index(runs[-1][-1]) + 1:
                runs[-1].append(version)
            else:
                runs.append([version])
        found.append(f"{server} {', '.join(_span(run) for run in runs)}")
    return "; ".join(found)


def _range(specifier: str) -> str:
    return specifier.replace(",", ", ").removeprefix("==")


def _table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    return Table(headers, tuple(rows))
