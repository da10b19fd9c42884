"""Which replica has which job: claims, renewals and returns of leases, as single statements on PostgreSQL.

    free --claim: epoch + 1--> held by a replica, until lease_until --renew--> ...
      ^                          |
      +------- give_back --------+      or the lease ends, and anybody claims the job with the next epoch

A replica claims only jobs of its own base. A job that no replica can take does not wait for ever: in the end a replica claims
it only to fail it. All times are of the database's clock. Renewals have a connection of their own, so that nothing else that a
replica asks of the database can keep them waiting.

Owns: the statements. Does not own: when they are made (cluster/leases.py), what a holder writes about its jobs (fenced.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Row,
    String,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.dml import ReturningUpdate

from coserve.core import ConfigError
from coserve.server.index.database import Database, PostgresLimits, translated
from coserve.server.index.rows import record_of
from coserve.server.index.tables import jobs, members
from coserve.server.records import ENDED, JobRecord
from coserve.server.replicas.members import SILENT_S

CLOCK: ColumnElement[float] = literal_column("extract(epoch FROM clock_timestamp())::double precision", Double)
"""Unix seconds of the database's clock."""
_RENEWAL_LIMITS = PostgresLimits(connections=1, wait_s=3.0, statement_s=4.0, lock_s=2.0, idle_s=4.0)
_CLAIM_LIMITS = PostgresLimits(connections=2, wait_s=5.0, statement_s=10.0, lock_s=2.0, idle_s=5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job that this replica has from now on. before: the replica whose lease had ended, if it gave nothing back. strikes,
    struck_at: as of UnfinishedJob. start_sha256: digest of the adapter that the job continues. hopeless: why no replica can
    take it; None: this one can."""

    record: JobRecord
    epoch: int
    before: str | None
    strikes: int
    struck_at: int
    start_sha256: str | None
    hopeless: str | None = None


class HeldRow(NamedTuple):
    """What a renewal has found. paused: whether the job's owner wants it so."""

    epoch: int
    paused: bool


class JobClaims:
    """The leases of one replica, in the database. Any thread may use it; every method raises StorageRefused."""

    def __init__(self, database: Database, replica: str, lease_s: float) -> None:
        """Raises ConfigError for SQLite, which one machine alone can use."""
        if not database.url.drivername.startswith("postgresql"):
            raise ConfigError("database_url: replicas need PostgreSQL: postgresql://USER@HOST/NAME", param="database_url")
        self._replica, self._lease_s = replica, lease_s
        # Everything here is one statement, which needs no BEGIN and COMMIT: each is a message to PostgreSQL and back.
        self._renewals, self._claims = (
            limits.engine(database.url).execution_options(isolation_level="AUTOCOMMIT")
            for limits in (_RENEWAL_LIMITS, _CLAIM_LIMITS)
        )

    def close(self) -> None:
        """Closes the connections."""
        self._renewals.dispose()
        self._claims.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with translated(), self._claims.begin() as connection:
            yield connection

    def claim(
        self, delay_s: float, *, may_run: bool = True, may_validate: bool = True, but: Collection[str] = (),
        fingerprint: str = "", from_others: bool = True,
    ) -> ClaimedJob | None:
        """Takes the next job whose lease has ended at least delay_s ago, in the order of jobs/queue.py: jobs that ran before,
        those of tenants with the fewest running jobs, lower priority numbers, earlier deadlines, older ones. may_run,
        may_validate: which jobs there is room for. but: jobs to leave to others. fingerprint: of this replica's base, which the
        jobs must have; empty: any. from_others: whether jobs are taken whose holders' leases have ended."""
        if not may_run and not may_validate:
            return None
        values = {
            "replica": self._replica, "lease_s": self._lease_s, "delay_s": delay_s, "own_base": fingerprint, "but": [*but],
        }
        with self._write() as connection:
            row = connection.execute(_claim_statement(may_run, may_validate, from_others), values).first()
        return None if row is None else _claimed(row)

    def find_hopeless(self, fingerprint: str) -> dict[str, bool]:
        """Jobs that no replica has and no live one can take: each has declined the job, or has another base, this one too. That
        may change when another replica starts. For each: whether its base is another one. fingerprint: of this replica's."""
        foreign = jobs.c.fingerprint.not_in(("", fingerprint)).label("foreign")
        with translated(), self._claims.connect() as connection:
            rows = connection.execute(select(jobs.c.id, foreign).where(*self._hopeless(fingerprint))).all()
        return {row.id: bool(row.foreign) for row in rows}

    def claim_hopeless(self, fingerprint: str, among: Collection[str]) -> ClaimedJob | None:
        """Takes one of some jobs, if it is one that `find_hopeless` would find now. fingerprint: as there."""
        picked = (
            select(jobs.c.id, jobs.c.owner).where(jobs.c.id.in_(list(among)), *self._hopeless(fingerprint))
            .order_by(jobs.c.seq).limit(1).with_for_update(skip_locked=True, of=jobs).cte("picked")
        )
        statement = (
            update(jobs).where(jobs.c.id == picked.c.id)
            .values(owner=self._replica, epoch=jobs.c.epoch + 1, lease_until=CLOCK + self._lease_s)
            .returning(jobs, picked.c.owner.label("before"))
        )
        with self._write() as connection:
            row = connection.execute(statement).first()
        if row is None:
            return None
        reason = (row.declined or {}).get(self._replica, "all replicas have another base model by now")
        return replace(_claimed(row), hopeless=f"no replica can go on with the job: {reason}")

    def _hopeless(self, fingerprint: str) -> Sequence[ColumnElement[bool]]:
        """What holds for the jobs of `find_hopeless`."""
        might = and_(
            members.c.kind == "engine", CLOCK - members.c.seen_at < SILENT_S,
            or_(jobs.c.fingerprint == "", members.c.info["fingerprint"].as_string() == jobs.c.fingerprint),
            ~_has_declined(members.c.id),
        )
        return (
            jobs.c.status.not_in(ENDED), jobs.c.paused.is_(False), func.coalesce(jobs.c.lease_until, 0.0) <= CLOCK,
            or_(jobs.c.fingerprint.not_in(("", fingerprint)), _has_declined(literal(self._replica))),
            ~exists().where(might).correlate(jobs),
        )

    def renew(self, held: Mapping[str, int]) -> dict[str, HeldRow]:
        """Prolongs leases, given by jobs and their epochs. Those that are missing in the answer are another's, or have
        ended."""
        statement = (
            update(jobs).where(tuple_(jobs.c.id, jobs.c.epoch).in_([*held.items()]), jobs.c.owner == self._replica)
            .values(lease_until=CLOCK + self._lease_s).returning(jobs.c.id, jobs.c.epoch, jobs.c.paused)
        )
        with translated(), self._renewals.begin() as connection:
            return {row.id: HeldRow(row.epoch, row.paused) for row in connection.execute(statement)}

    def give_back(self, job: str, epoch: int) -> None:
        """Lets others claim a job at once, if this replica has it."""
        mine: list[Any] = [jobs.c.id == job, jobs.c.epoch == epoch, jobs.c.owner == self._replica]
        with self._write() as connection:
            connection.execute(update(jobs).where(*mine).values(owner=None, lease_until=CLOCK))

    def abandon(self) -> None:
        """Ends all leases that an earlier process of this replica's name has left."""
        left = [jobs.c.owner == self._replica, jobs.c.status.not_in(ENDED)]
        with self._write() as connection:
            connection.execute(update(jobs).where(*left).values(lease_until=CLOCK))


@cache
def _claim_statement(may_run: bool, may_validate: bool, from_others: bool) -> ReturningUpdate[Any]:
    """What JobClaims.claim executes, with its other parameters and what claims it as bound values. It is needed every
    second, so it is put together once."""
    other = jobs.alias("other")
    running = (
        select(func.count()).select_from(other).where(
            other.c.tenant == jobs.c.tenant, other.c.status == "running", other.c.paused.is_(False),
            other.c.lease_until > CLOCK, other.c.owner.is_not(None),
        ).correlate(jobs).scalar_subquery()
    )
    wanted = [
        *([and_(jobs.c.status.in_(("queued", "running")), jobs.c.paused.is_(False))] if may_run else []),
        *([jobs.c.status == "validating_files"] if may_validate else []),
    ]
    own_base = bindparam("own_base", type_=String)
    picked = (
        select(jobs.c.id, jobs.c.owner)
        .where(
            or_(*wanted), func.coalesce(jobs.c.lease_until, 0.0) + bindparam("delay_s", type_=Double) <= CLOCK,
            jobs.c.id.not_in(bindparam("but", expanding=True)),
            or_(own_base == "", jobs.c.fingerprint.in_(("", own_base))),
            *([] if from_others else [jobs.c.owner.is_(None)]),
        )
        .order_by(
            jobs.c.status != "running", jobs.c.status == "validating_files", running, jobs.c.priority,
            jobs.c.deadline.asc().nulls_last(), jobs.c.created_at, jobs.c.seq,
        )
        .limit(1).with_for_update(skip_locked=True, of=jobs).cte("picked")
    )
    died = and_(jobs.c.owner.is_not(None), jobs.c.status.in_(("running", "validating_files")))
    return (
        update(jobs).where(jobs.c.id == picked.c.id)
        .values(
            owner=bindparam("replica"), epoch=jobs.c.epoch + 1, lease_until=CLOCK + bindparam("lease_s", type_=Double),
            # A death that nobody has explained counts as half a crash: whoever held the job may have gone with its work.
            strikes=case((~died, jobs.c.strikes), (jobs.c.step > jobs.c.struck_at, 1), else_=jobs.c.strikes + 1),
            struck_at=case((~died, jobs.c.struck_at), else_=func.greatest(jobs.c.step, jobs.c.struck_at)),
        )
        .returning(jobs, picked.c.owner.label("before"))
    )


def _has_declined(replica: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a replica has declined the row's job."""
    return func.coalesce(func.jsonb_exists(sql_cast(jobs.c.declined, JSONB), replica), False)


def _claimed(row: Row[Any]) -> ClaimedJob:
    return ClaimedJob(
        record=record_of(JobRecord, row), epoch=row.epoch, before=row.before, strikes=row.strikes, struck_at=row.struck_at,
        start_sha256=row.start_sha256,
    )
