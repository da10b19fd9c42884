"""A finetuning job in the engine: its driver's verbs carried out unit by unit, between and beside requests.

    driver --verb--> forward_backward: micro-batches get arenas, their units get scheduled, the objective answers
                     optim_step: slices       checkpoint: a copy, then written in the background       publish: a copy
                     write: by a thread
           <-answer- when the last piece has run

Pausing keeps everything where it is. A failure gives all memory back and harms nobody else. While the disk refuses a job's
files the job waits, and nobody else does. At the engine's end a job leaves a checkpoint of its last whole step.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from concurrent.futures import Executor as ThreadExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from coserve.core import AdapterCopy, CoserveError, JobFailed, OptimizerSlice
from coserve.engine.diskwrite import DiskWrite
from coserve.engine.jobhandle import JobHandle
from coserve.finetune.checkpoints import Cursor
from coserve.finetune.disk import GOES_ON, refusal_of, waiting_message
from coserve.finetune.job import ForwardBackward, JobEvent, OptimStep, Publish, SaveCheckpoint, Score, StepRow, Verb, Write
from coserve.peft.adapter import Adapter
from coserve.peft.format import save_adapter
from coserve.scheduler.arenas import ArenaBlocks
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase
from coserve.training.batchwork import BatchWork, Microbatch
from coserve.training.finetuning import PreparedJob
from coserve.training.trainer import out_of_memory

_SHORT_WRITE_S = 0.005
"""What the engine's thread waits for a row to be written: as a rule it takes a hundredth of that."""


class Host(Protocol):
    """What a job asks of its engine."""

    max_microbatches: int
    writer: ThreadExecutor
    """For checkpoints and results."""
    recorder: ThreadExecutor
    """For rows, which don't wait for checkpoints."""

    def reserve(self, num_bytes: int) -> tuple[ArenaBlocks, Tensor] | None:
        """Arena memory, or None while there is none."""

    def release(self, arena: ArenaBlocks) -> None:
        """Gives it back."""

    def new_number(self) -> int:
        """A number for a micro-batch."""

    def microbatch_begun(self, number: int, micro: Microbatch, work: MicrobatchWork) -> None:
        """It may get units."""

    def microbatch_closed(self, number: int) -> None:
        """It is through."""

    def copy_adapter(self, copy: AdapterCopy) -> None:
        """The next plan carries it."""

    def publish(self, name: str, adapter: Adapter) -> None:
        """A new version that requests can use."""

    def stored(self, name: str, adapter: Adapter, directory: Path) -> None:
        """A published adapter lies in a directory from now on."""

    def shrink_windows(self) -> bool:
        """After out-of-memory: smaller windows; False if they are smallest."""


