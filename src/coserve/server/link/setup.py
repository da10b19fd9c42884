"""What the engine's process is told on its standard input: one line of JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from coserve.server.settings import ServerConfig

START_CALL = 0
"""The call that a Replied answers if the engine can't start."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """address: of the API's socket."""

    address: str
    config: ServerConfig


def write_setup(setup: Setup) -> bytes:
    """One line."""
    return msgspec.json.encode(setup, enc_hook=str) + b"\n"  # a Path as text


def read_setup(line: bytes) -> Setup:
    """The reverse. Raises msgspec.ValidationError."""
    return msgspec.json.decode(line, type=Setup, dec_hook=_read_other)


def _read_other(kind: type, value: Any) -> Any:
    return kind(value)
