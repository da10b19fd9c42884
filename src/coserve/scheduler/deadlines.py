"""How long an iteration may take, by what running requests were promised.

    slack: until the least of the next tokens is due     cap: itl_factor x the least TPOT objective     hope: until the first
    request can't meet its objective any more, even if each of its tokens took no longer than decoding alone

Owns: these three, and the reserve. Does not own: what the time is used for (hybrid.py, units.py).
"""

from __future__ import annotations

from collections.abc import Collection

from coserve.config import SchedulerConfig
from coserve.scheduler.latency import LatencyModel, PassCost
from coserve.scheduler.requests import RequestState

UNBOUNDED = 1e9
"""Seconds that anything fits into."""


class Deadlines:
    """Of the running requests that a method is asked about. Times are in seconds."""

    def __init__(self, config: SchedulerConfig, latency: LatencyModel) -> None:
        self.config, self.latency = config, latency

    def reserve(self) -> float:
        """Relative error of a prediction to be ready for."""
        return self.latency.reserve() if self.config.reserve is None else self.config.reserve

    def cap(self, running: Collection[RequestState]) -> float:
        """What no iteration is planned longer than."""
        return self.config.itl_factor * min(r.tpot_s for r in running)

    def budget(self, running: Collection[RequestState], now: float) -> float:
        """What an iteration may be predicted to take."""
        if not running:
            return self.config.preemption_quantum_ms / 1e3
        token_s, reserve = self._token_seconds(running), self.reserve()
        return min([self.cap(running), *(r.slack_s(now, reserve) for r in running if not r.hopeless(now, token_s))])

    def stretched(self, running: Collection[RequestState], now: float, *, desperate: bool) -> float:
        """What an iteration may take where there is nothing shorter to run: all slack, over the cap; in despair until the end
        of hope, or without end where jobs are to have a least share."""
        if not running or (desperate and self.config.finetune_min_share > 0):
            return UNBOUNDED
        token_s, reserve = self._token_seconds(running), self.reserve()
        hopeful = [r for r in running if not r.hopeless(now, token_s)]
        times = (r.hope_s(token_s) - now if desperate else r.slack_s(now, reserve) for r in hopeful)
        return min(times, default=UNBOUNDED)

    def _token_seconds(self, running: Collection[RequestState]) -> float:
        """An iteration that gives each of them a token and does nothing else."""
        rows = len(running)
        cost = PassCost(rows, rows, rows, sum(r.total for r in running), 0, 0, 0, 0, len({r.key for r in running}))
        return self.latency.pass_seconds(cost) + self.latency.constant_seconds
