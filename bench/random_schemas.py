"""Random JSON schemas, by a seed: every keyword that structured output enforces, and some that it refuses.

Owns: which schemas there are. Does not own: what becomes of them (structured_outputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Schema = dict[str, Any] | bool
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = (
    r"^[a-z]{2,5}$", r"^\d{3}-\d{4}$", r"^(yes|no|maybe)$", r"^[A-Z][a-z]* [A-Z][a-z]*$", r"^#[0-9a-f]{6}$", r"^\w+$", r"[0-9]",
    r"^$|^x+$", r"^[^\s@]{1,9}@[^\s@]{1,9}$",
)
NAMES = ("name", "age", "tags", "größe", "a b", "", "$id", "naïve \"quoted\"", "items", "x_1", "日本", "\\", "valid")
WORDS = ("red", "green", "blau", "", "a\nb", "\"", "🙂", "long text with spaces", "\\u0041", "null")
REFUSED: Mapping[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "then": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "else": {"if": {"type": "string"}, "else": {"type": "null"}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "minContains": {"type": "array", "contains": {"type": "integer"}, "minContains": 2},
    "maxContains": {"type": "array", "contains": {"type": "integer"}, "maxContains": 2},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", "type": "string"}}},
}
"""Keywords of JSON Schema 2020-12 that can't be enforced, each in a schema."""


