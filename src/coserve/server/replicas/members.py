"""Who belongs to a fleet: one row per replica and ingress, which it writes itself and refreshes while it lives.

Times are those of the database's clock. Owns: the table of members. Does not own: who is alive from moment to moment (pool.py
hears that on the link itself), leases of jobs (claims.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from sqlalchemy import ColumnElement, Float, delete, extract, func, select, update
from sqlalchemy import cast as sql_cast

from coserve.server.index.database import Database
from coserve.server.index.tables import members
from coserve.server.link.messages import Ready

BEAT_EVERY_S = 2.0
"""Seconds between two refreshes of a member's row."""
SILENT_S = 15.0
"""A member whose row is older counts as gone."""
FORGOTTEN_S = 24 * 3600.0
"""Rows of members that have been gone for so long are deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A row.

    kind: engine or ingress. address: where ingresses connect, tcp://HOST:PORT; '' for an ingress. public_key: CURVE's, as Z85
    text. node: the machine. info: of a replica, what its engine has said of itself (Ready). seconds: since its last sign of
    life.
    """

    id: str
    kind: Literal["engine", "ingress"]
    address: str
    public_key: str
    node: str
    info: dict[str, Any]
    seconds: float = 0.0


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

    def join(self, member: Member) -> None:
        """Adds a row, or replaces it, and deletes those of members long gone."""
        values = {name: getattr(member, name) for name in ("id", "kind", "address", "public_key", "node", "info")}
        with self._database.write() as connection:
            connection.execute(delete(members).where(members.c.seen_at < _now() - FORGOTTEN_S))
            connection.execute(delete(members).where(members.c.id == member.id))
            connection.execute(members.insert().values(**values, joined_at=_now(), seen_at=_now()))

    def refresh(self, id: str, info: dict[str, Any] | None = None) -> bool:
        """The member lives. Returns False if its row is gone. info: what has changed; None: nothing has."""
        changes: dict[str, Any] = {"seen_at": _now(), **({} if info is None else {"info": info})}
        with self._database.write() as connection:
            return connection.execute(update(members).where(members.c.id == id).values(changes)).rowcount > 0

    def leave(self, id: str) -> None:
        """The member ends."""
        with self._database.write() as connection:
            connection.execute(delete(members).where(members.c.id == id))

    def alive(self, kind: Literal["engine", "ingress"] | None = None) -> Sequence[Member]:
        """Members whose rows are not older than SILENT_S, oldest first. kind: None: of both kinds."""
        age = _now() - members.c.seen_at
        query = select(members, age.label("seconds")).where(age < SILENT_S).order_by(members.c.joined_at)
        if kind is not None:
            query = query.where(members.c.kind == kind)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [Member(**{field.name: row[field.name] for field in dataclasses.fields(Member)}) for row in rows]

    def knows(self, public_key: str) -> bool:
        """Whether a key is that of a member. Members are remembered for FORGOTTEN_S, also while they are silent."""
        query = select(func.count()).select_from(members).where(members.c.public_key == public_key)
        with self._database.read() as connection:
            return bool(connection.execute(query).scalar_one())


class KnownKeys:
    """Keys of members, asked for once each. Any thread may use it."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._known = functools.lru_cache(maxsize=4096)(self._find)

    def __call__(self, public_key: str) -> bool:
        """Whether it is a member's key. Raises CapacityError while the database is away and the key isn't known yet."""
        try:
            return self._known(public_key)
        except _UnknownKey:
            return False

    def _find(self, public_key: str) -> bool:
        if not self._members.knows(public_key):
            raise _UnknownKey  # so that it is asked for again
        return True


class _UnknownKey(Exception):
    """Nobody has this key, yet."""
