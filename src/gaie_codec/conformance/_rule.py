"""A rule: what it asks for, and how evidence of any kind is held against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import msgspec

from .exchange import Evidence, Exchange, Fault

Outcome: TypeAlias = Literal["pass", "fail", "skipped"]
Judge: TypeAlias = Callable[[Evidence], "Iterable[Fault] | None"]
"""The faults, none for a pass; None where the evidence says nothing about the rule."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    id: str
    title: str
    source: str
    """Where the requirement is from."""

    judge: Judge | None
    """None for what no peer can see."""

    unseen: str
    """Why there is no judgement, where there is none."""


class RuleOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a rule."""

    id: str
    title: str
    outcome: Outcome
    reason: str = ""
    """Of a rule that was skipped, or of the first fault."""
    faults: tuple[Fault, ...] = ()


def judged(rule: Rule, evidence: Evidence) -> RuleOutcome:
    """The rule held against the evidence."""
    found = rule.judge(evidence) if rule.judge is not None else None
    if found is None:
        return RuleOutcome(id=rule.id, title=rule.title, outcome="skipped", reason=rule.unseen)
    faults = tuple(found)
    reason = faults[0].reason if faults else ""
    return RuleOutcome(id=rule.id, title=rule.title, outcome="fail" if faults else "pass", reason=reason, faults=faults)


def each(applies: Callable[[Exchange], object], check: Callable[[Exchange], Fault | None]) -> Judge:
    """Judges every exchange that the rule applies to by itself; one that does not says nothing."""

    def judge(evidence: Evidence) -> Iterable[Fault] | None:
        found = [check(exchange) for exchange in evidence.exchanges if applies(exchange)]
        return [fault for fault in found if fault is not None] if found else None

    return judge


def each_in(applies: Callable[[Exchange, Evidence], object], check: Callable[[Exchange, Evidence], Fault | None]) -> Judge:
    """Likewise for what depends on the pool, or on other streams."""

    def judge(evidence: Evidence) -> Iterable[Fault] | None:
        found = [check(exchange, evidence) for exchange in evidence.exchanges if applies(exchange, evidence)]
        return [fault for fault in found if fault is not None] if found else None

    return judge
