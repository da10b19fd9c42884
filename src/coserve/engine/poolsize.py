"""How large an engine's pool may be: what the device has, less what iterations and jobs take beside it.

    GPU:   [ taken already: weights ... | beside the pool: measured; one job's adapter and optimizer | pool    | not ours ]
                                                                                  share of the whole device --^

On one GPU the largest iterations run once, over a pool that is there for this only, and the peak of what they took beside it is
put aside. Elsewhere the pool gets a share of what is free.
Owns: the pool's size. Does not own: what is in the pool (runtime/cache.py, scheduler/blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from coserve.config.settings import EngineConfig, LoraConfig, SchedulerConfig
from coserve.core import Contents, PassCost, UnitCost
from coserve.engine.device import DeviceSetup, EngineDevice
from coserve.kernels.triton.paged_decode import partial_bytes
from coserve.model.memory import GIB, POOL_SHARE, available_to_each, gpu_bytes
from coserve.planning.budget import shape_adapter, state_bytes
from coserve.runtime.cache import block_bytes
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.sequences import GATHERED_BYTES
from coserve.scheduler.blocks import BlockPool

GPU_SHARE = 0.9
"""Of a GPU's memory: what an engine takes in all, if nothing else is said."""
WORK_SHARE = 0.15
"""Of the memory that weights leave on each of several GPUs: what is put aside unmeasured."""
ADAPTER_SLOTS = 8
"""Adapters of the default rank on all linears that memory is put aside for beside the pool."""
_MARGIN = 1 << 30
"""Bytes put aside for what is not measured: graphs, the library's own workspaces, checkpoints on their way to the disk."""
_SMALLEST_WINDOW = 128
_PROBE_SHARE = 0.6
"""Of the room: the pool of the measurement, which holds the largest micro-batch of an iteration."""


def pool_bytes(
    model: LoadedModel, config: EngineConfig, *, gpu_share: float = GPU_SHARE, report: Callable[[str], None] = lambda _: None
) -> int | None:
    """Bytes of each rank's pool beside loaded weights, by the settings if they say it. gpu_share: of a GPU's memory, what the
    engine may take in all. report: called with lines for the log. None where the system doesn't say how much is free."""
    if config.memory_bytes is not None:
        return config.memory_bytes
    size = model.tensor_parallel_size
    if model.device.type != "cuda":
        available = available_to_each(model.device, size)
        return None if available is None else int(available * POOL_SHARE)
    room = int(min(total * gpu_share - (total - free) for free, total in gpu_bytes(model.device, size)))
    if size > 1:
        return max(1, int(room * (1 - WORK_SHARE)))
    arch, itemsize = model.architecture, model.dtype.itemsize
    elements = shape_adapter(arch, LoraConfig()).flat.numel()
    adapters = state_bytes(elements, itemsize) + ADAPTER_SLOTS * elements * itemsize
    rows = config.scheduler.max_num_seqs
    beside = _measured_beside(model, config, room, report) + 2 * partial_bytes(rows, arch.num_heads, arch.head_dim)
    beside += GATHERED_BYTES
    report(f"beside the pool: {beside / GIB:.2f} GiB for the largest iterations, {adapters / GIB:.2f} GiB for adapters")
    return max(1, room - beside - adapters - _MARGIN)


def _measured_beside(model: LoadedModel, config: EngineConfig, room: int, report: Callable[[str], None]) -> int:
    """The peak of the bytes that the largest iterations take beside a pool. Contexts are short in it: what grows with them
    (`partial_bytes`, GATHERED_BYTES) is known."""
    block = block_bytes(model.weights.architecture, config.block_tokens, model.dtype.itemsize)
    num_blocks = max(1, int(room * _PROBE_SHARE) // block)
    device = EngineDevice(model, DeviceSetup(
        num_blocks=num_blocks, block_tokens=config.block_tokens, max_adapters=config.max_adapters,
        max_lora_rank=config.max_lora_rank, max_graph_rows=0, group=None,
    ))
    profiler = device.make_profiler(BlockPool(num_blocks, config.block_tokens, guaranteed_blocks=0))
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    limit, window = model.architecture.max_position_embeddings, config.scheduler.max_window_tokens
    while not profiler.run_once(largest_iterations(config.scheduler, min(window, limit), limit)):
        window //= 2  # the pool has no room for such a window, so jobs won't have any either
        if window < _SMALLEST_WINDOW:
            report("the device has too little memory to measure an iteration with finetuning")
            break
    peak = torch.cuda.max_memory_allocated(model.device) - before
    device.release()
    torch.cuda.empty_cache()
    return max(0, int(peak))


def largest_iterations(config: SchedulerConfig, window: int, max_positions: int) -> list[Contents]:
    """The iterations that take most beside the pool: the largest prompt with log-probabilities of its tokens, a training window
    that is fused among as many requests as there may be, and a unit of each direction over such a window."""
    rows, seqs = min(config.max_num_batched_tokens, max_positions), config.max_num_seqs
    pairs = window * (window + 1) // 2
    prompt = PassCost(rows, rows, 0, 0, rows * (rows + 1) // 2, 0, 0, 0, 0, 1)
    fused = PassCost(seqs + window, seqs, seqs, 64 * seqs, 0, window, pairs, window - 1, 0, 0)
    units = [UnitCost(backward, window, 1, pairs, 0 if backward else window - 1) for backward in (False, True)]
    return [*(Contents(cost, (), 0) for cost in (prompt, fused)), *(Contents(None, (unit,), 0) for unit in units)]
