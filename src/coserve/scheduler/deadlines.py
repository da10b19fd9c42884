"""How long an iteration may take, by what running requests were promised.

    slack           the time until the first of the next tokens is due
    cap             itl_factor x the least TPOT objective. The profile's objective, which nobody gave, allows a chunk of
                    FAST_CHUNK tokens too, if that takes no longer than the preemption quantum.
    feasible until  the time from which on a request misses its objective even if each of its tokens takes no longer than
                    decoding alone. From then on the request is infeasible.

Finetuning may take slack, because it can wait: nobody falls behind for it. A prompt may take more, until the first running
request would become infeasible. The running requests catch up while finetuning waits.

A best-effort request has an objective of math.inf, so that it has endless slack and is always feasible. Beside such requests
alone a prompt may take a preemption quantum, as beside none. A job may not take all of their slack: an iteration with a job
lasts at most itl_factor x the profile's TPOT, or itl_factor x decoding alone where that is longer.

Owns: slack, cap, feasibility, the reserve. Does not own: what the time is used for (hybrid.py, units.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection

from coserve.config.settings import SchedulerConfig
from coserve.core import PassCost, Slo
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.requests import RequestState

UNBOUNDED = 1e9
"""Seconds that anything fits into."""
FAST_CHUNK = 256
"""Tokens of a chunk that the profile's objective allows: smaller chunks take longer in all, and the prompt waits."""


class Deadlines:
    """Limits that running requests set. Each method takes the requests that run. All times are in seconds.

    best_effort: the objectives that a best-effort request counts as having beside jobs."""

    def __init__(self, config: SchedulerConfig, latency: LatencyModel, best_effort: Slo) -> None:
        self.config, self.latency, self.best_effort = config, latency, best_effort

    def reserve(self) -> float:
        """Relative error of a prediction to be ready for."""
        return self.latency.reserve() if self.config.reserve is None else self.config.reserve

    def cap(self, running: Collection[RequestState]) -> float:
        """What no pass with prompts is planned longer than, as long as none is late.

        An objective that decoding alone can't hold counts as what that takes. Best effort sets no cap but what a new arrival
        may wait. Where requests have the profile's objective, the cap allows a chunk of FAST_CHUNK tokens.
        """
        least, token_s = min(r.tpot_s for r in running), self._token_seconds(running)
        if least == math.inf:
            return max(self._quantum_s, self.config.itl_factor * token_s)
        cap = self.config.itl_factor * max(least, token_s)
        if self.config.tpot_ms is not None:
            return cap
        asked = [r.tpot_s for r in running if r.tpot_s not in (self.best_effort.tpot_s, math.inf)]
        asked_cap = self.config.itl_factor * max(min(asked), token_s) if asked else UNBOUNDED
        return max(cap, min(self._quantum_s, self._token_seconds(running, FAST_CHUNK), asked_cap))

    def for_jobs(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """What an iteration with finetuning may be predicted to take. prompt_s: what is kept for a prompt that may come."""
        if not running:
            return self._quantum_s
        least = min(r.tpot_s for r in running)
        if any(r.tpot_s == math.inf for r in running):
            least = min(least, max(self.best_effort.tpot_s, self._token_seconds(running)))
        return min(self.config.itl_factor * least, self._slack(running, now, prompt_s))

    def for_prompts(self, running: Collection[RequestState], now: float) -> float:
        """What a pass with prompts may be predicted to take so that all who can keep their objectives still can: one may fall
        behind as long as it can make up for it by its last token."""
        if not running:
            return self._quantum_s
        token_s, reserve = self._token_seconds(running), self.reserve()
        behind = (1 + reserve) * token_s
        feasible = [r for r in running if not r.infeasible(now, token_s)]
        return min([self.cap(running), *(max(r.slack_s(now, reserve), r.feasible_until_s(behind) - now) for r in feasible)])

    def for_others_prompts(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """What a pass with prompts of a tenant that has had more may take: it may cost these requests nothing. prompt_s: what
        is kept for the next prompt of their own tenants."""
        return min(self.cap(running), self._slack(running, now, prompt_s)) if running else UNBOUNDED

    @property
    def _quantum_s(self) -> float:
        return self.config.preemption_quantum_ms / 1e3

    def _slack(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """The least of those that can still meet their objective."""
        token_s, reserve = self._token_seconds(running), self.reserve()
        return min((r.slack_s(now, reserve, prompt_s) for r in running if not r.infeasible(now, token_s)), default=UNBOUNDED)

    def stretched(self, running: Collection[RequestState], now: float, *, overdue: bool) -> float:
        """What an iteration may take where a job has nothing shorter to run. It may take all slack, even over the cap.

        overdue: whether the job has waited so long that the iteration may last until the first request becomes infeasible. It
        may last without limit where jobs are to have a least share.
        """
        if not running or (overdue and self.config.finetune_min_share > 0):
            return UNBOUNDED
        token_s, reserve = self._token_seconds(running), self.reserve()
        feasible = [r for r in running if not r.infeasible(now, token_s)]
        times = (r.feasible_until_s(token_s) - now if overdue else r.slack_s(now, reserve) for r in feasible)
        return min(times, default=UNBOUNDED)

    def _token_seconds(self, running: Collection[RequestState], prompt: int = 0) -> float:
        """An iteration that gives each of them a token, and does nothing else but to begin a prompt with so many tokens."""
        rows, pairs, adapters = len(running), prompt * (prompt + 1) // 2, len({r.key for r in running})
        context, spans = sum(r.total for r in running), int(prompt > 0)
        cost = PassCost(rows + prompt, rows + spans, rows, context, pairs, 0, 0, 0, adapters, spans)
        return self.latency.pass_seconds(cost) + self.latency.constant_seconds
