"""The jobs of an engine: what is refused before one begins, their micro-batches in flight, and what they ask of the engine.

Owns: the jobs, the job of each micro-batch, handing out arenas. Does not own: how a job proceeds (jobs.py), when its units run
(scheduler/). Only the engine's thread changes it; any thread may call `check` and `choose_plan`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor as ThreadExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from coserve.config.data import size_field
from coserve.config.settings import EngineConfig
from coserve.core import AdapterCopy, CapacityError, ConfigError, CoserveError, InvalidRequest, StepPlan, WorkUnit
from coserve.engine.adapters import AdapterRegistry
from coserve.engine.device import EngineDevice
from coserve.engine.exchange import Exchange
from coserve.engine.jobhandle import JobHandle
from coserve.engine.jobs import LiveJob
from coserve.engine.sharing import Membership, shared_facts
from coserve.engine.threads import SideThreads
from coserve.engine.watching import Watcher
from coserve.peft.adapter import Adapter
from coserve.planning.budget import FittedPlan, require_room, shape_adapter
from coserve.planning.inflight import plan_in_flight
from coserve.runtime.loaded import dtype_name
from coserve.runtime.microbatch import microbatch_layout
from coserve.runtime.plans import scoring_plan
from coserve.scheduler.blocks import ArenaBlocks, BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.work import MicrobatchWork
from coserve.training.batchwork import Microbatch
from coserve.training.finetuning import PreparedJob
from coserve.training.request import JobRequest, ResolvedJob
from coserve.training.trainer import MIN_WINDOW


class UnitShape(NamedTuple):
    """What units are counted by. direction: 'forward', 'backward', or 'fused' for a forward unit in an inference pass. layers,
    rows: the unit's numbers of them, rounded up to powers of two."""

    direction: str
    layers: int
    rows: int


def shape_of(work: WorkUnit) -> UnitShape:
    """The shape of a unit."""
    unit = work.unit
    layers, rows = (1 << (size - 1).bit_length() for size in (unit.layer_end - unit.layer_start, unit.end - unit.start))
    return UnitShape("fused" if work.fused else unit.direction.value, layers, rows)


