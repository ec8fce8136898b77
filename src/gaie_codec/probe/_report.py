"""What `probe` found out, as one value."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from ..compat import Missing

Match: TypeAlias = Literal["exact", "newer", "between", "near", "floor", "unknown"]
Basis: TypeAlias = Literal["reflection", "engine version", "methods and fields", "nothing"]
Health: TypeAlias = Literal["serving", "not serving", "unknown"]


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is. Empty, 0 and None stand for what it does not tell."""

    target: str

    dialect: str = ""
    """Empty for a server that is none of the known ones."""

    snapshot: str = ""
    """What to speak to it: the server has all of this snapshot, except where `match` is "near"."""

    match: Match = "unknown"
    """"exact": the server's schema is the snapshot's. "newer": it has all of the newest snapshot, and more. "between": it has all of
    the snapshot, and more, and not all of a later one. "near": it contradicts every snapshot, this one least. "floor": it has at least
    the snapshot; how much more cannot be seen."""

    basis: Basis = "nothing"
    """What `match` was concluded from."""

    reason: str = ""
    """The same in a sentence."""

    refused: str = ""
    """Why the library must not speak this snapshot; empty for all but a few."""

    releases: tuple[str, ...] = ()
    """Every published release with exactly the server's schema, where that is known."""

    schema_hash: str = ""
    """Of the schema that the server reflects (docs/protos.md)."""

    unknown: tuple[str, ...] = ()
    """Fields and methods of the server that `snapshot` lacks; a field that was only seen on the wire has its number for a name."""

    reflection: Literal["", "v1", "v1alpha"] = ""
    services: tuple[str, ...] = ()
    """As listed by reflection; without it those that answered."""

    answers: dict[str, str] = {}
    """Every method that was called, and the gRPC code that came back."""

    engine: Literal["", "vllm", "sglang"] = ""
    engine_version: str = ""
    proto_version: str = ""

    health: Health = "unknown"
    health_basis: str = ""
    """Who says so, or why nobody does."""

    model: str = ""
    """The name that clients use."""

    aliases: tuple[str, ...] = ()
    model_path: str = ""
    max_model_len: int = 0
    tokenizer_path: str = ""
    """A directory of the server's, or an id on the Hugging Face hub."""

    has_tokenizer_stream: bool = False
    """Whether GetTokenizer hands out the tokenizer's files."""

    has_adapter: bool = False
    """Whether this library can speak the dialect."""

    cannot_say: tuple[Missing, ...] | None = None
    """What requests cannot say to a server of this snapshot; None where the library does not speak to it."""

    notes: tuple[str, ...] = ()
