"""The verb that a job's driver has asked for, while it is under way in an engine: one object per verb.

    forward_backward, score -> BatchRun: micro-batches get arenas, their units are scheduled, the objective gives coefficients
    optim_step -> OptimizerRun: slices         checkpoint, publish -> CopyRun: a copy within a plan

A short write is a DiskWrite (diskwrite.py). A job that several engines share has runs of its own for the first two verbs
(sharing.py). Does not own: which verb comes next (finetune/job.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor as ThreadExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from coserve.core import AdapterCopy, Group
from coserve.finetune.job import StepLoss
from coserve.peft.adapter import Adapter
from coserve.planning.budget import recompute_fraction
from coserve.scheduler.blocks import ArenaBlocks
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase
from coserve.training.batchwork import BatchWork, Microbatch
from coserve.training.trainer import AdapterTrainer


class Host(Protocol):
    """What a job needs of its engine."""

    writer: ThreadExecutor
    """Runs the writes of checkpoints and results."""
    recorder: ThreadExecutor
    """Runs the writes of metrics rows, so that they don't wait for checkpoints."""

    def reserve(self, num_bytes: int) -> tuple[ArenaBlocks, Tensor] | None:
        """An arena of at least `num_bytes` and its memory. None if there is no room now."""

    def release(self, arena: ArenaBlocks) -> None:
        """Gives an arena back."""

    def new_number(self) -> int:
        """A number that nothing else has, for a micro-batch."""

    def microbatch_begun(self, number: int, micro: Microbatch, work: MicrobatchWork) -> None:
        """Registers a micro-batch, which may get units from now on."""

    def microbatch_closed(self, number: int) -> None:
        """Removes a micro-batch that is done."""

    def copy_adapter(self, copy: AdapterCopy) -> None:
        """Puts a copy into the next plan."""

    def publish(self, name: str, adapter: Adapter) -> None:
        """Makes an adapter the newest version of `name`, which requests can use."""

    def stored(self, name: str, adapter: Adapter, directory: Path) -> None:
        """Tells that a published adapter now lies in a directory."""

    def shrink_windows(self, job: int) -> bool:
        """Halves the windows after a job ran out of memory, until that job ends. False if they can't get smaller."""


class VerbRun(Protocol):
    """One verb under way."""

    @property
    def answer(self) -> Any:
        """The verb's result, which is sent to the driver."""

    def done(self) -> bool:
        """Goes as far as possible without running units. Returns whether the verb is done."""


class BatchRun:
    """An optimizer batch, or a validation if `train` is False, as micro-batches in flight. job: the job's number. step: part of
    the key of the dropout masks."""

    def __init__(
        self, trainer: AdapterTrainer, host: Host, job: int, groups: Sequence[Group], step: int = 0, *, train: bool
    ) -> None:
        self._trainer, self._host, self._job, self.train = trainer, host, job, train
        self._new_batch = partial(BatchWork, trainer, groups, step, train=train)
        self._batch = self._new_batch()
        self._in_flight: dict[int, tuple[Microbatch, MicrobatchWork, ArenaBlocks]] = {}

    @property
    def answer(self) -> StepLoss:
        return self._batch.result()

    def done(self) -> bool:
        self._advance()
        self._begin_waiting()
        return self._batch.finished

    def _advance(self) -> None:
        """Answers micro-batches that are through forward, and closes those that are done."""
        for number, (micro, work, arena) in list(self._in_flight.items()):
            if work.phase is Phase.OBJECTIVE and self._batch.can_answer(micro):
                self._batch.answer(micro)
                work.on_objective()
            if work.phase is Phase.DONE:
                del self._in_flight[number]
                self._batch.close(micro)
                self._release(number, arena)

    def _begin_waiting(self) -> None:
        """Begins micro-batches that wait, as many as may be in flight and as there is memory for."""
        while self._batch.next is not None and len(self._in_flight) < self._trainer.in_flight:
            reserved = self._host.reserve(self._batch.layout(self._batch.next).total)
            if reserved is None:
                break
            self._begin(*reserved)

    def _begin(self, arena: ArenaBlocks, buffer: Tensor) -> None:
        micro, number = self._batch.begin(buffer), self._host.new_number()
        work = MicrobatchWork(
            id=number, job=self._job, num_tokens=micro.batch.num_tokens,
            num_layers=self._trainer.model.architecture.num_layers, lowest=micro.plan.lowest_trained,
            bounds=micro.batch.bounds, label_rows=micro.batch.host_label_rows.tolist(), forward_only=micro.forward_only,
            grid=self._trainer.config.grid_tokens,
            recompute_fraction=recompute_fraction(micro.plan),
        )
        self._in_flight[number] = (micro, work, arena)
        self._host.microbatch_begun(number, micro, work)

    def drop(self) -> None:
        """Abandons the batch and gives its memory back."""
        for number, (micro, _, arena) in self._in_flight.items():
            micro.state = None
            self._release(number, arena)
        self._in_flight.clear()

    def restart(self) -> None:
        """Begins the batch again. The caller has set the gradients to zero."""
        self.drop()
        self._batch = self._new_batch()

    def _release(self, number: int, arena: ArenaBlocks) -> None:
        self._host.microbatch_closed(number)
        self._host.release(arena)


class OptimizerRun:
    """An optimizer step, in slices of elements. work: where the scheduler reads how many are left. rate: the learning rate.
    norm: the gradient's, if it is known."""

    def __init__(self, trainer: AdapterTrainer, work: JobWork, rate: float, norm: float | None = None) -> None:
        self._trainer, self._work, self._rate = trainer, work, rate
        self.answer = trainer.clip(norm)
        self.updated = 0
        self.num_elements = trainer.num_elements if math.isfinite(self.answer) else 0  # else the driver ends the job
        work.optimizer_elements, work.optimizer_done = self.num_elements, 0

    def done(self) -> bool:
        if self.updated < self.num_elements:
            return False
        self._work.optimizer_elements = self._work.optimizer_done = 0
        return True

    def update(self, start: int, end: int) -> None:
        """Updates elements [start, end)."""
        self._trainer.update(start, end, self._rate)
        self.updated = end

    def complete(self) -> None:
        """Updates the remaining elements."""
        if self.updated < self.num_elements:
            self.update(self.updated, self.num_elements)


class CopyRun:
    """A copy of the working weights, made by a plan. snapshot: also copies the optimizer's state, for a checkpoint."""

    answer = None

    def __init__(self, host: Host, job: int, *, snapshot: bool) -> None:
        self.copied, self.snapshot = False, snapshot
        host.copy_adapter(AdapterCopy(job, snapshot=snapshot))

    def done(self) -> bool:
        return self.copied
