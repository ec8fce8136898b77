"""JSON bodies and their scalar fields, taken as leniently as vLLM's HTTP layer takes them.

"5" is 5, 1.0 is 1, true is 1, "yes" is true; 1.5 is no integer. What does not fit is a MalformedRequestError whose `param` is the
path of the field, in the words of vLLM's validation but without the offending value: error texts carry no payload.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from .._errors import MalformedRequestError

_TRUE: Final = frozenset(("1", "true", "t", "yes", "y", "on"))
_FALSE: Final = frozenset(("0", "false", "f", "no", "n", "off"))
_INTEGER: Final = re.compile(r"([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?")
_NO_SIZE: Final = ("int_parsing_size", "Unable to parse input string as an integer, exceeded maximum size")
_MAX_MESSAGE: Final = 500  # characters; a number may have 4300 digits
MAX_FAULTS: Final = 100
"""What an error tells at most; a value of a million parts may be wrong in each."""
_TOO_LARGE: Final = 2**63  # what pydantic takes no float for


def decode_json_object(body: bytes) -> dict[str, Any]:
    """The body as an object. What Python's own json takes is taken: a BOM, UTF-16/32, NaN and infinity, which no field's range has."""
    value = _decode_json(body)
    if value is None:
        raise type_error("", "missing", "Field required")
    if not isinstance(value, dict):
        raise type_errors(no_model_fault(""))
    return value


def _decode_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise _unreadable("nested too deeply") from None
    except (msgspec.DecodeError, ValueError):
        return _decode_leniently(body)


def _decode_leniently(body: bytes) -> Any:
    if not body:
        return None
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # it also takes lone surrogates, which are no text: ValueError
    except json.JSONDecodeError as error:
        # It says what it expected, and of the body one character at most.
        raise type_error(str(error.pos), "json_invalid", "JSON decode error", {"error": error.msg}) from None
    except RecursionError:
        raise _unreadable("nested too deeply") from None
    except ValueError:
        raise _unreadable("not valid text, or a number of too many digits") from None
    return value


def json_text(value: Any, loc: str) -> str:
    """The value as JSON, spelled as vLLM's HTTP layer spells it: engines cache compiled grammars by this text."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise type_error(loc, "json_invalid", "Input should be JSON of sane depth without infinite numbers") from None


def _unreadable(reason: str) -> MalformedRequestError:
    error = MalformedRequestError(f"There was an error parsing the body: {reason}", param="body")
    error.error_type = "Bad Request"
    return error


class Fault(NamedTuple):
    """What is wrong at `loc`, a dotted path below the body, in pydantic's words."""

    loc: str
    kind: str
    message: str
    context: Mapping[str, Any] | None = None


def type_error(loc: str, kind: str, message: str, context: Mapping[str, Any] | None = None) -> MalformedRequestError:
    """A value of the wrong type or form at `loc`."""
    return type_errors(Fault(loc, kind, message, context))


def type_errors(*faults: Fault) -> MalformedRequestError:
    """A value that is wrong in several ways, such as for each alternative of what its field takes. `param` is the first."""
    places = [f"body.{fault.loc}" if fault.loc else "body" for fault in faults]
    lines = [f"{len(faults)} validation error{'s' * (len(faults) > 1)}:"]
    for where, fault in zip(places, faults, strict=True):
        context = f", 'ctx': {dict(fault.context)!r}" if fault.context is not None else ""
        lines.append(f"  {{'type': {fault.kind!r}, 'loc': {where!r}, 'msg': {fault.message!r}{context}}}")
    error = MalformedRequestError("\n".join(lines), param=places[0])
    error.error_type = "Bad Request"
    return error


def no_model_fault(loc: str) -> Fault:
    """A value that is no object where vLLM has a model for its fields."""
    return Fault(loc, "model_attributes_type", "Input should be a valid dictionary or object to extract fields from")


def no_dataclass_fault(loc: str, name: str) -> Fault:
    """A value that is no object where vLLM has a dataclass of this name."""
    return Fault(loc, "dataclass_type", f"Input should be a dictionary or an instance of {name}", {"class_name": name})


