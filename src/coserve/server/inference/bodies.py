"""From the bytes of a JSON body to a request model, or to a 400 that names the field.

Owns: what JSON is refused (duplicate keys, infinities, lone surrogates, NUL, depth), the words for wrong types. Does not own:
the size of a body (app.py), which fields a route knows (fields.py), their types (protocol.py).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from coserve.core import InvalidRequest
from coserve.server.inference.fields import FieldPolicy

Model = TypeVar("Model", bound=BaseModel)

_LARGE_BYTES = 1 << 16
"""Larger bodies are read in a thread, so that others aren't held up."""
_INT64 = 1 << 63


def body_reader(model: type[Model], policy: FieldPolicy) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that gives the request's body as a `model`. Raises InvalidRequest."""

    async def read(request: Request) -> Model:
        try:
            data = await request.body()
        except ClientDisconnect as error:
            raise InvalidRequest("the body breaks off") from error
        if len(data) < _LARGE_BYTES:
            return read_body(data, model, policy)
        return await asyncio.to_thread(read_body, data, model, policy)

    return read


def openapi_body(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body, as a JSON schema without references."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def read_body(data: bytes, model: type[Model], policy: FieldPolicy) -> Model:
    """A body of bytes as a `model`. Raises InvalidRequest."""
    body = policy.apply(parse_object(data), model.model_fields)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _problem(error, body) from None


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises InvalidRequest."""
    try:
        text = data.decode()
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float, parse_int=_int
        )
        if "\\u" in text:
            _check_texts(value)
    except InvalidRequest:
        raise
    except UnicodeDecodeError:
        raise InvalidRequest("the body isn't UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body isn't JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        twice = name[:80].encode(errors="replace").decode()
        raise InvalidRequest(f"{twice!r} is in one object twice", param=twice)
    return found


def _refuse_constant(name: str) -> None:
    raise InvalidRequest(f"the body isn't JSON: {name} is no JSON number")


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise InvalidRequest(f"the body has a number that is too large: {text[:40]}")
    return number


def _int(text: str) -> int:
    if len(text) > 20 or not -_INT64 <= (number := int(text)) < 2 * _INT64:
        raise InvalidRequest(f"the body has a number that is too large: {text[:40]}")
    return number


def _check_texts(value: Any) -> None:
    """Refuses what escapes can write but no text holds."""
    if isinstance(value, str):
        if "\0" in value:
            raise InvalidRequest("the body has a text with a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidRequest("the body has a text with half a surrogate pair")
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_texts(name)
            _check_texts(item)


def _problem(error: ValidationError, body: Mapping[str, Any]) -> InvalidRequest:
    """The error that got furthest into the body: of a union, it's the alternative that was meant."""
    found = [
        (_place(item["loc"], body, item["type"] == "missing"), item["msg"])
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    place, message = max(found, key=lambda item: len(item[0]))
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return InvalidRequest(f"{param}: {message[:1].lower()}{message[1:]}"[:400], param=param[:200])


def _place(location: Sequence[int | str], value: Any, missing: bool) -> list[int | str]:
    """A pydantic location without the names of union alternatives, which aren't in the body."""
    place: list[int | str] = []
    for number, part in enumerate(location):
        inside = part in value if isinstance(value, dict) else (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
        if inside or (missing and number == len(location) - 1):
            place.append(part)
    return place


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema with its references replaced by what they refer to."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(item, definitions) for name, item in schema.items()}
