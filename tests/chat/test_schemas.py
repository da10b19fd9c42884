"""Objects that list properties have no others, wherever that can't change what else a schema says."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from coserve.chat.schemas import closed

A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
B: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "string"}}}
A_ONLY, B_ONLY = {**A, "additionalProperties": False}, {**B, "additionalProperties": False}


@pytest.mark.parametrize(("schema", "result"), [
    (A, A_ONLY),
    ({"type": "array", "items": A}, {"type": "array", "items": A_ONLY}),
    ({"prefixItems": [A, B], "items": False}, {"prefixItems": [A_ONLY, B_ONLY], "items": False}),
    ({**A, "properties": {"a": B}}, {**A_ONLY, "properties": {"a": B_ONLY}}),
    ({"additionalProperties": A}, {"additionalProperties": A_ONLY}), ({"patternProperties": {"x": A}}, {"patternProperties": {
        "x": A_ONLY}}),
    ({"anyOf": [A, {"type": "null"}, B]}, {"anyOf": [A_ONLY, {"type": "null"}, B_ONLY]}),
    ({"allOf": [A], "description": "x"}, {"allOf": [A_ONLY], "description": "x"}),
    ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"$ref": "#/$defs/A", "$defs": {"A": A_ONLY}}),
    ({**A, "$defs": {"A": B}, "x-guidance": {"lenient": True}}, {**A_ONLY, "$defs": {"A": B_ONLY}, "x-guidance": {
        "lenient": True}}),
    ({**B, "properties": {"b": {"oneOf": [A, B]}}}, {**B_ONLY, "properties": {"b": {"oneOf": [A, B]}}}),
])
def test_closed(schema: Any, result: Any) -> None:
    assert closed(schema) == result


@pytest.mark.parametrize("schema", [
    {}, {"type": "object"}, {"type": "object", "properties": {}}, {"properties": 3}, {"type": "string"},
    {**A, "additionalProperties": True}, {**A, "additionalProperties": {"type": "string"}},
    {**A, "patternProperties": {"x": {}}}, {**A, "unevaluatedProperties": False},
    {**A, "minProperties": 2}, {**A, "propertyNames": {"pattern": "x"}},
    {**A, "required": ["a", "b"]}, {**A, "required": 3},  # it needs what isn't listed
    {"allOf": [A, B]}, {**A, "allOf": [B]}, {**A, "anyOf": [B, {"required": ["b"]}]}, {"required": ["a"], "anyOf": [A, B]},
    {"oneOf": [A, B]}, {"not": A}, {"if": A, "then": B}, {"contains": A}, {**A, "const": {"a": "x", "b": 1}},
    {"enum": [{"x": {"b": 1}}], "properties": {"x": A}},
    {"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}}, {"$ref": "#/$defs/A", **B, "$defs": {"A": A}},
    {"properties": {"x": A, "y": {"oneOf": [{"$ref": "#/properties/x"}, B]}}},
    {"$dynamicRef": "#/$defs/A", "$defs": {"A": A}},
], ids=str)
def test_left_as_it_is(schema: Any) -> None:
    assert closed(schema) == schema


def test_one_that_is_too_deep() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    assert closed(schema) is schema


def test_what_pydantic_writes() -> None:
    class Part(pydantic.BaseModel):
        name: str
        parts: list[Part] | None = None

    class Whole(pydantic.BaseModel):
        first: Part = pydantic.Field(description="the first")
        others: dict[str, Part]

    found: Any = closed(Whole.model_json_schema())
    assert found["additionalProperties"] is found["$defs"]["Part"]["additionalProperties"] is False
    assert found["properties"]["others"]["additionalProperties"] == {"$ref": "#/$defs/Part"}
