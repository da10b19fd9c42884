"""The dtype in which the replicas of a fleet compute on processors: one for all, settled where the command runs.

By itself each engine would measure which dtype its processor multiplies faster, and engines that start beside each other could
come to different ends. A stream that goes on at another replica needs the same dtype there, and so does a job that moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from coserve.config.values import read_quantization
from coserve.model.checkpoint import Checkpoint
from coserve.model.locate import locate_model
from coserve.runtime.loaded import DTYPES, resolve_dtype
from coserve.server.settings import ServerConfig


def with_settled_dtype(config: ServerConfig, report: Callable[[str], None]) -> ServerConfig:
    """The settings with the dtype that this machine's processor runs the model in; they stay as they are if they name one.
    report: takes the reason, as a line. Raises NotFound, InvalidRequest and ConfigError for a model that can't be used."""
    if config.dtype != "auto":
        return config
    architecture = Checkpoint(locate_model(config.model, report=report)).architecture
    settled = resolve_dtype("auto", torch.device("cpu"), architecture, report, read_quantization(config.quantization))
    return replace(config, dtype=next(name for name, dtype in DTYPES.items() if dtype == settled))
