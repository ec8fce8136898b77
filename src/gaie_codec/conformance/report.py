"""What became of the rules -> a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from ._rule import RuleOutcome
from .exchange import Fault
from .rules import RULES
from .transcript import Transcript

_SHOWN: Final = 3
_SOURCES: Final = {rule.id: rule.source for rule in RULES}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run, or a recording. `target` is the address, or the name of the file."""

    target: str
    streams: int
    hung: int
    """Streams that the data plane gave up; a live run ends after `driver.MAX_HANGS` of them."""
    passed: int
    failed: int
    skipped: int
    rules: tuple[RuleOutcome, ...]


def make_report(target: str, transcript: Transcript, outcomes: Sequence[RuleOutcome]) -> Report:
    """The outcomes, counted."""
    hung = [line for line in transcript if line.end is not None and (line.end.by, line.end.status) == ("envoy", "DEADLINE_EXCEEDED")]
    counts = {kind: sum(outcome.outcome == kind for outcome in outcomes) for kind in ("pass", "fail", "skipped")}
    return Report(
        target=target,
        streams=len({line.stream for line in transcript if line.stream}),
        hung=len(hung),
        passed=counts["pass"],
        failed=counts["fail"],
        skipped=counts["skipped"],
        rules=tuple(outcomes),
    )


def encode_json(report: Report) -> bytes:
    """All of it."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def table(report: Report) -> Iterator[str]:
    """A line a rule; below each that failed, what broke it and the message that did."""
    for outcome in report.rules:
        why = f"  ({outcome.reason})" if outcome.outcome == "skipped" else ""
        yield _printable(f"{outcome.id:4} {outcome.outcome:8} {outcome.title}{why}")
        if outcome.faults:
            yield f"       required by: {_SOURCES[outcome.id]}"
        for fault in outcome.faults[:_SHOWN]:
            yield from map(_printable, _fault(fault))
        if len(outcome.faults) > _SHOWN:
            yield f"       and {len(outcome.faults) - _SHOWN} more; --format json has all"
    if report.hung:
        yield f"{report.hung} streams hung; with a live EPP the run ends at the fifth"
    yield f"{report.streams} streams with {report.target}: {report.passed} passed, {report.failed} failed, {report.skipped} skipped"


def _fault(fault: Fault) -> Iterator[str]:
    yield f"       {fault.reason}"
    if fault.message:
        yield f"       stream {fault.stream!r}, message {fault.number} from {fault.sender}: {fault.message}"
    elif fault.stream:
        yield f"       stream {fault.stream!r}"


def _printable(text: str) -> str:
    """What a peer says, without what a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
