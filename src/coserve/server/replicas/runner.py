"""Runs the jobs that a replica has claimed, as a single server's runner runs its own (jobs/runner.py), with these differences:

    a step            its event, the job's progress and the step in the row are one transaction under the job's epoch
    a checkpoint      goes to the artifact store, then one transaction makes it visible
    the result        goes to the store before the job's end is written, which is one transaction
    a job may leave   to another replica: handed over at the end of a step, or lost to whoever has claimed it

Owns: those differences, the reasons why a job is held. Does not own: leases (jobs.py), the order of deliveries (deliveries.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from coserve.config.data import finetune_config_from_dict
from coserve.core import CoserveError, InvalidRequest
from coserve.server.errors import StorageRefused
from coserve.server.index.rows import NewEvent
from coserve.server.jobs.objects import step_metrics
from coserve.server.jobs.queue import UnfinishedJob
from coserve.server.jobs.runner import JobRunner, end_fields, end_notes
from coserve.server.jobs.spec import num_members
from coserve.server.jobs.trackers import export_metrics
from coserve.server.link.messages import JobEnded
from coserve.server.records import AdapterRecord, CheckpointRecord, JobRecord, JobStatus, new_id, now
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.deliveries import Deliveries
from coserve.server.replicas.fenced import Fenced, FencedStore
from coserve.server.replicas.parcels import (
    SentCheckpoint,
    checkpoint_key,
    pack_checkpoint,
    pack_exports,
    pack_result,
    send_checkpoint,
    send_exports,
    send_result,
)
from coserve.server.replicas.runs import RunsEngine
from coserve.server.replicas.scratch import ScratchOutputs
from coserve.server.settings import ServerConfig

_MACHINE_FACTS = ("weights_layout", "kernels", "tensor_parallel_size", "adapter_sharding", "quantization", "threads")
"""Recorded facts of a job (training/finetuning.py) that may differ between replicas of one base."""


class Hold(Enum):
    """Why a job gets no units although its owner wants it to run."""

    LEASE = "lease"
    STORE = "store"


class ServedNames:
    """The names of models, as a replica's jobs need them. Engines load published versions when requests ask for them
    (adaptercache.py), so nothing is loaded or unloaded here."""

    def __init__(self, base_names: Callable[[], tuple[str, ...]]) -> None:
        self._base_names = base_names

    @property
    def base_names(self) -> tuple[str, ...]:
        """As JobModels'."""
        return self._base_names()

    def add(self, record: AdapterRecord) -> None:
        """Nothing: rows are written under an epoch (fenced.py)."""

    def remove(self, record: AdapterRecord) -> None:
        """Nothing, as `add`."""

    def note_loaded(self, record: AdapterRecord, generation: int) -> None:
        """Nothing: nobody asks for a run's own adapter."""

    async def drop_loaded(self, tenant: str, name: str) -> None:
        """Nothing: a run's own adapter goes with the run (runs.py)."""


