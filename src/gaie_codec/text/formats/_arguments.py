"""The JSON of a call's arguments, where the model writes them in another way: written as they come, each piece a valid continuation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ._json_text import decode, dump, rewritten
from ._reader import MalformedCallError
from ._writer import Writer

_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_INTEGER: Final = re.compile(r"-?(?:0|[1-9]\d*)")
_DEEPEST: Final = 64  # schemas in schemas
_ORDER: Final = ("null", "integer", "number", "boolean", "object", "array")  # in which a value is tried as one of several types


class ArgumentsWriter:
    """Tells one call. The name comes with the first piece of the arguments, unless `tell_name` is called before."""

    __slots__ = ("_name", "_pending", "_separator", "_writer")

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer = writer
        self._name = name
        self._pending = "{"  # goes out with what follows it
        self._separator = ""

    def tell_name(self) -> None:
        """Tell the name alone."""
        self._writer.tell(name=self._name)
        self._name = ""

    def key(self, key: str) -> None:
        """The name of the next argument."""
        self._pending += f"{self._separator}{dump(key)}: "
        self._separator = ", "

    def begin_text(self) -> None:
        """The value is a string."""
        self.raw('"')

    def text(self, text: str) -> None:
        """A piece of the string."""
        self.raw(dump(text)[1:-1])

    def end_text(self) -> None:
        """The string is whole."""
        self._pending += '"'

    def raw(self, text: str) -> None:
        """JSON text of a value, or of a piece of it."""
        self._writer.tell(self._pending + text, name=self._name)
        self._pending = self._name = ""

    def end(self) -> None:
        """The call is whole."""
        self.raw("}")
        self._writer.end_call()


class Schemas:
    """The types of arguments, by the definitions of a request's tools. Each is looked for once: both lists can be long."""

    __slots__ = ("_definitions", "_properties", "_types")

    def __init__(self, definitions: Sequence[Mapping[str, Any]]) -> None:
        self._definitions = definitions
        self._properties: dict[str, Mapping[str, Any]] | None = None
        self._types: dict[tuple[str, str], frozenset[str]] = {}

    def types(self, function: str, argument: str) -> frozenset[str]:
        """The JSON types that the argument may have; none if nothing says."""
        if self._properties is None:
            self._properties = {}
            for definition in self._definitions:
                self._properties.setdefault(*_properties_of(definition))
        schemas = self._properties.get(function)
        if schemas is None or argument not in schemas:
            return frozenset()
        types = self._types.get((function, argument))
        if types is None:
            types = self._types[function, argument] = types_of(schemas[argument])
        return types


def _properties_of(definition: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A function's name and the schemas of its arguments."""
    function = definition.get("function")
    if not isinstance(function, Mapping):
        return "", {}
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return str(function.get("name")), properties if isinstance(properties, Mapping) else {}


def types_of(schema: object, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema lets a value have; none if it does not say, or only far down."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return frozenset()
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset((declared,))
    if isinstance(declared, list):
        return frozenset(kind for kind in declared if isinstance(kind, str))
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        if isinstance(choices, list):
            return frozenset().union(*(types_of(choice, depth + 1) for choice in choices))
    values = schema.get("enum")
    if isinstance(values, list):
        return frozenset(map(_type_of, values))
    return frozenset()


def is_text(types: frozenset[str]) -> bool:
    """Is every value of these types written as a string, whatever it looks like?"""
    return not types & frozenset(_ORDER)


def typed(text: str, types: Iterable[str]) -> str:
    """JSON text of a value that is written as plain text: of the first type that fits, else a string."""
    plain = text.strip()
    for kind in _ORDER:
        if kind in types and (value := _as(plain, kind)):
            return value
    return dump(text)


def _as(text: str, kind: str) -> str:
    lower = text.lower()
    if kind == "null":
        return "null" if lower in ("null", "none") else ""
    if kind == "boolean":
        return lower if lower in ("true", "false") else ""
    if kind in ("integer", "number"):
        return text if (_INTEGER if kind == "integer" else _NUMBER).fullmatch(text) else ""
    try:
        value = decode(text)
    except MalformedCallError:
        return ""
    return rewritten(text) if isinstance(value, dict if kind == "object" else list) else ""


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "array"
