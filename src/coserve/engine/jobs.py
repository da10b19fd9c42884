"""A finetuning job in the engine: its driver's verbs are carried out unit by unit, between and beside requests.

    driver --verb--> its run (verbs.py): units, slices, copies within plans, or a write by a thread
           <-answer- when the last piece has run

A paused job keeps its memory. A failure ends only the job, whose memory is freed. While the disk refuses a job's files, only
that job waits. When the engine closes, a job writes a checkpoint of its last whole step; so does one that is handed over, once
its present step has ended. A job that several engines share goes through sharing.py; where it only follows, it writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coserve.core import AdapterCopy, CoserveError, JobFailed, OptimizerSlice, RankFailed
from coserve.engine.diskwrite import DiskWrite
from coserve.engine.exchange import Dismissed
from coserve.engine.jobhandle import JobHandle
from coserve.engine.sharing import Membership, ended_by
from coserve.engine.verbs import BatchRun, CopyRun, Host, OptimizerRun, VerbRun
from coserve.finetune.checkpoints import Cursor
from coserve.finetune.disk import GOES_ON, refusal_of, waiting_message
from coserve.finetune.job import ForwardBackward, JobEvent, OptimStep, SaveCheckpoint, Score, StepRow, Verb, Write
from coserve.hostcopy import to_host_later
from coserve.scheduler.work import JobWork
from coserve.training.finetuning import PreparedJob
from coserve.training.trainer import out_of_memory

_SHORT_WRITE_S = 0.005
"""How long the engine's thread waits for a row of metrics to be written, which usually takes a hundredth of that."""


class _StepEnded(Exception):
    """A job that leaves has come to the end of its step."""


