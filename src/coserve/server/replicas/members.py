"""Who belongs to a fleet: one row per replica and ingress, which it writes itself and refreshes while it lives.

Times are those of the database's clock. Owns: the table of members. Does not own: who is alive from moment to moment (links.py
hears that on the link itself), leases of jobs (claims.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from sqlalchemy import ColumnElement, Connection, Float, delete, extract, func, select, update
from sqlalchemy import cast as sql_cast

from coserve.core import CapacityError
from coserve.server.index.database import Database, translated
from coserve.server.index.tables import members
from coserve.server.link.messages import Ready

REFRESH_EVERY_S = 1.0
"""Seconds between two refreshes of a member's row, and between its looks for others."""
SILENT_S = 15.0
"""A member whose row is older counts as gone."""
FORGOTTEN_S = 24 * 3600.0
"""Rows of members that have been gone for so long are deleted."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A row.

    kind: engine or ingress. address: where ingresses connect, tcp://HOST:PORT; '' for an ingress. public_key: CURVE's, as Z85
    text. node: the machine. info: of a replica, what its engine has said of itself (Ready).
    """

    id: str
    kind: Literal["engine", "ingress"]
    address: str
    public_key: str
    node: str
    info: dict[str, Any]


def _now() -> ColumnElement[float]:
    """The database's clock, in Unix seconds."""
    return sql_cast(extract("epoch", func.clock_timestamp()), Float(53))


def describe_engine(info: Ready) -> dict[str, Any]:
    """What an engine says of itself as JSON for its row; `read_engine` reads it."""
    return cast(dict[str, Any], _without_infinity(msgspec.to_builtins(info)))


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value  # JSON has no infinity


def read_engine(info: Mapping[str, Any]) -> Ready:
    """Raises msgspec.ValidationError."""
    return msgspec.convert(info, Ready, strict=False)


class Members:
    """The members of the fleet that a PostgreSQL database belongs to. Synchronous and thread-safe; raises CapacityError while
    the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # What is asked every second needs no BEGIN and COMMIT: each is a message to PostgreSQL and back.
        self._single = database.engine.execution_options(isolation_level="AUTOCOMMIT")

    def join(self, member: Member) -> None:
        """Adds a row, or replaces it, and deletes those of members long gone."""
        with self._database.write() as connection:
            connection.execute(delete(members).where(members.c.seen_at < _now() - FORGOTTEN_S))
            connection.execute(delete(members).where(members.c.id == member.id))
            connection.execute(members.insert().values(**dataclasses.asdict(member), joined_at=_now(), seen_at=_now()))

    def refresh(self, id: str, info: dict[str, Any] | None = None) -> Sequence[Member] | None:
        """The member lives. Returns all members that do, as `alive`; None if the member's own row is gone. info: what has
        changed; None: nothing has."""
        changes: dict[str, Any] = {"seen_at": _now(), **({} if info is None else {"info": info})}
        with translated(), self._single.connect() as connection:
            known = connection.execute(update(members).where(members.c.id == id).values(changes)).rowcount > 0
            return _alive(connection) if known else None

    def leave(self, id: str) -> None:
        """The member ends."""
        with self._database.write() as connection:
            connection.execute(delete(members).where(members.c.id == id))

    def alive(self) -> Sequence[Member]:
        """Members whose rows are not older than SILENT_S, oldest first."""
        with translated(), self._single.connect() as connection:
            return _alive(connection)

    def knows(self, public_key: str) -> bool:
        """Whether a key is that of a member. Members are remembered for FORGOTTEN_S, also while they are silent."""
        query = select(func.count()).select_from(members).where(members.c.public_key == public_key)
        with self._database.read() as connection:
            return bool(connection.execute(query).scalar_one())


def _alive(connection: Connection) -> list[Member]:
    names = [field.name for field in dataclasses.fields(Member)]
    query = select(*(members.c[name] for name in names)).where(_now() - members.c.seen_at < SILENT_S)
    return [Member(**row) for row in connection.execute(query.order_by(members.c.joined_at)).mappings()]


class KnownKeys:
    """Keys of members, each asked for until it is known. Belongs to an event loop."""

    def __init__(self, members: Members) -> None:
        self._members, self._known = members, set[str]()

    async def ask(self, public_key: str) -> bool:
        """Whether it is a member's key. A known one waits for nobody. Raises CapacityError while the database is away and the
        key isn't known yet."""
        if public_key not in self._known and await asyncio.to_thread(self._members.knows, public_key):
            self._known.add(public_key)
        return public_key in self._known


class OwnRow:
    """One process's own row. Belongs to an event loop. row: describes the process as it is now."""

    def __init__(self, members: Members, row: Callable[[], Member]) -> None:
        self._members, self._row = members, row
        self._written = row()

    async def join(self) -> None:
        """Adds the row. Raises CapacityError."""
        await asyncio.to_thread(self._members.join, self._written)

    async def keep(self, see: Callable[[Sequence[Member]], None]) -> None:
        """Keeps the row fresh, and tells `see` of all members that live, until this is cancelled. A row that is gone is added
        again. While the database is away, nobody is told anything."""
        while True:
            try:
                row = self._row()
                changed = None if row.info == self._written.info else row.info
                found = await asyncio.to_thread(self._members.refresh, row.id, changed)
                if found is None:
                    await asyncio.to_thread(self._members.join, row)
                    found = await asyncio.to_thread(self._members.alive)
                self._written = row
                see(found)
            except CapacityError:  # it is tried again
                pass
            except Exception:  # without this loop a process would never learn again who lives
                _log.exception("the look at the table of members failed")
            await asyncio.sleep(REFRESH_EVERY_S)

    async def leave(self) -> None:
        """Deletes the row, if the database takes it; else it grows old by itself."""
        with contextlib.suppress(CapacityError):
            await asyncio.to_thread(self._members.leave, self._written.id)
