"""The index as the holder of jobs writes to it: whatever is written about a job says under which epoch, in the same
transaction.

A job that another replica has claimed, or that was cancelled, has a later epoch. Then nothing is written, and Fenced is raised:
a holder that was stopped for a while, or cut off, finds out with its first write at the latest.

Owns: what belongs into one transaction with a step, a checkpoint, a result, an end. Does not own: leases (claims.py), files,
which are in the artifact store before a row names them (deliveries.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, delete, select, update

from coserve.core import CoserveError
from coserve.server.index.database import Database
from coserve.server.index.rows import NewEvent, note_removed, put_adapter, put_checkpoint, put_event, record_of, values_of
from coserve.server.index.store import Store
from coserve.server.index.tables import adapters, checkpoints, files, jobs
from coserve.server.records import ENDED, AdapterRecord, CheckpointRecord, FileRecord, JobRecord, now


class Fenced(CoserveError):
    """The job isn't this replica's any more."""


class FencedStore(Store):
    """The index for the jobs of one replica.

    epochs: tells under which epoch this replica has a job; None if it hasn't. on_fenced: is told of a job that turns out to be
    another's, in any thread.
    """

    def __init__(
        self, database: Database, epochs: Callable[[str], int | None], on_fenced: Callable[[str], None] = lambda job: None
    ) -> None:
        super().__init__(database)
        self._epochs, self._on_fenced = epochs, on_fenced

    def _lock_job(self, connection: Connection, id: str) -> int:
        """As Store's. Raises Fenced."""
        epoch = self._epochs(id)
        if epoch is None:
            raise Fenced(f"job {id} isn't this replica's any more")
        row = connection.execute(select(jobs.c.epoch).where(jobs.c.id == id).with_for_update()).first()
        if row is None or row.epoch != epoch:
            self._on_fenced(id)
            raise Fenced(f"job {id} isn't this replica's any more: another one has it, or it was cancelled")
        return epoch

    def update_job(self, id: str, **changes: Any) -> JobRecord:
        """As Store's, for all but a job's end. Raises Fenced."""
        assert changes.get("status") not in ENDED, "a job's end is more than its row"
        with self.database.write() as connection:
            self._lock_job(connection, id)
            row = connection.execute(select(jobs).where(jobs.c.id == id)).one()
            job = dataclasses.replace(record_of(JobRecord, row), **changes)
            if changes:
                connection.execute(update(jobs).where(jobs.c.id == id).values(changes))
        return job

    def put_step(self, job: str, step: int, num_steps: int, event: NewEvent, progress: dict[str, Any]) -> None:
        """Records a step that is done: its metrics and how far the job is. A step that runs again replaces what was told of it.
        Raises Fenced."""
        with self.database.write() as connection:
            epoch = self._lock_job(connection, job)
            put_event(connection, job, event, now(), epoch)
            values = {"step": step, "num_steps": num_steps, "progress": progress}
            connection.execute(update(jobs).where(jobs.c.id == job).values(values))

    def put_strikes(self, job: str, strikes: int, struck_at: int) -> None:
        """Records evidence that the job is the cause of engines' ends. Raises Fenced."""
        with self.database.write() as connection:
            self._lock_job(connection, job)
            connection.execute(update(jobs).where(jobs.c.id == job).values(strikes=strikes, struck_at=struck_at))

    def put_declined(self, job: str, reason: str) -> None:
        """Records that this replica can't go on with the job, and why. Raises Fenced."""
        with self.database.write() as connection:
            self._lock_job(connection, job)
            row = connection.execute(select(jobs.c.owner, jobs.c.declined).where(jobs.c.id == job)).one()
            declined = {**(row.declined or {}), row.owner: reason}
            connection.execute(update(jobs).where(jobs.c.id == job).values(declined=declined))

    def commit_checkpoint(
        self, record: CheckpointRecord, adapter: AdapterRecord, keep: int, message: str
    ) -> list[CheckpointRecord]:
        """Makes a checkpoint visible whose files are in the artifact store: as a model, and as what the job goes on from.

        keep: how many checkpoints of the job stay, whichever replicas wrote them. message: of the event. Returns those that are
        gone; also later ones of earlier epochs, which this epoch's takeover has skipped as damaged. Later ones of this epoch
        stay: the engine has died, and comes to this step again. Doing it again changes nothing. Raises Fenced.
        """
        mine = checkpoints.c.job == record.job
        with self.database.write() as connection:
            epoch = self._lock_job(connection, record.job)
            same = [mine, checkpoints.c.step == record.step, checkpoints.c.epoch == epoch]
            known = connection.execute(select(checkpoints.c.sha256).where(*same)).scalar()
            put_checkpoint(connection, dataclasses.replace(record, epoch=epoch))
            put_adapter(connection, dataclasses.replace(adapter, epoch=epoch))
            rows = connection.execute(select(checkpoints).where(mine).order_by(checkpoints.c.step.desc())).all()
            found = [record_of(CheckpointRecord, row) for row in rows]
            kept = [one.step for one in found if one.step <= record.step or one.epoch == epoch][:max(1, keep)]
            gone = [one for one in found if one.step not in kept]
            for one in gone:
                connection.execute(delete(checkpoints).where(checkpoints.c.id == one.id))
                named = [adapters.c.tenant == adapter.tenant, adapters.c.name == one.model]
                connection.execute(delete(adapters).where(*named))
                note_removed(connection, checkpoints, one.job, one.id, [one.step])
            if known != record.sha256 and record.step in kept:
                put_event(connection, record.job, NewEvent(message=message), now(), epoch)
        return gone

    def end_job(
        self, job: str, changes: Mapping[str, Any], notes: Iterable[NewEvent], adapter: AdapterRecord | None = None,
        file: FileRecord | None = None,
    ) -> None:
        """Ends a job, which then has no holder, and lists what it has made, whose files are in the artifact store. So nobody
        sees a part of it, and a cancel comes before all of it or too late. Doing it again changes nothing. Raises Fenced.

        changes: the job's fields from now on, a status that ends it among them. notes: events that tell of it. adapter, file:
        its tuned model and its result file.
        """
        with self.database.write() as connection:
            epoch = self._lock_job(connection, job)
            if connection.execute(select(jobs.c.status).where(jobs.c.id == job)).scalar_one() in ENDED:
                return
            if adapter is not None:
                put_adapter(connection, dataclasses.replace(adapter, epoch=epoch))
            if file is not None and connection.execute(select(files.c.id).where(files.c.id == file.id)).first() is None:
                connection.execute(files.insert().values(values_of(file)))
            for note in notes:
                put_event(connection, job, note, now(), epoch)
            values = {**changes, "owner": None, "lease_until": None}
            connection.execute(update(jobs).where(jobs.c.id == job).values(values))
