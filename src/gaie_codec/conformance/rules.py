"""The table of rules, and a transcript -> what became of each: the same for a run that has just ended and for a recording."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .. import UsageError
from ._envoy_rules import ENVOY_RULES
from ._gotcha_rules import GOTCHA_RULES
from ._protocol_rules import PROTOCOL_RULES
from ._rule import Rule, RuleOutcome, judged
from .addresses import split
from .exchange import Evidence
from .transcript import Transcript

RULES: Final[tuple[Rule, ...]] = (*PROTOCOL_RULES, *ENVOY_RULES, *GOTCHA_RULES)
"""P1 to P14, E1 to E5, G1 to G20."""


def check(transcript: Transcript, *, pool: Iterable[str] = ()) -> tuple[RuleOutcome, ...]:
    """Every rule held against the transcript, in the order of the table.

    `pool` are the IP:PORT that the EPP may choose from; without it some rules are skipped. Raises UsageError for what is no IP:PORT.
    """
    endpoints = tuple(pool)
    for endpoint in endpoints:
        if split(endpoint) is None:
            raise UsageError(f"endpoint {endpoint}: not of the form IP:PORT (an IPv6 address goes in brackets)")
    evidence = Evidence(transcript, endpoints)
    return tuple(judged(rule, evidence) for rule in RULES)
