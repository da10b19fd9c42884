"""A simulated engine that keeps its plans and checks each: whether it is legal, and what lies in the cache's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coserve.config.settings import SchedulerConfig
from coserve.core import Direction, Span, StepPlan, Unit, WorkUnit
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.requests import RequestState
from coserve.scheduler.work import MicrobatchWork, Phase
from coserve.simulation.clock import VirtualClock
from coserve.simulation.disturbance import Disturbance, TrueLaw
from coserve.simulation.engine import SimulatedEngine
from coserve.simulation.jobs import SimulatedBatch, SimulatedJob
from coserve.simulation.requests import simulated_token
from coserve.simulation.runner import Launched, Ran, SimulatedRunner


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a micro-batch's units have gone. rows: forward, by layer; row, top: backward, rows and layers left."""

    work: MicrobatchWork
    rows: list[int] = field(default_factory=list)
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
        assert work.phase in (Phase.BACKWARD, Phase.DONE), "the objective has answered"
        assert self.forward_done() and not self.done and not work.forward_only
        assert unit.end == self.row and unit.layer_end == self.top and unit.layer_start >= work.lowest
        assert unit.layer_end - unit.layer_start == 1 or (unit.start, unit.end) == (0, work.num_tokens)
        self.row = unit.start
        if unit.start == 0:
            self.row, self.top = 0, unit.layer_start
            self.done = self.top == work.lowest


class CheckedRunner(SimulatedRunner):
    """Asserts that plans are legal, and keeps them. check_cache: the key-value cache is played through, token by token."""

    check_cache = True

    def __init__(self, clock: VirtualClock, truth: TrueLaw, scheduler: HybridScheduler) -> None:
        super().__init__(clock, truth, scheduler)
        self.units: list[WorkUnit] = []
        self.plans: list[tuple[float, StepPlan]] = []
        self._microbatches: dict[int, Progress] = {}
        self._slices: dict[int, int] = {}
        self._ends: dict[int, tuple[int, int]] = {}
        self._cache: dict[tuple[int, int], int] = {}
        self._as_launched: dict[int, tuple[dict[int, list[int]], dict[int, RequestState]]] = {}

    def launch(self, plan: StepPlan) -> Launched:
        scheduler = self.scheduler
        states = {span.request: scheduler.requests[span.request] for span in plan.spans}
        assert len(states) == len(plan.spans), "a request twice"
        assert sum(span.length for span in plan.spans) <= scheduler.config.max_num_batched_tokens
        assert scheduler.num_running <= scheduler.config.max_num_seqs
        for part, decode in ((plan.decode, True), (plan.prefill, False)):
            for span in part:
                self._check_span(span, states[span.request], decode=decode)
        self._as_launched[plan.number] = {number: list(scheduler.pool.table(number)) for number in states}, states
        self._check_units(plan)
        for piece in plan.optimizer:
            assert piece.start == self._slices.get(piece.job, 0) < piece.end
            assert not scheduler.jobs[piece.job].microbatches, "a micro-batch is in flight"
            self._slices[piece.job] = 0 if piece.end == scheduler.jobs[piece.job].optimizer_elements else piece.end
        self.units += plan.units
        self.plans.append((self.clock(), plan))
        return super().launch(plan)

    def _check_units(self, plan: StepPlan) -> None:
        assert sum(work.fused for work in plan.units) <= 1
        for work in sorted(plan.units, key=lambda w: not w.fused):  # the pass comes first
            progress = self._microbatches.setdefault(work.microbatch, Progress(work=self.scheduler.microbatch(work.microbatch)))
            progress.take(work.unit)
            if work.fused:
                assert plan.spans and work.unit.direction is Direction.FORWARD
                assert (work.unit.layer_start, work.unit.layer_end) == (0, progress.work.num_layers)
        for number in {work.microbatch for work in plan.units}:
            progress = self._microbatches[number]
            assert progress.forward_done() == (progress.work.phase is not Phase.FORWARD)
            assert progress.done == (progress.work.phase is Phase.DONE)

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

    def run(self, launched: Launched) -> Ran:
        tables, states = self._as_launched.pop(launched.plan.number)
        if self.check_cache:
            for span in launched.plan.spans:
                self._compute(span, tables[span.request], states[span.request])
        return super().run(launched)

    def _compute(self, span: Span, table: list[int], state: RequestState) -> None:
        """Keys and values of the span's tokens; each depends on all before it, which must be found in the cache."""
        size, before = self.scheduler.pool.block_tokens, hash(state.key)
        for position in range(span.end):
            known = position < len(state.prompt)
            token = state.prompt[position] if known else simulated_token(span.request, position)
            before = hash((before, token))
            place = (table[position // size], position % size)
            if position < span.start:
                assert self._cache[place] == before, "a block does not hold what its owner computed"
            else:
                self._cache[place] = before


class UncachedRunner(CheckedRunner):
    """Without the key-value cache, for long runs."""

    check_cache = False


class CheckedEngine(SimulatedEngine):
    """noise, slope, seed: of the disturbance. check_cache: as in CheckedRunner."""

    runner: CheckedRunner

    def __init__(
        self, config: SchedulerConfig, believed: LatencyModel, *, num_blocks: int = 4096, block_tokens: int = 16,
        disturbance: Disturbance | None = None, noise: float = 0.0, slope: float = 1.0, seed: int = 0, check_cache: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            config, believed, pool=BlockPool(num_blocks, block_tokens),
            disturbance=disturbance or Disturbance(noise=noise, slope=slope, seed=seed),
            runner=CheckedRunner if check_cache else UncachedRunner, **options,
        )

    def add_job(self, microbatches: Sequence[Sequence[int]], *, weight: float = 1.0, tenant: str = "", steps: int | None = None,
                **batch: Any) -> SimulatedJob:
        """A job. microbatches and batch: fields of SimulatedBatch."""
        return self.start_job(SimulatedBatch(microbatches=microbatches, **batch), weight=weight, tenant=tenant, steps=steps)

    @property
    def plans(self) -> list[tuple[float, StepPlan]]:
        """All plans that were not empty, with the times when they were made."""
        return self.runner.plans
