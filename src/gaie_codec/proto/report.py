"""What `proto check` found, as a value, as lines to read, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from .diff import Change, Severity, worst

__all__ = ["Finding", "Law", "Report", "describe_changes", "encode_json", "encode_table"]

_MAX_LINES: Final = 30


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not hold. `field` is a full name of the wire, or the path of a neutral field such as `sampling.top_k`."""

    field: str
    text: str


class Law(msgspec.Struct, frozen=True, kw_only=True):
    """One law and how it fared. `examples` is how often it was tried; `skipped` says why it was not tried at all."""

    name: str
    claim: str
    examples: int = 0
    findings: tuple[Finding, ...] = ()
    skipped: str = ""

    @property
    def outcome(self) -> str:
        """`held`, `broken` or `skipped`."""
        return "skipped" if self.skipped else "broken" if self.findings else "held"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate against the newest snapshot of its dialect."""

    dialect: str
    candidate: str
    schema_hash: str
    known_as: str
    """Which published schema it is, where that is known; empty for a new one."""
    baseline: str
    seed: int
    changes: tuple[Change, ...]
    laws: tuple[Law, ...]
    unmapped: tuple[str, ...]
    """New fields and methods which the adapter neither reads nor writes."""
    unused: tuple[str, ...]
    """New fields and methods in parts of the schema that the codec has no use for."""
    to_do: tuple[str, ...]

    @property
    def severity(self) -> Severity | None:
        """Of the worst change; None for the same schema."""
        return worst(self.changes)

    @property
    def is_clean(self) -> bool:
        """Nothing is wrong: no breaking change, and every law that could be tried holds."""
        return not any(change.severity.is_breaking for change in self.changes) and not any(law.findings for law in self.laws)


def encode_json(reports: Sequence[Report]) -> bytes:
    """The reports as a JSON array."""

    def as_object(report: Report) -> dict[str, Any]:
        laws = [{**msgspec.to_builtins(law), "outcome": law.outcome} for law in report.laws]
        return {**msgspec.to_builtins(report), "severity": report.severity, "is_clean": report.is_clean, "laws": laws}

    return msgspec.json.format(msgspec.json.encode([as_object(report) for report in reports]), indent=2)


def encode_table(report: Report) -> Iterator[str]:
    """The report as lines."""
    verdict = "nothing is wrong" if report.is_clean else "needs work"
    yield f"{report.dialect}: {report.candidate} against {report.baseline}: {report.severity or 'the same schema'}; {verdict}"
    yield f"schema hash {report.schema_hash}" + (f", published as {report.known_as}" if report.known_as else "")
    yield from _section("Changes", describe_changes(report.changes))
    width = max((len(law.name) for law in report.laws), default=0)
    yield ""
    yield f"Laws (seed {report.seed})"
    for law in report.laws:
        tried = law.skipped or f"{law.examples} examples"
        yield f"  {law.outcome:8} {law.name:{width}}  {law.claim} ({tried})"
        yield from _shortened([f"             {finding.field}: {finding.text}" for finding in law.findings])
    yield from _section("New, and neither read nor written by the adapter", list(report.unmapped))
    if report.unused:
        yield ""
        named = ", ".join(report.unused[:3]) + (", ..." if len(report.unused) > 3 else "")
        yield f"New in parts that the codec does not use: {len(report.unused)} ({named})"
    yield from _section("To do", [f"{place}. {text}" for place, text in enumerate(report.to_do, 1)])


def describe_changes(changes: Sequence[Change]) -> list[str]:
    """A line for each change, the additive ones last."""
    width = max((len(change.severity) for change in changes), default=0)
    return [f"{change.severity:{width}}  {change}" for change in changes]


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield title
        yield from _shortened([f"  {line}" for line in lines])


def _shortened(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:_MAX_LINES]
    if len(lines) > _MAX_LINES:
        yield f"  ... and {len(lines) - _MAX_LINES} more (--format json has all)"
