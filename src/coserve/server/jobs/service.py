"""Finetuning jobs of all tenants, as routes see them: created, checked, steered, listed; found again at the server's start.

    create -> validating_files -> queued -> running -> succeeded | failed | cancelled
              (a thread reads the data)   (runner.py and the engine)

Owns: who may do what with which job, the index's recovery from manifests. Does not own: bodies (spec.py), reading the data
(validation.py), what happens from the queue on (runner.py), files and models of a job (outputs.py).
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from coserve.config.settings import AdapterConfig
from coserve.core import CapacityError, NotFound
from coserve.durable import sync
from coserve.finetune.datacheck import DataCheck
from coserve.finetune.defaults import not_used
from coserve.server.errors import Conflict, Forbidden, TooLarge
from coserve.server.index.disk import storage_errors
from coserve.server.index.files import FileService
from coserve.server.index.manifest import find_manifests, is_job_id, write_manifest
from coserve.server.index.store import Store
from coserve.server.jobs.body import CreateJob
from coserve.server.jobs.data import DataReader
from coserve.server.jobs.intake import dated, disk_problem, new_job
from coserve.server.jobs.objects import job_object
from coserve.server.jobs.outputs import JobOutputs
from coserve.server.jobs.queue import UnfinishedJob
from coserve.server.jobs.runner import JobRunner
from coserve.server.jobs.spec import JobSpec, read_spec, unused
from coserve.server.jobs.usage import TenantDisk
from coserve.server.jobs.validation import DataValidation
from coserve.server.link.engineclient import EngineClient
from coserve.server.models import ModelRegistry
from coserve.server.records import ENDED, CheckpointRecord, EventRecord, JobRecord, now
from coserve.server.settings import ServerConfig

_DISK_WAIT_S, _LOOK_EVERY_S = 20.0, 0.05
"""Seconds that a change waits for a disk that neither takes nor refuses it, and seconds between two looks."""


class JobService:
    """What tenants can do with jobs. Coroutines belong to the event loop; other public methods to any thread."""

    def __init__(
        self, *, store: Store, files: FileService, models: ModelRegistry, engine: EngineClient, config: ServerConfig
    ) -> None:
        """Raises CapacityError where the data directory can't be written."""
        self._store, self._models, self._engine, self._config = store, models, engine, config
        self._outputs = JobOutputs(config.data_dir / "jobs", store, files, models)
        self._runner = JobRunner(store, self._outputs, models, engine, config, self._check_disk)
        self.journal = self._runner.journal
        self.disk = TenantDisk(config.data_dir / "jobs", store, models.copied_bytes)
        self._reader = DataReader(config.chat_template)
        self._validation = DataValidation(self._runner, self._outputs, self._reader, lambda: engine.info)
        self._creating: Counter[str] = Counter()  # tenant -> number of its jobs that are being created
        engine.supervisor.on_up(self._engine_up)

    async def start(self) -> None:
        """Reads manifests into the index, then goes on with unfinished jobs. The engine must have been started."""
        for record in await self.journal.write(self._recover):
            self._runner.live[record.id] = UnfinishedJob(record)
        if self._engine.ready:
            await self._engine_up()

    async def stop(self) -> None:
        """To be called before the engine ends. Waits for what is being written; jobs go on at the next start."""
        await self._runner.stop()

    # --- creation ---

    async def create(self, tenant: str, body: CreateJob) -> JobRecord:
        """A new job, whose status is validating_files. Raises InvalidRequest, NotFound (model), CapacityError."""
        most = self._config.max_tenant_jobs
        unfinished = sum(live.record.tenant == tenant for live in self._runner.live.values())
        if unfinished + self._creating[tenant] >= most:
            raise CapacityError(f"{most} of your jobs wait or run already; try again when one has ended")
        self._creating[tenant] += 1
        try:
            return await self._create(tenant, body)
        finally:
            self._creating[tenant] -= 1

    async def _create(self, tenant: str, body: CreateJob) -> JobRecord:
        if (problem := await asyncio.to_thread(self._disk_problem, tenant)) is not None:
            raise TooLarge(f"training_file: {problem}", param="training_file")
        source, continued, spec = await self._read_body(tenant, body)
        record = new_job(tenant, body, spec, continues=source is not None)
        await asyncio.to_thread(self._outputs.data_files, record)
        await self.journal.write(functools.partial(self._write_new, record, source))
        if continued is not None and (left := unused(spec.settings, continued)):
            self._runner.note(record.id, not_used(body.model, left), level="warn")
        live = self._runner.live[record.id] = UnfinishedJob(record)
        self._validation.begin(live)
        return record

    async def _read_body(self, tenant: str, body: CreateJob) -> tuple[Path | None, AdapterConfig | None, JobSpec]:
        """What a body asks for: the directory and the settings of the adapter that it continues, if it continues one, and its
        settings. Raises InvalidRequest, NotFound (model)."""
        source = continued = None
        if body.model not in self._models.base_names:
            found = await asyncio.to_thread(self._models.find_record, tenant, body.model)
            source = Path((await asyncio.to_thread(self._models.find_files, found)).directory)
            continued = await asyncio.to_thread(self._outputs.continued, source)
        info = self._engine.info
        return source, continued, read_spec(body, self._config, info.max_model_len, continued, info.hidden_size or None)

    async def check_data(self, tenant: str, body: CreateJob) -> tuple[DataCheck, DataCheck | None]:
        """What the files of a job hold that this body would create: the training file and the validation file. No job is
        created. Raises as `create`."""
        _, _, spec = await self._read_body(tenant, body)
        files = self._outputs.tenant_files
        training, validation = await asyncio.to_thread(files, tenant, body.training_file, body.validation_file)
        directory, config = Path(self._engine.info.directory), dated(spec.config, now())
        found = await self._reader.look(tenant, directory, config, training)
        return found, None if validation is None else await self._reader.look(tenant, directory, config, validation)

    def _write_new(self, record: JobRecord, source: Path | None) -> None:
        """Writes the job's directory. The manifest comes last, since without it there is no job."""
        directory = self._outputs.directory(record.id)
        try:
            with storage_errors():
                directory.mkdir()
                if source is not None:
                    self._outputs.copy_start(record.id, source)
                write_manifest(directory, record)
                sync(self._outputs.root)
            self._store.add_job(record)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self.journal.event(record.id, f"Created fine-tuning job: {record.id}")

    async def _engine_up(self) -> None:
        for live in list(self._runner.live.values()):
            if live.record.status == "validating_files":
                self._validation.begin(live)
        self._runner.advance()

    # --- steering ---

    async def cancel(self, tenant: str, id: str) -> JobRecord:
        """Ends a job; its checkpoints stay. Raises NotFound, Conflict."""
        live = await self._unfinished(tenant, id)
        self._validation.cancel(id)
        self._runner.act(live, "cancel")
        end = self._runner.spawn(self._runner.finish(live, "cancelled"), live)
        await asyncio.sleep(0)  # lets the task begin
        await self._written_or_refused(id, end)
        return live.record

    async def pause(self, tenant: str, id: str) -> JobRecord:
        """A waiting job won't start. A running one stops; it keeps its memory but gives up its place among max_jobs. Raises
        NotFound, Conflict."""
        return await self._set_paused(tenant, id, True)

    async def resume(self, tenant: str, id: str) -> JobRecord:
        """The job goes on at once if the engine holds it, else when its turn comes. Raises NotFound, Conflict."""
        return await self._set_paused(tenant, id, False)

    async def _set_paused(self, tenant: str, id: str, paused: bool) -> JobRecord:
        live = await self._unfinished(tenant, id)
        if live.record.paused == paused:
            return live.record
        if not paused and (problem := await asyncio.to_thread(self._disk_problem, tenant)) is not None:
            raise Conflict(f"job {id} can't go on: {problem}", param="fine_tuning_job_id")
        self._runner.act(live, "pause" if paused else "resume")
        live.steps.clear()
        self._runner.note(id, "The job was paused" if paused else "The job was resumed")
        written = self._runner.change(live, manifest=True, paused=paused)
        self._runner.advance()
        await self._written_or_refused(id, written)
        return live.record

    async def _written_or_refused(self, id: str, written: asyncio.Future[None]) -> None:
        """Waits until a change is written, or refused by the disk for now. A refused change holds too, and is written later."""
        limit = time.monotonic() + _DISK_WAIT_S
        while not written.done() and not self.journal.refuses(id) and time.monotonic() < limit:
            await asyncio.wait([written], timeout=_LOOK_EVERY_S)

    async def _check_disk(self, live: UnfinishedJob) -> None:
        """After a checkpoint: pauses the job if its tenant has more on disk than it may."""
        record = live.record
        problem = await asyncio.to_thread(self._disk_problem, record.tenant)
        if problem is not None and not live.record.paused and record.id in self._runner.live:
            self._runner.note(record.id, f"The job waits: {problem}, then resume it", level="warn")
            await self._set_paused(record.tenant, record.id, True)

    def _disk_problem(self, tenant: str) -> str | None:
        """What to tell a tenant whose files, jobs and adapters take more than they may; None if they don't."""
        return disk_problem(self.disk.bytes_of(tenant), self._config.max_tenant_file_bytes)

    async def _unfinished(self, tenant: str, id: str) -> UnfinishedJob:
        await asyncio.to_thread(self.get, tenant, id)
        live = self._runner.live.get(id)
        if live is None and self._runner.ending.get(id) is not None and self._runner.ending[id].status == "succeeded":
            raise Conflict(f"job {id} has run all its steps; its result is being written", param="fine_tuning_job_id")
        if live is None:
            raise Conflict(f"job {id} has ended", param="fine_tuning_job_id")
        return live

    # --- reading ---

    def get(self, tenant: str, id: str) -> JobRecord:
        """Raises NotFound."""
        if not is_job_id(id):
            raise NotFound("there is no fine-tuning job of this id", param="fine_tuning_job_id")
        return self._runner.present(self._store.get_job(tenant, id))

    def list_jobs(
        self, tenant: str, *, after: str | None, limit: int, metadata: dict[str, str] | None
    ) -> tuple[list[JobRecord], bool]:
        """The tenant's jobs, newest first, and whether more follow."""
        found, more = self._store.list_jobs(tenant, after=after, limit=limit, metadata=metadata)
        return [self._runner.present(record) for record in found], more

    def list_events(self, tenant: str, id: str, *, after: str | None, limit: int) -> tuple[list[EventRecord], bool]:
        """Newest first. Raises NotFound."""
        return self._store.list_events(self.get(tenant, id).id, after=after, limit=limit)

    def list_checkpoints(self, tenant: str, id: str, *, after: str | None, limit: int) -> tuple[list[CheckpointRecord], bool]:
        """Newest first. Raises NotFound."""
        return self._store.list_checkpoints(self.get(tenant, id).id, after=after, limit=limit)

    async def follow(self, tenant: str, id: str, after: str | None) -> AsyncIterator[EventRecord]:
        """Yields events as they come, oldest first, until the job ends. after: the id of an event; only later ones are told.
        Raises NotFound, InvalidRequest (after)."""
        record = await asyncio.to_thread(self.get, tenant, id)
        if after is not None:
            await asyncio.to_thread(self._store.list_events, id, after=after, limit=1)
        return self.journal.follow(record, lambda: self._store.get_job(tenant, id).status in ENDED, after)

    def describe(self, record: JobRecord) -> dict[str, Any]:
        """OpenAI's object of a job; of a running job with its pace."""
        live = self._runner.live.get(record.id)
        pace = None if live is None or record.status in ENDED else live.pace()
        return job_object(record, self._config.organization, pace)

    async def delete_model(self, tenant: str, name: str) -> list[str]:
        """Deletes one of the tenant's own tuned models with its files. Returns the names of all deleted models: with a job's
        result goes the checkpoint of its last step. Raises NotFound, Forbidden, Conflict."""
        if name in self._models.base_names:
            raise Forbidden(f"model: {name} is the base model", param="model")
        adapter = await asyncio.to_thread(self._models.find_record, tenant, name)
        if adapter.tenant != tenant or adapter.job is None:
            raise Forbidden(f"model: {name} is not the model of a finetuning job of yours", param="model")
        job = await asyncio.to_thread(self.get, tenant, adapter.job)
        if job.status not in ENDED:
            raise Conflict(f"model: job {adapter.job} has not ended; cancel it first", param="model")
        gone = await self.journal.write(functools.partial(self._outputs.delete_model, adapter, job.step))
        self.disk.forget(adapter.job)
        for model in gone:
            await self._models.drop_loaded(tenant, model)
        return gone

    # --- the server's start ---

    def _recover(self) -> list[JobRecord]:
        """Makes the index agree with the manifests. Returns the jobs that are to go on, oldest first."""
        for record in find_manifests(self._outputs.root):
            try:
                listed = self._store.get_job(None, record.id)
            except NotFound:
                self._store.add_job(record)
                self.journal.event(record.id, "The job was listed again from its directory", level="warn")
                self._runner.publish_steps(record)
            else:
                if listed.status in ENDED:
                    continue
                if record.status in ENDED:  # the crash came before the index had it
                    self._runner.publish_end(record)
            self._outputs.restore(record, self._runner.tuned(record))
        return self._store.unfinished_jobs()
