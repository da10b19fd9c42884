"""From the bytes of a JSON body to its object, or to a 400.

    scan     values are counted in the bytes: 16 MiB can hold millions of them, and each costs time in all that follows
    decode   msgspec; then names given twice, numbers that are too large, and NUL characters are refused

Every step is a single call for the interpreter, which keeps Python's lock while it runs, so no thread helps. The scan bounds
how long that can take.

Owns: which JSON is refused, and how much of it. Does not own: how bytes arrive (reader.py), fields (forms.py).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from coserve.core import InvalidRequest

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
_SMALL_BYTES = 1 << 16
"""Of a body that is read a second time, by Python's json, so that an error can name the field."""
_SCAN_BYTES = 1 << 18
_INT64 = 1 << 63


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
    if len(data) < _SMALL_BYTES:
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
    if len(data) < _SMALL_BYTES:
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
