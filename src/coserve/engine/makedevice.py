"""An engine's device, made to fit the memory that there is: how many blocks the pool has, whether weights may have packed
copies, and where adapters lie if several ranks share the model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from coserve.config.settings import EngineConfig
from coserve.config.values import require
from coserve.core import CapacityError, ConfigError
from coserve.engine.device import DeviceSetup, EngineDevice
from coserve.engine.onranks import DeviceOnRanks
from coserve.engine.poolsize import pool_bytes
from coserve.model.memory import available_to_each
from coserve.runtime.cache import block_bytes
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.warmup import warm_up
from coserve.training.group import engine_group, require_ranks


def make_device(model: LoadedModel, config: EngineConfig, *, trains: bool, report: Callable[[str], None]) -> EngineDevice:
    """The device, or those of all ranks that share the model. trains: whether backward units will run, if only while the
    machine is measured. report: called with lines for the log. Raises ConfigError, CapacityError, RankFailed."""
    size, dtype = model.tensor_parallel_size, model.dtype
    asked = config.tensor_parallel_size
    require(asked in (None, size), "tensor_parallel_size",
            f"the engine has {asked} and the model {size}; give load_model the number")
    block = block_bytes(model.weights.architecture, config.block_tokens, dtype.itemsize)
    pool = pool_bytes(model, config, report=report)
    if pool is None:
        raise ConfigError("memory_bytes: the free memory can't be told here; give it", param="memory_bytes")
    num_blocks = pool // block
    if num_blocks < 1:
        raise CapacityError(f"memory_bytes: one block of the key-value cache takes {block} bytes", param="memory_bytes")
    available = available_to_each(model.device, size)
    free = None if available is None else max(0, available - num_blocks * block)
    require_ranks(config.adapter_sharding, size)
    group = None
    if size > 1:
        group = engine_group(
            model.architecture, size, model.device, dtype.itemsize, config.scheduler.max_window_tokens, config.adapter_sharding
        )
    setup = DeviceSetup(
        num_blocks=num_blocks, block_tokens=config.block_tokens, max_adapters=config.max_adapters,
        max_lora_rank=config.max_lora_rank, max_graph_rows=config.scheduler.max_num_seqs if config.cuda_graphs else 0,
        group=group,
    )
    device = EngineDevice(model, setup) if group is None else DeviceOnRanks(model, setup)
    line = device.settle_copies(free, trains)
    if line is not None:
        report(line)
    _get_ready(device, report)
    return device


def _get_ready(device: EngineDevice, report: Callable[[str], None]) -> None:
    """Compiles kernels, and captures all sizes of decode pass that are replayed."""
    if device.group is None:
        warm_up(device.passes)
    count, began = 0, time.perf_counter()
    with torch.no_grad():
        while device.capture_next():
            count += 1
    if count:
        report(f"captured {count} sizes of decode pass as CUDA graphs in {time.perf_counter() - began:.1f} s")
