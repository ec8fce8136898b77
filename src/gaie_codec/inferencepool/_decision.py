"""A pool, what the model server is said to speak, and an override -> transcode or not, and why.

Proposal 2162 names two ways to know: a flag or environment variable, and (preferred) the pool's application protocol. The second needs a
third fact. `kubernetes.io/h2c` says HTTP/2 and no more, and servers of the OpenAI HTTP API speak that too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from .. import UsageError
from ._pool import InferencePool

Override: TypeAlias = Literal["auto", "transcode", "passthrough"]

ENVIRONMENT_VARIABLE: Final = "GAIE_CODEC_TRANSCODE"

_WORDS: Final[Mapping[str, Override]] = {
    "auto": "auto",
    "on": "transcode",
    "off": "passthrough",
    "transcode": "transcode",
    "passthrough": "passthrough",
}


def transcode_override(flag: str | None, environ: Mapping[str, str]) -> Override:
    """What the flag says, else what GAIE_CODEC_TRANSCODE says, else "auto". An empty variable is none.

    Both take auto, on (the same as transcode) and off (the same as passthrough). Raises UsageError that names which of them is wrong.
    """
    for said, name in ((flag, "--transcode"), (environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE)):
        if said is not None:
            if said.strip().lower() not in _WORDS:
                raise UsageError(f"{name}: {said[:40]!r} is none of auto, on, off")
            return _WORDS[said.strip().lower()]
    return "auto"


def transcodes(pool: InferencePool | None, *, speaks_grpc: bool, override: Override = "auto") -> tuple[bool, str]:
    """Whether OpenAI HTTP requests to the pool become gRPC, and why, for a line in a log.

    `speaks_grpc` is what the operator declared of the model servers: a dialect, or plain HTTP. Without a pool that alone decides. Raises
    UsageError for an override which asks for gRPC to servers that speak none, whatever the pool says.
    """
    if override not in ("auto", "transcode", "passthrough"):
        raise UsageError(f"override {override!r}: none of auto, transcode, passthrough")
    if override == "transcode":
        if not speaks_grpc:
            raise UsageError("transcoding is forced, but the model server is not declared to speak gRPC: there is nothing to transcode to")
        return True, "transcode: the override says so"
    if override == "passthrough":
        return False, "pass through: the override says so"
    if pool is None:
        if speaks_grpc:
            return True, "transcode: the model server is declared to speak gRPC, and there is no pool to say otherwise"
        return False, "pass through: the model server is not declared to speak gRPC"
    where = pool.declared_at or "the default"
    if pool.app_protocol == "http":
        grpc = ", and gRPC needs HTTP/2, although the model server is declared to speak it" if speaks_grpc else ""
        return False, f"pass through: appProtocol is http ({where}){grpc}"
    if not speaks_grpc:
        return False, (
            f"pass through over HTTP/2: appProtocol is {pool.app_protocol} ({where}), but that alone does not imply gRPC, "
            "and the model server is not declared to speak it"
        )
    return True, f"transcode: appProtocol is {pool.app_protocol} ({where}), and the model server is declared to speak gRPC"
