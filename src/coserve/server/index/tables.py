"""The tables of the index, and how an older index is brought up to date.

Owns: columns, constraints, the schema's version, migrations. Does not own: connections (database.py), queries (store.py).
Columns have the names of the fields in records.py; `seq` is the order of insertion where a record has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Dialect,
    Double,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    inspect,
    select,
    text,
    update,
)

from coserve.core import ConfigError


class _Name(TypeDecorator[str]):
    """The type of columns by which users ask for rows. No row has a name with NUL, which PostgreSQL refuses in a query."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """What the database gets."""
        return value if value is None else value.replace("\0", "\N{REPLACEMENT CHARACTER}")


SCHEMA = MetaData()
_Document = JSON(none_as_null=True)
_Sequence = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only where the type is called INTEGER."""


def _seq() -> Column[int]:
    return Column("seq", _Sequence, primary_key=True, autoincrement=True)


def _id() -> Column[str]:
    return Column("id", _Name, nullable=False, unique=True)


def _filled(name: str, kind: Any = Text) -> Column[Any]:
    """A column that has a value in every row."""
    return Column(name, kind, nullable=False)


def _counted(name: str, kind: Any = BigInteger, start: str = "0") -> Column[Any]:
    """A column that has a value in every row, from the start on."""
    return Column(name, kind, nullable=False, server_default=start)


def _job() -> Column[str]:
    return Column("job", _Name, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False)


version = Table("schema_version", SCHEMA, _filled("version", Integer))

keys = Table(
    "keys", SCHEMA, _seq(), _id(), _filled("tenant"), _filled("prefix"), Column("digest", Text, nullable=False, unique=True),
    _filled("created_at", BigInteger), Column("revoked_at", BigInteger),
)

files = Table(
    "files", SCHEMA, _seq(), _id(), _filled("tenant"), _filled("filename"), _filled("purpose"), _filled("bytes", BigInteger),
    _filled("sha256"), _filled("created_at", BigInteger), Index("files_of_tenant", "tenant", "created_at", "seq"),
)

jobs = Table(
    "jobs", SCHEMA, _seq(), _id(), _filled("tenant"), _filled("created_at", BigInteger), _filled("base"),
    _filled("training_file"), _filled("config", _Document), _filled("method", _Document), _filled("status"),
    _filled("paused", Boolean), Column("validation_file", Text), Column("start", Text), Column("suffix", Text),
    _filled("seed", BigInteger), Column("fine_tuned_model", Text), Column("finished_at", BigInteger),
    Column("started_at", BigInteger), Column("error", _Document), Column("trained_tokens", BigInteger),
    _filled("step", BigInteger), _filled("num_steps", BigInteger), _filled("result_files", _Document),
    _filled("integrations", _Document), _filled("metadata", _Document), _filled("settings", _Document),
    _filled("priority", BigInteger), _filled("weight", Float), Column("deadline", BigInteger),
    Column("owner", Text), _counted("epoch"), Column("lease_until", Double), _counted("strikes"),
    _counted("struck_at", start="-1"), Column("start_sha256", Text), Column("progress", _Document),
    _counted("fingerprint", Text, ""), Column("declined", _Document),
    Index("jobs_of_tenant", "tenant", "created_at", "seq"), Index("jobs_by_status", "status"),
)
"""Only replicas use what follows `deadline` (server/replicas/). owner: the replica that holds the job. epoch: how often it was
claimed or ended; a holder writes only under its own. lease_until: from when others may claim it, in Unix seconds of the
database's clock. strikes, struck_at: as of UnfinishedJob. start_sha256: of the adapter that it continues. progress: its
pace. fingerprint: of the base that it was created for; empty: an older coserve didn't say. declined: replicas that can't go on
with it, and why."""

events = Table(
    "events", SCHEMA, _id(), _job(), _filled("seq", BigInteger), _filled("created_at", BigInteger), _filled("level"),
    _filled("type"), _filled("message"), Column("data", _Document), Column("step", BigInteger), _counted("epoch"),
    UniqueConstraint("job", "seq"),
)
"""epoch: of the job, when the event was written."""

Index(
    "one_metrics_event_per_step", events.c.job, events.c.step, unique=True,
    sqlite_where=events.c.type == "metrics", postgresql_where=events.c.type == "metrics",
)

checkpoints = Table(
    "checkpoints", SCHEMA, _id(), _job(), _filled("created_at", BigInteger), _filled("step", BigInteger), _filled("model"),
    _filled("directory"), _filled("metrics", _Document), _counted("epoch"), _counted("sha256", Text, ""),
    _counted("state_sha256", Text, ""), _counted("bytes"), UniqueConstraint("job", "step"),
)

adapters = Table(
    "adapters", SCHEMA, _seq(), _filled("tenant"), _filled("name", _Name), _filled("directory"),
    _filled("created_at", BigInteger), Column("job", Text), _counted("version"), _counted("sha256", Text, ""),
    _counted("epoch"), _counted("bytes"), UniqueConstraint("tenant", "name"),
)