class SchemaMaker:
    """Makes schemas, one after the other."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self._definitions: dict[str, Schema] = {}

    def make(self) -> dict[str, Any]:
        """A schema as people write them: mostly an object."""
        rng = self.rng
        self._definitions = {}
        depth = rng.choice((1, 2, 2, 3))
        for name in rng.sample(("node", "unit", "point/x"), rng.choice((0, 0, 1, 2))):
            self._definitions[name] = self._object(1)
        root = self._object(depth) if rng.random() < 0.7 else self._any(depth)
        schema: dict[str, Any] = {} if root is True else {**root} if isinstance(root, dict) else {"type": "string"}
        if self._definitions:
            schema["$defs"] = self._definitions
        if rng.random() < 0.2:
            schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        if rng.random() < 0.06:
            schema |= rng.choice([refused for refused in REFUSED.values() if isinstance(refused, dict)])
        return schema

    def _any(self, depth: int) -> Schema:
        rng = self.rng
        simple: tuple[Callable[[int], Schema], ...] = (
            self._string, self._string, self._number, self._number, self._enumeration, self._plain,
        )
        nested: tuple[Callable[[int], Schema], ...] = (self._object, self._object, self._array, self._choice, self._merged)
        schema = rng.choice(simple if depth <= 0 or rng.random() < 0.45 else nested)(depth)
        if isinstance(schema, dict):
            if rng.random() < 0.15:
                schema["description"] = rng.choice(WORDS)
            if rng.random() < 0.1:
                schema["title"] = "A title"
            if rng.random() < 0.05:
                schema["default"] = None
        return schema

    def _plain(self, depth: int) -> Schema:
        rng = self.rng
        if self._definitions and rng.random() < 0.5:
            return {"$ref": "#/$defs/" + rng.choice(sorted(self._definitions)).replace("/", "~1")}
        return rng.choice((
            {"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]},
            {"type": ["integer", "string"], "maxLength": 5},
            {"const": rng.choice((*WORDS, 3, None, True, [1, "a"], {"a": 0}))},
        ))

    def _string(self, depth: int) -> Schema:
        rng = self.rng
        schema: dict[str, Any] = {"type": "string"}
        kind = rng.randrange(5)
        if kind == 0:
            schema["pattern"] = rng.choice(PATTERNS)
        elif kind == 1:
            schema["format"] = rng.choice((*FORMATS, *FORMATS, "colour"))
        else:
            least = rng.choice((0, 0, 1, 3))
            schema |= {"minLength": least} if least else {}
            schema["maxLength"] = least + rng.randrange(12)
        if rng.random() < 0.1:
            schema |= {"pattern": rng.choice(PATTERNS), "maxLength": rng.randrange(3, 12)}
        return schema

    def _number(self, depth: int) -> Schema:
        rng = self.rng
        schema: dict[str, Any] = {"type": rng.choice(("integer", "integer", "number"))}
        low = rng.choice((-1000, -7, 0, 1, 12)) + (0 if schema["type"] == "integer" else rng.choice((0, 0.5)))
        if rng.random() < 0.6:
            schema[rng.choice(("minimum", "exclusiveMinimum"))] = low
        if rng.random() < 0.6:
            schema[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.choice((2, 9, 150, 10_000))
        if rng.random() < 0.15:
            schema["multipleOf"] = rng.choice((1, 2, 5, 10)) if schema["type"] == "integer" else rng.choice((0.5, 0.25, 2))
        return schema

    def _enumeration(self, depth: int) -> Schema:
        rng = self.rng
        return {"enum": rng.sample((*WORDS, 0, -1.5, True, None, [], {"k": []}), rng.randrange(1, 6))}

    def _array(self, depth: int) -> Schema:
        rng = self.rng
        schema: dict[str, Any] = {"type": "array", "items": self._any(depth - 1)}
        if rng.random() < 0.2:
            schema["prefixItems"] = [self._any(depth - 1) for _ in range(rng.randrange(1, 3))]
            schema["items"] = rng.choice((False, schema["items"]))
        least = rng.choice((0, 0, 1, 2))
        schema |= {"minItems": least} if least else {}
        schema["maxItems"] = max(least, rng.randrange(1, 4))
        return schema

    def _object(self, depth: int) -> Schema:
        rng = self.rng
        names = rng.sample(NAMES, rng.randrange(1, 5))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._any(depth - 1) for name in names}}
        required = [name for name in names if rng.random() < 0.7]
        if required or rng.random() < 0.5:
            schema["required"] = required
        kind = rng.randrange(8)
        if kind < 5:
            schema["additionalProperties"] = False
        elif kind == 5:
            schema["additionalProperties"] = self._any(0)
        elif kind == 6:
            schema |= {"patternProperties": {"^p[0-9]$": self._any(0)}, "additionalProperties": False}
        if rng.random() < 0.05:
            schema["maxProperties"] = len(names) + 1
        return schema

    def _choice(self, depth: int) -> Schema:
        rng = self.rng
        options = [self._any(depth - 1) for _ in range(rng.randrange(2, 4))]
        if rng.random() < 0.3:  # told apart by a constant, as people write unions
            options = [
                {"type": "object", "properties": {"kind": {"const": f"k{number}"}, "value": option},
                 "required": ["kind", "value"], "additionalProperties": False} for number, option in enumerate(options)
            ]
            return {"oneOf": options}
        return {rng.choice(("anyOf", "anyOf", "anyOf", "oneOf")): options}

    def _merged(self, depth: int) -> Schema:
        first, second = self._object(depth - 1), self._object(depth - 1)
        assert isinstance(first, dict) and isinstance(second, dict)
        first.pop("additionalProperties", None)
        second.pop("additionalProperties", None)
        return {"allOf": [first, second]}


def large_schema(number: int, properties: int = 300) -> dict[str, Any]:
    """An object of many properties of several kinds, all required; different for each number."""
    kinds: tuple[Callable[[int], dict[str, Any]], ...] = (
        lambda i: {"type": "string", "maxLength": 10 + i, "description": f"The field {i} of the record {number}, in words."},
        lambda i: {"type": "integer", "minimum": -i, "maximum": 10 * i + number + 1},
        lambda i: {"enum": [f"value {i} {j} {number}" for j in range(20)]},
        lambda i: {"type": "array", "maxItems": 5, "items": {
            "type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "number"}}, "required": ["k", "v"],
        }},
        lambda i: {"type": "string", "pattern": rf"^[A-Z]{{{1 + i % 7}}}-\d+$"},
    )
    made = {f"field_{number}_{i}": kinds[i % len(kinds)](i) for i in range(properties)}
    return {"type": "object", "properties": made, "required": list(made), "additionalProperties": False}
