"""The life of requests and jobs around a real scheduler, on a virtual clock.

    schedule -> launch (what the plan holds is counted) -> [commit of the plan before, with lag] -> run (time passes) -> commit
             -> the time between two iterations passes

The time that an iteration takes comes from the truth, a law that the scheduler doesn't see. The scheduler believes a law of its
own, which it corrects by the times that it is told, as on a device. Tokens are a function of request and position.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Sequence

from coserve.config.settings import SchedulerConfig
from coserve.core import StepPlan
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.work import JobWork
from coserve.simulation.clock import VirtualClock
from coserve.simulation.disturbance import EXACT, Disturbance, TrueLaw
from coserve.simulation.jobs import SimulatedBatch, SimulatedJob
from coserve.simulation.requests import SimulatedRequest, distinct_prompt
from coserve.simulation.runner import Launched, Ran, SimulatedRunner

BASE_KEY = PrefixKey("", None, 0)
"""Of prefixes of the base model, which all tenants share."""


class SimulatedEngine:
    """A scheduler with requests, jobs and time.

    believed: the law that the scheduler begins with. truth: what iterations take, before the disturbance; None: the same.
    lag: commits that a plan is made ahead of, 0 or 1. pool: the memory; None: 4096 blocks of 16 tokens. runner: makes what runs
    the plans.
    """

    def __init__(
        self, config: SchedulerConfig, believed: LatencyModel, *, truth: LatencyModel | None = None,
        disturbance: Disturbance = EXACT, pool: BlockPool | None = None, num_layers: int = 4, lag: int = 0,
        runner: type[SimulatedRunner] = SimulatedRunner,
    ) -> None:
        self.clock, self.lag = VirtualClock(), lag
        self.pool = BlockPool(4096, 16) if pool is None else pool
        self.scheduler = HybridScheduler(config, believed, self.pool, num_layers)
        self.runner = runner(self.clock, TrueLaw(believed if truth is None else truth, disturbance), self.scheduler)
        self.requests: dict[int, SimulatedRequest] = {}
        self.jobs: dict[int, SimulatedJob] = {}
        self._new_number = itertools.count(1).__next__
        self._coming: list[SimulatedRequest] = []  # the next one last
        self._leaving: list[SimulatedRequest] = []
        self._pending: list[tuple[Launched, Ran]] = []

    # --- requests and jobs ---

    def submit(
        self, prompt: Sequence[int] | int, max_tokens: int, *, at: float | None = None, stop_at: int | None = None,
        cancel_at: float | None = None, tenant: str = "", tpot_s: float | None = None, ttft_s: float | None = None,
        key: PrefixKey = BASE_KEY, every_logit: bool = False,
    ) -> SimulatedRequest:
        """A request that arrives at a time, by default now. prompt: its tokens, or how many (unlike all others')."""
        number, default = self._new_number(), self.scheduler.slo
        if isinstance(prompt, int):
            prompt = distinct_prompt(number, prompt)
        state = RequestState(
            id=number, tenant=tenant, prompt=prompt, max_tokens=max_tokens, key=key,
            arrival_s=self.clock() if at is None else at, tpot_s=tpot_s or default.tpot_s,
            ttft_s=ttft_s or default.ttft_s, cacheable=not every_logit, every_logit=every_logit,
        )
        request = SimulatedRequest(state=state, stop_at=min(max_tokens, stop_at or max_tokens), cancel_at=cancel_at)
        self.requests[number] = request
        insort(self._coming, request, key=lambda r: -r.state.arrival_s)
        if cancel_at is not None:
            self._leaving.append(request)
        return request

    def cancel(self, request: SimulatedRequest) -> None:
        """The user of a request that has not finished leaves now."""
        request.cancelled = True
        if request in self._coming:
            self._coming.remove(request)
        self.scheduler.remove_request(request.state.id)

    def start_job(
        self, batch: SimulatedBatch | Sequence[SimulatedBatch], *, tenant: str = "", weight: float = 1.0,
        steps: int | None = None,
    ) -> SimulatedJob:
        """A job that wants units from now on. batch: of every optimizer step, or those of one step after the other, over and
        over. steps: after which it ends; None: never."""
        work = JobWork(id=self._new_number(), tenant=tenant, weight=weight)
        job = SimulatedJob(
            work=work, batches=(batch,) if isinstance(batch, SimulatedBatch) else batch, scheduler=self.scheduler,
            new_number=self._new_number, steps=steps,
        )
        self.jobs[work.id] = job
        self.scheduler.add_job(work)
        return job

    def remove_job(self, job: SimulatedJob) -> None:
        """The job ends now, whatever it has in flight, and its memory is free."""
        del self.jobs[job.work.id]
        job.drop()
        self.scheduler.remove_job(job.work.id)

    @property
    def idle(self) -> bool:
        """Whether nothing can happen before a request or a job comes."""
        return not (self.scheduler.requests or self.jobs or self._coming or self._pending)

    # --- iterations ---

    def step(self) -> StepPlan | None:
        """One iteration. With nothing to run the clock goes to the next arrival and the plan is empty; None at the end of
        all."""
        plan, launched, committed = self._iterate()
        if launched is None and not committed:
            return plan if self._wait_for_arrival() else None
        return plan

    def run_once(self) -> StepPlan:
        """One iteration. With nothing to run the plan is empty, and the clock stands still."""
        return self._iterate()[0]

    def _iterate(self) -> tuple[StepPlan, Launched | None, bool]:
        """The plan, the same launched unless it is empty, and whether a plan before it was committed first."""
        self._admit()
        for job in self.jobs.values():
            job.advance()
        plan = self.scheduler.schedule(self.clock())
        launched = None if plan.empty else self.runner.launch(plan)
        committed = bool(self._pending)
        if committed:
            self._commit(*self._pending.pop(0))
        if launched is not None:
            self._pending.append((launched, self.runner.run(launched)))
            if not self.lag:
                self._commit(*self._pending.pop(0))
            self.clock.advance(self.runner.truth.disturbance.between_s)
        return plan, launched, committed

    def run(self, until_s: float = float("inf"), max_steps: int = 200_000) -> None:
        """Iterations until a time or the end of all work; the last commits are made."""
        for _ in range(max_steps):
            if self.clock() >= until_s or self.step() is None:
                break
        else:
            raise AssertionError("no end")
        while self._pending:
            self._commit(*self._pending.pop(0))

    def _admit(self) -> None:
        """Requests whose time has come arrive, and those whose users leave are cancelled."""
        now = self.clock()
        while self._coming and self._coming[-1].state.arrival_s <= now:
            self.scheduler.add_request(self._coming.pop().state)
        for request in [r for r in self._leaving if r.cancel_at is not None and r.cancel_at <= now]:
            self._leaving.remove(request)
            if request.finished_s is None:
                self.cancel(request)

    def _wait_for_arrival(self) -> bool:
        """After an empty plan: whether there is an arrival to wait for, which the clock is advanced to."""
        assert not self.scheduler.requests or not self.scheduler.policy.inference, "requests wait and nothing runs"
        if not self._coming:
            return False
        self.clock.advance(max(0.0, self._coming[-1].state.arrival_s - self.clock()))
        return True

    def _commit(self, launched: Launched, ran: Ran) -> None:
        now, plan, scheduler = self.clock(), launched.plan, self.scheduler
        alive = [span for span in plan.spans if span.request in scheduler.requests]
        scheduler.commit(plan, ran.tokens, now)
        scheduler.observe(plan, ran.seconds)
        for span in alive:
            request = self.requests[span.request]
            if request.state.every_logit:
                end = min(span.end, len(request.state.prompt))
                request.logit_rows += range(span.end - span.logits, end)
            if span.samples:
                request.token_times.append(now)
                if len(request.token_times) >= request.stop_at:
                    request.finished_s = now
                    scheduler.remove_request(span.request)
        for job in self.jobs.values():
            job.on_commit(plan, launched.through)
