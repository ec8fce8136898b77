"""One mapping of a manifest -> its fields, typed; what is wrong goes to a report, with its path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeVar

from ._pool import RELEASES, Finding

DNS_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
GROUP: Final = re.compile(rf"({DNS_SUBDOMAIN.pattern})?")
KIND: Final = re.compile(r"[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?")

_LABEL_KEY: Final = re.compile(rf"({DNS_SUBDOMAIN.pattern}/)?([A-Za-z0-9][-A-Za-z0-9_.]{{0,61}})?[A-Za-z0-9]")
_LABEL_VALUE: Final = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")

_Word = TypeVar("_Word", bound=str)


class Report:
    """What is said about one pool, under the rules of one release, or of the newest where `version` is None."""

    def __init__(self, label: str, version: int | None) -> None:
        self.findings: list[Finding] = []
        self._label = label
        self._version = version
        self._first = 0

    @property
    def is_valid(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def accepted_since(self) -> str:
        """The first release that accepts what was reported; empty if none does."""
        return RELEASES[self._first] if self._first < len(RELEASES) else ""

    def error(self, path: str, message: str) -> None:
        """What no release accepts."""
        self._add(path, "error", message)

    def since(self, release: int, path: str, message: str) -> None:
        """What releases from this index on accept: an error for an older one, a note where none is named."""
        self._first = max(self._first, release)
        if self._version is None or self._version < release:
            self._add(path, "note" if self._version is None else "error", message, f"<{RELEASES[release]}")

    def never(self, path: str, message: str) -> None:
        """What can be read here but is in no release."""
        self._first = len(RELEASES)
        self._add(path, "note", message)

    def _add(self, path: str, severity: Literal["error", "note"], message: str, releases: str = "") -> None:
        self.findings.append(Finding(pool=self._label, path=path, severity=severity, message=message, releases=releases))


class Fields:
    """The fields of a mapping that are there and not null. Unknown ones, and a value that is no mapping, are errors."""

    def __init__(self, report: Report, path: str, value: Any, known: Iterable[str], hints: Mapping[str, str] | None = None) -> None:
        self.report = report
        self._path = path
        self.found: dict[str, Any] = {}
        self._is_mapping = isinstance(value, dict)
        if not self._is_mapping:
            report.error(path, f"{quoted(value)} is no mapping")
            return
        allowed = set(known)
        for key, item in value.items():
            if key not in allowed:
                hint = (hints or {}).get(self.at(key))
                report.error(self.at(key), f"unknown field{f'; {hint}' if hint else ''}")
            elif item is not None:
                self.found[key] = item

    def at(self, key: str) -> str:
        """The path of a field."""
        if _PLAIN_KEY.fullmatch(key):
            return f"{self._path}.{key}" if self._path else key
        return f"{self._path}[{quoted(key)}]"

    def value(self, key: str, *, required: bool = False) -> Any:
        """Whatever is there; None, and an error where it is required, for nothing."""
        if required and self._is_mapping and key not in self.found:
            self.report.error(self.at(key), "required")
        return self.found.get(key)

    def fields(self, key: str, known: Iterable[str], *, required: bool = False, hints: Mapping[str, str] | None = None) -> Fields | None:
        """The mapping that is there; None for nothing and for what is no mapping."""
        value = self.value(key, required=required)
        if value is None:
            return None
        found = Fields(self.report, self.at(key), value, known, hints)
        return found if isinstance(value, dict) else None

    def items(self, key: str, *, required: bool = False) -> list[Any] | None:
        """The list that is there."""
        value = self.value(key, required=required)
        if value is not None and not isinstance(value, list):
            self.report.error(self.at(key), f"{quoted(value)} is no list")
            return None
        return value

    def text(
        self, key: str, *, required: bool = False, pattern: re.Pattern[str] | None = None, low: int = 0, high: int | None = None
    ) -> str | None:
        """The string that is there, of `low` to `high` characters."""
        value = self.value(key, required=required)
        return value if value is None or _is_text(self.report, self.at(key), value, pattern, low, high) else None

    def choice(self, key: str, words: tuple[_Word, ...]) -> _Word | None:
        """The one of some words that is there."""
        value = self.found.get(key)
        for word in words:
            if value == word:
                return word
        if value is not None:
            self.report.error(self.at(key), f"{quoted(value)} is none of {', '.join(words)}")
        return None

    def integer(self, key: str, low: int, high: int, *, required: bool = False) -> int | None:
        """The whole number that is there."""
        value = self.value(key, required=required)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # 8000.0 is an integer to JSON schema
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self.report.error(self.at(key), f"{quoted(value)} is no integer")
        elif not low <= value <= high:
            shown = str(value) if abs(value) < 10**20 else "a number beyond it"
            self.report.error(self.at(key), f"{shown} is not in {low}..{high}")
        else:
            return value
        return None

    def labels(self, key: str, *, required: bool = False, key_high: int = 253, any_value: bool = False) -> dict[str, str] | None:
        """The map of labels, or of annotations, whose values may be any text and whose keys are compared in lower case."""
        value = self.value(key, required=required)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.report.error(self.at(key), f"{quoted(value)} is no mapping")
            return None
        found = {}
        for name, text in value.items():
            path = f"{self.at(key)}[{quoted(name)}]"
            is_key = _is_text(self.report, path, name.lower() if any_value else name, _LABEL_KEY, 1, key_high, what="key ")
            pattern, high = (None, None) if any_value else (_LABEL_VALUE, 63)
            if _is_text(self.report, path, text, pattern, 0, high) and is_key:
                found[name] = text
        return found


def quoted(value: Any) -> str:
    """A value to show in a message, in quotes if it is text: short, and without what a terminal would obey."""
    if isinstance(value, str):
        shown = ascii(value[:60])
        return shown if len(value) <= 60 else f"{shown[:-1]}...{shown[-1]}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value) if abs(value) < 10**20 else "a large number"
    return "a list" if isinstance(value, list) else "a mapping"


def _is_text(report: Report, path: str, value: Any, pattern: re.Pattern[str] | None, low: int, high: int | None, *, what: str = "") -> bool:
    if not isinstance(value, str):
        report.error(path, f"{what}{quoted(value)} is no string{'' if isinstance(value, list | dict) else '; put it in quotes'}")
    elif not low <= len(value) <= (len(value) if high is None else high):
        report.error(path, f"{what}has {len(value)} characters, not {low} to {high}")
    elif pattern is not None and not pattern.fullmatch(value):
        report.error(path, f"{what}{quoted(value)} does not match {pattern.pattern}")
    elif _SURROGATE.search(value):
        report.error(path, f"{what}has half of a surrogate pair")
    else:
        return True
    return False
