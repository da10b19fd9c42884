"""The dtype in which the replicas of a fleet compute on processors: one for all, settled where the command runs.

By itself each engine would measure which dtype its processor multiplies faster, and engines that start beside each other could
come to different ends. A stream that goes on at another replica needs the same dtype there, and so does a job that moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coserve.runtime.loaded import DTYPES, find_model
from coserve.server.settings import ServerConfig


def with_settled_dtype(config: ServerConfig, report: Callable[[str], None]) -> ServerConfig:
    """The settings with the dtype that this machine's processor runs the model in; they stay as they are if they name one.
    report: takes the reason, as a line. Raises NotFound, InvalidRequest and ConfigError for a model that can't be used."""
    if config.dtype != "auto":
        return config
    found = find_model(config.model, device="cpu", report=report, quantization=config.quantization)
    return replace(config, dtype=next(name for name, dtype in DTYPES.items() if dtype == found.dtype))
