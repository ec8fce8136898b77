"""The JSON of a call's arguments, where the model writes them in another way: written as they come, each piece a valid continuation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ._json_text import decode, dump
from ._reader import MalformedCallError
from ._writer import Writer

_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_INTEGER: Final = re.compile(r"-?(?:0|[1-9]\d*)")
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


def schemas_of(definitions: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The schemas of a function's arguments by name."""
    for definition in definitions:
        function = definition.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return properties if isinstance(properties, Mapping) else {}
    return {}


def types_of(schema: object) -> frozenset[str]:
    """The JSON types that a schema lets a value have; none if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset((declared,))
    if isinstance(declared, list):
        return frozenset(kind for kind in declared if isinstance(kind, str))
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        if isinstance(choices, list):
            return frozenset().union(*map(types_of, choices))
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
    return dump(json.loads(text)) if isinstance(value, dict if kind == "object" else list) else ""


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "array"
