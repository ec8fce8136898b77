"""Scalars, taken as pydantic takes them: it is what vLLM's HTTP layer runs on, and the oracle here."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gaie_codec import MalformedRequestError
from gaie_codec.openai import fields

READERS = {
    int: lambda value: fields.as_int(value, "x"),
    float: lambda value: fields.as_float(value, "x"),
    bool: lambda value: fields.bool_field({"x": value}, "x"),
    str: lambda value: fields.str_field({"x": value}, "x"),
    list: lambda value: fields.list_field({"x": value}, "x"),
    dict: lambda value: fields.object_field({"x": value}, "x"),
}
ADAPTERS = {kind: TypeAdapter(kind) for kind in READERS}
TEXTS = [
    "5",
    "5.0",
    " 5 ",
    "5.5",
    "1_0",
    "1__0",
    "abc",
    "",
    "0x10",
    "1e2",
    "yes",
    "TRUE",
    "t ",
    "on",
    "nan",
    "-inf",
    " 0.5",
    "+5",
    "\uff15",
    "1.",
]
VALUES = st.one_of(
    st.booleans(),
    st.integers(),
    st.sampled_from((10**400, -(10**400), 2**63, 2**63 - 1)),
    st.floats(),
    st.sampled_from(TEXTS),
    st.integers().map(str),
    st.floats().map(str),
    st.just([]),
    st.just({}),
)


def by_pydantic(kind: type, value: Any) -> tuple[Any, str]:
    try:
        return ADAPTERS[kind].validate_python(value), ""
    except ValidationError as error:
        fault = error.errors()[0]
        context = f", 'ctx': {fault['ctx']!r}" if "ctx" in fault else ""
        return None, f"1 validation error:\n  {{'type': {fault['type']!r}, 'loc': 'body.x', 'msg': {fault['msg']!r}{context}}}"


@pytest.mark.parametrize("kind", READERS)
@given(value=VALUES)
def test_values_are_taken_as_pydantic_takes_them(kind: type, value: Any) -> None:
    expected, message = by_pydantic(kind, value)
    if message:
        with pytest.raises(MalformedRequestError) as caught:
            READERS[kind](value)
        assert caught.value.message == message
        assert (caught.value.param, caught.value.error_type) == ("body.x", "Bad Request")
    else:
        found = READERS[kind](value)
        assert type(found) is type(expected)
        assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fields.literal_fault("x", "a"), "Input should be 'a'"),
        (fields.literal_fault("x", "a", "b"), "Input should be 'a' or 'b'"),
        (fields.literal_fault("x", "a", "b", "c"), "Input should be 'a', 'b' or 'c'"),
    ],
)
def test_literals(fault: fields.Fault, message: str) -> None:
    assert fault.message == message


def test_the_first_of_several_faults_is_the_parameter() -> None:
    error = fields.type_errors(fields.Fault("a.0", "missing", "Field required"), fields.Fault("b", "missing", "it's", {"ge": 0}))
    assert error.param == "body.a.0"
    assert error.message == (
        "2 validation errors:\n  {'type': 'missing', 'loc': 'body.a.0', 'msg': 'Field required'}\n"
        "  {'type': 'missing', 'loc': 'body.b', 'msg': \"it's\", 'ctx': {'ge': 0}}"
    )


def test_bounds() -> None:
    assert fields.bounded_int({"x": "5"}, "x", low=5, high=5) == 5
    for value, words in ((4, "greater than or equal to 5"), (6, "less than or equal to 5")):
        with pytest.raises(MalformedRequestError, match=words):
            fields.bounded_int({"x": value}, "x", low=5, high=5)


def test_numbers_of_thousands_of_digits_are_shortened() -> None:
    assert len(fields.range_error("x", f"got {10**4000}.").message) < 600
