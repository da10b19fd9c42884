"""The index as an ingress uses it for jobs: what a tenant asks for is one transaction, and the job's holder finds it.

    create  a row that anybody may claim        cancel  the end and the next epoch: whoever has the job may write no more
    pause   a wish in the row                   resume  the same, and the row may be claimed if nobody has it

Owns: those transactions, and what describes a job beside its record. Does not own: who may do what (desk.py), what holders
write (fenced.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, func, or_, select, update

from coserve.core import NotFound
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.index.rows import NewEvent, note_removed, put_event, record_of, values_of
from coserve.server.index.store import Store
from coserve.server.index.tables import adapters, checkpoints, events, jobs
from coserve.server.records import ENDED, AdapterRecord, EventRecord, JobRecord, now
from coserve.server.replicas.claims import CLOCK

CREATE_S = 5.0
"""Seconds for which the creation of a job is tried again while the database refuses it."""
RETRY_S = 0.5


class Followed(NamedTuple):
    """How far a job's events are. seq: of the last one."""

    seq: int
    ended: bool


class GoneModel(NamedTuple):
    """What went with a job's model. names: of models. keys: of artifacts that nothing names any more."""

    names: list[str]
    keys: list[str]


class DeskStore(Store):
    """The index for an ingress. Methods raise as Store's do."""

    # --- what tenants ask for ---

    def create_job(
        self, record: JobRecord, start_sha256: str | None, notes: Collection[NewEvent], fingerprint: str = ""
    ) -> None:
        """Adds a job that may be claimed, with its first events. start_sha256: digest of the adapter that it continues.
        fingerprint: of the base that replicas must have to claim it; empty: any.

        Tries again for some seconds while the database refuses, since it may have taken the job without being heard: whoever is
        told of a refusal asks for another job. Raises StorageRefused after that.
        """
        limit, refused = time.monotonic() + CREATE_S, False
        while True:
            try:
                self._insert_job(record, start_sha256, notes, fingerprint)
                return
            except Conflict:  # ids are random
                if not refused:
                    raise
                return
            except StorageRefused:
                if time.monotonic() > limit:
                    raise
                refused = True
                time.sleep(RETRY_S)

    def _insert_job(
        self, record: JobRecord, start_sha256: str | None, notes: Collection[NewEvent], fingerprint: str
    ) -> None:
        with self.database.write() as connection:
            row = values_of(record) | {"lease_until": CLOCK, "start_sha256": start_sha256, "fingerprint": fingerprint}
            connection.execute(jobs.insert().values(row))
            for note in notes:
                put_event(connection, record.id, note, record.created_at, 0)

    def cancel_job(self, tenant: str, id: str) -> JobRecord:
        """Ends a job. Raises NotFound, Conflict if it has ended."""
        with self.database.write() as connection:
            row = _lock(connection, tenant, id)
            tokens = (row.progress or {}).get("trained_tokens")
            ended: dict[str, Any] = {
                "status": "cancelled", "finished_at": now(), "paused": False, "trained_tokens": tokens,
            }
            released = {"owner": None, "lease_until": None, "epoch": row.epoch + 1}
            connection.execute(update(jobs).where(jobs.c.id == id).values(ended | released))
            put_event(connection, id, NewEvent(message="The job was cancelled"), now(), row.epoch + 1)
            return dataclasses.replace(record_of(JobRecord, row), **ended)

    def set_paused(self, tenant: str, id: str, paused: bool) -> JobRecord:
        """Writes down whether a job is to wait. Raises NotFound, Conflict if it has ended."""
        with self.database.write() as connection:
            row = _lock(connection, tenant, id)
            record = record_of(JobRecord, row)
            if record.paused == paused:
                return record
            values: dict[str, Any] = {"paused": paused}
            if not paused and row.owner is None:
                values["lease_until"] = CLOCK
            connection.execute(update(jobs).where(jobs.c.id == id).values(values))
            note = NewEvent(message="The job was paused" if paused else "The job was resumed")
            put_event(connection, id, note, now(), row.epoch)
            return dataclasses.replace(record, paused=paused)

    def delete_model(self, adapter: AdapterRecord, last_step: int) -> GoneModel:
        """Takes a model of a job that has ended out of the index. With the job's result goes the checkpoint of its last step,
        which has the same weights."""
        assert adapter.job is not None
        with self.database.write() as connection:
            found = connection.execute(select(checkpoints).where(checkpoints.c.job == adapter.job).with_for_update()).all()
            own = [row for row in found if row.model == adapter.name]
            gone = own or [row for row in found if row.step == last_step]
            names = list(dict.fromkeys([adapter.name, *(row.model for row in gone)]))
            for row in gone:
                connection.execute(delete(checkpoints).where(checkpoints.c.id == row.id))
                note_removed(connection, checkpoints, row.job, row.id, [row.step])
            connection.execute(delete(adapters).where(adapters.c.tenant == adapter.tenant, adapters.c.name.in_(names)))
        return GoneModel(names, [adapter.directory, *(row.directory for row in gone)])

    # --- what is told of jobs ---

    def count_unfinished(self, tenant: str) -> int:
        """How many jobs of a tenant wait or run."""
        query = select(func.count()).select_from(jobs).where(jobs.c.tenant == tenant, jobs.c.status.not_in(ENDED))
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def count_waiting(self) -> int:
        """How many jobs of all tenants could be claimed."""
        free = or_(jobs.c.lease_until.is_(None), jobs.c.lease_until <= CLOCK)
        query = select(func.count()).select_from(jobs).where(jobs.c.status.not_in(ENDED), jobs.c.paused.is_(False), free)
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def progress_of(self, ids: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """How far jobs are, by id: trained_tokens, and tokens_per_second and finish if their pace is known."""
        query = select(jobs.c.id, jobs.c.progress).where(jobs.c.id.in_([*ids]), jobs.c.progress.is_not(None))
        with self.database.read() as connection:
            return {row.id: row.progress for row in connection.execute(query)}

    def followed(self, ids: Collection[str]) -> dict[str, Followed]:
        """How far the events of jobs are. Jobs that are not there are missing."""
        last = select(func.max(events.c.seq)).where(events.c.job == jobs.c.id).correlate(jobs).scalar_subquery()
        query = select(jobs.c.id, jobs.c.status, func.coalesce(last, 0).label("seq")).where(jobs.c.id.in_([*ids]))
        with self.database.read() as connection:
            return {row.id: Followed(row.seq, row.status in ENDED) for row in connection.execute(query)}

    def event_seq(self, job: str, id: str) -> int:
        """The seq of an event; 0 if there is none."""
        with self.database.read() as connection:
            return int(connection.execute(select(events.c.seq).where(events.c.job == job, events.c.id == id)).scalar() or 0)

    def events_after(self, job: str, seq: int, limit: int = 1000) -> list[EventRecord]:
        """Events of a job that come after one, oldest first."""
        query = select(events).where(events.c.job == job, events.c.seq > seq).order_by(events.c.seq).limit(limit)
        return self._find(EventRecord, query)


def _lock(connection: Connection, tenant: str, id: str) -> Any:
    """The row of a tenant's job that hasn't ended, which nobody else changes until the transaction ends. Raises NotFound,
    Conflict."""
    row = connection.execute(select(jobs).where(jobs.c.id == id, jobs.c.tenant == tenant).with_for_update()).first()
    if row is None:
        raise NotFound(f"there is no fine-tuning job {id[:64]}", param="fine_tuning_job_id")
    if row.status in ENDED:
        raise Conflict(f"job {id} has ended", param="fine_tuning_job_id")
    return row