class LiveJob:
    """One job. `work` is what the scheduler sees."""

    def __init__(
        self, number: int, prepared: PreparedJob, handle: JobHandle, host: Host, *, tenant: str, weight: float
    ) -> None:
        self.number, self.prepared, self.handle, self.host = number, prepared, handle, host
        self.job, self.trainer = prepared.job, prepared.trainer
        self.work = JobWork(id=number, tenant=tenant, weight=weight, refresh_seconds=self.trainer.refresh_seconds)
        self.failure: Exception | None = None
        self._driver: Generator[Verb, Any, None] = self.job.work()
        self._answer: Any = None
        self._verb: Verb | None = None
        self._batch: BatchWork | None = None
        self._in_flight: dict[int, tuple[Microbatch, MicrobatchWork, ArenaBlocks]] = {}
        self._norm = self._rate = 0.0
        self._updating = False
        self._updated = 0
        self._copied: bool | None = None
        self._row: DiskWrite | None = None
        self._checkpoints: list[DiskWrite] = []
        self._result: DiskWrite | None = None
        self._waiting = False

    # --- called by the engine between iterations ---

    def advance(self) -> bool:
        """Goes as far as possible without running units; False when the job has ended."""
        try:
            if self.failure is not None:
                self._recover(self.failure)
            if self._result is None:
                while self._disk_takes_all() and self._advance():
                    pass
            else:
                self._finish(self._result)
        except StopIteration:  # the driver is through; while a checkpoint was refused it would not have come so far
            self._result = DiskWrite(self.host.writer, self.prepared.finish)
        except Exception as error:  # a job's failure is its own
            self._end("failed", error if isinstance(error, CoserveError) else JobFailed(_described(error)))
        return not self.handle.finished

    def cancel(self) -> None:
        """Ends the job."""
        self._end("cancelled", None)

    def abandon(self, error: CoserveError) -> None:
        """Ends the job because its engine has failed."""
        self._end("failed", error)

    def _advance(self) -> bool:
        """One step of the driver or of its verb; False if units have to run first."""
        if self._verb is None:
            self._verb, self._answer = self._driver.send(self._answer), None
            self._start(self._verb)
        match self._verb:
            case ForwardBackward() | Score():
                return self._advance_batch()
            case OptimStep():
                if self._updating:
                    return False
                self.work.optimizer_elements = self.work.optimizer_done = 0
                return self._reply(self._norm)
            case Write():
                return self._reply(None) if self._row_is_written() else False
            case _:
                return self._reply(None) if self._copied else False

    def _disk_takes_all(self) -> bool:
        """Whether no write is being refused. The first refusal becomes an event, and so does their end. Raises errors that more
        tries don't mend."""
        self._checkpoints = [write for write in self._checkpoints if not write.done()]
        others = [write for write in (self._row, self._result) if write is not None and not write.done()]
        refusals = [write.refusal for write in (*self._checkpoints, *others) if write.refusal is not None]
        if bool(refusals) != self._waiting:
            self._waiting = bool(refusals)
            self.job.listen(
                JobEvent(level="warn", message=waiting_message(refusals[0])) if refusals
                else JobEvent(level="info", message=GOES_ON)
            )
        return not refusals

    def _row_is_written(self) -> bool:
        if self._row is None or not self._row.done():
            return False
        self._row = None
        return True

    def _reply(self, answer: Any) -> bool:
        self._verb, self._answer = None, answer
        return True

    def _start(self, verb: Verb) -> None:
        match verb:
            case ForwardBackward(groups, step):
                self._batch = BatchWork(self.trainer, groups, step, train=True)
            case Score(groups):
                self._batch = BatchWork(self.trainer, groups, 0, train=False)
            case OptimStep(rate):
                optimizer = self.trainer.optimizer
                self._norm = optimizer.clip()
                if math.isfinite(self._norm):  # else the driver ends the job
                    self._updating, self._updated, self._rate = True, 0, rate
                    self.work.optimizer_elements, self.work.optimizer_done = optimizer.master.numel(), 0
            case SaveCheckpoint():
                self._copied = False
                self.host.copy_adapter(AdapterCopy(self.number, snapshot=True))
            case Publish():
                self._copied = False
                self.host.copy_adapter(AdapterCopy(self.number, snapshot=False))
            case Write(_, action):
                self._row = DiskWrite(self.host.recorder, action)
                self._row.wait(_SHORT_WRITE_S)

    def _advance_batch(self) -> bool:
        batch = self._batch
        assert batch is not None
        for number, (micro, work, arena) in list(self._in_flight.items()):
            if work.phase is Phase.OBJECTIVE and batch.can_answer(micro):
                batch.answer(micro)
                work.on_objective()
            if work.phase is Phase.DONE:
                del self._in_flight[number]
                batch.close(micro)
                self.host.microbatch_closed(number)
                self.host.release(arena)
        grid = self.trainer.config.grid_tokens
        # A deterministic job adds its gradients in one order only.
        most = self.host.max_microbatches if grid is None else 1
        while batch.next is not None and len(self._in_flight) < most:
            reserved = self.host.reserve(batch.layout(batch.next).total)
            if reserved is None:
                break
            arena, buffer = reserved
            micro = batch.begin(buffer)
            number = self.host.new_number()
            work = MicrobatchWork(
                id=number, job=self.number, num_tokens=micro.batch.num_tokens,
                num_layers=self.trainer.model.architecture.num_layers, lowest=micro.plan.lowest_trained,
                bounds=micro.batch.bounds, label_rows=micro.batch.host_label_rows.tolist(), forward_only=micro.forward_only,
                grid=grid, recompute_fraction=micro.plan.recompute_flops / max(1, micro.plan.trained_forward_flops),
            )
            self._in_flight[number] = (micro, work, arena)
            self.host.microbatch_begun(number, micro, work)
        if batch.finished:
            self._batch = None
            return self._reply(batch.result())
        return False

    # --- called while a plan runs ---

    def optimize(self, part: OptimizerSlice) -> None:
        """Updates the elements of a slice of the plan."""
        optimizer = self.trainer.optimizer
        optimizer.update(part.start, part.end, self._rate)
        self._updated = part.end
        if part.end == optimizer.master.numel():
            optimizer.close_step()
            self._updating = False

    def copy_adapter(self, copy: AdapterCopy) -> None:
        """Publishes the working weights; with a snapshot, the checkpoint is written by the host's writer."""
        adapter = self.trainer.adapter.copy()
        self.host.publish(self.handle.name, adapter)
        if copy.snapshot:
            state = {name: tensor.clone() for name, tensor in self.trainer.optimizer.state().items()}
            cursor = self.job.cursor
            self._checkpoints.append(DiskWrite(self.host.writer, lambda: self._write(cursor, state)))
        else:
            self.trainer.published = adapter
        self._copied = True

    def _write(self, cursor: Cursor, state: dict[str, Tensor], unrecorded: StepRow | None = None) -> None:
        model = self.trainer.model

        def save(directory: Path) -> None:
            save_adapter(
                directory, self.trainer.adapter, state["master"], base_name=model.name, fingerprint=model.fingerprint
            )

        self.job.write_checkpoint(cursor, state, save, unrecorded=unrecorded)

    def fail(self, error: Exception) -> None:
        """A unit, slice or copy raised; dealt with before the next iteration."""
        self.failure = self.failure or error

    # --- ends ---

    def _recover(self, error: Exception) -> None:
        """Out of memory: the optimizer batch starts again with smaller windows, unless they are fixed. Anything else ends the
        job."""
        self.failure = None
        if not isinstance(error, torch.OutOfMemoryError) or not isinstance(self._verb, ForwardBackward | Score):
            raise error
        fixed = self.trainer.config.deterministic
        if fixed or not self.host.shrink_windows():
            raise out_of_memory(error, deterministic=fixed) from error
        self.job.listen(JobEvent(level="warn", message="out of memory: smaller windows; the optimizer batch starts again"))
        self._drop_batch()
        assert self.trainer.adapter.grad is not None
        self.trainer.adapter.grad.zero_()
        self._start(self._verb)

    def _drop_batch(self) -> None:
        for number, (micro, _, arena) in self._in_flight.items():
            micro.state = None
            self.host.microbatch_closed(number)
            self.host.release(arena)
        self._in_flight.clear()
        self._batch = None

    def _finish(self, result: DiskWrite) -> None:
        """The driver is through; the job has ended when its files are written."""
        try:
            taken = self._disk_takes_all()
        except Exception as error:
            raise JobFailed(f"the job's files can't be written: {error}") from error
        if taken and not self._checkpoints and result.done():
            assert self.trainer.published is not None
            self.host.stored(self.handle.name, self.trainer.published, self.handle.directory)
            self._end("succeeded", None)

    def stop(self) -> None:
        """The engine ends, the job doesn't: a checkpoint of its last whole step is written, from which `resume` goes on. What
        has run of the next step's batch is dropped."""
        for write in self._checkpoints:  # before the last one, so that they are written in the order of their steps
            if write.refusal is not None:
                write.retry()
        try:
            if self.failure is None and self._result is None:
                asked = self._complete_step()
                if asked or self.job.cursor.step > self.job.saved_step:
                    state, row = self.trainer.optimizer.state(), self.job.unrecorded
                    self.host.writer.submit(self._write_last, self.job.cursor, state, row)
        except StopIteration:
            pass
        except Exception as error:  # the checkpoint before is still there
            self.job.listen(JobEvent(level="warn", message=f"no checkpoint at the end: {_described(error)}"))
        self._end("cancelled", None)

    def _complete_step(self) -> bool:
        """Goes on to where units would have to run, without running any; True if the driver has asked for a checkpoint that was
        not copied. Raises what the driver raises."""
        asked = False
        while True:
            match self._verb:
                case OptimStep():
                    if self._updating:
                        self.optimize(OptimizerSlice(self.number, self._updated, self.trainer.optimizer.master.numel()))
                    self._reply(self._norm)
                case Write():
                    if not self._row_is_written():
                        return asked  # a checkpoint takes the row with it
                    self._reply(None)
                case SaveCheckpoint():
                    asked = asked or not self._copied
                    self._reply(None)
                case None if self.job.cursor.step > self.job.saved_step:
                    pass
                case _:
                    return asked
            self._verb, self._answer = self._driver.send(self._answer), None
            if isinstance(self._verb, OptimStep):
                return asked  # this starts the next step, which is left to the resumed job
            if isinstance(self._verb, Write):
                self._start(self._verb)

    def _write_last(self, cursor: Cursor, state: dict[str, Tensor], unrecorded: StepRow | None) -> None:
        try:
            self._write(cursor, state, unrecorded)
        except Exception as error:
            self.job.listen(JobEvent(level="warn", message=f"no checkpoint at the end: {_described(error)}"))

    def _end(self, status: str, error: CoserveError | None) -> None:
        self._driver.close()
        self._drop_batch()
        self._checkpoints.clear()
        self._row = self._result = None
        if error is not None:
            self.handle.listen(JobEvent(level="error", message=str(error)))
        self.handle.close(status, error)


def _described(error: Exception) -> str:
    reason = refusal_of(error)
    return f"{type(error).__name__}: {error}" if reason is None else f"{reason} ({error})"

