"""JSON schemas of answers and of tools' parameters, as people and libraries write them.

JSON Schema lets an object have properties that its schema doesn't list. Hardly anybody means that, and a small model that is
held to such a schema adds properties without end. OpenAI's strict mode wants `additionalProperties` of false written out
everywhere; schemas that are made from a TypedDict or from pydantic's models don't have it.

Owns: which objects have only the properties that are listed. Does not own: what else of a schema is enforced (grammar/).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ONE = ("items", "additionalProperties", "additionalItems")
_MANY = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("items", "prefixItems")
_OF_OBJECTS = {
    "properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties", "propertyNames",
    "dependentRequired", "dependencies",
}
"""Keywords about an object's properties."""
_COMBINED = {"$ref", "allOf", "anyOf"}
"""Keywords by which other schemas describe the same value. One of them alone is no more than these schemas."""
_ENTANGLED = {
    "oneOf", "not", "if", "then", "else", "contains", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "$dynamicRef", "$recursiveRef", "const", "enum",
}
"""Keywords under which a schema that allows less may make another one allow more, or nothing."""


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, with `additionalProperties` of false in each object that lists properties and says nothing of others.

    What the result allows the schema allows too. Left as they are: objects that need a property which isn't listed, and those
    that several schemas describe together (`allOf`, `oneOf`, a `$ref` beside `properties` and so on), with all below them. If
    there is a `$ref` among the latter, the whole schema is left as it is."""
    try:
        return _closed(schema)
    except (_Entangled, RecursionError):
        return schema


class _Entangled(Exception):
    """A schema that several others describe together refers to some place."""


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    combined = schema.keys() & _COMBINED
    several = schema.get("allOf")
    alone = len(combined) + bool(schema.keys() & _OF_OBJECTS) <= 1 and not (isinstance(several, list) and len(several) > 1)
    if schema.keys() & _ENTANGLED or not alone:
        if _refers(schema):
            raise _Entangled
        return schema
    result = dict(schema)
    for key in _ONE:
        if isinstance(schema.get(key), Mapping):
            result[key] = _closed(schema[key])
    for key in _MANY:
        if isinstance(schema.get(key), Mapping):
            result[key] = {name: _closed(value) for name, value in schema[key].items()}
    for key in (*_LISTS, "allOf", "anyOf"):
        if isinstance(schema.get(key), list):
            result[key] = [_closed(value) for value in schema[key]]
    properties, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(properties, Mapping) and properties and isinstance(required, list | tuple)
        and not schema.keys() & (_OF_OBJECTS - {"properties", "required"}) and all(name in properties for name in required)
    ):
        result["additionalProperties"] = False
    return result


def _refers(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        return any(key in ("$ref", "$dynamicRef", "$recursiveRef") for key in schema) or any(map(_refers, schema.values()))
    return isinstance(schema, list) and any(map(_refers, schema))
