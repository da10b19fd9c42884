"""The pool of an engine that shares a machine's memory with other engines.

On a CPU an engine's pool is a share of what is free at its start, and pages that nothing was written to yet count as free.
Engines that start together would all promise the same bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from coserve.model.memory import POOL_SHARE, available_to_each
from coserve.server.settings import ServerConfig


def share_memory(config: ServerConfig, sharers: int) -> ServerConfig:
    """The settings of one of `sharers` engines on this machine: with a pool of its part, unless they say its size. Engines on
    GPUs share none."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if sharers < 2 or on_gpu or config.kv_cache_memory_bytes is not None:
        return config
    available = available_to_each(torch.device("cpu"), config.tensor_parallel_size)
    return config if available is None else replace(config, kv_cache_memory_bytes=int(available * POOL_SHARE / sharers))