class JobTable:
    """Jobs by number, and the engine as they see it (verbs.Host). new_number: returns a number that nothing else has."""

    def __init__(
        self, device: EngineDevice, config: EngineConfig, blocks: BlockPool, scheduler: HybridScheduler,
        adapters: AdapterRegistry, new_number: Callable[[], int],
    ) -> None:
        self.device, self.config = device, config
        self.arch, self.itemsize = device.model.architecture, device.model.dtype.itemsize
        self.blocks, self.scheduler, self.adapters = blocks, scheduler, adapters
        self.new_number = new_number
        self.writer: ThreadExecutor = SideThreads(1, "coserve-writer")
        self.recorder: ThreadExecutor = SideThreads(1, "coserve-recorder")
        self.jobs: dict[int, LiveJob] = {}
        self.microbatches: dict[int, Microbatch] = {}
        self.owners: dict[int, int] = {}
        self.shapes: Counter[UnitShape] = Counter()
        self._largest_windows: dict[int, int] = {}  # in tokens, as long as a job runs that ran out of memory with larger ones

    # --- refusals ---

    def check(self, request: JobRequest, name: str) -> None:
        """Checks a job against the engine's limits, before its data is read. Raises ConfigError, InvalidRequest."""
        grid, most, adapter = request.config.grid_tokens, self.config.scheduler.max_window_tokens, request.adapter
        if grid is not None and grid > most:
            raise ConfigError(
                f"window_tokens: a deterministic job's windows have {grid} tokens, over the engine's max_window_tokens={most}; "
                "raise that, or lower window_tokens", param="window_tokens",
            )
        rank = shape_adapter(self.arch, adapter).rank
        if rank > self.config.max_lora_rank:
            field = size_field(adapter) or "r"
            raise ConfigError(
                f"{field}: rank {rank} is over max_lora_rank={self.config.max_lora_rank}; raise that, or lower {field}",
                param=field,
            )
        self._check_name(name)

    def _check_name(self, name: str) -> None:
        if any(job.handle.name == name for job in list(self.jobs.values())):
            raise InvalidRequest(f"name: a job called {name!r} is running; name another", param="name")

    def choose_plan(self, job: ResolvedJob) -> FittedPlan:
        """The plan for the memory that jobs may have, and how many micro-batches are in flight. Raises CapacityError if no plan
        fits."""
        arch, itemsize, settings = self.arch, self.itemsize, job.settings
        chosen = plan_in_flight(job.plans, settings, self._room, self.scheduler.latency, self.config.scheduler)
        if job.held_out is not None:
            tokens = min(settings.max_microbatch_tokens, sum(group.num_tokens for group in job.held_out.groups))
            scoring = scoring_plan(arch, shape_adapter(arch, settings.adapter), itemsize=itemsize, ranks=job.group)
            own = self.device.model.weights.architecture
            require_room(tokens, microbatch_layout(scoring, tokens, own, itemsize, forward_only=True).total, self._room)
        return chosen

    @property
    def _room(self) -> int:
        """Bytes of the pool that jobs may have: all but what inference is guaranteed."""
        return (self.blocks.num_blocks - self.blocks.guaranteed_blocks) * self.device.pool.block_bytes

    # --- the life of jobs ---

    def begin(
        self, prepared: PreparedJob, handle: JobHandle, tenant: str, weight: float, exchange: Exchange | None = None
    ) -> None:
        """Adds a job, which may get units from now on. It fails at once if a job of its name began while it was prepared.
        exchange: its place among the engines that share it."""
        try:
            self._check_name(handle.name)
        except InvalidRequest as error:
            if exchange is not None:
                exchange.leave()
            handle.close("failed", error)
            return
        sharing = None
        if exchange is not None:
            facts = shared_facts(prepared.job.facts, dtype_name(self.device.model.dtype))
            sharing = Membership(exchange, prepared.trainer, prepared.job, facts)
        job = LiveJob(self.new_number(), prepared, handle, self, tenant=tenant, weight=weight, sharing=sharing)
        self.jobs[job.number] = job
        self.scheduler.add_job(job.work)

    def act(self, handle: JobHandle, action: str) -> None:
        """Carries out "pause", "resume", "cancel" or "hand_over", if the job still runs."""
        job = next((j for j in self.jobs.values() if j.handle is handle), None)
        if job is None or handle.finished:
            return
        if action == "cancel":
            job.end("cancelled")
            self._remove_job(job)
            return
        job.leaving = job.leaving or action == "hand_over"
        if action == "hand_over" or job.left:
            return
        job.work.paused = action == "pause"
        handle.status = "paused" if job.work.paused else "running"

    def _remove_job(self, job: LiveJob) -> None:
        del self.jobs[job.number]
        self.scheduler.remove_job(job.number)
        self._largest_windows.pop(job.number, None)
        self._limit_windows()

    def advance(self, watcher: Watcher) -> None:
        """Lets every job go as far as it can without running units."""
        for job in list(self.jobs.values()):
            watcher.begin("a job's work between units", jobs=(job.handle.label,))
            if not job.advance():
                self._remove_job(job)

    def count(self, plan: StepPlan) -> float:
        """The trained tokens of a plan's units, as JobProgress counts them. Adds each job's to its handle; counts shapes."""
        total = 0.0
        for work in plan.units:
            self.shapes[shape_of(work)] += 1
            tokens = work.unit.tokens(self.arch.num_layers) / 2
            total += tokens
            job = self.jobs.get(self.owners.get(work.microbatch, -1))
            if job is not None:
                job.handle.trained_tokens += tokens
        return total

    def stop_all(self) -> None:
        """Ends every job's run; each writes a checkpoint to resume from."""
        for job in list(self.jobs.values()):
            job.stop()
            self._remove_job(job)

    def close(self) -> None:
        """Waits until all files are written."""
        self.recorder.shutdown()
        self.writer.shutdown()

    def fail_all(self, error: CoserveError) -> None:
        """Ends all jobs with the engine's error. Every handle is closed, even if cleaning up fails, so that no caller hangs."""
        for job in list(self.jobs.values()):
            with contextlib.suppress(Exception):
                job.end("failed", error)
                self._remove_job(job)
            with contextlib.suppress(Exception):
                if not job.handle.finished:
                    job.handle.close("failed", error)
        self.jobs.clear()

    # --- what jobs ask for ---

    def reserve(self, num_bytes: int) -> tuple[ArenaBlocks, Tensor] | None:
        try:
            arena, moves = self.blocks.reserve_arena(-(-num_bytes // self.device.pool.block_bytes))
        except CapacityError:
            return None
        self.device.move(moves)
        return arena, self.device.arena(arena.first, arena.end)

    def release(self, arena: ArenaBlocks) -> None:
        self.blocks.release_arena(arena)

    def microbatch_begun(self, number: int, micro: Microbatch, work: MicrobatchWork) -> None:
        self.microbatches[number] = micro
        self.owners[number] = work.job
        self.scheduler.add_microbatch(work)

    def microbatch_closed(self, number: int) -> None:
        del self.microbatches[number]
        job = self.scheduler.jobs.get(self.owners.pop(number))
        if job is not None:
            job.microbatches.pop(number, None)

    def copy_adapter(self, copy: AdapterCopy) -> None:
        self.scheduler.copy_adapter(copy)

    def publish(self, name: str, adapter: Adapter) -> None:
        self.adapters.publish(name, adapter)

    def stored(self, name: str, adapter: Adapter, directory: Path) -> None:
        self.adapters.store(name, adapter, directory.absolute())

    def shrink_windows(self, job: int) -> bool:
        half = self.scheduler.picker.shapes.max_window // 2
        if half < MIN_WINDOW:
            return False
        self._largest_windows[job] = half
        self._limit_windows()
        return True

    def _limit_windows(self) -> None:
        most = self.config.scheduler.max_window_tokens
        self.scheduler.picker.shapes.max_window = min((most, *self._largest_windows.values()))

