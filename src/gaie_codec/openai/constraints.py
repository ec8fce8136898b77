"""`response_format` and `structured_outputs` -> the one Constraint that they ask for.

What is wrong with a `response_format` is said for each form that it may have, as pydantic says it of a union. Structural tags have two
forms: `format`, and the older one of `structures` and `triggers`; both go to the model server as they came, with keys in vLLM's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, Final

import msgspec

from .._errors import MalformedRequestError
from .._events import Constraint
from .fields import MAX_FAULTS, Fault, json_text, literal_fault, no_dataclass_fault, no_model_fault, type_error, type_errors

FIELDS: Final = frozenset(("response_format", "structured_outputs"))
MAX_SCHEMA_DEPTH: Final = 64
"""Levels of objects and lists in a JSON schema."""

_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_PLAIN_FORMATS: Final = ("text", "json_object", "json_schema")
_NONE: Final = "You must use one kind of structured outputs constraint but none are specified"
_SEVERAL: Final = "You can only use one kind of structured outputs constraint but multiple are specified"


def decode_constraint(fields: Mapping[str, Any]) -> Constraint | None:
    """What the output must match; where both fields ask for the same kind, `response_format` counts. Raises MalformedRequestError."""
    from_format = _decode_response_format(fields.get("response_format"))
    outputs = fields.get("structured_outputs")
    if outputs is None:
        return from_format
    if not isinstance(outputs, dict):
        raise type_errors(no_dataclass_fault("structured_outputs", "StructuredOutputsParams"))
    asked = [kind for kind in _KINDS if outputs.get(kind) is not None]
    if not asked:
        raise MalformedRequestError(_NONE)
    if len(asked) > 1:
        raise MalformedRequestError(_SEVERAL)
    constraint = _decode_structured(asked[0], outputs[asked[0]])
    if from_format is not None and from_format.kind != constraint.kind:
        raise MalformedRequestError(_SEVERAL)
    return from_format or constraint


def _decode_structured(kind: str, value: Any) -> Constraint:
    loc = f"structured_outputs.{kind}"
    if kind == "json_object":
        if value is not True:
            raise MalformedRequestError(
                "structured_outputs.json_object must be True if set; omit structured_outputs to disable structured outputs"
            )
        return Constraint(kind="json_object")
    if kind == "choice":
        if not isinstance(value, list):
            raise type_error(loc, "list_type", "Input should be a valid list")
        for place, choice in enumerate(value):
            if not isinstance(choice, str):
                raise type_error(f"{loc}.{place}", "string_type", "Input should be a valid string")
        if not value:
            raise MalformedRequestError("Choice '[]' cannot be an empty list")
        return Constraint(kind="choice", value=tuple(value))
    if kind == "json":
        if not isinstance(value, str | dict):
            raise type_errors(
                Fault(loc, "string_type", "Input should be a valid string"), Fault(loc, "dict_type", "Input should be a valid dictionary")
            )
        return Constraint(kind="json_schema", value=_schema_text(value, loc))
    if not isinstance(value, str):
        if kind != "structural_tag" or not isinstance(value, dict):
            raise type_error(loc, "string_type", "Input should be a valid string")
        value = json_text(value, loc)
    if kind == "grammar" and not value.strip():
        raise MalformedRequestError("structured_outputs.grammar cannot be an empty string")
    return Constraint(kind=kind, value=value)  # type: ignore[arg-type]


def _decode_response_format(value: Any) -> Constraint | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise type_errors(*[no_model_fault("response_format")] * 3)
    kind = value.get("type")
    if kind == "structural_tag":
        return Constraint(kind="structural_tag", value=json_text(_decode_tag(value), "response_format"))
    if any(True for _ in _faults_of_plain(value)):
        raise _no_format(value)
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        if wrapper is None:
            raise MalformedRequestError(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided. (parameter=response_format)",
                param="response_format",
            )
        if wrapper.get("schema") is None:
            raise MalformedRequestError(_NONE)
        return Constraint(kind="json_schema", value=_schema_text(wrapper["schema"], "response_format.json_schema.schema"))
    return Constraint(kind="json_object") if kind == "json_object" else None


def _no_format(value: dict[str, Any]) -> MalformedRequestError:
    return type_errors(*islice(chain(_faults_of_plain(value), _faults_of_tag(value), _faults_of_older_tag(value)), MAX_FAULTS))


def _decode_tag(value: dict[str, Any]) -> dict[str, Any]:
    """A structural tag with its keys in the order of vLLM's models, whose text servers cache grammars by."""
    if "format" in value:
        return {"type": value["type"], "format": value["format"]} | value
    if any(True for _ in _faults_of_older_tag(value)):
        raise _no_format(value)
    structures = [{"begin": one["begin"], "schema": one.get("schema"), "end": one["end"]} | one for one in value["structures"]]
    return {"type": value["type"], "structures": structures, "triggers": value["triggers"]} | value | {"structures": structures}


