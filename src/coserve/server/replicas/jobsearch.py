"""Which jobs a replica takes, and when it looks for them.

    a job of its base that nobody has        at once if it has much slack, else a little later, so that others are first
    one whose holder's lease has ended       the same; but not while the database may have kept the holder from renewing it
    one that it has declined                 never, but for the next case
    one that no live replica could take      only to fail it, when that was so at every look for long enough

Belongs to one event loop. Owns: these rules, times of looks. Does not own: the statements (claims.py), what becomes of a job
that was taken (jobs.py), how much slack means how much later (cluster/leases.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, TypeVar

from coserve.cluster.leases import LeaseTiming
from coserve.server.replicas.claims import ClaimedJob, JobClaims

POLL_S = 1.0
"""Seconds between two looks for jobs that wait, unless a nudge tells of one."""
HOPELESS_S = 30.0
"""Seconds between two looks for jobs that no replica can take."""
DECLINED_S, FOREIGN_S = 600.0, 24 * 3600.0
"""Seconds for which a job must have been one that no replica can take, before it fails: one that all have declined, as another
replica may be starting; and one whose base nobody has, as another fleet of this database may be away."""
T = TypeVar("T")


class InThread(Protocol):
    """Runs an action beside the event loop."""

    def __call__(self, action: Callable[[], T], /) -> Awaitable[T]:
        """Returns what the action returns, and raises what it raises."""
        ...


class JobSearch:
    """next_s: when to look again. poll_s: seconds between two looks. All times are of one clock that rises."""

    def __init__(self, claims: JobClaims, timing: LeaseTiming, now: float, in_thread: InThread) -> None:
        self._claims, self._timing, self._in_thread = claims, timing, in_thread
        self.next_s, self.poll_s = 0.0, POLL_S
        self._declined: set[str] = set()
        self._refused_s = -math.inf  # when the database last refused a claim or a renewal
        self._next_hopeless_s = now + HOPELESS_S
        self._hopeless_since: dict[str, float] = {}

    def decline(self, job: str) -> None:
        """A job can't go on here, but may elsewhere."""
        self._declined.add(job)

    def refused(self, now: float) -> None:
        """The database refuses claims, or renewals: other replicas' too, perhaps."""
        self._refused_s, self._next_hopeless_s = now, now + HOPELESS_S

    async def find(
        self, now: float, fingerprint: str, *, delay_s: float, may_run: bool, may_validate: bool, but: Collection[str]
    ) -> ClaimedJob | None:
        """Claims a job if there is one to take, and sets `next_s`. Parameters as those of JobClaims.claim. Raises
        StorageRefused."""
        others_had_time, passed_over = self._others_had_time(now), self._declined.union(but)
        claimed = await self._in_thread(lambda: self._claims.claim(
            delay_s, may_run=may_run, may_validate=may_validate, but=passed_over, fingerprint=fingerprint,
            from_others=others_had_time,
        ))
        if claimed is None and others_had_time and now >= self._next_hopeless_s:
            self._next_hopeless_s = now + HOPELESS_S * random.uniform(0.8, 1.2)
            claimed = await self._find_hopeless(now, fingerprint)
        pause_s = min(self.poll_s * random.uniform(0.8, 1.2), max(delay_s, 0.05) if delay_s else self.poll_s)
        self.next_s = now if claimed is not None else now + pause_s
        return claimed

    async def _find_hopeless(self, now: float, fingerprint: str) -> ClaimedJob | None:
        found = await self._in_thread(lambda: self._claims.find_hopeless(fingerprint))
        self._hopeless_since = {job: self._hopeless_since.get(job, now) for job in found}
        limits = {job: FOREIGN_S if foreign else DECLINED_S for job, foreign in found.items()}
        late = [job for job, limit in limits.items() if now - self._hopeless_since[job] >= limit]
        return await self._in_thread(lambda: self._claims.claim_hopeless(fingerprint, late)) if late else None

    def _others_had_time(self, now: float) -> bool:
        """Whether others would have renewed their leases by now, if they live. Where the database was away for longer than a
        lease, all leases have ended when it is back."""
        return now >= self._refused_s + self._timing.renew_s + self._timing.retry_s
