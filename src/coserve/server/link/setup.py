"""What the two processes agree on before they can talk: the line of JSON on the engine's standard input, signals, files."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from typing import BinaryIO

import msgspec

from coserve.server.settings import ServerConfig

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a server in order. A terminal sends them to both processes; the engine's ignores them."""
STACKS_SIGNAL = signal.SIGUSR1
"""Has the engine process write the stacks of all its threads, also while one of them holds the interpreter's lock."""
START_CALL = 0
"""The number of a Replied that says why the engine can't start; no call has it."""
STOP_S = 30.0
"""Seconds that an engine gets at the end to write its checkpoints."""
ACTIVITY_FILE, STACKS_FILE = "activity", "stacks"
"""Files in EngineSetup's directory. The first says what the engine's threads are doing (activity.py). The second gets their
stacks when these are asked for, and when the process crashes."""


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process reads first.

    address: where the API process's socket listens.
    watch: a directory with ACTIVITY_FILE and STACKS_FILE, which the API process deletes once the engine has started; '': none.
    """

    address: str
    config: ServerConfig
    watch: str = ""


def write_setup(setup: EngineSetup) -> bytes:
    """The setup as one line of JSON, with its line break."""
    return msgspec.json.encode(setup, enc_hook=str) + b"\n"  # a Path as text


def read_setup(line: bytes) -> EngineSetup:
    """The setup in a line of `write_setup`. Raises msgspec.ValidationError."""
    return msgspec.json.decode(line, type=EngineSetup, dec_hook=lambda kind, text: kind(text))


def end_with(parent: BinaryIO, leftover: str = "") -> None:
    """Ends this process, whatever it is doing, when the other end of `parent` has gone. leftover: a directory that is deleted
    then, since a parent that was killed can't do it."""
    def wait() -> None:
        parent.read()
        if leftover:
            shutil.rmtree(leftover, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, name="coserve-parent", daemon=True).start()
