"""The tables of the index, and how an older index is brought up to date.

Owns: columns, constraints, the schema's version, migrations. Does not own: connections (database.py), queries (store.py).
Columns have the names of the fields in records.py; `seq` is the order of insertion where a record has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
    text,
    update,
)

from coserve.core import ConfigError

SCHEMA = MetaData()
_Document = JSON(none_as_null=True)
_Sequence = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only where the type is called INTEGER."""


def _seq() -> Column[int]:
    return Column("seq", _Sequence, primary_key=True, autoincrement=True)


def _id() -> Column[str]:
    return Column("id", Text, nullable=False, unique=True)


def _time(name: str = "created_at", *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


def _job() -> Column[str]:
    return Column("job", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False)


version = Table("schema_version", SCHEMA, Column("version", Integer, nullable=False))

keys = Table(
    "keys", SCHEMA, _seq(), _id(), Column("tenant", Text, nullable=False), Column("prefix", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True), _time(), _time("revoked_at", nullable=True),
)

files = Table(
    "files", SCHEMA, _seq(), _id(), Column("tenant", Text, nullable=False), Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False), Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False), _time(),
    Index("files_of_tenant", "tenant", "created_at", "seq"),
)

jobs = Table(
    "jobs", SCHEMA, _seq(), _id(), Column("tenant", Text, nullable=False), _time(), Column("base", Text, nullable=False),
    Column("training_file", Text, nullable=False), Column("config", _Document, nullable=False),
    Column("method", _Document, nullable=False), Column("status", Text, nullable=False),
    Column("paused", Boolean, nullable=False), Column("validation_file", Text), Column("start", Text), Column("suffix", Text),
    Column("seed", BigInteger, nullable=False), Column("fine_tuned_model", Text), _time("finished_at", nullable=True),
    _time("started_at", nullable=True), Column("error", _Document), Column("trained_tokens", BigInteger),
    Column("step", BigInteger, nullable=False), Column("num_steps", BigInteger, nullable=False),
    Column("result_files", _Document, nullable=False), Column("integrations", _Document, nullable=False),
    Column("metadata", _Document, nullable=False), Column("settings", _Document, nullable=False),
    Column("priority", BigInteger, nullable=False), Column("weight", Float, nullable=False),
    _time("deadline", nullable=True),
    Index("jobs_of_tenant", "tenant", "created_at", "seq"), Index("jobs_by_status", "status"),
)

events = Table(
    "events", SCHEMA, _id(), _job(), Column("seq", BigInteger, nullable=False), _time(),
    Column("level", Text, nullable=False), Column("type", Text, nullable=False), Column("message", Text, nullable=False),
    Column("data", _Document), Column("step", BigInteger), UniqueConstraint("job", "seq"),
)
Index(
    "one_metrics_event_per_step", events.c.job, events.c.step, unique=True,
    sqlite_where=events.c.type == "metrics", postgresql_where=events.c.type == "metrics",
)

checkpoints = Table(
    "checkpoints", SCHEMA, _id(), _job(), _time(), Column("step", BigInteger, nullable=False),
    Column("model", Text, nullable=False), Column("directory", Text, nullable=False),
    Column("metrics", _Document, nullable=False), UniqueConstraint("job", "step"),
)

adapters = Table(
    "adapters", SCHEMA, _seq(), Column("tenant", Text, nullable=False), Column("name", Text, nullable=False),
    Column("directory", Text, nullable=False), _time(), Column("job", Text), UniqueConstraint("tenant", "name"),
)

removed = Table(
    "removed", SCHEMA, Column("list", Text, primary_key=True), Column("owner", Text, primary_key=True),
    Column("id", Text, primary_key=True), Column("place", _Document, nullable=False), _time("removed_at"),
)
"""Where deleted entries were in their lists, so that a page may begin after one. An index without this table gets it. That
needs no new schema version, since older coserves ignore the table."""

Migration = Callable[[Connection], None]
MIGRATIONS: tuple[Migration, ...] = ()
"""MIGRATIONS[i] changes an index of version i + 1 into one of version i + 2. It must not use the tables above, which may have
changed since."""

_MIGRATION_LOCK = 0x636F7365
"""Any number that other programs on the same PostgreSQL don't use."""


def prepare_schema(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Makes the tables of an empty database, or brings older ones up to date, in the connection's transaction.

    Raises ConfigError where the index was written by a newer coserve.
    """
    if connection.dialect.name == "postgresql":  # SQLite's transactions exclude each other anyway
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    known = 1 + len(migrations)
    if not inspect(connection).has_table(version.name):
        SCHEMA.create_all(connection)
        connection.execute(version.insert().values(version=known))
        return
    found = connection.execute(select(version.c.version)).scalar_one()
    if found > known:
        raise ConfigError(
            f"database_url: the index has schema version {found}, this coserve knows versions up to {known}: "
            "use the newer coserve that wrote it", param="database_url",
        )
    for migrate in migrations[found - 1:]:
        migrate(connection)
    removed.create(connection, checkfirst=True)
    connection.execute(update(version).values(version=known))
