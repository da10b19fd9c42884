"""Jobs that haven't ended, on the event loop: which are handed to the engine, what the engine tells of them, how they end.

    queued --advance--> StartJob --> running: JobHappened ... JobEnded --> finish: manifest, models, events, the index's row

A job that the engine has begun (output/job.json) is always resumed; so after any crash, of the engine or of the server,
`advance` just starts what has not ended. Owns: UnfinishedJobs and their changes. Does not own: how jobs come about
(service.py), the order of the queue (queue.py), words and objects (objects.py), directories (outputs.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Literal

from coserve.config.data import finetune_config_from_dict
from coserve.core import CapacityError, CoserveError, JobFailed
from coserve.finetune.checkpoints import MANIFEST_FILE as CHECKPOINT_MANIFEST
from coserve.server.errors import EngineUnavailable, StorageRefused, make_error
from coserve.server.index.manifest import write_manifest
from coserve.server.index.rows import NewEvent
from coserve.server.index.store import Store
from coserve.server.jobs.hosting import JobEngine, JobModels
from coserve.server.jobs.journal import RETRY_S, JobJournal
from coserve.server.jobs.objects import error_object, step_data, step_message, step_metrics, tuned_name
from coserve.server.jobs.outputs import JobOutputs
from coserve.server.jobs.queue import MAX_STRIKES, UnfinishedJob, next_job
from coserve.server.jobs.trackers import export_metrics
from coserve.server.link.messages import JobEnded, JobHappened
from coserve.server.models import engine_name
from coserve.server.records import JobRecord, JobStatus, now
from coserve.server.settings import ServerConfig

_END_FIELDS = (
    "status", "finished_at", "paused", "error", "fine_tuned_model", "result_files", "trained_tokens", "step", "num_steps",
)
"""Fields of a job's record that its end changes."""
_log = logging.getLogger(__name__)


