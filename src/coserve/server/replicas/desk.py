"""Finetuning jobs of all tenants at an ingress, as routes see them. What JobService is for a single server (jobs/service.py),
but nothing runs here: rows of the index say what is wanted, and the replicas that have the jobs see to it (jobs.py).

Owns: who may do what with which job, what a new job needs in the artifact store. Does not own: the transactions (deskrows.py),
streams of events (following.py), reading the data, except for looks before a job is created.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coserve.config.settings import AdapterConfig
from coserve.core import CapacityError, CoserveError, NotFound
from coserve.finetune.datacheck import DataCheck
from coserve.finetune.defaults import not_used
from coserve.peft.described import described_adapter
from coserve.server.errors import Conflict, Forbidden, TooLarge
from coserve.server.index.manifest import is_job_id
from coserve.server.index.rows import NewEvent
from coserve.server.index.store import Store
from coserve.server.jobs.body import CreateJob
from coserve.server.jobs.data import DataFile, DataReader
from coserve.server.jobs.intake import dated, disk_problem, find_data, new_job
from coserve.server.jobs.objects import Pace, job_object
from coserve.server.jobs.spec import JobSpec, read_spec, unused
from coserve.server.records import ENDED, CheckpointRecord, EventRecord, JobRecord, now
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.deskrows import DeskStore
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.following import EventFollowers
from coserve.server.replicas.models import ReplicaModels
from coserve.server.replicas.parcels import checkpoint_key, start_key
from coserve.server.replicas.sweeping import sweep_job
from coserve.server.replicas.usage import StoredBytes
from coserve.server.settings import ServerConfig
from coserve.server.shelf import EngineFacts

_MAX_PACES = 10_000


class _Continued(NamedTuple):
    """The adapter that a job is to continue. directory: a copy here. config: its settings."""

    directory: Path
    config: AdapterConfig


class JobDesk:
    """What tenants can do with jobs. Coroutines belong to the event loop; other public methods to any thread.

    journal: streams of events. disk: how many bytes tenants have.
    """

    def __init__(
        self, *, store: Store, files: StoredFiles, models: ReplicaModels, engine: EngineFacts, config: ServerConfig,
        artifacts: ArtifactStore, nudge: Callable[[str], None] = lambda job: None,
    ) -> None:
        """nudge: tells all replicas that the row of a job has changed; they find out by themselves within seconds. It is called
        on the event loop."""
        self._index, self._store = store, DeskStore(store.database.limited())
        self._files, self._models, self._engine = files, models, engine
        self._config, self._artifacts, self._nudge = config, artifacts, nudge
        self.journal = EventFollowers(self._store)
        self.disk = StoredBytes(self._store)
        self._reader = DataReader(config.chat_template)
        self._creating: Counter[str] = Counter()  # tenant -> number of its jobs that are being created
        self._paces: OrderedDict[str, Pace | None] = OrderedDict()
        self._sweeps: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Nothing has to be found again: the index is the truth."""

    async def stop(self) -> None:
        """Ends the streams of events. Jobs go on."""
        await self.journal.close()
        for sweeping in list(self._sweeps):
            sweeping.cancel()
        await asyncio.gather(*self._sweeps, return_exceptions=True)
        if self._store.database is not self._index.database:
            self._store.close()

    # --- creation ---

    async def create(self, tenant: str, body: CreateJob) -> JobRecord:
        """A new job, whose status is validating_files. Raises InvalidRequest, NotFound (model), CapacityError."""
        most = self._config.max_tenant_jobs
        self._creating[tenant] += 1
        try:
            unfinished = await asyncio.to_thread(self._store.count_unfinished, tenant)
            if unfinished + self._creating[tenant] > most:
                raise CapacityError(f"{most} of your jobs wait or run already; try again when one has ended")
            return await self._create(tenant, body)
        finally:
            self._creating[tenant] -= 1
            if not self._creating[tenant]:
                del self._creating[tenant]

    async def _create(self, tenant: str, body: CreateJob) -> JobRecord:
        if (problem := await asyncio.to_thread(self._disk_problem, tenant)) is not None:
            raise TooLarge(f"training_file: {problem}", param="training_file")
        continued, spec = await self._read_body(tenant, body)
        record = new_job(tenant, body, spec, continues=continued is not None)
        await asyncio.to_thread(self._put, record, continued, spec)
        self._nudge(record.id)
        return record

    def _put(self, record: JobRecord, continued: _Continued | None, spec: JobSpec) -> None:
        """Keeps the adapter that a job continues, which may be deleted, then adds the row."""
        for id, param in ((record.training_file, "training_file"), (record.validation_file, "validation_file")):
            if id is not None:
                find_data(self._store, record.tenant, id, param)
        notes = [NewEvent(message=f"Created fine-tuning job: {record.id}")]
        start = None
        if continued is not None:
            start = self._artifacts.put_directory(start_key(record.id), continued.directory).sha256
            if left := unused(spec.settings, continued.config):
                notes.append(NewEvent(message=not_used(record.base, left), level="warn"))
        self._store.create_job(record, start, notes, self._engine.info.fingerprint)

    async def _read_body(self, tenant: str, body: CreateJob) -> tuple[_Continued | None, JobSpec]:
        """What a body asks for. Raises InvalidRequest, NotFound (model)."""
        continued = None
        if body.model not in self._models.base_names:
            continued = await asyncio.to_thread(self._find_continued, tenant, body.model)
        info, adapter = self._engine.info, None if continued is None else continued.config
        return continued, read_spec(body, self._config, info.max_model_len, adapter, info.hidden_size or None)

    def _find_continued(self, tenant: str, name: str) -> _Continued:
        directory = Path(self._models.find_files(self._models.find_record(tenant, name)).directory)
        try:
            return _Continued(directory, described_adapter(directory))
        except CoserveError as error:
            raise NotFound("model: the files of this adapter are gone or damaged", param="model") from error

    async def check_data(self, tenant: str, body: CreateJob) -> tuple[DataCheck, DataCheck | None]:
        """What the files of a job hold that this body would create: the training file and the validation file. No job is
        created. Raises as `create`."""
        _, spec = await self._read_body(tenant, body)
        found = await self._look(tenant, spec, body.training_file, "training_file")
        if body.validation_file is None:
            return found, None
        return found, await self._look(tenant, spec, body.validation_file, "validation_file")

    async def _look(self, tenant: str, spec: JobSpec, id: str, param: str) -> DataCheck:
        record = await asyncio.to_thread(find_data, self._store, tenant, id, param)
        path = await asyncio.to_thread(self._files.path, record)
        file = DataFile(path, record.filename, param)
        return await self._reader.look(tenant, Path(self._engine.info.directory), dated(spec.config, now()), file)

    # --- steering ---

    async def cancel(self, tenant: str, id: str) -> JobRecord:
        """Ends a job; its checkpoints stay. Raises NotFound, Conflict."""
        record = await self._change(id, lambda: self._store.cancel_job(tenant, id))
        sweeping = asyncio.create_task(sweep_job(self._store, self._artifacts, id))  # its holder, if it has one, does so too
        self._sweeps.add(sweeping)
        sweeping.add_done_callback(self._sweeps.discard)
        return record

    async def pause(self, tenant: str, id: str) -> JobRecord:
        """A waiting job won't start. A running one stops; it keeps its memory but gives up its place among max_jobs. Raises
        NotFound, Conflict."""
        return await self._change(id, lambda: self._store.set_paused(tenant, id, True))

    async def resume(self, tenant: str, id: str) -> JobRecord:
        """The job goes on at once if a replica holds it, else when its turn comes. Raises NotFound, Conflict."""
        if (problem := await asyncio.to_thread(self._disk_problem, tenant)) is not None:
            found = await asyncio.to_thread(self.get, tenant, id)
            if found.paused:
                raise Conflict(f"job {id} can't go on: {problem}", param="fine_tuning_job_id")
        return await self._change(id, lambda: self._store.set_paused(tenant, id, False))

    async def _change(self, id: str, change: Callable[[], JobRecord]) -> JobRecord:
        _check_id(id)
        record = await asyncio.to_thread(change)
        self._paces.pop(id, None)
        self._nudge(id)
        return record

    def _disk_problem(self, tenant: str) -> str | None:
        return disk_problem(self.disk.bytes_of(tenant), self._config.max_tenant_file_bytes)

    # --- reading ---

    def get(self, tenant: str, id: str) -> JobRecord:
        """Raises NotFound."""
        _check_id(id)
        record = self._store.get_job(tenant, id)
        self._note_paces([record])
        return record

    def list_jobs(
        self, tenant: str, *, after: str | None, limit: int, metadata: dict[str, str] | None
    ) -> tuple[list[JobRecord], bool]:
        """The tenant's jobs, newest first, and whether more follow."""
        found, more = self._store.list_jobs(tenant, after=after, limit=limit, metadata=metadata)
        self._note_paces(found)
        return found, more

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
        seq = 0
        if after is not None:
            await asyncio.to_thread(self._store.list_events, id, after=after, limit=1)
            seq = await asyncio.to_thread(self._store.event_seq, id, after)
        return self.journal.follow(record, seq)

    def describe(self, record: JobRecord) -> dict[str, Any]:
        """OpenAI's object of a job; of a running job with the pace that was last read."""
        pace = None if record.status != "running" or record.paused else self._paces.get(record.id)
        return job_object(record, self._config.organization, pace)

    def count_waiting(self) -> int:
        """How many jobs of all tenants no replica has, although they could run. Raises StorageRefused."""
        return self._store.count_waiting()

    def _note_paces(self, records: list[JobRecord]) -> None:
        running = [record.id for record in records if record.status == "running" and not record.paused]
        if not running:
            return
        for id, progress in self._store.progress_of(running).items():
            self._paces[id] = _pace(progress)
            self._paces.move_to_end(id)
        while len(self._paces) > _MAX_PACES:
            self._paces.popitem(last=False)

    # --- models ---

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
        gone = await asyncio.to_thread(self._store.delete_model, adapter, job.step)
        for model in gone.names:
            await self._models.drop_loaded(tenant, model)
        self._models.discard(*dict.fromkeys(map(checkpoint_key, gone.keys)))
        return gone.names


def _check_id(id: str) -> None:
    if not is_job_id(id):
        raise NotFound("there is no fine-tuning job of this id", param="fine_tuning_job_id")


def _pace(progress: Mapping[str, Any]) -> Pace | None:
    if "finish" not in progress:
        return None
    return Pace(tokens_per_second=float(progress["tokens_per_second"]), finish=int(progress["finish"]))