class LiveJob:
    """One job in the engine. `work` is its state for the scheduler. sharing: its part in a job that several engines share.
    leaving: whether it is to be handed over. left: whether it has done its last step here."""

    def __init__(
        self, number: int, prepared: PreparedJob, handle: JobHandle, host: Host, *, tenant: str, weight: float,
        sharing: Membership | None = None,
    ) -> None:
        self.number, self.prepared, self.handle, self.host, self.sharing = number, prepared, handle, host, sharing
        self.job, self.trainer = prepared.job, prepared.trainer
        self.work = JobWork(id=number, tenant=tenant, weight=weight, refresh_seconds=self.trainer.refresh_seconds)
        self.failure: Exception | None = None
        self._driver: Generator[Verb, Any, None] = self.job.follow() if self._follows else self.job.work()
        self._answer: Any = None
        self._run: VerbRun | None = None
        self._checkpoints: list[DiskWrite] = []
        self._result: DiskWrite | None = None
        self._waiting = False
        self.leaving = self.left = False

    @property
    def _follows(self) -> bool:
        return self.sharing is not None and self.sharing.follows

    # --- called by the engine between iterations ---

    def advance(self) -> bool:
        """Goes as far as possible without running units. False if the job has ended."""
        try:
            if self.failure is not None:
                self._recover(self.failure)
            if self._result is not None:
                self._finish(self._result)
            elif self._may_go_on():
                self._go_on()
            elif self.leaving:  # it hasn't joined yet
                self.end("handed_over")
        except StopIteration:  # the driver has finished, which it can't while a checkpoint is refused
            if self._follows:
                self.end("succeeded")
            else:
                self.trainer.before_save()
                self._result = DiskWrite(self.host.writer, self.prepared.finish)
        except Dismissed as error:
            failure = ended_by(error)
            self.end("cancelled" if failure is None else "failed", failure)
        except RankFailed:
            raise
        except Exception as error:  # only this job fails
            self.end("failed", error if isinstance(error, CoserveError) else JobFailed(_described(error)))
        return not self.handle.finished

    def _may_go_on(self) -> bool:
        return self.sharing is None or self.sharing.ready(updating=isinstance(self._run, OptimizerRun))

    def _go_on(self) -> None:
        """As far as possible without running units. A job that leaves goes to the end of its step, if it isn't paused."""
        if self.leaving and self.work.paused:
            self._leave(self._complete_step())
            return
        try:
            while self._disk_takes_all() and self._advance():
                pass
        except _StepEnded:
            self._leave(False)

    def _advance(self) -> bool:
        """Completes the present verb, or begins the next one and completes that. False if units have to run first."""
        if self._run is None:
            self._run = self._begin(self._driver.send(self._answer))
        if not self._run.done():
            return False
        self._answer, self._run = self._run.answer, None
        return True

    def _begin(self, verb: Verb) -> VerbRun:
        match verb:
            case ForwardBackward() if self.leaving:
                raise _StepEnded
            case ForwardBackward(groups, step) if self.sharing is not None:
                return self.sharing.batch(self.host, self.number, groups, step)
            case OptimStep(rate) if self.sharing is not None:
                return self.sharing.optimizer(self.work, rate)
            case ForwardBackward(groups, step):
                return BatchRun(self.trainer, self.host, self.number, groups, step, train=True)
            case Score(groups):
                return BatchRun(self.trainer, self.host, self.number, groups, train=False)
            case OptimStep(rate):
                return OptimizerRun(self.trainer, self.work, rate)
            case Write(_, action):
                write = DiskWrite(self.host.recorder, action)
                write.wait(_SHORT_WRITE_S)
                return write
            case _:
                return CopyRun(self.host, self.number, snapshot=isinstance(verb, SaveCheckpoint))

    def _disk_takes_all(self) -> bool:
        """Whether the disk refuses no write at present. An event tells when refusals begin and when they end. Raises errors
        that trying again can't fix."""
        self._checkpoints = [write for write in self._checkpoints if not write.done()]
        others = [write for write in (self._run, self._result) if isinstance(write, DiskWrite) and not write.done()]
        refusals = [write.refusal for write in (*self._checkpoints, *others) if write.refusal is not None]
        if bool(refusals) != self._waiting:
            self._waiting = bool(refusals)
            self.job.listen(
                JobEvent(level="warn", message=waiting_message(refusals[0])) if refusals
                else JobEvent(level="info", message=GOES_ON)
            )
        return not refusals

    # --- called while a plan runs ---

    def optimize(self, part: OptimizerSlice) -> None:
        """Runs a slice of the optimizer step."""
        assert isinstance(self._run, OptimizerRun)
        self._run.update(part.start, part.end)

    def copy_adapter(self, copy: AdapterCopy) -> None:
        """Publishes the working weights. For a snapshot, the host's writer also writes the checkpoint."""
        assert isinstance(self._run, CopyRun)
        adapter = self.trainer.copy_adapter()
        self.host.publish(self.handle.name, adapter)
        if copy.snapshot:
            state, cursor = to_host_later(self.trainer.snapshot()), self.job.cursor
            self._checkpoints.append(DiskWrite(self.host.writer, lambda: self._write(cursor, state)))
        else:
            self.trainer.published = adapter
        self._run.copied = True

    def _write(
        self, cursor: Cursor, copy: Callable[[], dict[str, Tensor]], unrecorded: StepRow | None = None
    ) -> None:
        """Writes a checkpoint. copy: brings the optimizer's state to the host."""
        state = copy()
        save = partial(self.trainer.save, master=state["master"])
        self.job.write_checkpoint(cursor, state, save, unrecorded=unrecorded)

    def fail(self, error: Exception) -> None:
        """Notes that a unit, slice or copy raised `error`. `advance` handles it before the next iteration."""
        self.failure = self.failure or error

    # --- ends ---

    def _recover(self, error: Exception) -> None:
        """After out-of-memory, restarts the optimizer batch with smaller windows, unless the job's windows are fixed. Raises
        any other error, which ends the job."""
        self.failure = None
        if not isinstance(error, torch.OutOfMemoryError) or not isinstance(self._run, BatchRun):
            raise error
        fixed = self.trainer.config.deterministic
        if fixed or not self.host.shrink_windows(self.number):
            raise out_of_memory(error, deterministic=fixed) from error
        self.job.listen(JobEvent(level="warn", message="out of memory: smaller windows; the optimizer batch starts again"))
        assert self.trainer.adapter.grad is not None
        self.trainer.adapter.grad.zero_()
        self._run.restart()

    def _finish(self, result: DiskWrite) -> None:
        """After the driver's end, or the last step of a job that leaves: ends the job when its files are written."""
        try:
            taken = self._disk_takes_all()
            written = taken and not self._checkpoints and result.done()
        except Exception as error:
            if not self.left:
                raise JobFailed(f"the job's files can't be written: {error}") from error
            self.job.listen(JobEvent(level="warn", message=f"no checkpoint at the end: {_described(error)}"))
            written = True  # the previous checkpoint is still there
        if written and self.left:
            self.end("handed_over")
        elif written:
            assert self.trainer.published is not None
            self.host.stored(self.handle.name, self.trainer.published, self.handle.directory)
            self.end("succeeded")

    def _leave(self, asked: bool) -> None:
        """Writes a checkpoint of the last whole step, if there is none, after which the job ends here. The part of the next
        step's batch that a paused job has run is lost. asked: whether the job has asked for this checkpoint already. A job that
        only follows is just left."""
        if self._follows:
            self.end("handed_over")
            return
        write: Callable[[], object] = _nothing
        if asked or self.job.cursor.step > self.job.saved_step:
            state = to_host_later(self.trainer.snapshot())
            write = partial(self._write, self.job.cursor, state, self.job.unrecorded)
        if isinstance(self._run, BatchRun):
            self._run.drop()
            self._run = None
        self.work.optimizer_elements = self.work.optimizer_done = 0
        self.left, self._result = True, DiskWrite(self.host.writer, write)

    def stop(self) -> None:
        """Leaves the job for a later `resume`, since the engine closes: writes a checkpoint of the last whole step. The part of
        the next step's batch that has run is lost. A job that only follows is just left."""
        if self._follows:
            self.end("cancelled")
            return
        for write in self._checkpoints:  # before the last one, so that checkpoints are written in the order of their steps
            if write.refusal is not None:
                write.retry()
        try:
            if self.failure is None and self._result is None:
                asked = self._complete_step()
                if asked or self.job.cursor.step > self.job.saved_step:
                    state, row = to_host_later(self.trainer.snapshot()), self.job.unrecorded
                    self.host.writer.submit(self._write_last, self.job.cursor, state, row)
        except StopIteration:
            pass
        except Exception as error:  # the previous checkpoint is still there
            self.job.listen(JobEvent(level="warn", message=f"no checkpoint at the end: {_described(error)}"))
        self.end("cancelled")

    def _complete_step(self) -> bool:
        """Completes an optimizer step that has begun, and its row, without running units. True if the job then asks for a
        checkpoint. Raises what the driver raises."""
        run, answer = self._run, self._answer
        while run is not None or self.job.cursor.step > self.job.saved_step:
            match run:
                case OptimizerRun():
                    run.complete()
                case DiskWrite():
                    if not run.done():
                        break  # the checkpoint will hold the row
                case CopyRun():
                    return run.snapshot and not run.copied
                case BatchRun():
                    break
            verb = self._driver.send(answer if run is None else run.answer)
            if not isinstance(verb, Write):  # the resumed job will begin any other verb again
                return isinstance(verb, SaveCheckpoint)
            run = self._begin(verb)
        return False

    def _write_last(
        self, cursor: Cursor, copy: Callable[[], dict[str, Tensor]], unrecorded: StepRow | None
    ) -> None:
        try:
            self._write(cursor, copy, unrecorded)
        except Exception as error:
            self.job.listen(JobEvent(level="warn", message=f"no checkpoint at the end: {_described(error)}"))

    def end(self, status: str, error: CoserveError | None = None) -> None:
        """Ends the job, and frees its memory. status: succeeded, failed, cancelled or handed_over. error: why it
        failed."""
        self._driver.close()
        if isinstance(self._run, BatchRun):
            self._run.drop()
        if self.sharing is not None:
            self.sharing.leave()
        self._checkpoints.clear()
        self._run = self._result = None
        if error is not None:
            self.handle.listen(JobEvent(level="error", message=str(error)))
        self.handle.close(status, error)


def _nothing() -> None:
    """Stands for a write where nothing is left to write."""


def _described(error: Exception) -> str:
    reason = refusal_of(error)
    return f"{type(error).__name__}: {error}" if reason is None else f"{reason} ({error})"

