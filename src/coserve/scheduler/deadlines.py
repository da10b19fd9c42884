"""How long an iteration may take, so that running requests get what they were promised.

    slack           the time until the first running request's next token is due
    cap             itl_factor x the least TPOT objective. If that objective comes from the profile, since nobody gave one, the
                    cap also allows a chunk of FAST_CHUNK tokens that takes no longer than the preemption quantum.
    feasible until  the last moment at which a request can still meet its TPOT objective, if each of its tokens then takes as
                    long as decoding alone. After it the request is infeasible.

An iteration with finetuning lasts no longer than the slack, so that no request falls behind for a job. An iteration with a
prompt may last longer, until the first running request would become infeasible. Requests that fell behind catch up while
finetuning waits.

A best-effort request has an objective of math.inf, so that its slack has no end and it is always feasible. Where all running
requests are best effort, an iteration with a prompt may last for a preemption quantum, as where none runs. An iteration with
finetuning beside a best-effort request lasts at most itl_factor x the profile's TPOT, or itl_factor x decoding alone if that
is longer.

Owns: slack, cap, feasibility, the reserve. Does not own: what the time is used for (prompts.py, units.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from coserve.config.settings import SchedulerConfig
from coserve.core import PassCost, Slo
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.requests import RequestState

UNBOUNDED = 1e9
"""Seconds that anything fits into."""
FAST_CHUNK = 256
"""Tokens of a chunk that the profile's objective always allows. A prompt in smaller chunks would take longer in all."""
SHORT_WAIT = 0.1
"""A prompt that comes may wait for this share of the TTFT objective until running requests have gained slack for it."""


class Limits(NamedTuple):
    """The longest that an iteration may be predicted to take, in seconds. prompts: a pass with prompts. jobs: an iteration with
    finetuning."""

    prompts: float
    jobs: float


class Deadlines:
    """Limits that running requests set to an iteration. Each method takes the requests that run. All times are in seconds.

    best_effort: the objectives that a best-effort request counts as having beside jobs.
    """

    def __init__(self, config: SchedulerConfig, latency: LatencyModel, best_effort: Slo) -> None:
        self.config, self.latency, self.best_effort = config, latency, best_effort
        self.quantum_s = config.preemption_quantum_ms / 1e3

    def reserve(self) -> float:
        """The relative error of a prediction that slack is kept for."""
        return self.latency.reserve() if self.config.reserve is None else self.config.reserve

    def cap(self, running: Collection[RequestState]) -> float:
        """The longest that a pass with prompts may be predicted to take, unless one of the prompts is late.

        An objective shorter than decoding alone counts as the time that decoding takes. If all requests are best effort, the
        cap is the preemption quantum, or itl_factor x decoding alone if that is longer.
        """
        return self._cap(running, self._token_seconds(running), min([r.tpot_s for r in running]))

    def _cap(self, running: Collection[RequestState], token_s: float, least: float) -> float:
        """The cap where an iteration that gives each request a token takes `token_s`. least: of the TPOT objectives."""
        if least == math.inf:
            return max(self.quantum_s, self.config.itl_factor * token_s)
        cap = self.config.itl_factor * max(least, token_s)
        if self.config.tpot_ms is not None:
            return cap
        asked = [r.tpot_s for r in running if r.tpot_s not in (self.best_effort.tpot_s, math.inf)]
        asked_cap = self.config.itl_factor * max(min(asked), token_s) if asked else UNBOUNDED
        return max(cap, min(self.quantum_s, self._token_seconds(running, FAST_CHUNK), asked_cap))

    def limits(self, running: Collection[RequestState], now: float, prompt_s: float) -> Limits:
        """How long the next iteration may be. prompt_s: seconds of a prompt that may come.

        So that no request becomes infeasible, one may fall behind for a prompt as long as it can make up for it by its last
        token. For a job none falls behind. Jobs leave what such a prompt takes, less what requests gain in a SHORT_WAIT without
        jobs.
        """
        if not running:
            return Limits(self.quantum_s, self.quantum_s)
        token_s, reserve = self._token_seconds(running), self.reserve()
        tpots = [r.tpot_s for r in running]
        behind, tpot_s = (1 + reserve) * token_s, self._least_tpot(tpots, token_s)
        prompts, jobs = self._cap(running, token_s, min(tpots)), self.config.itl_factor * tpot_s
        gain = max(0.0, tpot_s / max(token_s, 1e-9) - 1)  # seconds of slack for each second without jobs
        prompt_s = max(0.0, prompt_s - SHORT_WAIT * self.best_effort.ttft_s * gain)
        for request in running:
            slack, share, until = request.margins(now, reserve, token_s, prompt_s)
            if now > until:
                continue
            if slack < prompts:
                prompts = min(prompts, max(slack, request.feasible_until_s(behind) - now))
            if slack - share < jobs:
                jobs = slack - share
        return Limits(prompts, jobs)

    def _least_tpot(self, tpots: Collection[float], token_s: float) -> float:
        """The least TPOT objective, as jobs have to keep it. tpots: those of requests that run."""
        least = min(tpots)
        if max(tpots) == math.inf:
            least = min(least, max(self.best_effort.tpot_s, token_s))
        return least

    def for_others_prompts(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """The longest that a pass may take with a prompt of a tenant that has had more than these requests' tenants.

        They don't fall behind for it. prompt_s: kept for the next prompt of their own tenants.
        """
        return min(self.cap(running), self._slack(running, now, prompt_s)) if running else UNBOUNDED

    def _slack(self, running: Collection[RequestState], now: float, prompt_s: float) -> float:
        """The least slack among requests that can still meet their objective."""
        token_s, reserve = self._token_seconds(running), self.reserve()
        return min((r.slack_s(now, reserve, prompt_s) for r in running if not r.infeasible(now, token_s)), default=UNBOUNDED)

    def stretched(self, running: Collection[RequestState], now: float, *, overdue: bool) -> float:
        """The longest that an iteration may take if a job has nothing shorter to run: all slack, even over the cap.

        overdue: the job has waited so long that the iteration may last until the first request becomes infeasible. If jobs are
        to have a least share of the time, it then has no limit.
        """
        if not running or (overdue and self.config.finetune_min_share > 0):
            return UNBOUNDED
        token_s, reserve = self._token_seconds(running), self.reserve()
        feasible = [r for r in running if not r.infeasible(now, token_s)]
        times = (r.feasible_until_s(token_s) - now if overdue else r.slack_s(now, reserve) for r in feasible)
        return min(times, default=UNBOUNDED)

    def _token_seconds(self, running: Collection[RequestState], prompt: int = 0) -> float:
        """Predicts an iteration that gives each request a token. prompt: tokens of a new prompt's first chunk in it."""
        rows, pairs, adapters = len(running), prompt * (prompt + 1) // 2, len({r.key for r in running})
        context, spans = sum([len(r.prompt) + len(r.output) + r.in_flight for r in running]), int(prompt > 0)
        cost = PassCost(rows + prompt, rows + spans, rows, context, pairs, 0, 0, 0, adapters, spans)
        return self.latency.pass_seconds(cost) + self.latency.constant_seconds
