"""An engine's device where several ranks share the model: each has an EngineDevice of its own, and all are told the same.

    the engine, on rank 0     DeviceOnRanks, SlotsOnRanks, ProfilerOnRanks: each call is an order (runtime/ranks.py)
    ranks 1 to N - 1          their twins: EngineDevice, AdapterSlots, Profiler

Sampling, scheduling and files are rank 0's alone. An error here ends the engine, since ranks that have not done the same can't
go on together. Owns: which calls are orders. Does not own: what they do (device.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coserve.core import BlockMove, Contents, RankFailed, Unit
from coserve.engine.device import DeviceSetup, EngineDevice
from coserve.peft.adapter import Adapter
from coserve.peft.gate import PassedAdapter, read_adapter
from coserve.peft.share import shared_adapter
from coserve.profiling.measure import Profiler
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.fused import TrainWindow
from coserve.runtime.loaded import LoadedModel, adapter_base
from coserve.runtime.microbatch import InFlight
from coserve.runtime.ranks import RankProcesses
from coserve.runtime.spans import RowSpan
from coserve.scheduler.blocks import BlockPool


class SlotsOnRanks(AdapterSlots):
    """The slots of rank 0. processes: of the ranks."""

    processes: RankProcesses

    def place(self, key: Hashable, adapter: Adapter) -> int:
        self.check(adapter)
        return self.processes.call(AdapterSlots.place, self, key, adapter)

    def remove(self, key: Hashable) -> None:
        """Also where a rank has failed, since the engine ends then, and gives back what requests hold."""
        try:
            self.processes.call(AdapterSlots.remove, self, key)
        except RankFailed:
            if key in self:
                super().remove(key)


class DeviceOnRanks(EngineDevice):
    """The devices of all ranks, seen from rank 0."""

    slots_class = SlotsOnRanks
    slots: SlotsOnRanks

    def __init__(self, model: LoadedModel, setup: DeviceSetup) -> None:
        assert model.processes is not None
        self._processes = model.processes
        with self._processes.told(EngineDevice, model, setup, keeps=True) as keep:
            super().__init__(model, setup)
            keep(self)
        self.slots.processes = self._processes
        self._processes.call(getattr, self, "slots", keeps=True)

    def check(self) -> None:
        self._processes.check()

    def run_pass(
        self, token_ids: Sequence[int], decode: Sequence[RowSpan], prefill: Sequence[RowSpan], window: TrainWindow | None
    ) -> None:
        parts: Sequence[Any] = (None, None, None) if window is None else window
        with self._processes.told(_run_pass, self, token_ids, decode, prefill, *parts):
            super().run_pass(token_ids, decode, prefill, window)

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self._processes.call(EngineDevice.logits, self, rows)

    def run_unit(self, state: InFlight, unit: Unit, adapter: Adapter | None, *, deterministic: bool) -> None:
        self._processes.call(_run_unit, self, state, unit, adapter, deterministic)

    def move(self, moves: Sequence[BlockMove]) -> None:
        if moves:
            self._processes.call(EngineDevice.move, self, moves)

    def arena(self, first: int, end: int) -> Tensor:
        return self._processes.call(EngineDevice.arena, self, first, end, keeps=True)

    def release(self) -> None:
        self._processes.call(EngineDevice.release, self)

    def settle_copies(self, free: int | None, training: bool) -> str | None:
        return self._processes.call(EngineDevice.settle_copies, self, free, training)

    def load_adapter(self, directory: Path) -> Adapter:
        return self._processes.call(_bind, self, read_adapter(directory, adapter_base(self.model)), keeps=True)

    def make_profiler(self, blocks: BlockPool) -> Profiler:
        return ProfilerOnRanks(self, blocks, self._processes)


def _run_pass(
    device: EngineDevice, token_ids: Sequence[int], decode: Sequence[RowSpan], prefill: Sequence[RowSpan],
    state: InFlight | None, unit: Unit | None, adapter: Adapter | None,
) -> None:
    """As `EngineDevice.run_pass`, with the window's parts, which may have twins."""
    window = None if state is None or unit is None else TrainWindow(state, unit, adapter)
    device.run_pass(token_ids, decode, prefill, window)


def _run_unit(device: EngineDevice, state: InFlight, unit: Unit, adapter: Adapter | None, deterministic: bool) -> None:
    EngineDevice.run_unit(device, state, unit, adapter, deterministic=deterministic)


def _bind(device: EngineDevice, passed: PassedAdapter) -> Adapter:
    """A rank's part of an adapter that has been read. Raises InvalidRequest on all ranks alike."""
    assert device.group is not None
    adapter, _ = shared_adapter(device.model.weights, passed.config, device.group.fixed, seed=0, passed=passed)
    return adapter


def _make_profiler(device: EngineDevice, guaranteed_blocks: int) -> Profiler:
    """Of a rank that schedules nothing: all of the pool is free, as it is on rank 0."""
    blocks = BlockPool(device.pool.num_blocks, device.pool.block_tokens, guaranteed_blocks=guaranteed_blocks)
    return Profiler(device.passes, device.train, blocks)


class ProfilerOnRanks(Profiler):
    """Times rank 0, while the others do the same."""

    def __init__(self, device: DeviceOnRanks, blocks: BlockPool, processes: RankProcesses) -> None:
        self._processes = processes
        with processes.told(_make_profiler, device, blocks.guaranteed_blocks, keeps=True) as keep:
            super().__init__(device.passes, device.train, blocks)
            keep(self)

    def prepare(self) -> None:
        self._processes.call(Profiler.prepare, self)

    def begin(self, point: Contents) -> None:
        self._processes.call(Profiler.begin, self, point)

    def once(self) -> float:
        return self._processes.call(Profiler.once, self)

    def end(self) -> None:
        self._processes.call(Profiler.end, self)
