"""The connection to the index's database, SQLite or PostgreSQL, and the database's failures as errors of the error tree.

Owns: URLs, pragmas, transactions. Does not own: tables (tables.py), queries (store.py).
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from coserve.core import ConfigError, CoserveError, InvalidRequest
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.index.disk import FULL
from coserve.server.index.tables import prepare_schema

_READS = "coserve_reads"
_BUSY_S = 5.0
_MIN_FREE_BYTES = 64 << 10
"""About how many bytes of the disk SQLite needs to open an index."""
_PRAGMAS = (f"busy_timeout = {_BUSY_S * 1e3:.0f}", "journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON")
"""synchronous = NORMAL is enough: what the index loses when the power fails is found again in the manifests."""

_FAILURES = {
    "database or disk is full": FULL,
    "disk i/o error": "the disk of the data directory fails to read or write; see the system's log",
    "readonly database": "the data directory can't be written",
    "database is locked": "the index is busy; try again",
    "unable to open database file": "the index can't be opened for now; try again",
}
"""Parts of SQLite's messages, in lower case, and what a user reads instead."""
_BUSY_STATES = ("25006", "25P03", "40001", "40P01", "55P03", "57014")
"""PostgreSQL's codes of a transaction that it ended: on a server that may only be read, as after a failover; left idle; in
conflict with another; a deadlock; locked rows; too slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresLimits:
    """Limits of a program that shares PostgreSQL with others and must not wait for it, nor keep it from them.

    connections: at most, at once. wait_s: for one of them, and for a new one to be made. statement_s: for an answer.
    lock_s: for rows that others hold. idle_s: how long the program may leave a transaction open, for example since it was
    stopped (SIGSTOP); PostgreSQL ends the transaction then, so that its rows aren't locked for ever.
    """

    connections: int = 10
    wait_s: float = 5.0
    statement_s: float = 30.0
    lock_s: float = 5.0
    idle_s: float = 10.0

    def engine(self, url: URL) -> Engine:
        """Connections to PostgreSQL within these limits."""
        settings = {
            "statement_timeout": self.statement_s, "lock_timeout": self.lock_s,
            "idle_in_transaction_session_timeout": self.idle_s,
        }
        options = " ".join(f"-c {name}={seconds * 1e3:.0f}" for name, seconds in settings.items())
        arguments = {
            "connect_timeout": max(2, round(self.wait_s)), "options": options, "keepalives_idle": 5, "keepalives_interval": 2,
            "keepalives_count": 3, "tcp_user_timeout": round(self.statement_s * 1e3),
        }
        return _connect_postgres(
            url, pool_size=self.connections, max_overflow=0, pool_timeout=self.wait_s, connect_args=arguments
        )


class Database:
    """One database, with up-to-date tables. Any thread may use it."""

    def __init__(self, url: str | URL, limits: PostgresLimits | None = None) -> None:
        """Raises ConfigError, also for a damaged file or a newer schema. url: SQLAlchemy's; 'postgresql://' uses psycopg.
        limits: of the connections to PostgreSQL."""
        self.url, self.limits = read_url(url), limits
        parsed = self.url
        if parsed.drivername.startswith("sqlite"):
            self.engine = _connect_sqlite(parsed)
        else:
            self.engine = _connect_postgres(parsed) if limits is None else limits.engine(parsed)
        self._reading = self.engine.execution_options(**{_READS: True})
        try:
            with self.engine.begin() as connection:
                if connection.dialect.name == "sqlite":
                    problem = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                    if problem != "ok":
                        raise _damaged(str(parsed.database), str(problem))
                prepare_schema(connection)
        except DBAPIError as error:
            self.engine.dispose()
            raise _opening_failed(parsed, error) from error
        except BaseException:
            self.engine.dispose()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees one state throughout."""
        with translated(), self._reading.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write. All of it takes effect, or nothing.

        Raises StorageRefused (disk full, database busy or away), Conflict (exists already), InvalidRequest (can't be stored).
        """
        with translated(), self.engine.begin() as connection:
            yield connection

    def limited(self) -> Database:
        """The same database within limits: itself if it has some, else a new one of default limits. Raises ConfigError."""
        return self if self.limits is not None else Database(self.url, PostgresLimits())

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()


def read_url(url: str | URL) -> URL:
    """A URL of SQLite or PostgreSQL, with its driver. Raises ConfigError, without a password that it may hold."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:  # its message may hold a password
        raise ConfigError("database_url: can't be read as a URL, such as postgresql://user@host/name",
                          param="database_url") from error
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("postgresql+psycopg", "sqlite", "sqlite+pysqlite"):
        raise ConfigError(f"database_url: {parsed.drivername} isn't supported; sqlite and postgresql are", param="database_url")
    if parsed.drivername.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise ConfigError("database_url: SQLite needs a file, such as sqlite:////var/lib/coserve.db", param="database_url")
    return parsed


def _connect_sqlite(url: URL) -> Engine:
    try:
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data_dir: {error.filename} can't be made ({error.strerror})", param="data_dir") from error
    engine = create_engine(url, json_serializer=_dump)

    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # sqlite3's own BEGIN comes too late, and not at all before a change of tables
        for pragma in _PRAGMAS:
            _execute_pragma(connection, pragma)

    def begin(connection: Connection) -> None:
        # A transaction that reads and then writes fails at once if another one wrote in between. So writers wait at the start.
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get(_READS) else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def _execute_pragma(connection: sqlite3.Connection, pragma: str) -> None:
    """Runs a PRAGMA. It waits if another connection turns WAL on at this moment, which SQLite's busy timeout doesn't do."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}").close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _connect_postgres(url: URL, **options: Any) -> Engine:
    try:
        return create_engine(url, json_serializer=_dump, pool_pre_ping=True, **options)
    except ModuleNotFoundError as error:
        raise ConfigError("database_url: PostgreSQL needs psycopg: pip install 'coserve[postgres]'",
                          param="database_url") from error


def _dump(value: Any) -> str:
    """A value as JSON. Numbers that JSON doesn't have, such as NaN, become null."""
    return msgspec.json.encode(value).decode()


def _damaged(path: str, problem: str) -> ConfigError:
    return ConfigError(
        f"data_dir: the index {path} is damaged ({problem}). Move it and the files {Path(path).name}-wal and -shm away and "
        "start again: it is rebuilt from the files and jobs on disk. API keys have to be made again", param="data_dir",
    )


def _opening_failed(url: URL, error: DBAPIError) -> ConfigError:
    reason = str(error.orig).strip()
    if not url.drivername.startswith("sqlite"):
        return ConfigError(f"database_url: {url.render_as_string(hide_password=True)} can't be used: {reason}",
                           param="database_url")
    if "not a database" in reason or "malformed" in reason:
        return _damaged(str(url.database), reason)
    if shutil.disk_usage(Path(str(url.database)).parent).free < _MIN_FREE_BYTES:
        reason = f"{FULL} ({reason})"
    return ConfigError(f"data_dir: the index {url.database} can't be opened: {reason}", param="data_dir")


@contextmanager
def translated() -> Iterator[None]:
    """Raises the database's errors as ours. Any other one is a bug of ours, and passes unchanged."""
    try:
        yield
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidRequest(f"a value can't be stored: {error}") from error
    except PoolTimeout as error:
        raise StorageRefused(_FAILURES["database is locked"]) from error
    except DBAPIError as error:
        known = _translate(error)
        if known is None:
            raise
        raise known from error


def _translate(error: DBAPIError) -> CoserveError | None:
    reason = str(error.orig).lower()
    for message, refusal in _FAILURES.items():
        if message in reason:
            return StorageRefused(refusal)
    if isinstance(error, IntegrityError):
        return Conflict("an entry with this name or id exists already")
    if isinstance(error, DataError):  # NUL in a text, a number out of range
        return InvalidRequest(f"a value can't be stored: {error.orig}")
    state = getattr(error.orig, "sqlstate", None)
    if state == "53100":
        return StorageRefused("the disk of the index's database is full")
    if state in _BUSY_STATES:
        return StorageRefused(_FAILURES["database is locked"])
    if isinstance(error, OperationalError) and hasattr(error.orig, "sqlstate"):  # psycopg: no connection
        return StorageRefused("the index's database can't be reached; try again")
    return None
