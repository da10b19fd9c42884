"""From the bytes of a JSON body to a request model, or to a 400 that names the field.

    content type   application/json, before anything is read
    who asks       before anything is read
    scan           values counted in the bytes: 16 MiB can have millions, and each costs time in all that follows
    decode         msgspec; then names given twice, numbers that are too large, NUL
    validate       pydantic, by the route's model

Large bodies are read in the tenants' turn (work.py). The scan bounds how long one step can keep Python's lock: every step
below is a single call for the interpreter, and while it runs no thread helps.

Owns: what JSON is refused, how much of it, the words for wrong types. Does not own: the bytes of a body (middleware.py),
which fields a route knows (fields.py), their types (protocol.py), what values together cost (limits.py).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from coserve.core import InvalidRequest
from coserve.server.errors import UnsupportedType
from coserve.server.inference.fields import FieldPolicy
from coserve.server.services import Served, Tenant

Model = TypeVar("Model", bound=BaseModel)

MAX_VALUES = 1 << 18
"""Of a body: texts, numbers, lists and objects, inner ones included. More than a prompt of token ids needs."""
MAX_INNER = 1 << 15
"""Lists, objects and names of a body: they cost far more than numbers."""
MAX_SMALL_VALUES = 1 << 13
"""Of a body that holds no prompt."""
MAX_NAMES = 1 << 12
"""Of one object."""
MAX_ESCAPES = 4 << 20
"""Backslashes of a body: a text is decoded in one step, and slowly where it is made of escapes."""
_LARGE_BYTES = 1 << 14
_SCAN_BYTES = 1 << 18
_INT64 = 1 << 63


def body_reader(
    model: type[Model], policy: FieldPolicy, check: Callable[[Mapping[str, Any]], None] = lambda body: None
) -> Callable[[Request, Served, Tenant], Awaitable[Model]]:
    """A dependency that gives the request's body as a `model`. check: of its values before they are validated, see limits.py.
    Raises InvalidRequest."""
    return json_reader(partial(validate, model=model, policy=policy, check=check), MAX_VALUES)


def json_reader(
    convert: Callable[[dict[str, Any]], Model], max_values: int = MAX_SMALL_VALUES
) -> Callable[[Request, Served, Tenant], Awaitable[Model]]:
    """A dependency that gives what `convert` makes of the request's JSON object. Raises InvalidRequest."""

    async def read(request: Request, services: Served, tenant: Tenant) -> Model:
        check_type(request)
        parts, held, allowance = list[bytes](), 0, services.shares.body_bytes
        try:
            async for part in request.stream():
                if part:
                    allowance.take(tenant, len(part))
                    held += len(part)
                    parts.append(part)
            data = b"".join(parts)
            parts.clear()
            if len(data) < _LARGE_BYTES:
                return convert(parse_object(data, max_values))
            return await services.work.run(tenant, lambda: convert(parse_object(data, max_values)))
        except ClientDisconnect as error:
            raise InvalidRequest("the body breaks off") from error
        finally:
            if held:
                allowance.give_back(tenant, held)

    return read


