"""The index: keys, files, jobs, events, checkpoints and adapters, for looking them up.

All methods are synchronous and short, and any thread may call them. Each of them may also raise CapacityError, if the disk is
full or the database busy, and InvalidRequest, for a value that can't be stored, such as NUL in a text.

Owns: every query. Does not own: tables (tables.py), the connection and its errors (database.py), files on disk, from which the
index can be rebuilt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import URL, Column, ColumnElement, Connection, Select, Table, delete, func, select, tuple_, update

from coserve.core import CapacityError, InvalidRequest, NotFound
from coserve.server.index.database import Database
from coserve.server.index.rows import (
    NewEvent,
    RecordT,
    note_removed,
    put_adapter,
    put_checkpoint,
    put_event,
    record_of,
    values_of,
)
from coserve.server.index.tables import adapters, checkpoints, events, files, jobs, keys, places, removed
from coserve.server.records import (
    ENDED,
    AdapterRecord,
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    KeyRecord,
)

_BYTES = "files"
"""The row of `places` for what files, checkpoints and adapters hold."""
_PLACE_LOCK = 0x636F7366
"""Any number that other programs on the same PostgreSQL don't use."""


class Store:
    """The index.

    Lists are returned as (entries, whether more follow). after: the id of the last entry of the page before, which may be
    deleted by now; InvalidRequest is raised if the list never had such an entry.
    """

    def __init__(self, database: str | URL | Database) -> None:
        """database: its URL, SQLAlchemy's, of SQLite or PostgreSQL. Raises ConfigError where the database can't be used."""
        self.database = database if isinstance(database, Database) else Database(database)

    def close(self) -> None:
        """Closes the database's connections."""
        self.database.close()

    # --- keys ---

    def add_key(self, record: KeyRecord) -> None:
        """Adds a key. Raises Conflict where it exists."""
        with self.database.write() as connection:
            connection.execute(keys.insert().values(values_of(record)))

    def list_keys(self) -> list[KeyRecord]:
        """All keys, revoked ones too, oldest first."""
        return self._find(KeyRecord, select(keys).order_by(keys.c.seq))

    def find_key(self, digest: str) -> KeyRecord | None:
        """The key with a digest, also if it is revoked."""
        return next(iter(self._find(KeyRecord, select(keys).where(keys.c.digest == digest))), None)

    def revoke_key(self, id: str, at: int) -> None:
        """Revokes a key at a time in Unix seconds. One that is revoked already keeps its time. Raises NotFound."""
        with self.database.write() as connection:
            time = func.coalesce(keys.c.revoked_at, at)
            if connection.execute(update(keys).where(keys.c.id == id).values(revoked_at=time)).rowcount == 0:
                raise NotFound(f"there is no key {id}", param="id")

    # --- files ---

    def add_file(self, record: FileRecord) -> None:
        """Raises Conflict where the id exists."""
        with self.database.write() as connection:
            connection.execute(files.insert().values(values_of(record)))

    def get_file(self, tenant: str, id: str) -> FileRecord:
        """Raises NotFound, also for another tenant's."""
        found = self._find(FileRecord, select(files).where(files.c.tenant == tenant, files.c.id == id))
        if not found:
            raise NotFound(f"there is no file {id[:64]}", param="file_id")
        return found[0]

    def delete_file(self, tenant: str, id: str) -> None:
        """Raises NotFound, also for another tenant's."""
        if not self._remove(_FILES, tenant, id):
            raise NotFound(f"there is no file {id[:64]}", param="file_id")

    def list_files(
        self, tenant: str, *, purpose: str | None = None, after: str | None = None, limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[FileRecord], bool]:
        """A tenant's files by creation time; desc: newest first."""
        wanted = () if purpose is None else (files.c.purpose == purpose,)
        return self._list(FileRecord, _FILES, tenant, after, limit, order, wanted)

    def count_file_bytes(self, tenant: str) -> int:
        """The bytes of all files of a tenant together."""
        query = select(func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.tenant == tenant)
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def count_files(self, tenant: str) -> int:
        """How many files a tenant has."""
        with self.database.read() as connection:
            return int(connection.execute(select(func.count()).select_from(files).where(files.c.tenant == tenant)).scalar_one())

    # --- where the bytes are ---

    def names_bytes(self) -> bool:
        """Whether there is a file, a checkpoint or an adapter, whose bytes must then be somewhere."""
        with self.database.read() as connection:
            some = (connection.execute(select(table.c.created_at).limit(1)) for table in (files, checkpoints, adapters))
            return any(rows.first() is not None for rows in some)

    def find_place(self) -> str | None:
        """The id of the place that holds the bytes of all rows, if one is noted."""
        with self.database.read() as connection:
            return _find_place(connection)

    def settle_place(self, choose: Callable[[], str]) -> str:
        """The same. Where none is noted, it is what `choose` returns; other processes that ask meanwhile wait, so that one
        chooses for all. Raises what `choose` raises."""
        known = self.find_place()
        if known is not None:
            return known
        with self.database.write() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's transactions exclude each other anyway
                connection.execute(select(func.pg_advisory_xact_lock(_PLACE_LOCK)))
            known = _find_place(connection)
            if known is None:
                known = choose()
                connection.execute(places.insert().values(what=_BYTES, id=known))
        return known

    def all_files(self) -> list[FileRecord]:
        """Files of all tenants, oldest first."""
        return self._find(FileRecord, select(files).order_by(files.c.created_at, files.c.seq))

    # --- jobs ---

    def add_job(self, record: JobRecord) -> None:
        """Raises Conflict where the id exists."""
        with self.database.write() as connection:
            connection.execute(jobs.insert().values(values_of(record)))

    def get_job(self, tenant: str | None, id: str) -> JobRecord:
        """tenant None: anybody's job. Raises NotFound, also for another tenant's."""
        with self.database.read() as connection:
            return _get_job(connection, tenant, id)

    def update_job(self, id: str, **changes: Any) -> JobRecord:
        """Changes fields of a job, and returns it as it is then. Raises NotFound. changes: fields of JobRecord."""
        with self.database.write() as connection:
            self._lock_job(connection, id)
            job = dataclasses.replace(_get_job(connection, None, id), **changes)
            if changes:
                connection.execute(update(jobs).where(jobs.c.id == id).values(changes))
        return job

    def _lock_job(self, connection: Connection, id: str) -> int:
        """Keeps others from writing about a job until the transaction ends. Returns the epoch of what is written. Raises
        NotFound."""
        if connection.execute(select(jobs.c.id).where(jobs.c.id == id).with_for_update()).first() is None:
            raise _no_job(id)
        return 0

    def list_jobs(
        self, tenant: str, *, after: str | None = None, limit: int = 20, metadata: dict[str, str] | None = None,
    ) -> tuple[list[JobRecord], bool]:
        """A tenant's jobs, newest first. metadata: pairs that the jobs must all have."""
        wanted = (metadata or {}).items()
        found: list[JobRecord] = []
        with self.database.read() as connection:
            query = _page(connection, _JOBS, tenant, after=after)
            if not wanted:
                query = query.limit(limit + 1)
            # Pairs are compared here, since the databases disagree about keys with quotes and dots.
            for row in connection.execution_options(yield_per=100).execute(query):
                if wanted <= row.metadata.items():
                    found.append(record_of(JobRecord, row))
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def job_states(self, tenant: str) -> list[tuple[str, str]]:
        """(id, status) of a tenant's jobs."""
        with self.database.read() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.status).where(jobs.c.tenant == tenant)).all()
        return [(str(row.id), str(row.status)) for row in rows]

    def unfinished_jobs(self) -> list[JobRecord]:
        """Every tenant's jobs that haven't ended, oldest first."""
        return self._find(JobRecord, select(jobs).where(jobs.c.status.not_in(ENDED)).order_by(jobs.c.created_at, jobs.c.seq))

    # --- events ---

    def add_event(
        self, job: str, *, level: Literal["info", "warn", "error"], type: Literal["message", "metrics"], message: str,
        data: dict[str, Any] | None = None, step: int | None = None, created_at: int,
    ) -> EventRecord:
        """Adds an event with the job's next seq. Raises NotFound where there is no such job.

        A metrics event replaces the one of the same step, if there is one, and takes its id and seq.
        """
        event = NewEvent(message=message, level=level, data=data, step=step if type == "metrics" else None)
        with self.database.write() as connection:
            return put_event(connection, job, event, created_at, self._lock_job(connection, job))

    def list_events(self, job: str, *, after: str | None = None, limit: int = 20) -> tuple[list[EventRecord], bool]:
        """A job's events, newest first."""
        return self._list(EventRecord, _EVENTS, job, after, limit)

    # --- checkpoints ---

    def put_checkpoint(self, record: CheckpointRecord) -> CheckpointRecord:
        """Stores a checkpoint, and returns it as it is stored. Raises NotFound where there is no such job.

        It replaces the checkpoint of the same job and step, if there is one, and takes its id.
        """
        with self.database.write() as connection:
            self._lock_job(connection, record.job)
            return put_checkpoint(connection, record)

    def list_checkpoints(self, job: str, *, after: str | None = None, limit: int = 10) -> tuple[list[CheckpointRecord], bool]:
        """A job's checkpoints, the one of the last step first."""
        return self._list(CheckpointRecord, _CHECKPOINTS, job, after, limit)

    def delete_checkpoint(self, id: str) -> None:
        """Raises NotFound."""
        if not self._remove(_CHECKPOINTS, None, id):
            raise NotFound(f"there is no checkpoint {id[:64]}", param="id")

    # --- adapters ---

    def put_adapter(self, record: AdapterRecord) -> AdapterRecord:
        """Stores an adapter, and returns it as it is stored. It replaces the one of the same tenant and name, if there is one;
        the version rises if the digests of its files are others."""
        with self.database.write() as connection:
            return put_adapter(connection, record)

    def find_adapter(self, tenant: str, name: str) -> AdapterRecord | None:
        """The adapter of a name: the tenant's own, else everybody's."""
        query = select(adapters).where(adapters.c.tenant.in_((tenant, "")), adapters.c.name == name)
        found = self._find(AdapterRecord, query)
        return max(found, key=lambda adapter: adapter.tenant, default=None)

    def list_adapters(self, tenant: str) -> list[AdapterRecord]:
        """The tenant's adapters and everybody's, oldest first."""
        query = select(adapters).where(adapters.c.tenant.in_((tenant, ""))).order_by(adapters.c.created_at, adapters.c.seq)
        return self._find(AdapterRecord, query)

    def adapter_directories(self) -> set[str]:
        """The directories of all tenants' adapters."""
        with self.database.read() as connection:
            return set(connection.execute(select(adapters.c.directory)).scalars())

    def count_artifact_bytes(self, tenant: str) -> int:
        """The bytes of all adapters and checkpoints of a tenant that are in the artifact store. Files with several names count
        once."""
        own = select(adapters.c.directory, adapters.c.bytes).where(adapters.c.tenant == tenant).distinct().subquery()
        states = (
            select(func.coalesce(func.sum(checkpoints.c.bytes), 0)).join(jobs, jobs.c.id == checkpoints.c.job)
            .where(jobs.c.tenant == tenant)
        )
        with self.database.read() as connection:
            found = connection.execute(select(func.coalesce(func.sum(own.c.bytes), 0))).scalar_one()
            return int(found) + int(connection.execute(states).scalar_one())

    def delete_adapter(self, tenant: str, name: str) -> None:
        """Deletes an adapter. Raises NotFound, also for an adapter of everybody's unless tenant is ''."""
        with self.database.write() as connection:
            same = (adapters.c.tenant == tenant) & (adapters.c.name == name)
            if connection.execute(delete(adapters).where(same)).rowcount == 0:
                raise NotFound(f"there is no adapter {name[:64]}", param="lora_name")

    # --- all kinds of records ---

    def _find(self, kind: type[RecordT], query: Select[Any]) -> list[RecordT]:
        """The records that a query gives."""
        with self.database.read() as connection:
            return [record_of(kind, row) for row in connection.execute(query)]

    def _list(
        self, kind: type[RecordT], listing: _List, owner: str, after: str | None, limit: int,
        order: Literal["asc", "desc"] = "desc", wanted: Sequence[ColumnElement[bool]] = (),
    ) -> tuple[list[RecordT], bool]:
        """A page of an owner's entries, and whether more follow. wanted: conditions that an entry meets."""
        with self.database.read() as connection:
            query = _page(connection, listing, owner, after=after, order=order).where(*wanted).limit(limit + 1)
            found = [record_of(kind, row) for row in connection.execute(query)]
        return found[:limit], len(found) > limit

    def _remove(self, listing: _List, owner: str | None, id: str) -> bool:
        """Deletes an entry, and remembers its place unless the disk is full. Returns whether there was such an entry.

        owner: in whose list the entry is; None: in anybody's.
        """
        table = listing.table
        mine = [table.c.id == id, *([] if owner is None else [listing.owner == owner])]
        try:
            with self.database.write() as connection:
                found = connection.execute(select(listing.owner, *listing.key).where(*mine)).first()
                if found is None:
                    return False
                connection.execute(delete(table).where(*mine))
                note_removed(connection, table, found[0], id, found[1:])
        except CapacityError as error:
            if "busy" in str(error):
                raise
            with self.database.write() as connection:
                return connection.execute(delete(table).where(*mine)).rowcount > 0
        return True


