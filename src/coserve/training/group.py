"""The group of ranks that share a model for a job: whether this machine can have it, and where the adapter lies on it."""

from __future__ import annotations

import os

import torch

from coserve.compiler.parallelize import TensorParallel
from coserve.config.settings import FinetuneConfig
from coserve.core import ConfigError
from coserve.devices.prices import machine_device, parallel_prices
from coserve.model.architecture import Architecture
from coserve.model.decoder import rank_architecture
from coserve.planning.budget import shape_adapter
from coserve.runtime.plans import adapter_shardings


def make_group(
    arch: Architecture, settings: FinetuneConfig, size: int, device: torch.device, itemsize: int, step_tokens: int
) -> TensorParallel:
    """The group of `size` ranks that train an adapter of these settings, with its shardings. step_tokens: of an optimizer step.
    Raises ConfigError for a number of ranks that can't share the model, and for more ranks than GPUs."""
    rank_architecture(arch, size)
    require_devices(size, device)
    prices = parallel_prices(
        machine_device(device), itemsize=itemsize, window_tokens=settings.window_tokens,
        step_tokens=step_tokens,
    )
    group = TensorParallel(size=size, kv_heads=arch.num_kv_heads, prices=prices)
    return group.fix(adapter_shardings(arch, shape_adapter(arch, settings.adapter), group))


def require_devices(size: int, device: torch.device) -> None:
    """Raises ConfigError for more ranks than GPUs."""
    count = torch.cuda.device_count() if device.type == "cuda" else size
    if size > count:
        raise ConfigError(
            f"tensor_parallel_size: {size} ranks need {size} CUDA devices, and there are {count}", param="tensor_parallel_size"
        )


def sharing_note(size: int, device: torch.device) -> str:
    """What is said of a group before it starts."""
    if device.type == "cuda":
        return f"{size} processes share the model, each on a GPU of its own"
    cores = len(os.sched_getaffinity(0))
    slow = ", which is slower than one process" if size > cores else ""
    return f"{size} processes share the model and {cores} cores{slow}"
