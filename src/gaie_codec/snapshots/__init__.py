"""A dialect and a snapshot name -> message classes and methods, from a `DescriptorPool` of that snapshot's own.

All snapshots of a dialect use the same full names, so they cannot share a pool. Classes of two snapshots have nothing to do with
each other: a message of one is not accepted as a field of the other's. docs/protos.md tells where snapshots come from.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from .._errors import UsageError
from ._data import MODULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from google.protobuf.message import Message

__all__ = ["SNAPSHOTS", "Method", "Snapshot", "is_repeated", "load"]

SNAPSHOTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({dialect: tuple(modules) for dialect, modules in MODULES.items()})
"""The snapshot names of every dialect, oldest first."""

_Found = TypeVar("_Found")

_loaded: dict[tuple[str, str], Snapshot] = {}


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One method of a service. `path` is the HTTP/2 `:path` of its calls."""

    path: str
    request: type[Message]
    response: type[Message]
    server_streaming: bool


class Snapshot:
    """One published version of a dialect's schema. Get it from `load`.

    Names are full, or relative to a package of the snapshot; the package of the services comes before those it imports. `refused`
    says why no server may be spoken to in this version, and is empty for all but the few that are kept for tools alone.
    """

    __slots__ = ("_files", "_messages", "dialect", "name", "pool", "refused", "services")

    def __init__(self, dialect: str, name: str, files: Iterable[bytes], refused: str = "") -> None:
        """`files` are serialized FileDescriptorProtos, dependencies first."""
        self.dialect: Final = dialect
        self.name: Final = name
        self.refused: Final = refused
        self.pool: Final = DescriptorPool()
        added = [self.pool.AddSerializedFile(file) for file in files]
        self._files = tuple(file for file in reversed(added) if file.package != "google.protobuf")
        self._messages: dict[str, type[Message]] = {}
        self.services: Final = tuple(service.full_name for file in self._files for service in file.services_by_name.values())

    def message(self, name: str) -> type[Message]:
        """The class of a message. Raises UsageError if the snapshot has no such message."""
        if name not in self._messages:
            self._messages[name] = GetMessageClass(self._find(self.pool.FindMessageTypeByName, "message", name))
        return self._messages[name]

    def has_field(self, message: str, field: str) -> bool:
        """Whether a message has a field of that name. Raises UsageError if the snapshot has no such message."""
        return field in self._find(self.pool.FindMessageTypeByName, "message", message).fields_by_name

    def method(self, service: str, name: str) -> Method:
        """A method of a service. Raises UsageError if the snapshot lacks either."""
        descriptor = self._find(self.pool.FindServiceByName, "service", service)
        if name not in descriptor.methods_by_name:
            raise UsageError(f"{descriptor.full_name} of {self} has no method {name!r}; there are: {_listed(descriptor.methods_by_name)}")
        method = descriptor.methods_by_name[name]
        return Method(
            path=f"/{descriptor.full_name}/{name}",
            request=GetMessageClass(method.input_type),
            response=GetMessageClass(method.output_type),
            server_streaming=method.server_streaming,
        )

    def method_at(self, path: str) -> Method:
        """The method behind the `:path` of a call, `/service/method`. Raises UsageError if the snapshot has none there."""
        service, _, name = path.removeprefix("/").partition("/")
        return self.method(service, name)

    def has_method(self, service: str, name: str) -> bool:
        """Whether a service has a method of that name. Raises UsageError if the snapshot has no such service."""
        return name in self._find(self.pool.FindServiceByName, "service", service).methods_by_name

    def _find(self, find: Callable[[str], _Found], kind: str, name: str) -> _Found:
        for full_name in (name, *(f"{file.package}.{name}" for file in self._files)):
            try:
                return find(full_name)
            except KeyError:
                continue
        messages = (message for file in self._files for message in file.message_types_by_name)
        raise UsageError(f"{self} has no {kind} {name!r}; there are: {_listed(messages if kind == 'message' else self.services)}")

    def __str__(self) -> str:
        return f"{self.dialect} {self.name}"

    def __repr__(self) -> str:
        return f"<Snapshot {self}>"


def load(dialect: str, snapshot: str | None = None) -> Snapshot:
    """The snapshot of that name, or the dialect's newest. Always the same object; the first call takes about a millisecond.

    Raises UsageError for a dialect or a snapshot that does not exist. A refused snapshot is loaded like any other.
    """
    if dialect not in MODULES:
        raise UsageError(f"no dialect {dialect!r}; there are: {_listed(MODULES)}")
    name = SNAPSHOTS[dialect][-1] if snapshot is None else snapshot
    if name not in MODULES[dialect]:
        raise UsageError(f"{dialect} has no snapshot {name!r}; there are: {', '.join(SNAPSHOTS[dialect])}")
    key = dialect, name
    if key not in _loaded:
        data = import_module(f"{__name__}._data.{MODULES[dialect][name]}")
        # Two threads may both get here. setdefault lets one snapshot win, so that nobody holds classes of the other.
        _loaded.setdefault(key, Snapshot(dialect, name, data.FILES, data.REFUSED))
    return _loaded[key]


def is_repeated(field: Any) -> bool:
    """Whether the FieldDescriptor is of a list or a map.

    protobuf before 6.31 does not know `field.is_repeated`, later ones warn of `field.label`.
    """
    known = getattr(field, "is_repeated", None)
    return bool(field.label == field.LABEL_REPEATED if known is None else known)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
