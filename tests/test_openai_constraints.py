"""Constraints: both fields, both forms of structural tags, and unions of faults as pydantic has them of vLLM's models."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gaie_codec import Constraint, MalformedRequestError
from gaie_codec.openai.constraints import MAX_SCHEMA_DEPTH, decode_constraint


class Model(BaseModel):
    model_config = ConfigDict(extra="allow", from_attributes=True)  # as FastAPI validates


class JsonSchema(Model):
    name: str
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class Plain(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Tag(Model):
    type: Literal["structural_tag"]
    format: Any


class Structure(Model):
    begin: str
    structural_tag_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    end: str


class OlderTag(Model):
    type: Literal["structural_tag"]
    structures: list[Structure]
    triggers: list[str]


FORMATS = TypeAdapter(Plain | Tag | OlderTag)
MEMBERS = {"Plain", "Tag", "OlderTag"}
STRUCTURE = {"end": "</f>", "begin": "<f>", "schema": {"type": "object"}}


def refused(**fields: Any) -> MalformedRequestError:
    with pytest.raises(MalformedRequestError) as caught:
        decode_constraint(fields)
    return caught.value


@pytest.mark.parametrize(
    "value",
    [
        *("json", 5, [], {}, {"type": "yaml"}, {"type": 5}, {"type": "json_schema", "json_schema": {}}),
        *({"type": "json_schema", "json_schema": 5}, {"type": "json_schema", "json_schema": {"name": 5, "schema": []}}),
        *(
            {"type": "structural_tag"},
            {"type": "structural_tag", "structures": 5},
            {"type": "structural_tag", "structures": [5], "triggers": 5},
        ),
        {"type": "structural_tag", "structures": [{"begin": 5, "schema": []}], "triggers": ["a", 5]},
        {"type": "text", "json_schema": {"schema": {}}},
    ],
)
def test_faults_are_those_of_each_form(value: Any) -> None:
    with pytest.raises(ValidationError) as expected:
        FORMATS.validate_python(value)
    faults = expected.value.errors()
    lines = []
    for fault in faults:
        loc = ".".join(str(part) for part in fault["loc"] if part not in MEMBERS)
        context = f", 'ctx': {fault['ctx']!r}" if "ctx" in fault else ""
        lines.append(
            f"  {{'type': {fault['type']!r}, 'loc': 'body.response_format{'.' * bool(loc)}{loc}', 'msg': {fault['msg']!r}{context}}}"
        )
    assert refused(response_format=value).message == "\n".join([f"{len(faults)} validation errors:", *lines])


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
        ({"structured_outputs": {"json": '{"a": 1}'}}, Constraint(kind="json_schema", value='{"a": 1}')),
        ({"structured_outputs": {"json": "{"}}, Constraint(kind="json_schema", value="{")),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"json_object": True}},
            Constraint(kind="json_object"),
        ),
        (
            {"response_format": {"format": {"type": "any_text"}, "more": 1, "type": "structural_tag"}},
            Constraint(kind="structural_tag", value='{"type": "structural_tag", "format": {"type": "any_text"}, "more": 1}'),
        ),
    ],
)
def test_what_is_asked_for(fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert decode_constraint(fields) == constraint


def test_the_older_form_of_structural_tags() -> None:
    found = decode_constraint({"response_format": {"triggers": ["<f"], "structures": [STRUCTURE], "type": "structural_tag"}})
    assert found is not None
    assert isinstance(found.value, str)
    assert found.value == json.dumps(
        {
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
            "triggers": ["<f"],
        }
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema' field must be provided"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, None, "none are specified"),
        ({"structured_outputs": {}}, None, "none are specified"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, None, "multiple are specified"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None, "multiple are specified"),
        ({"structured_outputs": {"grammar": " \n"}}, None, "cannot be an empty string"),
        ({"structured_outputs": {"choice": []}}, None, "cannot be an empty list"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "body.structured_outputs.choice.1", "valid string"),
        ({"structured_outputs": {"json": 5}}, "body.structured_outputs.json", "2 validation errors"),
        ({"structured_outputs": {"json_object": False}}, None, "must be True if set"),
        ({"structured_outputs": "a"}, "body.structured_outputs", "instance of StructuredOutputsParams"),
    ],
)
def test_what_makes_no_sense(fields: dict[str, Any], param: str | None, words: str) -> None:
    error = refused(**fields)
    assert error.param == param
    assert words in error.message


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"a": schema}
    return schema


@pytest.mark.parametrize("as_text", [False, True])
def test_schemas_have_a_depth(as_text: bool) -> None:
    for levels, is_refused in ((MAX_SCHEMA_DEPTH, False), (MAX_SCHEMA_DEPTH + 1, True)):
        schema: Any = json.dumps(nested(levels)) if as_text else nested(levels)
        if is_refused:
            assert refused(structured_outputs={"json": schema}).param == "structured_outputs"
        else:
            assert decode_constraint({"structured_outputs": {"json": schema}}) is not None
    assert refused(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": nested(65)}}).param == "response_format"