def literal_fault(loc: str, *allowed: str) -> Fault:
    """A value that is none of `allowed`."""
    names = [repr(name) for name in allowed]
    expected = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return Fault(loc, "literal_error", f"Input should be {expected}", {"expected": expected})


def range_error(name: str, message: str, value: object = None) -> MalformedRequestError:
    """A value of the right type which its field does not allow. `value`, when given, is repeated: numbers only."""
    suffix = f" (parameter={name}, value={value})" if value is not None else f" (parameter={name})"
    return MalformedRequestError(shorten(message + suffix), param=name)


def shorten(text: str) -> str:
    """A message that repeats a number, which may have thousands of digits: its beginning."""
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def int_field(body: Mapping[str, Any], name: str, *, loc: str | None = None) -> int | None:
    """The field as an integer, None when absent or null."""
    return as_int(body.get(name), name if loc is None else loc)


def as_int(value: Any, loc: str) -> int | None:
    """`value` as an integer; None stays None."""
    found = read_int(value, loc)
    if isinstance(found, Fault):
        raise type_errors(found)
    return found


def read_int(value: Any, loc: str) -> int | Fault | None:
    """`value` as an integer, or why it is none; None stays None."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return Fault(loc, "finite_number", "Input should be a finite number")
        if not value.is_integer():
            return Fault(loc, "int_from_float", "Input should be a valid integer, got a number with a fractional part")
        return int(value) if abs(value) < _TOO_LARGE else Fault(loc, *_NO_SIZE)
    if isinstance(value, str):
        text = _INTEGER.fullmatch(value.strip())
        if text is None:
            return Fault(loc, "int_parsing", "Input should be a valid integer, unable to parse string as an integer")
        try:
            return int(text[1])
        except ValueError:
            return Fault(loc, *_NO_SIZE)
    return Fault(loc, "int_type", "Input should be a valid integer")


def bounded_int(body: Mapping[str, Any], name: str, *, low: int | None = None, high: int | None = None) -> int | None:
    """The field as an integer that is not below `low` nor above `high`, None when absent or null."""
    value = as_int(body.get(name), name)
    if value is not None and low is not None and value < low:
        raise type_error(name, "greater_than_equal", f"Input should be greater than or equal to {low}", {"ge": low})
    if value is not None and high is not None and value > high:
        raise type_error(name, "less_than_equal", f"Input should be less than or equal to {high}", {"le": high})
    return value


def float_field(body: Mapping[str, Any], name: str) -> float | None:
    """The field as a number, None when absent or null."""
    return as_float(body.get(name), name)


def as_float(value: Any, loc: str) -> float | None:
    """`value` as a number; None stays None."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            raise type_error(loc, "float_type", "Input should be a valid number") from None
    if isinstance(value, str):
        try:
            return float(value if value.isascii() else "")
        except ValueError:
            raise type_error(loc, "float_parsing", "Input should be a valid number, unable to parse string as a number") from None
    raise type_error(loc, "float_type", "Input should be a valid number")


def bool_field(body: Mapping[str, Any], name: str, default: bool = False, *, loc: str | None = None) -> bool:
    """The field as a boolean, `default` when absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        lowered = value.lower()
        if lowered in _TRUE or lowered in _FALSE:
            return lowered in _TRUE
    where = name if loc is None else loc
    if isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < _TOO_LARGE and float(value).is_integer()):
        raise type_error(where, "bool_parsing", "Input should be a valid boolean, unable to interpret input")
    raise type_error(where, "bool_type", "Input should be a valid boolean")


def str_field(body: Mapping[str, Any], name: str, default: str = "") -> str:
    """The field as text, `default` when absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        return value
    raise type_error(name, "string_type", "Input should be a valid string")


def object_field(body: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The field as an object, None when absent or null."""
    value = body.get(name)
    if value is None or isinstance(value, dict):
        return value
    raise type_error(name, "dict_type", "Input should be a valid dictionary")


def list_field(body: Mapping[str, Any], name: str) -> list[Any] | None:
    """The field as a list, None when absent or null."""
    value = body.get(name)
    if value is None or isinstance(value, list):
        return value
    raise type_error(name, "list_type", "Input should be a valid list")
