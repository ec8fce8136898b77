"""Release numbers of Python packages (PEP 440) and ranges of them, compared.

The package `packaging` does all of this; it is not a dependency because the matrix needs forty lines of it. A test holds these against
it. Differences: no epochs, no `~=` and `===`, and a range says of a pre-release what its order says (packaging leaves most out).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

from .._errors import UsageError

_VERSION: Final = re.compile(
    r"v?(?P<release>\d{1,9}(\.\d{1,9}){0,8})"
    r"([-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_number>\d{0,9}))?"
    r"([-_.]?(?P<post>post|rev|r)[-_.]?(?P<post_number>\d{0,9})|-(?P<post_dash>\d{1,9}))?"
    r"([-_.]?(?P<dev>dev)[-_.]?(?P<dev_number>\d{0,9}))?"
    r"(\+[a-z0-9]+([-_.][a-z0-9]+)*)?",
    re.ASCII | re.IGNORECASE,
)
_PRE: Final = MappingProxyType({"alpha": 0, "a": 0, "beta": 1, "b": 1, "preview": 2, "pre": 2, "c": 2, "rc": 2})
_FINAL: Final = (3, 0)
_DEV_ONLY: Final = (-1, 0)


class Version(NamedTuple):
    """A release number as something to compare. A local part (`+cu129`) does not count: it names a build of the same release."""

    release: tuple[int, ...]
    pre: tuple[int, int]
    post: int
    dev: tuple[int, int]

    @property
    def is_prerelease(self) -> bool:
        """Whether this comes before a final release of the same number."""
        return self.pre != _FINAL or self.dev[0] == 0


_OPERATORS: Final[Mapping[str, Callable[[Version, Version], bool]]] = MappingProxyType(
    {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
)


@lru_cache(maxsize=1024)
def parse(text: str) -> Version:
    """A release number, with or without a leading v. Raises UsageError for anything else."""
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text[:40]!r} is not a release number such as 0.31.0")
    release = tuple(int(part) for part in match["release"].split("."))
    while len(release) > 1 and release[-1] == 0:
        release = release[:-1]
    post = int(match["post_number"] or match["post_dash"] or 0) if match["post"] or match["post_dash"] else -1
    if match["pre"]:
        pre = _PRE[match["pre"].lower()], int(match["pre_number"] or 0)
    else:
        pre = _DEV_ONLY if match["dev"] and post < 0 else _FINAL
    return Version(release, pre, post, (0, int(match["dev_number"] or 0)) if match["dev"] else (1, 0))


@lru_cache(maxsize=1024)
def _clauses(specifier: str) -> tuple[tuple[Callable[[Version, Version], bool], Version], ...]:
    found = []
    for clause in specifier.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*", clause)
        if match is None:
            raise UsageError(f"{specifier[:40]!r} is not a range such as >=0.4.4,<0.4.8")
        found.append((_OPERATORS[match[1]], parse(match[2])))
    return tuple(found)


def within(version: str, specifier: str) -> bool:
    """Whether a release is in a range such as `>=0.4.4,<0.4.8`. An empty range holds nothing. Raises UsageError for what is neither."""
    parsed = parse(version)
    return bool(specifier) and all(compare(parsed, bound) for compare, bound in _clauses(specifier))


def between(version: str, since: str | None, until: str | None) -> bool:
    """Whether a release is not before `since` and not after `until`; None is open."""
    parsed = parse(version)
    return (since is None or parse(since) <= parsed) and (until is None or parsed <= parse(until))
