"""Large responses: JSON made in short steps, and sent in pieces that wait for the client.

Owns: how a value becomes bytes without one step that keeps Python's lock for long. Does not own: what is in a response
(responses.py), on which thread it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_STEP_VALUES = 1 << 12
"""Values that are encoded at once."""
_SENT_BYTES = 1 << 18
"""Bytes that are handed on at once."""


def json_pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value."""
    if _weight(value) <= _STEP_VALUES:
        yield msgspec.json.encode(value)
    elif isinstance(value, dict):
        before = b"{"
        for name, item in value.items():
            yield before + msgspec.json.encode(name) + b":"
            yield from json_pieces(item)
            before = b","
        yield b"}"
    else:
        yield from _list_pieces(value)


def _list_pieces(items: list[Any]) -> Iterator[bytes]:
    before, light, weight = b"[", list[Any](), 0
    for item in items:
        found = _weight(item)
        if light and weight + found > _STEP_VALUES:
            yield before + msgspec.json.encode(light)[1:-1]
            before, light, weight = b",", [], 0
        if found > _STEP_VALUES:
            yield before
            yield from json_pieces(item)
            before = b","
        else:
            light.append(item)
            weight += found
    if light:
        yield before + msgspec.json.encode(light)[1:-1]
    yield b"]"


def _weight(value: Any) -> int:
    """How many values it holds. Counting ends once it is certain that it is large."""
    count, left = 0, [value]
    while left and count <= _STEP_VALUES:
        item = left.pop()
        count += 1
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
    return count


def encode_large(value: Any) -> list[bytes]:
    """The JSON of a value, in pieces of a good size to send."""
    pieces, held, size = list[bytes](), list[bytes](), 0
    for piece in json_pieces(value):
        held.append(piece)
        size += len(piece)
        if size >= _SENT_BYTES:
            pieces.append(b"".join(held))
            held, size = [], 0
    pieces.append(b"".join(held))
    return pieces


class PiecesResponse(Response):
    """A JSON response whose pieces wait for a slow client, and for nobody else."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__(None)
        self._pieces = pieces
        self.headers["content-length"] = str(sum(map(len, pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            for start in range(0, len(piece), _SENT_BYTES):
                await send({"type": "http.response.body", "body": piece[start : start + _SENT_BYTES], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
