"""Leases of jobs as their holder sees them: when they are renewed, when the holder pauses in time, when a job is another's.

    took --> held --renewal, every renew_s--> held
              |  safe_s after *sending* the last renewal that succeeded
              v
            lapsed: paused --a renewal succeeds after all--> held
              |
              a renewal says that the job has another epoch by now: lost

In the database a lease ends lease_s after the renewal came there, which is not before it was sent. So whoever pauses safe_s
after sending has paused before anybody else may claim the job, as far as clocks run alike and processes run at all. Only
liveness rests on that: a holder that was stopped may act too late, and then the epoch of its writes tells them from those of
the next holder.

Owns: the holder's decisions. Does not own: the rows (server/replicas/claims.py), clocks: every time is an argument, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from coserve.core import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTiming:
    """lease_s: a lease's length. renew_s: between two renewals. retry_s: after one that failed. safe_s: how long after sending
    a renewal the holder relies on it. claim_delay_s: how long a replica without training headroom leaves a job to others."""

    lease_s: float = 20.0
    renew_s: float = 5.0
    retry_s: float = 1.0
    safe_s: float = 15.0
    claim_delay_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry_s <= self.renew_s < self.safe_s < self.lease_s:
            raise ConfigError("lease_s: must be longer than safe_s, that than renew_s, and that than retry_s", param="lease_s")
        if self.claim_delay_s < 0:
            raise ConfigError("claim_delay_s: must not be negative", param="claim_delay_s")

    def claim_delay(self, headroom: float, running: int) -> float:
        """Seconds for which a claimable job is left to replicas with more headroom. headroom: the share of time that training
        could get here, 0 to 1. running: jobs that share it already."""
        slack = min(1.0, max(0.0, headroom)) / (1 + max(0, running))
        return self.claim_delay_s * (1 - slack)


class LeaseChanges(NamedTuple):
    """Jobs whose leases have changed. lapsed: pause them. regained: they may go on. lost: another has them, or they ended."""

    lapsed: tuple[str, ...] = ()
    regained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(slots=True)
class _Lease:
    epoch: int
    sent_s: float
    lapsed: bool = False


class LeaseBook:
    """The leases of one holder. One renewal of all of them is under way at most."""

    def __init__(self, timing: LeaseTiming) -> None:
        self.timing = timing
        self._leases: dict[str, _Lease] = {}
        self._asked: dict[str, int] | None = None
        self._asked_s = self._next_s = -math.inf

    def took(self, job: str, epoch: int, sent_s: float) -> None:
        """A claim that was sent at sent_s has succeeded."""
        if not self._leases:
            self._next_s = sent_s + self.timing.renew_s
        self._leases[job] = _Lease(epoch, sent_s)

    def drop(self, job: str) -> None:
        """The job has ended, or its lease was given back."""
        self._leases.pop(job, None)

    @property
    def jobs(self) -> Mapping[str, int]:
        """Epochs of the jobs that are held or lapsed."""
        return {job: lease.epoch for job, lease in self._leases.items()}

    def epoch(self, job: str) -> int | None:
        """Under which the holder may write about a job. None: not at all."""
        lease = self._leases.get(job)
        return None if lease is None else lease.epoch

    def is_safe(self, job: str, now: float) -> bool:
        """Whether nobody else can have claimed the job yet, as far as clocks tell."""
        lease = self._leases.get(job)
        return lease is not None and now < lease.sent_s + self.timing.safe_s

    def hurry(self, now: float) -> None:
        """Has the next renewal sent now: a row may have changed."""
        self._next_s = min(self._next_s, now)

    def renewal(self, now: float) -> Mapping[str, int]:
        """The leases to renew, if it is time; the renewal counts as sent now, and `answered` or `failed` has to follow."""
        if self._asked is not None or not self._leases or now < self._next_s:
            return {}
        self._asked, self._asked_s = dict(self.jobs), now
        self._next_s = now + self.timing.renew_s
        return self._asked

    def answered(self, kept: Mapping[str, int], now: float) -> LeaseChanges:
        """The renewal under way has come back. kept: the epochs of the rows that were renewed."""
        asked, self._asked = self._asked or {}, None
        regained, lost = [], []
        for job, epoch in asked.items():
            lease = self._leases.get(job)
            if lease is None or lease.epoch != epoch:
                continue  # it was dropped, and perhaps claimed again, meanwhile
            if kept.get(job) != epoch:
                del self._leases[job]
                lost.append(job)
                continue
            lease.sent_s = max(lease.sent_s, self._asked_s)
            if lease.lapsed and self.is_safe(job, now):
                lease.lapsed = False
                regained.append(job)
        return LeaseChanges(regained=tuple(regained), lost=tuple(lost))

    def failed(self, now: float) -> None:
        """The renewal under way got no answer; it may have taken effect or not."""
        self._asked = None
        self._next_s = min(self._next_s, now + self.timing.retry_s)

    def look(self, now: float) -> LeaseChanges:
        """Leases that have lapsed since the last look."""
        lapsed = [job for job, lease in self._leases.items() if not lease.lapsed and not self.is_safe(job, now)]
        for job in lapsed:
            self._leases[job].lapsed = True
        return LeaseChanges(lapsed=tuple(lapsed))

    def is_lapsed(self, job: str) -> bool:
        """Whether the holder has been told to pause the job."""
        lease = self._leases.get(job)
        return lease is not None and lease.lapsed

    def next_s(self) -> float:
        """When to look again, or to renew; infinite without leases."""
        if not self._leases:
            return math.inf
        ends = [lease.sent_s + self.timing.safe_s for lease in self._leases.values() if not lease.lapsed]
        return min([*ends, *([self._next_s] if self._asked is None else [])], default=math.inf)
