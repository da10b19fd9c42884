"""From a body's JSON object to a route's model, or to a 400 that names the field.

    prepare    what the route does with fields before their types are checked: names it ignores or refuses, amounts
    validate   pydantic, by the route's model
    explain    of pydantic's errors the likeliest, with its path

Owns: the order of these steps, paths of fields in errors. Does not own: JSON (parse.py), which fields a route has (its model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from coserve.core import InvalidRequest
from coserve.server.bodies.parse import MAX_SMALL_VALUES, parse_object

_MAX_MESSAGE, _MAX_PARAM = 1000, 300
"""Characters of an error's message and of the field's path in it."""


class Body(BaseModel):
    """Root of all models of bodies: fields that the model doesn't have are refused, and no type is converted to another."""

    model_config = ConfigDict(extra="forbid", strict=True)


Model = TypeVar("Model", bound=BaseModel)
Wording = Callable[[Sequence[int | str], Any], str]
"""(path, pydantic's error) -> what is said about the field."""


def _in_lower_case(path: Sequence[int | str], error: Any) -> str:
    message: str = error["msg"]
    return message[:1].lower() + message[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form(Generic[Model]):
    """How a route's body is read."""

    model: type[Model]
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Takes the body's fields and gives those to validate. Raises InvalidRequest."""
    wording: Wording = _in_lower_case
    """What is said about a wrong field."""
    max_values: int = MAX_SMALL_VALUES
    """JSON values that the body may have."""

    @property
    def openapi(self) -> dict[str, Any]:
        """For a route's `openapi_extra`: the body as a JSON schema without references."""
        schema = self.model.model_json_schema()
        definitions = schema.pop("$defs", {})
        content = {"application/json": {"schema": _inlined(schema, definitions)}}
        return {"requestBody": {"required": True, "content": content}}

    def parse(self, data: bytes) -> Model:
        """A body's bytes as the model. Raises InvalidRequest."""
        return self.read(parse_object(data, self.max_values))

    def read(self, body: Mapping[str, Any]) -> Model:
        """A body's fields as the model. Raises InvalidRequest."""
        fields = self.prepare(body)
        try:
            return self.model.model_validate(fields)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
            raise explain(errors, fields, self.wording) from None


def explain(errors: Sequence[Any], body: Mapping[str, Any], wording: Wording) -> InvalidRequest:
    """The error that got furthest into the body, the first of several: where a value may have one of several types, that is
    the type which was meant. errors: pydantic's."""
    found = [(_path(error["loc"], body, error["type"] == "missing"), error) for error in errors]
    path, error = max(found, key=lambda item: len(item[0]))
    name = path_name(path)
    param = name[:_MAX_PARAM] if name.isprintable() and name else "body"
    return InvalidRequest(f"{param}: {wording(path, error)}"[:_MAX_MESSAGE], param=param)


def path_name(path: Sequence[int | str]) -> str:
    """('messages', 0, 'role') -> 'messages[0].role'."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _path(location: Sequence[int | str], value: Any, missing: bool) -> list[int | str]:
    """Where in the body a pydantic error is. Its location also has the names of a union's types, which aren't in the body."""
    path: list[int | str] = []
    for number, part in enumerate(location):
        inside = part in value if isinstance(value, Mapping) else (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
        if inside or (missing and number == len(location) - 1):
            path.append(part)
    return path


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema with its references replaced by what they refer to."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(item, definitions) for name, item in schema.items()}
