"""What each engine, with gaie-codec in front, is expected to do; where they differ, and only there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """`statuses` is the HTTP status a client gets for what the engine fails with before the first token."""

    name: str
    version: str
    serve: tuple[str, ...] = ()
    passthrough: bool = False
    names_model: bool = True
    logprobs: bool = True
    top_logprobs: bool = True
    statuses: Mapping[int, int] = dataclasses.field(default_factory=lambda: {400: 400, 429: 500, 503: 500})

    @property
    def spec(self) -> str:
        return f"{self.name}:{self.version}"


def of(name: str, version: str) -> dict[str, Traits]:
    """The set-ups of one engine, by label."""
    label = f"{name}:{version}"
    match name:
        case "vllm-native":
            # Engine errors are told apart from 0.33 on; before 0.30 they came as a finish, "abort", with status OK.
            number = tuple(map(int, version.split(".")[:2]))
            statuses = {400: 400, 429: 500, 503: 503} if number >= (0, 33) else {400: 500, 429: 500, 503: 500}
            return {label: Traits(name=name, version=version, statuses=statuses, names_model=number >= (0, 27))}
        case "sglang-runtime":
            verbatim = {400: 400, 429: 429, 503: 503}
            plain = Traits(name=name, version=version, passthrough=True, logprobs=False, statuses=verbatim)
            typed = Traits(name=name, version=version, serve=("--no-passthrough",), statuses={400: 500, 429: 429, 503: 503})
            return {label: plain, f"{label}+typed": typed}
        case "sglang-api":
            return {label: Traits(name=name, version=version, statuses={400: 400, 429: 429, 503: 503})}
        case "smg-vllm-rust":
            return {label: Traits(name=name, version=version, statuses={400: 500, 429: 500, 503: 500})}
        case "smg-sglang-rust":
            return {label: Traits(name=name, version=version, top_logprobs=False, statuses={400: 400, 429: 500, 503: 503})}
        case _:
            return {label: Traits(name=name, version=version)}


def selected() -> dict[str, Traits]:
    """The set-ups of `$ENGINES`, a list of NAME[:VERSION]; by default of every engine in its newest and oldest release."""
    specs = os.environ.get("ENGINES", "").split() or [
        f"{name}:{version}" for name, versions in launch.VERSIONS.items() for version in versions
    ]
    found: dict[str, Traits] = {}
    for spec in specs:
        found |= of(*launch.parse(spec))
    return found
