"""What the engine's process is told on its standard input: one line of JSON."""

from __future__ import annotations

import signal
from typing import Any

import msgspec

from coserve.server.settings import ServerConfig

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a server in order. A terminal sends them to both processes; the engine's ignores them."""
START_CALL = 0
"""The call that a Replied answers if the engine can't start."""
STOP_S = 30.0
"""Seconds that an engine gets at the end to write its checkpoints."""
ACTIVITY_FILE, STACKS_FILE = "activity", "stacks"
"""What the engine's threads do (activity.py), and where their stacks go when they are asked for or the process crashes."""


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """address: of the API's socket. watch: a directory with ACTIVITY_FILE and STACKS_FILE, which is deleted once the engine has
    started; '': none."""

    address: str
    config: ServerConfig
    watch: str = ""


def write_setup(setup: EngineSetup) -> bytes:
    """One line."""
    return msgspec.json.encode(setup, enc_hook=str) + b"\n"  # a Path as text


def read_setup(line: bytes) -> EngineSetup:
    """The reverse. Raises msgspec.ValidationError."""
    return msgspec.json.decode(line, type=EngineSetup, dec_hook=_read_other)


def _read_other(kind: type, value: Any) -> Any:
    return kind(value)
