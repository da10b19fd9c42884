"""Runs step plans in no time but the virtual clock's.

The time of an iteration is counted from the plan's rows and units, not from what the scheduler thinks of them. Owns: that
count, how much was trained. Does not own: what the scheduler believes, requests, jobs (engine.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from coserve.core import Contents, Direction, PassCost, StepPlan, Unit, UnitCost, WorkUnit
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.work import MicrobatchWork, Phase
from coserve.simulation.clock import VirtualClock
from coserve.simulation.disturbance import TrueLaw
from coserve.simulation.requests import simulated_token


@dataclass(frozen=True, slots=True)
class Launched:
    """A plan with what was counted when it was made. through: micro-batches whose forward or backward it ends."""

    plan: StepPlan
    contents: Contents
    through: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """What an iteration gave. tokens: sampled, by request. seconds: that it took."""

    tokens: Mapping[int, list[int]]
    seconds: float


@dataclass(slots=True)
class TrainedRows:
    """Rows that went through all layers, summed over units as rows x layers / layers of the model. fused: forward rows that
    rode in a pass with requests; forward, backward: all of them."""

    forward: float = 0.0
    fused: float = 0.0
    backward: float = 0.0

    def add(self, work: WorkUnit, num_layers: int) -> None:
        """Counts a unit. num_layers: of the model."""
        rows = work.unit.tokens(num_layers)
        if work.unit.direction is Direction.BACKWARD:
            self.backward += rows
            return
        self.forward += rows
        if work.fused:
            self.fused += rows


class SimulatedRunner:
    """Counts what its plans hold.

    trained: tokens by job, half of each at forward and half at backward. busy_s: seconds of all iterations. finetune_s: those
    of them that finetuning caused.
    """

    def __init__(self, clock: VirtualClock, truth: TrueLaw, scheduler: HybridScheduler) -> None:
        self.clock, self.truth, self.scheduler = clock, truth, scheduler
        self.trained: defaultdict[int, float] = defaultdict(float)
        self.rows = TrainedRows()
        self.finetune_s = self.busy_s = 0.0
        self.iterations = 0

    def launch(self, plan: StepPlan) -> Launched:
        """Counts a plan that was just made, and that the scheduler's state is behind."""
        through = []
        for item in plan.units:
            work = self.scheduler.microbatch(item.microbatch)
            self.rows.add(item, work.num_layers)
            self.trained[work.job] += item.unit.tokens(work.num_layers) / 2
            if work.phase in (Phase.OBJECTIVE, Phase.DONE) and item.microbatch not in through:
                through.append(item.microbatch)
        return Launched(plan, self.contents(plan), tuple(through))

    def run(self, launched: Launched) -> Ran:
        """Time passes, and tokens come of the spans that sample."""
        seconds, alone = self.truth.expected(launched.contents), self._alone_seconds(launched.contents)
        factor = self.truth.factor(self.clock())
        self.iterations += 1
        self.busy_s += seconds * factor
        self.finetune_s += (seconds - alone) * factor
        self.clock.advance(seconds * factor)
        tokens = {span.request: [simulated_token(span.request, span.end)] for span in launched.plan.spans if span.samples}
        return Ran(tokens, seconds * factor)

    def _alone_seconds(self, contents: Contents) -> float:
        """The expected time of the iteration's requests without its finetuning; 0 without requests."""
        cost = contents.inference
        if cost is None:
            return 0.0
        cost = cost._replace(rows=cost.rows - cost.fused_rows, fused_rows=0, fused_pairs=0, fused_labels=0)
        return self.truth.expected(Contents(cost, (), 0))

    def contents(self, plan: StepPlan) -> Contents:
        """The plan's size, counted from its rows and units."""
        microbatch = self.scheduler.microbatch
        units = tuple(self._unit_cost(item.unit, microbatch(item.microbatch)) for item in plan.units if not item.fused)
        refresh = sum(self.scheduler.jobs[part.job].slice_refresh_seconds(part.end - part.start) for part in plan.optimizer)
        elements = sum(part.end - part.start for part in plan.optimizer)
        return Contents(self._pass_cost(plan) if plan.spans else None, units, elements, refresh)

    def _pass_cost(self, plan: StepPlan) -> PassCost:
        requests, fused = self.scheduler.requests, plan.fused
        rows = len(plan.decode) + sum(span.length for span in plan.prefill)
        fused_rows = fused_pairs = fused_labels = 0
        if fused is not None:
            work, start, end = self.scheduler.microbatch(fused.microbatch), fused.unit.start, fused.unit.end
            fused_rows, fused_pairs, fused_labels = end - start, work.pairs(start, end), work.labels(start, end)
        adapters = {requests[span.request].key for span in plan.spans if requests[span.request].key.adapter is not None}
        return PassCost(
            rows=rows + fused_rows, head_rows=sum(span.logits for span in plan.spans), decode_rows=len(plan.decode),
            decode_context=sum(span.start + span.length for span in plan.decode),
            prefill_pairs=sum(span.length * (span.start + span.end + 1) // 2 for span in plan.prefill),
            fused_rows=fused_rows, fused_pairs=fused_pairs, fused_labels=fused_labels, adapter_segments=len(adapters),
            prefill_spans=len(plan.prefill),
        )

    def _unit_cost(self, unit: Unit, work: MicrobatchWork) -> UnitCost:
        backward = unit.direction is Direction.BACKWARD
        top = not backward and unit.layer_end == work.num_layers
        return UnitCost(
            backward, unit.end - unit.start, unit.layer_end - unit.layer_start, work.pairs(unit.start, unit.end),
            work.labels(unit.start, unit.end) if top else 0, work.recompute_fraction if backward else 0.0,
        )
