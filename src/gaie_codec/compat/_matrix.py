"""The shape of compat_matrix.yaml, and the matrix itself as frozen values.

The file is the source; `tools/compat.py` turns it into `_data.py`, and these types into the file's JSON schema. Nothing here reads a
file or knows YAML.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

_NUMBER = r"[0-9]+(\.[0-9]+)*(rc[0-9]+)?(\.post[0-9]+)?"
_CLAUSE = rf"(>=|<=|==|!=|>|<){_NUMBER}"

VersionText: TypeAlias = Annotated[str, Meta(pattern=f"^{_NUMBER}$", description="A release number, without a leading v.")]
Range: TypeAlias = Annotated[str, Meta(pattern=f"^{_CLAUSE}(,{_CLAUSE})*$", description="Such as >=0.4.4,<0.4.8.")]
Day: TypeAlias = Annotated[str, Meta(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")]
Uploaded: TypeAlias = Annotated[
    str, Meta(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9](T[0-2][0-9]:[0-5][0-9]Z)?$", description="A day, or a minute in UTC.")
]
Sentence: TypeAlias = Annotated[str, Meta(pattern=r"^.*\.$", max_length=160, description="One sentence.")]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=60)]
SchemaId: TypeAlias = Annotated[str, Meta(pattern=r"^X?[VS][0-9]+$", description="An id of the published history.")]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class SnapshotEntry(_Entry, frozen=True):
    """A snapshot: when its schema appeared, and which smg-grpc-proto it is used with (`exact`: which ships just this schema)."""

    name: Name
    published: Day
    adds: Sentence
    schema: SchemaId | None = None
    service: Name | None = None
    smg_grpc_proto: Range | None = None
    exact: Range | None = None
    refused: str | None = None


class DialectEntry(_Entry, frozen=True):
    """A gRPC protocol and its snapshots, oldest first."""

    service: Name
    summary: str
    snapshots: tuple[SnapshotEntry, ...]


class ProtoRelease(_Entry, frozen=True):
    """A release of smg-grpc-proto and the ids of the schemas in it."""

    version: VersionText
    uploaded: Uploaded
    vllm_engine: SchemaId = msgspec.field(name="vllm.engine")
    sglang_scheduler: SchemaId = msgspec.field(name="sglang.scheduler")


class ServicerRelease(_Entry, frozen=True):
    """A release of smg-grpc-servicer: the smg-grpc-proto it needs, and the engines its extras ask for."""

    version: VersionText
    uploaded: Uploaded
    proto: Range
    vllm: Range | None = None
    sglang: Range | None = None


class Packages(_Entry, frozen=True):
    """The packages under the gRPC servers of vLLM and SGLang, oldest first."""

    proto: tuple[ProtoRelease, ...] = msgspec.field(name="smg-grpc-proto")
    servicer: tuple[ServicerRelease, ...] = msgspec.field(name="smg-grpc-servicer")


class Installed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What may be installed together: servicer (None: the engine's own), smg-grpc-proto, and the snapshot that fits."""

    servicer: VersionText | None
    proto: VersionText
    snapshot: Name


class Row(_Entry, frozen=True):
    """One release of a server in one dialect: a snapshot, or three combinations of packages where the release leaves that open."""

    version: VersionText
    snapshot: Name | None = None
    schema: SchemaId | None = None
    floor: Installed | None = None
    release_day: Installed | None = None
    today: Installed | None = None


class Era(_Entry, frozen=True):
    """Releases that are started in one way. `requires` is what they ask of the smg packages."""

    releases: Range
    start: str
    install: str | None = None
    requires: str | None = None


class ServerDialect(_Entry, frozen=True):
    """How a server comes to speak a dialect, and in which snapshot."""

    eras: tuple[Era, ...]
    releases: tuple[Row, ...]


class ServerRelease(_Entry, frozen=True):
    """A release of a server."""

    version: VersionText
    uploaded: Uploaded | None = None
    note: Sentence | None = None


class ServerEntry(_Entry, frozen=True):
    """Something with releases that speaks dialects, or reads them as they pass."""

    title: str
    kind: Literal["model server", "endpoint picker"]
    releases: tuple[ServerRelease, ...]
    dialects: dict[str, ServerDialect]
    aliases: tuple[Name, ...] = ()


class BadPair(_Entry, frozen=True):
    """A combination that installs and does not work: `releases` of package or server `of`, with `smg_grpc_proto`."""

    id: Name
    dialects: tuple[Name, ...]
    of: Name
    releases: Range
    smg_grpc_proto: Range
    effect: Sentence
    source: str


class Behaviour(_Entry, frozen=True):
    """What a release does and its schema does not show. `since` and `until` are releases of `of`, both inclusive."""

    id: Name
    dialect: Name
    effect: Sentence
    source: str
    of: Name | None = None
    since: VersionText | None = None
    until: VersionText | None = None
    fields: tuple[Name, ...] = ()

    @property
    def releases(self) -> str:
        """Whose releases behave so, in words; empty where all do."""
        if self.of is None:
            return ""
        if self.since is not None and self.since == self.until:
            return f"{self.of} {self.since}"
        if self.since is None and self.until is None:
            return f"{self.of}, all"
        return " ".join([self.of, *([f"from {self.since}"] if self.since else []), *([f"up to {self.until}"] if self.until else [])])


class GatewayFields(_Entry, frozen=True):
    """Request fields that a gateway handles without the model server."""

    names: tuple[Name, ...]
    why: Sentence


class Matrix(_Entry, frozen=True):
    """The whole file."""

    today: Day
    dialects: dict[str, DialectEntry]
    packages: Packages
    servers: dict[str, ServerEntry]
    bad_pairs: tuple[BadPair, ...]
    behaviours: tuple[Behaviour, ...]
    openai_fields: dict[str, tuple[str, ...]]
    gateway_fields: tuple[GatewayFields, ...]


@cache
def matrix() -> Matrix:
    """The matrix. The first call decodes it, which takes about a millisecond."""
    from ._data import MATRIX

    return msgspec.json.decode(MATRIX, type=Matrix)
