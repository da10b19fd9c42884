"""The memory of a simulated engine: what a model leaves of its devices' memory, and what a job takes of that.

    of each device's memory      a share that is used at all, the rest is for libraries and fragments
      - weights                  an even share per device
      - workspace                of the largest pass
      - adapter and optimizer    of one job
      = the pool                 key-value blocks and training arenas, as in a real engine

Under tensor parallelism keys, values and arenas are taken to be shared evenly by the devices too, hidden rows included, as with
sequence parallelism. Owns: this account. Does not own: which plan a job gets for its room (planning/budget.py), whose blocks
are whose (scheduler/blocks.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from coserve.config.settings import EngineConfig, FinetuneConfig, SchedulerConfig
from coserve.config.values import require
from coserve.core import CapacityError
from coserve.model.architecture import Architecture
from coserve.model.memory import GIB
from coserve.planning.budget import (
    FittedPlan,
    JobPlans,
    Workload,
    recompute_fraction,
    shape_adapter,
    training_bytes,
)
from coserve.planning.inflight import plan_in_flight
from coserve.runtime.cache import block_bytes
from coserve.runtime.microbatch import microbatch_layout
from coserve.runtime.plans import fused_plan
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.jobs import SimulatedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """The memory of each of `tensor_parallel_size` equal devices, in bytes.

    usable: what the engine may take. fixed: by purpose, what is taken for as long as it runs. block_bytes: of one block of the
    pool, on all devices together.
    """

    usable: int
    fixed: Mapping[str, int]
    tensor_parallel_size: int
    block_bytes: int
    engine: EngineConfig

    @property
    def pool_bytes(self) -> int:
        """What is left for the pool."""
        return self.usable - sum(self.fixed.values())

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return max(0, self.pool_bytes * self.tensor_parallel_size // self.block_bytes)

    @property
    def guaranteed_blocks(self) -> int:
        """Blocks that arenas never take."""
        return math.ceil(self.num_blocks * self.engine.inference_share)

    @property
    def job_bytes(self) -> int:
        """What arenas may take of the pool, on all devices together."""
        return (self.num_blocks - self.guaranteed_blocks) * self.block_bytes

    def make_pool(self) -> BlockPool:
        """The pool, empty."""
        return BlockPool(
            self.num_blocks, self.engine.block_tokens, guaranteed_blocks=self.guaranteed_blocks,
            caching=self.engine.prefix_caching,
        )


def device_memory(
    arch: Architecture, job: FinetuneConfig, engine: EngineConfig, *, memory_bytes: float, usable_share: float, itemsize: int,
    tensor_parallel_size: int,
) -> DeviceMemory:
    """The account of a model on devices of `memory_bytes` each. job: what may train beside requests. itemsize: bytes per weight
    and per cached key or value. Raises CapacityError (param `device`) where nothing is left for the pool."""
    require(0 < usable_share <= 1, "gpu_memory_utilization", f"must be in (0, 1], got {usable_share}")
    adapter, limits = shape_adapter(arch, job.adapter), engine.scheduler
    plan = JobPlans(arch, adapter, Workload(1, 1), itemsize=itemsize).fastest().plan
    rows = limits.max_num_batched_tokens + limits.max_window_tokens
    training = training_bytes(
        arch, plan, adapter.flat.numel(), microbatch_tokens=limits.max_window_tokens, window_tokens=limits.max_window_tokens,
        itemsize=itemsize, fused_head=tensor_parallel_size == 1,
    )
    fused = fused_plan(arch, adapter, (), [{}] * arch.num_layers, plan, dropout=adapter.dropout, itemsize=itemsize)
    memory = DeviceMemory(
        usable=int(memory_bytes * usable_share),
        fixed={
            "weights": -(-training["weights"] // tensor_parallel_size),
            "workspace": max(training["workspace"], rows * max(layer.program.work_bytes for layer in fused)),
            "adapter and optimizer": training["adapter and optimizer"],
        },
        tensor_parallel_size=tensor_parallel_size, block_bytes=block_bytes(arch, engine.block_tokens, itemsize), engine=engine,
    )
    if memory.num_blocks < 1:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.fixed.items())
        raise CapacityError(
            f"device: the model needs {sum(memory.fixed.values()) / GIB:.2f} GiB ({parts}) on each of {tensor_parallel_size}, "
            f"and {memory.usable / GIB:.2f} GiB of each may be used ({usable_share:g} of {memory_bytes / 1e9:.0f} GB); raise "
            "tensor_parallel_size, or choose a device with more memory", param="device",
        )
    return memory


class PlannedBatch(NamedTuple):
    """A job's batch, and the plan by which its micro-batches take memory."""

    batch: SimulatedBatch
    plan: FittedPlan


def plan_batch(
    arch: Architecture, config: FinetuneConfig, example_tokens: Sequence[int], memory: DeviceMemory, latency: LatencyModel,
    scheduler: SchedulerConfig, *, itemsize: int,
) -> PlannedBatch:
    """An optimizer batch of examples with the plan that a real engine would choose for them.

    example_tokens: of each example, in order; they are packed into micro-batches as they come. latency, scheduler: what the
    engine believes, and its settings. Raises ConfigError for one that
    is longer than a micro-batch, and CapacityError where no plan fits.
    """
    most = config.max_microbatch_tokens
    require(max(example_tokens) <= most, "max_microbatch_tokens",
            f"{most} is less than an example's {max(example_tokens)} tokens")
    packed: list[list[int]] = []
    for tokens in example_tokens:
        if packed and sum(packed[-1]) + tokens <= most:
            packed[-1].append(tokens)
        else:
            packed.append([tokens])
    largest = max(map(sum, packed))
    adapter = shape_adapter(arch, config.adapter)
    squares = sum(tokens * tokens for tokens in example_tokens)
    workload = Workload(largest, math.ceil(squares / sum(example_tokens)), len(packed))
    plans = JobPlans(arch, adapter, workload, itemsize=itemsize, compression=config.activation_compression)
    fitted = plan_in_flight(
        plans, config, memory.job_bytes, latency, scheduler,
        remedy="choose more devices, or devices with more memory",
    )
    sizes = [microbatch_layout(fitted.plan, sum(part), arch, itemsize, forward_only=False).total for part in packed]
    batch = SimulatedBatch(
        microbatches=packed, elements=adapter.flat.numel(), lowest=fitted.plan.lowest_trained, grid=config.grid_tokens,
        recompute_fraction=recompute_fraction(fitted.plan), in_flight=fitted.in_flight,
        arena_blocks=[-(-size // memory.block_bytes) for size in sizes],
    )
    return PlannedBatch(batch, fitted)
