"""The index: keys, files, jobs, events, checkpoints and adapters, for looking them up.

All methods are synchronous and short, and any thread may call them. Each of them may also raise CapacityError, if the disk is
full or the database busy, and InvalidRequest, for a value that can't be stored, such as NUL in a text.

Owns: every query. Does not own: tables (tables.py), the connection and its errors (database.py), files on disk, from which the
index can be rebuilt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from sqlalchemy import URL, Column, ColumnElement, Connection, Row, Select, Table, delete, func, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from coserve.core import CapacityError, InvalidRequest, NotFound
from coserve.server.index.database import Database
from coserve.server.index.tables import adapters, checkpoints, events, files, jobs, keys, removed
from coserve.server.records import (
    ENDED,
    AdapterRecord,
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    KeyRecord,
    new_id,
    now,
)

_REMEMBERED_S = 30 * 24 * 3600
"""Seconds for which the place of a deleted entry is remembered."""


RecordT = TypeVar("RecordT", AdapterRecord, CheckpointRecord, EventRecord, FileRecord, JobRecord, KeyRecord)


class Store:
    """The index.

    Lists are returned as (entries, whether more follow). after: the id of the last entry of the page before, which may be
    deleted by now; InvalidRequest is raised if the list never had such an entry.
    """

    def __init__(self, url: str | URL) -> None:
        """url: SQLAlchemy's, of SQLite or PostgreSQL. Raises ConfigError where the database can't be used."""
        self._database = Database(url)

    def close(self) -> None:
        """Closes the database's connections."""
        self._database.close()

    # --- keys ---

    def add_key(self, record: KeyRecord) -> None:
        """Adds a key. Raises Conflict where it exists."""
        with self._database.write() as connection:
            connection.execute(keys.insert().values(_values(record)))

    def list_keys(self) -> list[KeyRecord]:
        """All keys, revoked ones too, oldest first."""
        return self._find(KeyRecord, select(keys).order_by(keys.c.seq))

    def find_key(self, digest: str) -> KeyRecord | None:
        """The key with a digest, also if it is revoked."""
        return next(iter(self._find(KeyRecord, select(keys).where(keys.c.digest == digest))), None)

    def revoke_key(self, id: str, at: int) -> None:
        """Revokes a key at a time in Unix seconds. One that is revoked already keeps its time. Raises NotFound."""
        with self._database.write() as connection:
            time = func.coalesce(keys.c.revoked_at, at)
            if connection.execute(update(keys).where(keys.c.id == id).values(revoked_at=time)).rowcount == 0:
                raise NotFound(f"there is no key {id}", param="id")

    # --- files ---

    def add_file(self, record: FileRecord) -> None:
        """Raises Conflict where the id exists."""
        with self._database.write() as connection:
            connection.execute(files.insert().values(_values(record)))

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
        with self._database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def count_files(self, tenant: str) -> int:
        """How many files a tenant has."""
        with self._database.read() as connection:
            return int(connection.execute(select(func.count()).select_from(files).where(files.c.tenant == tenant)).scalar_one())

    def all_files(self) -> list[FileRecord]:
        """Files of all tenants, oldest first."""
        return self._find(FileRecord, select(files).order_by(files.c.created_at, files.c.seq))

    # --- jobs ---

    def add_job(self, record: JobRecord) -> None:
        """Raises Conflict where the id exists."""
        with self._database.write() as connection:
            connection.execute(jobs.insert().values(_values(record)))

    def get_job(self, tenant: str | None, id: str) -> JobRecord:
        """tenant None: anybody's job. Raises NotFound, also for another tenant's."""
        with self._database.read() as connection:
            return _get_job(connection, tenant, id)

    def update_job(self, id: str, **changes: Any) -> JobRecord:
        """Changes fields of a job, and returns it as it is then. Raises NotFound. changes: fields of JobRecord."""
        with self._database.write() as connection:
            job = dataclasses.replace(_get_job(connection, None, id, lock=True), **changes)
            if changes:
                connection.execute(update(jobs).where(jobs.c.id == id).values(changes))
        return job

    def list_jobs(
        self, tenant: str, *, after: str | None = None, limit: int = 20, metadata: dict[str, str] | None = None,
    ) -> tuple[list[JobRecord], bool]:
        """A tenant's jobs, newest first. metadata: pairs that the jobs must all have."""
        wanted = (metadata or {}).items()
        found: list[JobRecord] = []
        with self._database.read() as connection:
            query = _page(connection, _JOBS, tenant, after=after)
            if not wanted:
                query = query.limit(limit + 1)
            # Pairs are compared here, since the databases disagree about keys with quotes and dots.
            for row in connection.execution_options(yield_per=100).execute(query):
                if wanted <= row.metadata.items():
                    found.append(_record(JobRecord, row))
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def job_states(self, tenant: str) -> list[tuple[str, str]]:
        """(id, status) of a tenant's jobs."""
        with self._database.read() as connection:
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
        with self._database.write() as connection:
            _get_job(connection, None, job, lock=True)
            same_step = (events.c.job == job) & (events.c.type == "metrics") & (events.c.step == step)
            known = connection.execute(select(events).where(same_step)).first() if type == "metrics" else None
            if known is None:
                last = connection.execute(select(func.max(events.c.seq)).where(events.c.job == job)).scalar()
                id, seq = new_id("ftevent"), (last or 0) + 1
            else:
                id, seq = known.id, known.seq
            event = EventRecord(
                id=id, job=job, seq=seq, created_at=created_at, level=level, type=type, message=message, data=data, step=step,
            )
            _put(connection, events, (events.c.id,), _values(event))
        return event

    def list_events(self, job: str, *, after: str | None = None, limit: int = 20) -> tuple[list[EventRecord], bool]:
        """A job's events, newest first."""
        return self._list(EventRecord, _EVENTS, job, after, limit)

    # --- checkpoints ---

    def put_checkpoint(self, record: CheckpointRecord) -> CheckpointRecord:
        """Stores a checkpoint, and returns it as it is stored. Raises NotFound where there is no such job.

        It replaces the checkpoint of the same job and step, if there is one, and takes its id.
        """
        with self._database.write() as connection:
            _get_job(connection, None, record.job, lock=True)
            same = (checkpoints.c.job == record.job) & (checkpoints.c.step == record.step)
            id = connection.execute(select(checkpoints.c.id).where(same)).scalar() or record.id
            stored = dataclasses.replace(record, id=id)
            _put(connection, checkpoints, (checkpoints.c.id,), _values(stored))
        return stored

    def list_checkpoints(self, job: str, *, after: str | None = None, limit: int = 10) -> tuple[list[CheckpointRecord], bool]:
        """A job's checkpoints, the one of the last step first."""
        return self._list(CheckpointRecord, _CHECKPOINTS, job, after, limit)

    def delete_checkpoint(self, id: str) -> None:
        """Raises NotFound."""
        if not self._remove(_CHECKPOINTS, None, id):
            raise NotFound(f"there is no checkpoint {id[:64]}", param="id")

    # --- adapters ---

    def put_adapter(self, record: AdapterRecord) -> None:
        """Stores an adapter. It replaces the one of the same tenant and name, if there is one."""
        with self._database.write() as connection:
            _put(connection, adapters, (adapters.c.tenant, adapters.c.name), _values(record))

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
        with self._database.read() as connection:
            return set(connection.execute(select(adapters.c.directory)).scalars())

    def delete_adapter(self, tenant: str, name: str) -> None:
        """Deletes an adapter. Raises NotFound, also for an adapter of everybody's unless tenant is ''."""
        with self._database.write() as connection:
            same = (adapters.c.tenant == tenant) & (adapters.c.name == name)
            if connection.execute(delete(adapters).where(same)).rowcount == 0:
                raise NotFound(f"there is no adapter {name[:64]}", param="lora_name")

    # --- all kinds of records ---

    def _find(self, kind: type[RecordT], query: Select[Any]) -> list[RecordT]:
        """The records that a query gives."""
        with self._database.read() as connection:
            return [_record(kind, row) for row in connection.execute(query)]

    def _list(
        self, kind: type[RecordT], listing: _List, owner: str, after: str | None, limit: int,
        order: Literal["asc", "desc"] = "desc", wanted: Sequence[ColumnElement[bool]] = (),
    ) -> tuple[list[RecordT], bool]:
        """A page of an owner's entries, and whether more follow. wanted: conditions that an entry meets."""
        with self._database.read() as connection:
            query = _page(connection, listing, owner, after=after, order=order).where(*wanted).limit(limit + 1)
            found = [_record(kind, row) for row in connection.execute(query)]
        return found[:limit], len(found) > limit

    def _remove(self, listing: _List, owner: str | None, id: str) -> bool:
        """Deletes an entry, and remembers its place unless the disk is full. Returns whether there was such an entry.

        owner: in whose list the entry is; None: in anybody's.
        """
        table = listing.table
        mine = [table.c.id == id, *([] if owner is None else [listing.owner == owner])]
        try:
            with self._database.write() as connection:
                found = connection.execute(select(listing.owner, *listing.key).where(*mine)).first()
                if found is None:
                    return False
                connection.execute(delete(table).where(*mine))
                connection.execute(delete(removed).where(removed.c.removed_at < now() - _REMEMBERED_S))
                _put(connection, removed, (removed.c.list, removed.c.owner, removed.c.id), {
                    "list": table.name, "owner": found[0], "id": id, "place": [*found[1:]], "removed_at": now(),
                })
        except CapacityError as error:
            if "busy" in str(error):
                raise
            with self._database.write() as connection:
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


def _values(record: RecordT) -> dict[str, Any]:
    """A record's fields, as columns."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _record(kind: type[RecordT], row: Row[Any]) -> RecordT:
    """The record of a row. Sequences in records are tuples; JSON gives lists."""
    values: dict[str, Any] = {name: row._mapping[name] for name in kind.__dataclass_fields__}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**values)


def _get_job(connection: Connection, tenant: str | None, id: str, *, lock: bool = False) -> JobRecord:
    """A job; tenant None: anybody's. Raises NotFound. lock: whether others can't change it until the transaction ends (SQLite's
    write transactions exclude each other anyway)."""
    query = select(jobs).where(jobs.c.id == id)
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"there is no fine-tuning job {id[:64]}", param="fine_tuning_job_id")
    return _record(JobRecord, row)


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


def _put(connection: Connection, table: Table, key: Sequence[Column[Any]], values: dict[str, Any]) -> None:
    """Inserts a row, or replaces the one that has the same key."""
    inserting = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(inserting(table).values(values).on_conflict_do_update(index_elements=list(key), set_=values))