def check_type(request: Request) -> None:
    """Raises UnsupportedType for a body that doesn't call itself JSON: what a website's form or simple script would send."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        said = f"says {given[:60]!r}" if given.isprintable() and given else "says none"
        raise UnsupportedType(
            f"content-type: send application/json (this request {said}); with curl: -H 'content-type: application/json'"
        )


def openapi_body(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body, as a JSON schema without references."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def validate(
    body: Mapping[str, Any], model: type[Model], policy: FieldPolicy,
    check: Callable[[Mapping[str, Any]], None] = lambda body: None,
) -> Model:
    """An object as a `model`. Raises InvalidRequest."""
    fields = policy.apply(body, model.model_fields)
    check(fields)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _problem(error, fields) from None


def parse_object(data: bytes, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises InvalidRequest."""
    if _count_outside_texts(data, b",[{", enough=max_values) > max_values:
        raise InvalidRequest(f"the body has more than {max_values} values; send less at once")
    most = min(max_values, MAX_INNER)
    if _count_outside_texts(data, b"[{:", enough=most) > most:
        raise InvalidRequest(f"the body has more than {most} lists, objects and names; send less at once")
    if _count(data, b"\\") > MAX_ESCAPES:
        raise InvalidRequest(f"the body has more than {MAX_ESCAPES} escapes (backslashes); write characters as UTF-8")
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError:
        raise InvalidRequest("the body isn't UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:  # msgspec's own are of this class too
        raise _no_json(data, error) from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", param="body")
    num_names, nul = len(value), b"\\u0000" in data
    for name, item in value.items():
        num_names += _check_values(name, item, nul)
    if _count_outside_texts(data, b":", enough=num_names) != num_names:
        raise _name_twice(data)
    return value


def _count(data: bytes, marks: bytes) -> int:
    """How often these characters are anywhere."""
    return sum(int(np.count_nonzero(np.isin(part, list(marks)))) for part in _parts(data))


def _count_outside_texts(data: bytes, marks: bytes, enough: int) -> int:
    """How often these characters are in the JSON outside of its texts. Inside is looked for only where there are more than
    `enough` of them anywhere."""
    if (anywhere := _count(data, marks)) <= enough:
        return anywhere
    found, inside, slashes = 0, False, 0
    for part in _parts(data):
        places = np.arange(len(part))
        other = np.maximum.accumulate(np.where(part != ord("\\"), places, -1 - slashes))  # the last one that is no backslash
        before = np.concatenate(([slashes], (places - other)[:-1]))  # backslashes right before each
        quotes = (part == ord('"')) & (before % 2 == 0)
        in_text = (np.cumsum(quotes) + inside) % 2 == 1
        found += int(np.count_nonzero(np.isin(part, list(marks)) & ~in_text))
        inside, slashes = bool(in_text[-1]), int(places[-1] - other[-1])
    return found


def _parts(data: bytes) -> Iterator[np.ndarray]:
    """In steps that give Python's lock back."""
    for start in range(0, len(data), _SCAN_BYTES):
        yield np.frombuffer(data, np.uint8, min(_SCAN_BYTES, len(data) - start), start)


def _no_json(data: bytes, error: ValueError) -> InvalidRequest:
    """What msgspec says. For a small body that Python's json can read, the message names the field instead."""
    if len(data) < 4 * _LARGE_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(data)
            for name, item in value.items() if isinstance(value, dict) else ():
                if _is_foreign(item):
                    return InvalidRequest(f"{name}: isn't JSON; no NaN, no Infinity, whole characters", param=name)
    return InvalidRequest(f"the body isn't JSON: {error}"[:300])


def _is_foreign(value: Any) -> bool:
    """Whether it holds NaN, infinity or half of a surrogate pair."""
    if isinstance(value, dict | list):
        return any(map(_is_foreign, [*value, *value.values()] if isinstance(value, dict) else value))
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    return isinstance(value, float) and not math.isfinite(value)


def _check_values(field: str, value: Any, nul: bool) -> int:
    """Refuses values that can't be stored or sent on. Returns how many names the field's objects have together. nul: whether
    the body has escaped NUL characters, so that texts are to be searched for them."""
    param = field[:80] if field.isprintable() else "body"
    num_names, left = 0, [value, field]
    while left:
        item = left.pop()
        kind = type(item)
        if kind is dict:
            if len(item) > MAX_NAMES:
                raise InvalidRequest(f"{param}: an object of {len(item)} names; at most {MAX_NAMES} are taken", param=param)
            num_names += len(item)
            left.extend(item.values())
            if nul:
                left.extend(item)
        elif kind is list:
            left.extend(item)
        elif kind is int:
            if not -_INT64 <= item < 2 * _INT64:
                raise InvalidRequest(f"{param}: a number is too large", param=param)
        elif nul and kind is str and "\0" in item:
            raise InvalidRequest(f"{param}: a text has a NUL character", param=param)
    return num_names


def _name_twice(data: bytes) -> InvalidRequest:
    """The error of an object that has a name twice, with the name if the body is small."""
    if len(data) < 4 * _LARGE_BYTES:
        try:
            json.loads(data, object_pairs_hook=_object)
        except InvalidRequest as error:
            return error
    return InvalidRequest("the body has an object with a name twice")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        twice = name[:80].encode(errors="replace").decode()
        raise InvalidRequest(f"{twice!r} is in one object twice", param=twice)
    return found


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