members = Table(
    "members", SCHEMA, Column("id", Text, primary_key=True), _filled("kind"), _filled("address"), _filled("public_key"),
    _filled("node"), _filled("info", _Document), _filled("joined_at", Double), _filled("seen_at", Double),
)
"""Processes of a fleet of replicas. kind: engine or ingress. public_key: its CURVE key. info: an engine's Ready. joined_at,
seen_at: Unix seconds of the database's clock."""

removed = Table(
    "removed", SCHEMA, Column("list", Text, primary_key=True), Column("owner", Text, primary_key=True),
    Column("id", _Name, primary_key=True), _filled("place", _Document), _filled("removed_at", BigInteger),
)
"""Where deleted entries were in their lists, so that a page may begin after one. An index without this table gets it. That
needs no new schema version, since older coserves ignore the table."""

places = Table("places", SCHEMA, Column("what", Text, primary_key=True), _filled("id"))
"""Where the bytes are that rows name. what: files, for those of files, checkpoints and adapters. id: of the data directory or
the artifact store that has them (index/place.py)."""

Migration = Callable[[Connection], None]


def _add_replicas(connection: Connection) -> None:
    """Version 2: what replicas share. Everything has a value that a single server needs nothing of."""
    double = "DOUBLE PRECISION" if connection.dialect.name == "postgresql" else "DOUBLE"
    for table, column in (
        ("jobs", "owner TEXT"), ("jobs", "epoch BIGINT NOT NULL DEFAULT 0"), ("jobs", f"lease_until {double}"),
        ("jobs", "strikes BIGINT NOT NULL DEFAULT 0"), ("jobs", "struck_at BIGINT NOT NULL DEFAULT -1"),
        ("jobs", "start_sha256 TEXT"), ("jobs", "progress JSON"), ("events", "epoch BIGINT NOT NULL DEFAULT 0"),
        ("checkpoints", "epoch BIGINT NOT NULL DEFAULT 0"), ("checkpoints", "sha256 TEXT NOT NULL DEFAULT ''"),
        ("checkpoints", "state_sha256 TEXT NOT NULL DEFAULT ''"), ("checkpoints", "bytes BIGINT NOT NULL DEFAULT 0"),
        ("adapters", "version BIGINT NOT NULL DEFAULT 0"), ("adapters", "sha256 TEXT NOT NULL DEFAULT ''"),
        ("adapters", "epoch BIGINT NOT NULL DEFAULT 0"), ("adapters", "bytes BIGINT NOT NULL DEFAULT 0"),
    ):
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {column}"))
    connection.execute(text(
        "CREATE TABLE members (id TEXT NOT NULL PRIMARY KEY, kind TEXT NOT NULL, address TEXT NOT NULL, "
        "public_key TEXT NOT NULL, node TEXT NOT NULL, info JSON NOT NULL, "
        f"joined_at {double} NOT NULL, seen_at {double} NOT NULL)"
    ))


def _add_places_and_takers(connection: Connection) -> None:
    """Version 3: the index knows whose bytes it names, and which replicas can take a job."""
    connection.execute(text("CREATE TABLE places (what TEXT NOT NULL PRIMARY KEY, id TEXT NOT NULL)"))
    for column in ("fingerprint TEXT NOT NULL DEFAULT ''", "declined JSON"):
        connection.execute(text(f"ALTER TABLE jobs ADD COLUMN {column}"))


MIGRATIONS: tuple[Migration, ...] = (_add_replicas, _add_places_and_takers)
"""MIGRATIONS[i] changes an index of version i + 1 into one of version i + 2. It must not use the tables above, which may have
changed since."""

_MIGRATION_LOCK = 0x636F7365
"""Any number that other programs on the same PostgreSQL don't use."""
_SILENT_S = 60.0
"""Seconds after which a member that doesn't show itself no longer keeps its fleet's tables from being changed."""
_FIRST_WITH_MEMBERS = 2


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
    if found < known:
        _refuse_in_use(connection, found)
    for migrate in migrations[found - 1:]:
        migrate(connection)
    removed.create(connection, checkfirst=True)
    connection.execute(update(version).values(version=known))


def _refuse_in_use(connection: Connection, found: int) -> None:
    """Raises ConfigError while replicas of an older coserve use the index, since they would meet tables they don't know."""
    if found < _FIRST_WITH_MEMBERS or connection.dialect.name != "postgresql":
        return
    query = text("SELECT id FROM members WHERE seen_at > extract(epoch FROM clock_timestamp()) - :silent ORDER BY id")
    present = [str(id) for id in connection.execute(query, {"silent": _SILENT_S}).scalars()]
    if present:
        raise ConfigError(
            f"database_url: the index has schema version {found} and is in use by {len(present)} processes of an older coserve "
            f"({', '.join(present[:4])}): stop them first, since this coserve changes the tables", param="database_url",
        )