class ReplicaRunner(JobRunner):
    """The runner of a replica. All its methods belong to the event loop, except those that say otherwise.

    draining: whether jobs are to leave, and none begins. on_left: is called when a job has left the engine, to be given back.
    on_refused: is called when a job can't go on here, but may elsewhere. on_ended: is called when a job's end is written.
    """

    def __init__(
        self, store: FencedStore, outputs: ScratchOutputs, models: ServedNames, engine: RunsEngine, config: ServerConfig,
        artifacts: ArtifactStore, after_checkpoint: Callable[[UnfinishedJob], Coroutine[Any, Any, None]], *,
        epochs: Callable[[str], int | None], on_left: Callable[[UnfinishedJob], None],
        on_refused: Callable[[UnfinishedJob], None], on_ended: Callable[[UnfinishedJob], None],
    ) -> None:
        super().__init__(store, outputs, models, engine, config, after_checkpoint)
        self._fenced, self._scratch, self._runs, self._artifacts, self._epochs = store, outputs, engine, artifacts, epochs
        self._on_left, self._on_refused, self._on_ended = on_left, on_refused, on_ended
        self._loop = asyncio.get_running_loop()
        self.deliveries = Deliveries(self.note, lambda live, on: self.hold(live, Hold.STORE, on))
        self.draining = False
        self._held: dict[str, set[Hold]] = {}
        self._sending: set[tuple[str, int | None, int]] = set()  # (job, epoch, step) of uncommitted checkpoints
        self._work: dict[asyncio.Task[None], UnfinishedJob] = {}
        self._tokens: dict[str, tuple[int, int]] = {}  # of the journal's thread: a job's last step, and its tokens up to there

    async def stop(self) -> None:
        await super().stop()
        self.deliveries.close()

    # --- jobs come and go ---

    def spawn(self, work: Coroutine[Any, Any, None], live: UnfinishedJob | None = None) -> asyncio.Task[None]:
        task = super().spawn(_unless_fenced(work), live)
        task.add_done_callback(lambda done: work.close())  # it hasn't begun if the task is cancelled at once
        if live is not None:
            self._work[task] = live
            task.add_done_callback(lambda done: self._work.pop(done, None))
        return task

    async def delivered(self, live: UnfinishedJob) -> None:
        """Returns when all that a job has made so far is in the store and in the index."""
        await self.deliveries.pack(live, lambda: None)
        async with self.deliveries.turn(live):
            await self.journal.write(lambda: None)

    async def forget(self, live: UnfinishedJob) -> None:
        """Stops all work on a job that isn't this replica's any more. Returns when nothing of it will be written."""
        id = live.record.id
        if self.live.get(id) is live:
            del self.live[id]
        self.ending.pop(id, None)
        this = asyncio.current_task()
        for task in [task for task, of in self._work.items() if of is live and task is not this]:
            task.cancel()
        self.deliveries.forget(id)
        self._held.pop(id, None)
        await self.journal.drop(id)  # else it would be written under the next epoch that this replica has the job under
        await self.journal.write(lambda: self._tokens.pop(id, None))
        self.advance()

    def advance(self) -> None:
        if not self.draining:
            super().advance()

    def launched(self, live: UnfinishedJob) -> None:
        super().launched(live)
        if self.draining and live.record.id in self.live:
            self.act(live, "hand_over")

    async def refused(self, live: UnfinishedJob, error: CoserveError) -> None:
        """As JobRunner's. A job that has begun elsewhere is left to others where this machine isn't like that one: a
        deterministic job needs the same kernels and threads. Other things that have changed are the same everywhere."""
        of_machine = error.param is not None and error.param.split(".")[0] in _MACHINE_FACTS
        if isinstance(error, InvalidRequest) and str(error).startswith("resume: ") and of_machine:
            id, reason = live.record.id, str(error)
            self.note(id, f"The job is left to others: {reason}", level="warn")
            await self.journal.keep(id, lambda: self._fenced.put_declined(id, reason))
            self._on_refused(live)
        else:
            await super().refused(live, error)

    def left(self, live: UnfinishedJob, message: JobEnded) -> None:
        if message.status == "handed_over":
            self._on_left(live)
        else:
            super().left(live, message)

    def _start_fields(self, record: JobRecord) -> dict[str, Any]:
        def note(line: str) -> None:
            if record.id in self.live:
                self.note(record.id, line)

        return {**super()._start_fields(record), "members": num_members(record.settings), "note": note}

    # --- why a job waits ---

    def holds(self, live: UnfinishedJob) -> bool:
        return super().holds(live) or bool(self._held.get(live.record.id))

    def hold(self, live: UnfinishedJob, reason: Hold, on: bool) -> None:
        """Lets a job wait for a reason, or no longer."""
        before, reasons = self.holds(live), self._held.setdefault(live.record.id, set())
        (reasons.add if on else reasons.discard)(reason)
        self._pass_on_hold(live, before)

    def show_paused(self, live: UnfinishedJob, paused: bool) -> None:
        """Takes over what the job's owner wants, which is in the row already."""
        if live.record.paused == paused or live.record.id not in self.live:
            return
        before = self.holds(live)
        live.record = dataclasses.replace(live.record, paused=paused)
        live.steps.clear()
        self._pass_on_hold(live, before)
        self.advance()

    def _pass_on_hold(self, live: UnfinishedJob, before: bool) -> None:
        after = self.holds(live)
        if before != after:
            self.act(live, "pause" if after else "resume")

    # --- records ---

    def keep_step(self, live: UnfinishedJob, step: int, num_steps: int, event: NewEvent) -> None:
        live.record = dataclasses.replace(live.record, step=step, num_steps=num_steps)
        id, tokens, pace = live.record.id, live.steps[-1][1], live.pace()

        def put() -> None:
            known, total = self._tokens.get(id, (-1, 0))
            total = total + tokens if known == step - 1 else self._scratch.trained_tokens(id, step)
            progress: dict[str, Any] = {"trained_tokens": total}
            if pace is not None:
                progress |= {"tokens_per_second": pace.tokens_per_second, "finish": pace.finish}
            self._fenced.put_step(id, step, num_steps, event, progress)
            self._tokens[id] = (step, total)

        self.journal.keep(id, put)

    def catch_up(self, record: JobRecord) -> None:
        """In the journal's thread, before a run goes on after a death of the engine: tells of steps and checkpoints that it had
        written and not told."""
        self.publish_steps(record)
        known = self._scratch.committed_steps(record.id)
        rows = {row.step: step_metrics(dataclasses.asdict(row)) for row in self._scratch.rows(record.id)}
        for step, directory in self._scratch.local_checkpoints(record.id):
            if step not in known:
                self._loop.call_soon_threadsafe(self._offer, record.id, step, directory, rows.get(step, {"step": step}))

    def _offer(self, id: str, step: int, directory: Path, metrics: dict[str, Any]) -> None:
        live = self.live.get(id)
        if live is not None and (id, self._epochs(id), step) not in self._sending:
            self.keep_checkpoint(live, step, directory, metrics)

    def keep_checkpoint(self, live: UnfinishedJob, step: int, directory: Path, metrics: dict[str, Any]) -> None:
        place = live.record.id, self._epochs(live.record.id), step
        self._sending.add(place)
        task = self.spawn(self._deliver_checkpoint(live, step, directory, metrics), live)
        task.add_done_callback(lambda done: self._sending.discard(place))

    async def _deliver_checkpoint(
        self, live: UnfinishedJob, step: int, directory: Path, metrics: dict[str, Any]
    ) -> None:
        record, tuned = live.record, self.tuned(live.record)
        epoch = self._epoch(record.id)

        def pack() -> bool:
            with self._scratch.writing(record.id):
                return pack_checkpoint(self._scratch.output(record.id), directory, box)

        with self._box(record.id) as box:
            if not await self.deliveries.pack(live, pack):
                return
            async with self.deliveries.turn(live):
                sent = await self.deliveries.send(
                    live, lambda: send_checkpoint(self._artifacts, record.id, epoch, step, box)
                )
                model, keep = f"{tuned}:ckpt-step-{step}", finetune_config_from_dict(record.config).keep_checkpoints
                checkpoint, adapter = _rows(record, model, step, metrics, sent)
                message = f"Checkpoint created at step {step}, served as {model}"
                gone = await self.journal.keep(
                    record.id, lambda: self._fenced.commit_checkpoint(checkpoint, adapter, keep, message)
                )
        for old in gone:
            self.spawn(self._delete(checkpoint_key(old.directory)))
        self.spawn(self._after_checkpoint(live))

    async def deliver(self, live: UnfinishedJob) -> None:
        record, epoch = live.record, self._epoch(live.record.id)
        if record.status != "succeeded":
            await self.delivered(live)
            return

        def pack() -> None:
            with self._scratch.writing(record.id):
                pack_result(self._scratch.output(record.id), self._scratch.rows(record.id), box)

        with self._box(record.id) as box:
            await self.deliveries.pack(live, pack)
            async with self.deliveries.turn(live):
                self._scratch.results[record.id] = await self.deliveries.send(
                    live, lambda: send_result(self._artifacts, record, epoch, box)
                )

    @contextmanager
    def _box(self, job: str) -> Iterator[Path]:
        """Where a box may be made, which goes when the context ends. Raises Fenced."""
        box = self._scratch.new_box(job)
        try:
            yield box
        finally:
            self.deliveries.drop(box)

    # --- ends ---

    async def finish(self, live: UnfinishedJob, status: JobStatus, **changes: Any) -> None:
        """As JobRunner's. A job that can't be ended here is given back, which counts as a crash."""
        record = live.record
        if self.live.get(record.id) is not live or self._epochs(record.id) is None:
            return
        try:
            await super().finish(live, status, **changes)
        except Fenced:
            raise
        except Exception:
            live.strike(alone=True)
            self._keep_strikes(live)
            self._on_left(live)
            raise
        finally:
            self._scratch.results.pop(record.id, None)
        self._on_ended(live)

    async def export(self, live: UnfinishedJob) -> list[str]:
        record, epoch = live.record, self._epoch(live.record.id)

        def write() -> list[str]:
            with self._scratch.writing(record.id) as directory:
                return export_metrics(directory, record)

        def pack() -> None:
            with self._scratch.writing(record.id) as directory:
                pack_exports(directory, box)

        warnings = await asyncio.to_thread(write)
        with self._box(record.id) as box:
            await self.deliveries.pack(live, pack)
            await self.deliveries.send(live, lambda: send_exports(self._artifacts, record.id, epoch, box))
        return warnings

    def write_end(self, live: UnfinishedJob, warnings: list[str]) -> None:
        record, sent = live.record, self._scratch.results.get(live.record.id)
        self.publish_steps(record)
        tuned = None if record.fine_tuned_model is None else self._scratch.put_tuned(record, record.fine_tuned_model)
        file = None if sent is None or tuned is None else sent.file
        self._fenced.end_job(record.id, end_fields(record), end_notes(record, warnings), tuned, file)

    def _engine_down(self) -> None:
        before = {id: (live.strikes, live.struck_at) for id, live in self.live.items()}
        super()._engine_down()
        for id, live in self.live.items():
            if before.get(id) != (live.strikes, live.struck_at):
                self._keep_strikes(live)

    def _keep_strikes(self, live: UnfinishedJob) -> None:
        id, strikes, struck_at = live.record.id, live.strikes, live.struck_at
        self.journal.keep(id, lambda: self._fenced.put_strikes(id, strikes, struck_at))

    async def _delete(self, key: str) -> None:
        """Deletes artifacts that no row names. If the store refuses, they stay there and nobody sees them."""
        with contextlib.suppress(StorageRefused):
            await asyncio.to_thread(self._artifacts.delete, key)

    def _epoch(self, job: str) -> int:
        epoch = self._epochs(job)
        if epoch is None:
            raise Fenced(f"job {job} isn't this replica's any more")
        return epoch


async def _unless_fenced(work: Coroutine[Any, Any, None]) -> None:
    """Work on a job, which ends where the job is found to be another's: whoever found it has told (fenced.py)."""
    with contextlib.suppress(Fenced):
        await work


def _rows(
    record: JobRecord, model: str, step: int, metrics: dict[str, Any], sent: SentCheckpoint
) -> tuple[CheckpointRecord, AdapterRecord]:
    """The rows of a checkpoint that is in the store."""
    adapter, state = sent
    checkpoint = CheckpointRecord(
        id=new_id("ftckpt").replace("-", "_", 1), job=record.id, created_at=now(), step=step, model=model, metrics=metrics,
        directory=adapter.key, sha256=adapter.sha256, state_sha256=state.sha256, bytes=state.bytes,
    )
    return checkpoint, AdapterRecord(
        name=model, tenant=record.tenant, directory=adapter.key, created_at=now(), job=record.id, sha256=adapter.sha256,
        bytes=adapter.bytes,
    )