class _List(NamedTuple):
    """Entries with ids that are listed by pages. owner: the column that says in whose list an entry is. key: columns that give
    the order."""

    table: Table
    owner: Column[str]
    key: tuple[Column[int], ...]


_FILES = _List(files, files.c.tenant, (files.c.created_at, files.c.seq))
_JOBS = _List(jobs, jobs.c.tenant, (jobs.c.created_at, jobs.c.seq))
_EVENTS = _List(events, events.c.job, (events.c.seq,))
_CHECKPOINTS = _List(checkpoints, checkpoints.c.job, (checkpoints.c.step,))


def _find_place(connection: Connection) -> str | None:
    return connection.execute(select(places.c.id).where(places.c.what == _BYTES)).scalar()


def _get_job(connection: Connection, tenant: str | None, id: str) -> JobRecord:
    """A job; tenant None: anybody's. Raises NotFound."""
    query = select(jobs).where(jobs.c.id == id)
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    row = connection.execute(query).first()
    if row is None:
        raise _no_job(id)
    return record_of(JobRecord, row)


def _no_job(id: str) -> NotFound:
    return NotFound(f"there is no fine-tuning job {id[:64]}", param="fine_tuning_job_id")


def _page(
    connection: Connection, listing: _List, owner: str, *, after: str | None, order: Literal["asc", "desc"] = "desc",
) -> Select[Any]:
    """An owner's entries in their order, those that come after the entry with the id `after`. Raises InvalidRequest."""
    table, key = listing.table, listing.key
    ordered = (column.asc() if order == "asc" else column.desc() for column in key)
    query = select(table).where(listing.owner == owner).order_by(*ordered)
    if after is None:
        return query
    place = connection.execute(select(*key).where(listing.owner == owner, table.c.id == after)).first()
    if place is None:
        gone = (removed.c.list == table.name) & (removed.c.owner == owner) & (removed.c.id == after)
        place = connection.execute(select(removed.c.place).where(gone)).scalar()
    if place is None:
        raise InvalidRequest(f"after: there is no entry {after[:64]} in this list", param="after")
    return query.where(tuple_(*key) > tuple(place) if order == "asc" else tuple_(*key) < tuple(place))
