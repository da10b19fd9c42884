"""An engine without tensors: the real scheduler and block pool, a fake clock, and a runner that checks every plan.

    schedule -> launch (checks, tables as they are then) -> [commit of the plan before, with lag] -> run (time passes) -> commit

The time that an iteration takes comes from a hidden latency law of its own, counted from the plan and not from what the
scheduler thinks of it. Tokens are a function of request and position, so that a lost or doubled token shows.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coserve.config.settings import SchedulerConfig
from coserve.core import Contents, Direction, PassCost, Sampled, Span, StepPlan, StepResult, Unit, UnitCost, WorkUnit
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase

BASE = PrefixKey("", None, 0)


class FakeClock:
    """Seconds; nothing moves it but `advance`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


def fake_token(request: int, position: int) -> int:
    """The token that is sampled at a position of a request's tokens."""
    return (request * 7919 + position * 104729) % 50000


@dataclass(slots=True, kw_only=True)
class FakeRequest:
    """A user of the engine. stop_at: output tokens after which the text ends by itself; cancel_at: when the user leaves."""

    state: RequestState
    stop_at: int
    cancel_at: float | None = None
    finished_s: float | None = None
    logit_rows: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether it kept both objectives."""
        if self.finished_s is None:
            return False
        first, last = self.token_times[0], self.token_times[-1]
        gaps = len(self.token_times) - 1
        late = gaps > 0 and (last - first) / gaps > self.state.tpot_s + 1e-9
        return first - self.state.arrival_s <= self.state.ttft_s + 1e-9 and not late


@dataclass(slots=True, kw_only=True)
class _Progress:
    """How far the runner has seen a micro-batch go. rows: forward, by layer; row, top: backward, rows and layers left."""

    work: MicrobatchWork
    rows: list[int] = field(default_factory=list)
    answered: bool = False
    row: int = 0
    top: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.rows = [0] * self.work.num_layers
        self.top = self.work.num_layers

    def forward_done(self) -> bool:
        return self.rows[-1] == self.work.num_tokens

    def take(self, unit: Unit) -> None:
        """One unit more; asserts that it may come next."""
        work = self.work
        assert 0 <= unit.start < unit.end <= work.num_tokens and 0 <= unit.layer_start < unit.layer_end <= work.num_layers
        if unit.direction is Direction.FORWARD:
            for layer in range(unit.layer_start, unit.layer_end):
                assert self.rows[layer] == unit.start
                assert layer == 0 or self.rows[layer - 1] >= unit.end
                self.rows[layer] = unit.end
            return
        if self.row == 0:
            self.row = work.num_tokens
        assert self.answered and not self.done and not work.forward_only
        assert unit.end == self.row and unit.layer_end == self.top and unit.layer_start >= work.lowest
        assert unit.layer_end - unit.layer_start == 1 or (unit.start, unit.end) == (0, work.num_tokens)
        self.row = unit.start
        if unit.start == 0:
            self.row, self.top = 0, unit.layer_start
            self.done = self.top == work.lowest


@dataclass(slots=True)
class Launched:
    """A plan with what it needs as it was when it was made."""

    plan: StepPlan
    tables: dict[int, list[int]]
    states: dict[int, RequestState]
    contents: Contents
    forwarded: list[int]
    finished: list[int]


class FakeRunner:
    """Runs plans in no time but the clock's. truth: what iterations really take; noise: standard deviation of a relative error.
    check_cache: the key-value cache is played through, token by token."""

    def __init__(
        self, clock: FakeClock, truth: LatencyModel, scheduler: HybridScheduler, *, noise: float = 0.0, check_cache: bool = True
    ) -> None:
        self.clock, self.truth, self.scheduler = clock, truth, scheduler
        self.noise, self.check_cache = noise, check_cache
        self.microbatches: dict[int, _Progress] = {}
        self.slices: dict[int, int] = {}
        self.trained: dict[int, float] = {}
        self.units: list[WorkUnit] = []
        self.finetune_s = self.busy_s = 0.0
        self._ends: dict[int, tuple[int, int]] = {}
        self._cache: dict[tuple[int, int], int] = {}
        self._random = random.Random(0)

    # --- launch: everything a plan says is legal ---

    def launch(self, plan: StepPlan) -> Launched:
        """Checks a plan that was just made."""
        scheduler = self.scheduler
        states = {span.request: scheduler.requests[span.request] for span in plan.spans}
        assert len(states) == len(plan.spans), "a request twice"
        assert sum(span.length for span in plan.spans) <= scheduler.config.max_num_batched_tokens
        assert scheduler.num_running <= scheduler.config.max_num_seqs
        for span in plan.spans:
            self._check_span(span, states[span.request], decode=span in plan.decode)
        tables = {number: list(scheduler.pool.table(number)) for number in states}
        assert sum(work.fused for work in plan.units) <= 1
        forwarded, finished = [], []
        for work in sorted(plan.units, key=lambda w: not w.fused):  # the pass comes first
            progress = self.microbatches[work.microbatch]
            progress.take(work.unit)
            if work.fused:
                assert plan.spans and work.unit.direction is Direction.FORWARD
                assert (work.unit.layer_start, work.unit.layer_end) == (0, progress.work.num_layers)
            if work.unit.direction is Direction.FORWARD and progress.forward_done():
                forwarded.append(work.microbatch)
            if progress.done:
                finished.append(work.microbatch)
            rows, layers = work.unit.end - work.unit.start, work.unit.layer_end - work.unit.layer_start
            tokens = rows * layers / progress.work.num_layers / 2
            self.trained[progress.work.job] = self.trained.get(progress.work.job, 0.0) + tokens
        self.units += plan.units
        for part in plan.optimizer:
            assert part.start == self.slices.get(part.job, 0) < part.end
            assert not any(p.work.job == part.job for p in self.microbatches.values()), "a micro-batch is in flight"
            self.slices[part.job] = part.end
        return Launched(plan, tables, states, self._contents(plan, states), forwarded, finished)

    def _check_span(self, span: Span, state: RequestState, *, decode: bool) -> None:
        lives, end = self._ends.get(span.request, (-1, 0))
        expected = end if lives == state.preemptions else state.cached_tokens
        assert span.start == expected, "a span starts where the last one ended"
        assert span.length >= 1 and span.end <= state.total
        assert not decode or (span.length == 1 and span.samples and span.logits == 1)
        assert span.samples == (span.end == state.total - 1 and state.in_flight > 0)
        assert span.samples <= span.logits <= span.length
        assert len(self.scheduler.pool.table(span.request)) * self.scheduler.pool.block_tokens >= span.end
        self._ends[span.request] = (state.preemptions, span.end)

    def _contents(self, plan: StepPlan, states: dict[int, RequestState]) -> Contents:
        """What the plan costs, counted from its rows."""
        units, cost = [], None
        if plan.spans:
            adapters = {state.key for state in states.values() if state.key.adapter is not None}
            fused = plan.fused
            work = None if fused is None else self.microbatches[fused.microbatch].work
            window = (0, 0) if fused is None else (fused.unit.start, fused.unit.end)
            cost = PassCost(
                rows=sum(span.length for span in plan.spans) + window[1] - window[0],
                head_rows=sum(span.logits for span in plan.spans), decode_rows=len(plan.decode),
                decode_context=sum(span.end for span in plan.decode),
                prefill_pairs=sum(position + 1 for span in plan.prefill for position in range(span.start, span.end)),
                fused_rows=window[1] - window[0], fused_pairs=work.pairs(*window) if work else 0,
                fused_labels=work.labels(*window) if work else 0, adapter_segments=len(adapters),
            )
        for item in plan.units:
            if not item.fused:
                unit, work = item.unit, self.microbatches[item.microbatch].work
                backward = unit.direction is Direction.BACKWARD
                top = not backward and unit.layer_end == work.num_layers
                units.append(UnitCost(backward, unit.end - unit.start, unit.layer_end - unit.layer_start,
                                      work.pairs(unit.start, unit.end), work.labels(unit.start, unit.end) if top else 0))
        refresh = sum(self.scheduler.jobs[part.job].slice_refresh_seconds(part.end - part.start) for part in plan.optimizer)
        return Contents(cost, tuple(units), sum(part.end - part.start for part in plan.optimizer), refresh)

    # --- run ---

    def run(self, launched: Launched) -> StepResult:
        """Time passes; tokens come of the spans that sample."""
        plan = launched.plan
        if self.check_cache:
            for span in plan.spans:
                self._compute(span, launched)
        error = max(-3.0, min(3.0, self._random.gauss(0.0, 1.0))) * self.noise
        seconds = self.truth.seconds(launched.contents) * (1 + error)
        inference = Contents(launched.contents.inference, (), 0)
        if inference.inference is not None:
            cost = inference.inference
            cost = cost._replace(rows=cost.rows - cost.fused_rows, fused_rows=0, fused_pairs=0, fused_labels=0)
            self.finetune_s += seconds - self.truth.seconds(Contents(cost, (), 0)) * (1 + error)
        else:
            self.finetune_s += seconds
        self.busy_s += seconds
        self.clock.advance(seconds)
        tokens = {span.request: [Sampled(fake_token(span.request, span.end))] for span in plan.spans if span.samples}
        return StepResult(tokens=tokens, prompt_logprobs={}, seconds=seconds)

    def _compute(self, span: Span, launched: Launched) -> None:
        """Keys and values of the span's tokens; each depends on all before it, which must be found in the cache."""
        state, table, size = launched.states[span.request], launched.tables[span.request], self.scheduler.pool.block_tokens
        before = hash(state.key)
        for position in range(span.end):
            known = position < len(state.prompt)
            token = state.prompt[position] if known else fake_token(span.request, position)
            before = hash((before, token))
            place = (table[position // size], position % size)
            if position < span.start:
                assert self._cache[place] == before, "a block does not hold what its owner computed"
            else:
                self._cache[place] = before


@dataclass(slots=True, kw_only=True)
class FakeJob:
    """A job that trains the same optimizer batch for ever, or `steps` times. microbatches: tokens of each example, per
    micro-batch; grouped: no micro-batch's backward begins before all of the batch are forward; grid: of a deterministic job,
    which has one micro-batch in flight."""

    work: JobWork
    microbatches: Sequence[Sequence[int]]
    elements: int = 100_000
    grouped: bool = False
    forward_only: bool = False
    lowest: int = 0
    grid: int | None = None
    steps: int | None = None
    steps_done: int = 0
    next: int = 0
    waiting: list[MicrobatchWork] = field(default_factory=list)
    through: set[int] = field(default_factory=set)
    updating: bool = False


class FakeEngine:
    """The life of requests and jobs around a scheduler. lag: commits that a plan is made ahead of, 0 or 1."""

    def __init__(
        self, config: SchedulerConfig, believed: LatencyModel, *, truth: LatencyModel | None = None, num_blocks: int = 4096,
        block_tokens: int = 16, num_layers: int = 4, lag: int = 0, noise: float = 0.0, check_cache: bool = True,
    ) -> None:
        self.clock, self.lag, self.num_layers = FakeClock(), lag, num_layers
        self.pool = BlockPool(num_blocks, block_tokens)
        self.scheduler = HybridScheduler(config, believed, self.pool, num_layers)
        self.runner = FakeRunner(
            self.clock, truth or LatencyModel(believed.coefficients), self.scheduler, noise=noise, check_cache=check_cache
        )
        self.requests: dict[int, FakeRequest] = {}
        self.jobs: dict[int, FakeJob] = {}
        self.plans: list[tuple[float, StepPlan]] = []
        self._coming: list[FakeRequest] = []
        self._leaving: list[FakeRequest] = []
        self._numbers = 0
        self._pending: list[tuple[Launched, StepResult]] = []

    def submit(
        self, prompt: Sequence[int] | int, max_tokens: int, *, at: float | None = None, stop_at: int | None = None,
        cancel_at: float | None = None, tenant: str = "", tpot_s: float | None = None, ttft_s: float | None = None,
        key: PrefixKey = BASE, every_logit: bool = False,
    ) -> FakeRequest:
        """A request that arrives at a time, by default now. prompt: its tokens, or how many (unlike all others')."""
        self._numbers += 1
        number, default = self._numbers, self.scheduler.slo
        tokens = [number * 1_000_003 + i for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        state = RequestState(
            id=number, tenant=tenant, prompt=tokens, max_tokens=max_tokens, key=key,
            arrival_s=self.clock() if at is None else at, tpot_s=tpot_s or default.tpot_s,
            ttft_s=ttft_s or default.ttft_s, cacheable=not every_logit, every_logit=every_logit,
        )
        request = FakeRequest(state=state, stop_at=min(max_tokens, stop_at or max_tokens), cancel_at=cancel_at)
        self.requests[number] = request
        insort(self._coming, request, key=lambda r: -r.state.arrival_s)
        if cancel_at is not None:
            self._leaving.append(request)
        return request

    def add_job(
        self, microbatches: Sequence[Sequence[int]], *, tenant: str = "", weight: float = 1.0, **options: Any
    ) -> FakeJob:
        """A job that wants units from now on."""
        self._numbers += 1
        job = FakeJob(
            work=JobWork(id=self._numbers, tenant=tenant, weight=weight), microbatches=microbatches, **options
        )
        self.jobs[job.work.id] = job
        self.scheduler.add_job(job.work)
        return job

    # --- iterations ---

    def step(self) -> StepPlan | None:
        """One iteration, or with nothing to run the clock goes to the next arrival; None at the end of all."""
        while self._coming and self._coming[-1].state.arrival_s <= self.clock():
            self.scheduler.add_request(self._coming.pop().state)
        for request in list(self._leaving):
            if request.cancel_at is not None and request.cancel_at <= self.clock():
                self._leaving.remove(request)
                self.scheduler.remove_request(request.state.id)
        for job in list(self.jobs.values()):
            self._pump(job)
        plan = self.scheduler.schedule(self.clock())
        launched = None if plan.empty else self.runner.launch(plan)
        committed = bool(self._pending)
        if committed:
            self._commit(*self._pending.pop(0))
        if launched is None:
            return plan if committed or self._moves() else None
        self.plans.append((self.clock(), plan))
        self._pending.append((launched, self.runner.run(launched)))
        if not self.lag:
            self._commit(*self._pending.pop(0))
        return plan

    def run(self, until_s: float = float("inf"), max_steps: int = 200_000) -> None:
        """Iterations until a time or the end of all work; the last commits are made."""
        for _ in range(max_steps):
            if self.clock() >= until_s or self.step() is None:
                break
        else:
            raise AssertionError("no end")
        while self._pending:
            self._commit(*self._pending.pop(0))

    def _moves(self) -> bool:
        """After an empty plan: whether there is something to wait for, which the clock is advanced to."""
        assert not self.scheduler.requests or not self.scheduler.policy.inference, "requests wait and nothing runs"
        if not self._coming:
            return False
        self.clock.advance(max(0.0, self._coming[-1].state.arrival_s - self.clock()))
        return True

    def _commit(self, launched: Launched, result: StepResult) -> None:
        now = self.clock()
        plan = launched.plan
        alive = {span.request for span in plan.spans if span.request in self.scheduler.requests}
        self.scheduler.commit(plan, {n: [s.token for s in t] for n, t in result.tokens.items()}, now, result.seconds)
        for span in plan.spans:
            request = self.requests[span.request]
            if span.request not in alive:
                continue
            request.logit_rows += [row for row in range(span.end - span.logits, span.end) if row < len(request.state.prompt)]
            if span.samples:
                request.token_times.append(now)
                if len(request.token_times) >= request.stop_at:
                    request.finished_s = now
                    self.scheduler.remove_request(span.request)
        for job in self.jobs.values():
            job.through |= {n for n in (*launched.forwarded, *launched.finished) if n in job.work.microbatches}
            if any(part.job == job.work.id and part.end == job.elements for part in plan.optimizer):
                job.updating = False
                job.work.optimizer_elements = job.work.optimizer_done = 0
                job.steps_done += 1
                job.next = 0
                del self.runner.slices[job.work.id]

    # --- jobs ---

    def _pump(self, job: FakeJob) -> None:
        """What a job's driver does between iterations, on what is committed."""
        forward = [w for w in job.waiting if w.id in job.through]
        all_forward = job.next == len(job.microbatches) and len(forward) == len(job.waiting)
        for work in list(job.waiting):
            progress = self.runner.microbatches[work.id]
            if work.id in job.through and work.phase is Phase.OBJECTIVE and (all_forward or not job.grouped):
                work.on_objective()
                progress.answered = True
                job.through.discard(work.id)
                if work.forward_only:
                    job.through.add(work.id)
            if work.id in job.through and work.phase is Phase.DONE:
                job.waiting.remove(work)
                job.through.discard(work.id)
                del job.work.microbatches[work.id]
                del self.runner.microbatches[work.id]
        if job.updating or (job.steps is not None and job.steps_done >= job.steps):
            return
        if job.next == len(job.microbatches) and not job.waiting:
            if job.forward_only:
                job.steps_done, job.next = job.steps_done + 1, 0
                self._pump(job)
            else:
                job.updating = True
                job.work.optimizer_elements, job.work.optimizer_done = job.elements, 0
            return
        most = self.scheduler.config.max_microbatches if job.grid is None else 1
        while job.next < len(job.microbatches) and len(job.waiting) < most:
            self._begin(job, job.microbatches[job.next])

    def _begin(self, job: FakeJob, examples: Sequence[int]) -> None:
        self._numbers += 1
        job.next += 1
        ends = [sum(examples[: i + 1]) for i in range(len(examples))]
        work = MicrobatchWork(
            id=self._numbers, job=job.work.id, num_tokens=ends[-1], num_layers=self.num_layers, lowest=job.lowest,
            bounds=list(zip([0, *ends[:-1]], ends, strict=True)), label_rows=range(ends[-1]), forward_only=job.forward_only,
            grid=job.grid,
        )
        job.waiting.append(work)
        self.runner.microbatches[work.id] = _Progress(work=work)
        self.scheduler.add_microbatch(work)
