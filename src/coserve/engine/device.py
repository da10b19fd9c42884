"""What an engine does on a device: passes of requests, units of jobs, blocks of memory, slots of adapters.

    engine: scheduler, requests, jobs --> EngineDevice: pool, slots, executors         (onranks.py: the same on several ranks)

Owns: these objects, and the calls that several ranks make together. Does not own: what runs when (step.py, scheduler/).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coserve.compiler.parallelize import TensorParallel
from coserve.core import BlockMove, Unit
from coserve.model.memory import settle_copies
from coserve.peft.adapter import Adapter
from coserve.profiling.measure import Profiler
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.fused import PassExecutor, TrainWindow
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.microbatch import InFlight
from coserve.runtime.spans import RowSpan
from coserve.runtime.transfer import to_device
from coserve.scheduler.blocks import BlockPool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSetup:
    """How much a device holds. num_blocks, block_tokens: of the pool. max_adapters, max_lora_rank: as in EngineConfig.
    max_graph_rows: as PassExecutor's. group: the ranks that share the model, where there are several."""

    num_blocks: int
    block_tokens: int
    max_adapters: int
    max_lora_rank: int
    max_graph_rows: int
    group: TensorParallel | None


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Within it, if `wanted`, PyTorch uses deterministic algorithms. Everything else keeps the faster ones."""
    before = torch.are_deterministic_algorithms_enabled()
    if before or not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class EngineDevice:
    """An engine's memory and executors on one device, or one rank's."""

    slots_class = AdapterSlots

    def __init__(self, model: LoadedModel, setup: DeviceSetup) -> None:
        weights = model.weights
        self.model, self.group = model, setup.group
        self.pool = KeyValuePool(
            weights.architecture, setup.num_blocks, setup.block_tokens, weights.dtype, weights.device
        )
        self.slots = self.slots_class(
            weights.architecture, weights.dtype, weights.device, max_slots=setup.max_adapters, max_rank=setup.max_lora_rank
        )
        self.train = TrainExecutor(model.executor)
        self.passes = PassExecutor(
            model.executor, self.train, self.pool, self.slots, max_graph_rows=setup.max_graph_rows, ranks=setup.group
        )
        self._hidden = torch.empty(0)

    # --- iterations ---

    def check(self) -> None:
        """Raises RankFailed if a rank that shares the model has ended."""

    def run_pass(
        self, token_ids: Sequence[int], decode: Sequence[RowSpan], prefill: Sequence[RowSpan], window: TrainWindow | None
    ) -> None:
        """Runs a forward pass: as `PassExecutor.run`."""
        self._hidden = self.passes.run(to_device(token_ids, self.pool.buffer.device), decode, prefill, window)

    def capture_next(self) -> bool:
        """Captures one more size of decode pass, where those are replayed; False if there is none left."""
        return self.passes.capture_next()

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] of rows of the last pass."""
        hidden = self._hidden
        if len(rows) < hidden.shape[0]:
            hidden = hidden[to_device(rows, hidden.device)]
        return self.passes.logits(hidden)

    def run_unit(self, state: InFlight, unit: Unit, adapter: Adapter | None, *, deterministic: bool) -> None:
        """Runs a unit of a micro-batch: as `TrainExecutor.run`. deterministic: with deterministic algorithms."""
        with _deterministic(deterministic):
            self.train.run(state, unit, adapter)

    @property
    def is_cuda(self) -> bool:
        """Whether it works beside the host, which launches and goes on."""
        return self.pool.buffer.device.type == "cuda"

    # --- memory ---

    def move(self, moves: Sequence[BlockMove]) -> None:
        """Copies blocks of the pool, in order."""
        self.pool.move(moves)

    def arena(self, first: int, end: int) -> Tensor:
        """The bytes of blocks [first, end) of the pool."""
        return self.pool.arena(first, end)

    def settle_copies(self, free: int | None, training: bool) -> str | None:
        """Lets the weights have packed copies if memory allows: as `model.memory.settle_copies`."""
        return settle_copies(self.model.weights, free, training=training)

    def release(self) -> None:
        """Gives the pool's memory back; nothing may use it any more."""
        self.pool.release()

    # --- adapters, profiles ---

    def load_adapter(self, directory: Path) -> Adapter:
        """Reads an adapter, in any thread. Raises NotFound, InvalidRequest."""
        return self.model.load_adapter(directory)

    def make_profiler(self, blocks: BlockPool) -> Profiler:
        """Times what rows and units cost, on memory that it borrows from the pool. blocks: which of it is free."""
        return Profiler(self.passes, self.train, blocks)