def _faults_of_plain(value: dict[str, Any]) -> Iterator[Fault]:
    loc = "response_format.type"
    if "type" not in value:
        yield Fault(loc, "missing", "Field required")
    elif value["type"] not in _PLAIN_FORMATS:
        yield literal_fault(loc, *_PLAIN_FORMATS)
    wrapper = value.get("json_schema")
    loc = "response_format.json_schema"
    if wrapper is None:
        return
    if not isinstance(wrapper, dict):
        yield no_model_fault(loc)
        return
    yield from _faults_of_text(wrapper, "name", loc)
    if not isinstance(wrapper.get("schema"), dict | None):
        yield Fault(f"{loc}.schema", "dict_type", "Input should be a valid dictionary")


def _faults_of_type(value: dict[str, Any]) -> Iterator[Fault]:
    if "type" not in value:
        yield Fault("response_format.type", "missing", "Field required")
    elif value["type"] != "structural_tag":
        yield literal_fault("response_format.type", "structural_tag")


def _faults_of_tag(value: dict[str, Any]) -> Iterator[Fault]:
    yield from _faults_of_type(value)
    if "format" not in value:
        yield Fault("response_format.format", "missing", "Field required")


def _faults_of_older_tag(value: dict[str, Any]) -> Iterator[Fault]:
    yield from _faults_of_type(value)
    for name in ("structures", "triggers"):
        loc = f"response_format.{name}"
        if name not in value:
            yield Fault(loc, "missing", "Field required")
        elif not isinstance(value[name], list):
            yield Fault(loc, "list_type", "Input should be a valid list")
        else:
            for place, item in enumerate(value[name]):
                yield from _faults_of_item(name, item, f"{loc}.{place}")


def _faults_of_item(name: str, item: Any, loc: str) -> Iterator[Fault]:
    if name == "triggers":
        if not isinstance(item, str):
            yield Fault(loc, "string_type", "Input should be a valid string")
    elif not isinstance(item, dict):
        yield no_model_fault(loc)
    else:
        yield from _faults_of_text(item, "begin", loc)
        if not isinstance(item.get("schema"), dict | None):
            yield Fault(f"{loc}.schema", "dict_type", "Input should be a valid dictionary")
        yield from _faults_of_text(item, "end", loc)


def _faults_of_text(value: dict[str, Any], name: str, loc: str) -> Iterator[Fault]:
    if name not in value:
        yield Fault(f"{loc}.{name}", "missing", "Field required")
    elif not isinstance(value[name], str):
        yield Fault(f"{loc}.{name}", "string_type", "Input should be a valid string")


def _schema_text(value: str | dict[str, Any], loc: str) -> str:
    text = value if isinstance(value, str) else json_text(value, loc)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return text  # the model server says what is wrong with it
    if _is_deeper(value, MAX_SCHEMA_DEPTH):
        raise MalformedRequestError(f"a JSON schema may be nested at most {MAX_SCHEMA_DEPTH} levels deep", param=loc.partition(".")[0])
    return text


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether there are more levels of objects and lists; looks no further than one more."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return items is not None and (levels == 0 or any(_is_deeper(item, levels - 1) for item in items))
