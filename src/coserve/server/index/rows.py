"""Records as rows of the index: how one is read, and how one is written within a transaction.

Owns: which row a record replaces, the order of events. Does not own: transactions (database.py), queries (store.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from sqlalchemy import Column, Connection, Row, Table, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from coserve.server.index.tables import adapters, checkpoints, events, removed
from coserve.server.records import (
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


def values_of(record: RecordT) -> dict[str, Any]:
    """A record's fields, as columns."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def record_of(kind: type[RecordT], row: Row[Any]) -> RecordT:
    """The record of a row. Sequences in records are tuples; JSON gives lists."""
    values: dict[str, Any] = {name: row._mapping[name] for name in kind.__dataclass_fields__}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**values)


def put_row(connection: Connection, table: Table, key: Sequence[Column[Any]], values: dict[str, Any]) -> None:
    """Inserts a row, or replaces the one that has the same key."""
    inserting = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(inserting(table).values(values).on_conflict_do_update(index_elements=list(key), set_=values))


def note_removed(connection: Connection, table: Table, owner: str, id: str, place: Sequence[Any]) -> None:
    """Remembers where a deleted entry was in its owner's list, so that a page may begin after it."""
    connection.execute(delete(removed).where(removed.c.removed_at < now() - _REMEMBERED_S))
    values = {"list": table.name, "owner": owner, "id": id, "place": [*place], "removed_at": now()}
    put_row(connection, removed, (removed.c.list, removed.c.owner, removed.c.id), values)


class NewEvent(NamedTuple):
    """An event that is to be added. step: given if the event has the metrics of this step."""

    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None
    step: int | None = None


def put_event(connection: Connection, job: str, new: NewEvent, created_at: int, epoch: int) -> EventRecord:
    """Adds an event of a job that is locked, with the job's next seq. A metrics event replaces the one of the same step, if
    there is one, and takes its id and seq; one of a later epoch stays. epoch: under which it is written."""
    known = None
    if new.step is not None:
        same_step = (events.c.job == job) & (events.c.type == "metrics") & (events.c.step == new.step)
        known = connection.execute(select(events).where(same_step)).first()
    if known is not None and known.epoch > epoch:
        return record_of(EventRecord, known)
    if known is None:
        last = connection.execute(select(func.max(events.c.seq)).where(events.c.job == job)).scalar()
        id, seq = new_id("ftevent"), (last or 0) + 1
    else:
        id, seq = known.id, known.seq
    event = EventRecord(
        id=id, job=job, seq=seq, created_at=created_at, level=new.level, type="message" if new.step is None else "metrics",
        message=new.message, data=new.data, step=new.step,
    )
    put_row(connection, events, (events.c.id,), values_of(event) | {"epoch": epoch})
    return event


def put_checkpoint(connection: Connection, record: CheckpointRecord) -> CheckpointRecord:
    """Stores a checkpoint of a job that is locked; it replaces the one of the same step, if there is one, and takes its id."""
    same = (checkpoints.c.job == record.job) & (checkpoints.c.step == record.step)
    id = connection.execute(select(checkpoints.c.id).where(same)).scalar() or record.id
    stored = dataclasses.replace(record, id=id)
    put_row(connection, checkpoints, (checkpoints.c.id,), values_of(stored))
    return stored


def put_adapter(connection: Connection, record: AdapterRecord) -> AdapterRecord:
    """Stores an adapter; it replaces the one of the same tenant and name, if there is one."""
    if record.sha256:
        same = (adapters.c.tenant == record.tenant) & (adapters.c.name == record.name)
        known = connection.execute(select(adapters).where(same)).first()
        if known is not None:
            changed = (known.directory, known.sha256) != (record.directory, record.sha256)
            record = dataclasses.replace(record, version=known.version + changed)
    put_row(connection, adapters, (adapters.c.tenant, adapters.c.name), values_of(record))
    return record
