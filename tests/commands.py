"""The command `coserve`, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coserve.cli.settings import read_settings
from coserve.config.settings import FinetuneConfig


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def config_of(path: Path | None, given: dict[str, Any], kind: str | None = None) -> FinetuneConfig:
    """The settings of a job that a settings file and flags ask for."""
    return read_settings(path, given, kind).config