class JobRunner:
    """Starts and follows jobs. All its methods belong to the event loop, except those that say otherwise.

    What a replica of a fleet does otherwise is in methods that its own runner replaces (server/replicas/runner.py): `launched`,
    `refused`, `holds`, `keep_step`, `keep_checkpoint`, `deliver`, `export`, `write_end`, `left`, `catch_up`.
    """

    def __init__(
        self, store: Store, outputs: JobOutputs, models: JobModels, engine: JobEngine, config: ServerConfig,
        after_checkpoint: Callable[[UnfinishedJob], Coroutine[Any, Any, None]],
    ) -> None:
        """after_checkpoint: runs after each checkpoint of a job."""
        self._store, self._outputs, self._models, self._engine, self._config = store, outputs, models, engine, config
        self.journal = JobJournal(store)
        self.live: dict[str, UnfinishedJob] = {}
        self.ending: dict[str, JobRecord] = {}
        """Jobs that have ended, until the index knows of their end."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._after_checkpoint = after_checkpoint
        engine.on_job(self._hear)
        engine.supervisor.on_down(self._engine_down)

    async def stop(self) -> None:
        """Stops listening to the engine, and waits for what is being written. Jobs go on at the server's next start."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.journal.close()

    # --- records ---

    def change(self, live: UnfinishedJob, *, manifest: bool = False, **changes: Any) -> asyncio.Future[None]:
        """Changes a job's record, here at once and in the index soon. The future is done once the index has it."""
        record = live.record = dataclasses.replace(live.record, **changes)

        def put() -> None:
            if manifest:
                write_manifest(self._outputs.directory(record.id), record)
            self._store.update_job(record.id, **changes)

        return self.journal.keep(record.id, put)

    def note(self, id: str, message: str, *, level: Literal["info", "warn", "error"] = "info") -> None:
        """Adds an event to a job."""
        if level != "info":
            _log.warning("%s", message, extra={"job": id})
        self.journal.keep(id, lambda: self.journal.event(id, message, level=level))

    def present(self, record: JobRecord) -> JobRecord:
        """The job of a record from the index, as it is now: the index lags behind while the disk refuses writes. A job is shown
        as succeeded only when its model and files can be used."""
        live = self.live.get(record.id)
        if live is not None:
            return live.record
        ending = self.ending.get(record.id)
        return record if ending is None or ending.status == "succeeded" else ending

    def tuned(self, record: JobRecord) -> str:
        """The name that the job's result has or will have."""
        return record.fine_tuned_model or tuned_name(record, self._models.base_names[0], self._config.organization)

    def spawn(self, work: Coroutine[Any, Any, None], live: UnfinishedJob | None = None) -> asyncio.Task[None]:
        """Runs work in a task of its own, which is returned. live: the job that fails if the work does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._task_ended(done, live))
        return task

    def _task_ended(self, task: asyncio.Task[None], live: UnfinishedJob | None) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        job = {} if live is None else {"job": live.record.id}
        _log.error("finetuning jobs: an unexpected error", exc_info=error, extra=job)
        if live is not None and not self._stopping:
            self.spawn(self.fail(live, CoserveError("an unexpected error of the server; see its log")))

    # --- the queue ---

    def advance(self) -> None:
        """Starts jobs while there is room."""
        if self._stopping or not self._engine.ready:
            return
        generation = self._engine.generation
        while sum(live.holds_place(generation) for live in self.live.values()) < self._config.max_jobs:
            live = next_job(self.live.values(), generation)
            if live is None:
                return
            live.generation = generation
            live.steps.clear()
            self.spawn(self._launch(live), live)

    async def _launch(self, live: UnfinishedJob) -> None:
        """Hands a job to the engine. A refusal is the job's end; a lost engine is not."""
        id, generation = live.record.id, live.generation
        if live.record.status == "queued":
            self.note(id, "Fine-tuning job started")
            self.change(live, status="running", started_at=now())
        with contextlib.suppress(CapacityError):  # the journal has logged it
            await self.journal.write(lambda: self.catch_up(live.record))
        try:
            await self._start(live)
        except EngineUnavailable:
            if live.generation == generation == self._engine.generation:
                live.generation = None
            return
        except CoserveError as error:
            await self.refused(live, error)
            return
        self.launched(live)

    async def refused(self, live: UnfinishedJob, error: CoserveError) -> None:
        """The engine doesn't take a job."""
        await self.fail(live, error)

    def launched(self, live: UnfinishedJob) -> None:
        """The engine has a job now."""
        if live.record.id not in self.live:
            self.act(live, "cancel")
        elif self.holds(live):
            self.act(live, "pause")

    def holds(self, live: UnfinishedJob) -> bool:
        """Whether a job must not get units at present."""
        return live.record.paused

    async def _start(self, live: UnfinishedJob) -> None:
        """Waits while the disk refuses the job's directory. Raises what the engine raises."""
        waited, generation = False, live.generation
        while live.record.id in self.live:
            if live.generation != generation:
                raise EngineUnavailable("another engine has the job by now")
            try:
                await self._engine.start_job(**await asyncio.to_thread(self._start_fields, live.record))
                return
            except StorageRefused as error:
                if not waited:
                    self.note(live.record.id, f"The job can't start yet: {error}", level="warn")
                waited = True
                await asyncio.sleep(RETRY_S)

    def catch_up(self, record: JobRecord) -> None:
        """In the journal's thread, before a job goes on: adds the steps and checkpoints that the index lacks because an engine
        or a server died after writing them."""
        self.publish_steps(record)
        self._outputs.restore(record, self.tuned(record))

    def publish_steps(self, record: JobRecord) -> None:
        """In the journal's thread: adds the missing events of steps that the job's table has."""
        rows = self._outputs.rows(record.id)
        known = {event.step for event in self.journal.events(record.id)} if rows else set()
        for row in rows:
            if row.step not in known:
                fields = dataclasses.asdict(row)
                text, data = step_message(fields, record.num_steps), step_data(fields, record.num_steps)
                self.journal.event(record.id, text, data=data, step=row.step)

    def _start_fields(self, record: JobRecord) -> dict[str, Any]:
        """The fields of StartJob. Raises InvalidRequest if a file is gone, and StorageRefused."""
        self._outputs.prepare(record)
        training, validation = self._outputs.data_files(record)
        start = self._outputs.start_directory(record)
        return {
            "id": record.id, "adapter": engine_name(record.tenant, self.tuned(record)), "training_file": str(training.path),
            "validation_file": None if validation is None else str(validation.path),
            "directory": str(self._outputs.output(record.id)), "config": finetune_config_from_dict(record.config),
            "resume": self._outputs.started(record.id), "start": None if start is None else str(start),
            "tenant": record.tenant, "weight": record.weight,
        }

    def act(self, live: UnfinishedJob, action: Literal["pause", "resume", "cancel", "hand_over"]) -> None:
        """Passes the action on to the engine, if it holds the job."""
        if self._engine.ready and live.generation == self._engine.generation:
            self._engine.act_job(live.record.id, action)

    # --- what the engine says ---

    def _engine_down(self) -> None:
        end = self._engine.supervisor.last_end
        for live in list(self.live.values()):
            if live.generation is None or live.record.status != "running" or self._stopping:
                continue
            id = live.record.id
            if end is None or id not in end.jobs or not end.guilty:
                self.note(id, "The engine has stopped; the job goes on from its last checkpoint", level="warn")
            elif live.strike(alone=end.alone):
                error = JobFailed(
                    f"the engine has stopped {MAX_STRIKES} times or more while it worked on this job at step "
                    f"{max(live.furthest, live.record.step) + 1}, so the job is given up; the last time: {end.reason}"
                )
                self.spawn(self.fail(live, error), live)
            else:
                stopped = "The engine has stopped while it worked on this job, which goes on from its last checkpoint"
                self.note(id, f"{stopped}: {end.reason}", level="warn")

    def _hear(self, message: JobHappened | JobEnded) -> None:
        live = self.live.get(message.id)
        if self._stopping:
            return
        if isinstance(message, JobEnded):
            self._hear_end(message, live)
        elif live is None:
            return  # it was cancelled
        elif message.row is not None:
            self._hear_step(live, message, message.row)
        elif message.checkpoint is not None:
            self._hear_checkpoint(live, message.checkpoint_step, Path(message.checkpoint))
        else:
            if message.resumed_step is not None:  # what the page shows are steps that the job has
                self.change(live, step=message.resumed_step, num_steps=message.num_steps)
            if message.level != "info":
                _log.warning("%s", message.message, extra={"job": message.id})
            self.journal.keep(message.id, lambda: self._pass_on(message))

    def _pass_on(self, message: JobHappened) -> None:
        """In the journal's thread: adds an event, but not a remark about a file that was made when the file was checked."""
        noted = f": {message.message}"
        if message.level == "warn" and any(event.message.endswith(noted) for event in self.journal.events(message.id)):
            return
        self.journal.event(message.id, message.message, level=message.level)

    def _hear_step(self, live: UnfinishedJob, message: JobHappened, row: dict[str, float | int | None]) -> None:
        step = int(row["step"] or 0)
        live.rows[step] = step_metrics(row)
        live.furthest = max(live.furthest, step)
        live.steps.append((message.time_s, int(row["tokens"] or 0)))
        data, text = step_data(row, message.num_steps), step_message(row, message.num_steps)
        self.keep_step(live, step, message.num_steps, NewEvent(message=text, data=data, step=step))

    def keep_step(self, live: UnfinishedJob, step: int, num_steps: int, event: NewEvent) -> None:
        """Records a step that the job has done. event: has its metrics."""
        id = live.record.id
        self.journal.keep(id, lambda: self.journal.event(id, event.message, data=event.data, step=step))
        self.change(live, step=step, num_steps=num_steps)

    def _hear_checkpoint(self, live: UnfinishedJob, step: int, directory: Path) -> None:
        metrics = live.rows.get(step, {"step": step})
        for old in [number for number in live.rows if number <= step]:
            del live.rows[old]
        self.keep_checkpoint(live, step, directory, metrics)

    def keep_checkpoint(self, live: UnfinishedJob, step: int, directory: Path, metrics: dict[str, Any]) -> None:
        """Records a checkpoint that the engine has written. metrics: of its step."""
        record, tuned = live.record, self.tuned(live.record)
        loop = asyncio.get_running_loop()

        def drop(model: str) -> None:
            if not self._stopping:
                self.spawn(self._models.drop_loaded(record.tenant, model))

        def put() -> None:
            there = (directory / CHECKPOINT_MANIFEST).is_file()  # else keep_checkpoints has taken it already
            model = self._outputs.put_checkpoint(record, tuned, step, directory, metrics) if there else None
            for gone in self._outputs.prune(record):
                loop.call_soon_threadsafe(drop, gone)
            if model is not None:  # last, so that it is there once, however often this is tried
                self.journal.event(record.id, f"Checkpoint created at step {step}, served as {model}")

        self.journal.keep(record.id, put)
        self.spawn(self._after_checkpoint(live))

    def _hear_end(self, message: JobEnded, live: UnfinishedJob | None) -> None:
        counts = {"step": message.step, "trained_tokens": message.trained_tokens}
        if live is None:  # it was cancelled here; the index has its end already
            directory = self._outputs.directory(message.id)
            self.journal.keep(message.id, lambda: write_manifest(directory, self._store.update_job(message.id, **counts)))
        elif message.status == "succeeded":
            self.spawn(self.finish(live, "succeeded", **counts), live)
        elif message.status == "failed":
            problem = message.problem
            error = CoserveError("the job failed") if problem is None else make_error(problem)
            self.spawn(self.fail(live, error, **counts), live)
        else:
            self.left(live, message)

    def left(self, live: UnfinishedJob, message: JobEnded) -> None:
        """The engine has let go of a job that goes on later. Nobody asked for it: the engine is ending."""
        live.generation = None

    # --- ends ---

    async def fail(self, live: UnfinishedJob, error: CoserveError, **counts: int) -> None:
        """The job has failed."""
        await self.finish(live, "failed", error=error_object(error), **counts)

    async def finish(self, live: UnfinishedJob, status: JobStatus, **changes: Any) -> None:
        """Ends a job, unless it has ended. The manifest is written first and the index's row last, so that whoever reads the
        status can use the model and the files. Tries until the disk takes it."""
        id = live.record.id
        if self.live.get(id) is not live:
            return
        del self.live[id]
        if "error" in changes:
            _log.warning("the job has failed: %s", changes["error"].get("message"), extra={"job": id})
        self.ending[id] = live.record = dataclasses.replace(
            live.record, status=status, finished_at=now(), paused=False, **changes
        )
        await self.deliver(live)
        if status == "succeeded":
            result = await self.journal.keep(id, lambda: self._outputs.save_result(live.record))
            live.record = dataclasses.replace(
                live.record, fine_tuned_model=self.tuned(live.record), result_files=(result,), finished_at=now()
            )
        warnings = await self.export(live) if live.record.integrations else []
        await self.journal.keep(id, lambda: self.write_end(live, warnings))
        self.ending.pop(id, None)
        if status != "succeeded" and live.generation == self._engine.generation:
            await self._models.drop_loaded(live.record.tenant, self.tuned(live.record))
        self.advance()

    async def deliver(self, live: UnfinishedJob) -> None:
        """Brings what an ended job has made to where it is served from, which is where the engine wrote it."""

    async def export(self, live: UnfinishedJob) -> list[str]:
        """Writes the metrics of a job that has ended for its integrations. Returns a line for each that failed."""
        return await asyncio.to_thread(export_metrics, self._outputs.directory(live.record.id), live.record)

    def write_end(self, live: UnfinishedJob, warnings: list[str]) -> None:
        """In the journal's thread: writes all that a job's end changes."""
        record, id = live.record, live.record.id
        write_manifest(self._outputs.directory(id), record)
        if record.fine_tuned_model is not None:
            adapter = self._outputs.put_tuned(record, record.fine_tuned_model)
            if live.generation is not None:
                self._models.note_loaded(adapter, live.generation)
        self.publish_end(record, warnings)
        self.journal.end(id)

    def publish_end(self, record: JobRecord, warnings: Iterable[str] = ()) -> None:
        """In the journal's thread: adds the missing events of a job that has ended, and then its end to the index."""
        self.publish_steps(record)
        noted = {event.message for event in self.journal.events(record.id)}
        for note in end_notes(record, warnings):
            if note.message not in noted:
                self.journal.event(record.id, note.message, level=note.level)
        self._store.update_job(record.id, **end_fields(record))


def end_fields(record: JobRecord) -> dict[str, Any]:
    """What a job's end changes in its row."""
    return {name: getattr(record, name) for name in _END_FIELDS}


def end_notes(record: JobRecord, warnings: Iterable[str]) -> list[NewEvent]:
    """What is told of a job's end, the end itself last. warnings: lines to tell before it."""
    notes = [NewEvent(message=warning, level="warn") for warning in warnings]
    if record.fine_tuned_model is not None:
        notes.insert(0, NewEvent(message=f"New fine-tuned model created: {record.fine_tuned_model}"))
    if record.status == "failed":
        notes.append(NewEvent(message=f"The job failed: {(record.error or {}).get('message')}", level="error"))
    else:
        done = record.status == "succeeded"
        notes.append(NewEvent(message="The job has successfully completed" if done else "The job was cancelled"))
    return notes
