"""A finetuning job of a simulation: what its driver does between iterations, without tensors.

    micro-batches get arenas and units -> the objective answers those whose forward is through -> backward -> optimizer step

Owns: which micro-batches are in flight and what comes next, as engine/verbs.py does for a real job. Does not own: when units
run (scheduler/).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from coserve.core import CapacityError, StepPlan
from coserve.scheduler.blocks import ArenaBlocks
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedBatch:
    """The optimizer batch that a job trains over and over.

    microbatches: tokens of each example, per micro-batch. elements: parameters that the optimizer updates. grouped: whether no
    micro-batch's backward begins before all of the batch are forward. forward_only, lowest, grid, recompute_fraction: as in
    MicrobatchWork. in_flight: how many micro-batches may be in flight at once. label_rows: rows with a label per micro-batch,
    ascending; empty: all rows have one. arena_blocks: blocks of the pool that each takes while it is in flight; empty: none
    take any.
    """

    microbatches: Sequence[Sequence[int]]
    elements: int = 100_000
    grouped: bool = False
    forward_only: bool = False
    lowest: int = 0
    grid: int | None = None
    recompute_fraction: float = 0.0
    in_flight: int = 2
    label_rows: Sequence[Sequence[int]] = ()
    arena_blocks: Sequence[int] = ()


@dataclass(slots=True, kw_only=True)
class SimulatedJob:
    """A job. batches: those of its optimizer steps, over and over. steps: optimizer steps until it ends; None: it never does.
    waiting: its micro-batches in flight. next: the number of the batch's next micro-batch. through: those in flight whose
    forward or backward is committed. updating: whether an optimizer step is under way."""

    work: JobWork
    batches: Sequence[SimulatedBatch]
    scheduler: HybridScheduler
    new_number: Callable[[], int]
    steps: int | None = None
    steps_done: int = 0
    next: int = 0
    waiting: list[MicrobatchWork] = field(default_factory=list)
    arenas: dict[int, ArenaBlocks] = field(default_factory=dict)
    through: set[int] = field(default_factory=set)
    updating: bool = False

    @property
    def batch(self) -> SimulatedBatch:
        """The batch of the present step."""
        return self.batches[self.steps_done % len(self.batches)]

    @property
    def finished(self) -> bool:
        """Whether all its steps are done."""
        return self.steps is not None and self.steps_done >= self.steps

    def advance(self) -> None:
        """Goes as far as possible without running units, on what is committed."""
        self._answer()
        self._close()
        if self.updating or self.finished:
            return
        if self.next == len(self.batch.microbatches) and not self.waiting:
            if not self.batch.forward_only:
                self.updating = True
                self.work.optimizer_elements, self.work.optimizer_done = self.batch.elements, 0
                return
            self.steps_done, self.next = self.steps_done + 1, 0
            if self.finished:
                return
        most = self.batch.in_flight if self.batch.grid is None else 1
        while self.next < len(self.batch.microbatches) and len(self.waiting) < most:
            if not self._begin(self.batch.microbatches[self.next]):
                break

    def on_commit(self, plan: StepPlan, through: Collection[int]) -> None:
        """A plan has run. through: micro-batches whose forward or backward it ended, of any job."""
        self.through |= {number for number in through if number in self.work.microbatches}
        if any(part.job == self.work.id and part.end == self.batch.elements for part in plan.optimizer):
            self.updating = False
            self.work.optimizer_elements = self.work.optimizer_done = 0
            self.steps_done += 1
            self.next = 0

    def drop(self) -> None:
        """Gives all memory back, since the job ends."""
        for arena in self.arenas.values():
            self.scheduler.pool.release_arena(arena)
        self.arenas.clear()
        self.waiting.clear()
        self.work.microbatches.clear()

    def _answer(self) -> None:
        """The training objective answers micro-batches whose forward is through."""
        forward = [work for work in self.waiting if work.id in self.through]
        all_forward = self.next == len(self.batch.microbatches) and len(forward) == len(self.waiting)
        for work in forward:
            if work.phase is Phase.OBJECTIVE and (all_forward or not self.batch.grouped):
                work.on_objective()
                if not work.forward_only:
                    self.through.discard(work.id)

    def _close(self) -> None:
        """Micro-batches that are done leave, and their arenas are free."""
        for work in [w for w in self.waiting if w.id in self.through and w.phase is Phase.DONE]:
            self.waiting.remove(work)
            self.through.discard(work.id)
            del self.work.microbatches[work.id]
            if work.id in self.arenas:
                self.scheduler.pool.release_arena(self.arenas.pop(work.id))

    def _begin(self, examples: Sequence[int]) -> bool:
        """The next micro-batch gets its arena and may get units; False if there is no room for it now."""
        arena = None
        if self.batch.arena_blocks:
            try:
                arena, _ = self.scheduler.pool.reserve_arena(self.batch.arena_blocks[self.next])
            except CapacityError:
                return False
        ends, labels = list(accumulate(examples, initial=0)), self.batch.label_rows
        work = MicrobatchWork(
            id=self.new_number(), job=self.work.id, num_tokens=ends[-1], num_layers=self.scheduler.picker.shapes.num_layers,
            lowest=self.batch.lowest, bounds=list(pairwise(ends)),
            label_rows=labels[self.next] if labels else range(ends[-1]), forward_only=self.batch.forward_only,
            grid=self.batch.grid, recompute_fraction=self.batch.recompute_fraction,
        )
        self.next += 1
        self.waiting.append(work)
        if arena is not None:
            self.arenas[work.id] = arena
        self.scheduler.add_microbatch(work)
        return True
