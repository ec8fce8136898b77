"""JSON bodies and their scalar fields, taken as leniently as vLLM's HTTP layer takes them.

"5" is 5, 1.0 is 1, true is 1, "yes" is true; 1.5 is no integer. What does not fit is a MalformedRequestError whose `param` is the
path of the field, in the words of vLLM's validation but without the offending value: error texts carry no payload.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from .._errors import MalformedRequestError

_TRUE: Final = frozenset(("1", "true", "t", "yes", "y", "on"))
_MAX_MESSAGE: Final = 500  # characters; a number may have 4300 digits
_FALSE: Final = frozenset(("0", "false", "f", "no", "n", "off"))


def decode_json_object(body: bytes) -> dict[str, Any]:
    """The body as an object. Besides UTF-8, a BOM and UTF-16/32 are taken, as Python's own json takes them."""
    try:
        value = _decode_json(body)
    except RecursionError:
        raise _json_error("nested too deeply") from None
    except msgspec.DecodeError as error:
        raise _json_error(str(error)) from None  # a byte offset, and no more of the body than one character
    except ValueError:
        raise _json_error("not valid text, or a number of too many digits") from None
    if not isinstance(value, dict):
        raise type_error("", "model_attributes_type", "Input should be a valid dictionary or object to extract fields from")
    return value


def _decode_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number beyond a double. Python's json makes it infinite, and then the field's own range check names the field.
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # it also takes lone surrogates, which are no text: ValueError
        return value
    except msgspec.DecodeError:
        encoding = json.detect_encoding(body)
        if encoding == "utf-8":
            raise
        return msgspec.json.decode(body.decode(encoding))


def json_text(value: Any, loc: str) -> str:
    """The value as JSON, spelled as vLLM's HTTP layer spells it: engines cache compiled grammars by this text."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise type_error(loc, "json_invalid", "Input should be JSON of sane depth without infinite numbers") from None


def _json_error(reason: str) -> MalformedRequestError:
    error = MalformedRequestError(f"There was an error parsing the body: {reason}", param="body")
    error.error_type = "Bad Request"
    return error


def type_error(loc: str, kind: str, message: str) -> MalformedRequestError:
    """A value of the wrong type or form at `loc`, a dotted path below the body."""
    where = f"body.{loc}" if loc else "body"
    error = MalformedRequestError(f"1 validation error:\n  {{'type': '{kind}', 'loc': '{where}', 'msg': '{message}'}}", param=where)
    error.error_type = "Bad Request"
    return error


def range_error(name: str, message: str, value: object = None) -> MalformedRequestError:
    """A value of the right type which its field does not allow. `value`, when given, is repeated: numbers only."""
    suffix = f" (parameter={name}, value={value})" if value is not None else f" (parameter={name})"
    text = message + suffix
    return MalformedRequestError(text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}...", param=name)


def int_field(body: Mapping[str, Any], name: str, *, loc: str | None = None) -> int | None:
    """The field as an integer, None when absent or null."""
    return as_int(body.get(name), name if loc is None else loc)


def as_int(value: Any, loc: str) -> int | None:
    """`value` as an integer; None stays None."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value) and value.is_integer():
            return int(value)
        raise type_error(loc, "int_from_float", "Input should be a valid integer, got a number with a fractional part")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise type_error(loc, "int_parsing", "Input should be a valid integer, unable to parse string as an integer") from None
    raise type_error(loc, "int_type", "Input should be a valid integer")


def float_field(body: Mapping[str, Any], name: str) -> float | None:
    """The field as a number, None when absent or null."""
    return as_float(body.get(name), name)


def as_float(value: Any, loc: str) -> float | None:
    """`value` as a number; None stays None. An integer too large for a float is out of every range, hence infinite."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str):
        try:
            return float(value)
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
    raise type_error(name if loc is None else loc, "bool_parsing", "Input should be a valid boolean, unable to interpret input")


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
