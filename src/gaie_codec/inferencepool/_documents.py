"""Text of a manifest, YAML or JSON -> its documents, as Kubernetes' strict decoding reads them.

YAML by PyYAML, with its own safe loader narrowed: only the types that JSON has, so that a timestamp or 1:30 stays text as it does in
Kubernetes; keys become strings; a key that is there twice is an error; and nesting is bounded, because PyYAML's composer is recursive.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import yaml

from .. import MalformedRequestError

MAX_BYTES: Final = 1 << 20
"""Of one file. More than etcd, and so Kubernetes, stores of an object."""

_MAX_DEPTH: Final = 100
_MAX_MERGED: Final = 10_000


def decode_documents(text: str | bytes) -> list[Any]:
    """The documents of a text, without empty ones. Raises MalformedRequestError with the line at fault."""
    if len(text) > MAX_BYTES:
        raise MalformedRequestError(f"more than the {MAX_BYTES} bytes that a manifest may have")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MalformedRequestError(f"byte {error.start + 1} is not UTF-8") from None
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        # PyYAML takes no tab as white space, JSON does.
        try:
            return [json.loads(text.lstrip("\ufeff"), object_pairs_hook=_unique, parse_constant=_refuse_constant)]
        except json.JSONDecodeError:
            pass
        except (ValueError, RecursionError) as error:
            raise MalformedRequestError(f"JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}") from None
    documents = []
    loader = None
    try:
        loader = _Loader(text)
        while loader.check_data():  # type: ignore[no-untyped-call]
            documents.append(loader.get_data())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise MalformedRequestError(f"YAML{where}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise MalformedRequestError(f"YAML: character {error.position + 1}: {error.reason}") from None
    except (yaml.YAMLError, ValueError, OverflowError):
        # PyYAML lets escapes beyond Unicode and numbers of thousands of digits through to Python's own conversions.
        raise MalformedRequestError(f"YAML near line {loader.line + 1 if loader is not None else 1}: a value that cannot be read") from None
    finally:
        if loader is not None:
            loader.dispose()
    return [document for document in documents if document is not None]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:60]!r} is there twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


class _Loader(yaml.SafeLoader):
    """Documents in the types of JSON."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._merged = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def decode_null(self, node: Any) -> None:
        self.construct_scalar(node)

    def decode_bool(self, node: Any) -> bool:
        value = str(self.construct_scalar(node)).lower()
        if value not in self.bool_values:
            raise _at(node, f"{value[:40]!r} is no boolean")
        return self.bool_values[value]

    def decode_int(self, node: Any) -> int:
        try:
            return self.construct_yaml_int(node)
        except ValueError:
            raise _at(node, "not a whole number that can be read") from None

    def decode_float(self, node: Any) -> float:
        try:
            return self.construct_yaml_float(node)
        except ValueError:
            raise _at(node, "not a number that can be read") from None

    def decode_list(self, node: Any) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def decode_dict(self, node: Any) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _at(node, "not a mapping")
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._merge(merged, value_node)
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, bool):
                key = str(key).lower()
            if isinstance(key, int):
                key = str(key)
            if not isinstance(key, str):
                raise _at(key_node, "a key that is no string")
            if key in found:
                raise _at(key_node, f"key {key[:60]!r} is there twice")
            found[key] = self.construct_object(value_node, deep=True)
        return merged | found

    def _merge(self, into: dict[str, Any], node: Any) -> None:
        several = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for each in several:
            value = self.construct_object(each, deep=True)
            if not isinstance(value, dict):
                raise _at(node, "<< takes a mapping, or a list of them")
            # A few lines of aliases to aliases can ask for any number of copies.
            self._merged += len(value) + 1
            if self._merged > _MAX_MERGED:
                raise _at(node, "too much is merged")
            for key, item in value.items():
                into.setdefault(key, item)

    def refuse_tag(self, node: Any) -> None:
        raise _at(node, f"tag {node.tag[:60]!r} has no place in a manifest")


def _at(node: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.yaml_constructors = {
    "tag:yaml.org,2002:null": _Loader.decode_null,
    "tag:yaml.org,2002:bool": _Loader.decode_bool,
    "tag:yaml.org,2002:int": _Loader.decode_int,
    "tag:yaml.org,2002:float": _Loader.decode_float,
    "tag:yaml.org,2002:str": _Loader.construct_scalar,
    "tag:yaml.org,2002:seq": _Loader.decode_list,
    "tag:yaml.org,2002:map": _Loader.decode_dict,
    None: _Loader.refuse_tag,
}
# PyYAML's, without timestamps, the lone =, and numbers to the base of 60.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*)\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        "-+0123456789.",
    ),
    ("int", r"[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    first = [*_first.replace("\0", ""), *([""] if "\0" in _first else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), first)
