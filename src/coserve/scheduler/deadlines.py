"""How long an iteration may take, by what running requests were promised.

    slack   until the first of the next tokens is due
    cap     itl_factor x the least TPOT objective
    hope    until the first request can't meet its objective any more, even if each of its tokens took no longer than decoding
            alone

Finetuning may take slack: it can wait, so that nobody falls behind for it. Prompts may take time up to the end of hope: those
that run make up for it while finetuning waits. Owns: these three, and the reserve. Does not own: what the time is used for
(hybrid.py, units.py).
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
        """What no pass with prompts is planned longer than, as long as none is late. An objective that decoding alone can't
        hold counts as what that takes."""
        return self.config.itl_factor * max(min(r.tpot_s for r in running), self._token_seconds(running))

    def for_jobs(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """What an iteration with finetuning may be predicted to take. prompt_s: what is kept for a prompt that may come."""
        if not running:
            return self.config.preemption_quantum_ms / 1e3
        return min(self.config.itl_factor * min(r.tpot_s for r in running), self._slack(running, now, prompt_s))

    def for_prompts(self, running: Collection[RequestState], now: float) -> float:
        """What a pass with prompts may be predicted to take so that all who can keep their objectives still can: one may fall
        behind as long as it can make up for it by its last token."""
        if not running:
            return self.config.preemption_quantum_ms / 1e3
        token_s, reserve = self._token_seconds(running), self.reserve()
        behind = (1 + reserve) * token_s
        left = (max(r.slack_s(now, reserve), r.hope_s(behind) - now) for r in running if not r.hopeless(now, token_s))
        return min([self.cap(running), *left])

    def for_others_prompts(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """What a pass with prompts of a tenant that has had more may take: it may cost these requests nothing. prompt_s: what
        is kept for the next prompt of their own tenants."""
        return min(self.cap(running), self._slack(running, now, prompt_s)) if running else UNBOUNDED

    def _slack(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """The least of those that can still meet their objective."""
        token_s, reserve = self._token_seconds(running), self.reserve()
        return min((r.slack_s(now, reserve, prompt_s) for r in running if not r.hopeless(now, token_s)), default=UNBOUNDED)

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
