"""Which units of finetuning fit into a span of time: the shapes with the best predicted work per second.

Work is counted in seconds at the best rate: what a unit's rows and layers would cost in a large window. A unit's efficiency is
work / predicted seconds. On a CPU, large windows over few layers are the most efficient. Where reading weights takes most of a
pass, rows that ride in the pass (fused) are. The latency model decides.

Units wait in two cases. StarvationGuard ends the wait:

    inefficient   No shape that fits is efficient. Slack that is not used adds up, so that a larger one fits later. After
                  PATIENCE iterations any shape will do.
    stuck         A micro-batch on a grid has no choice of windows, and is never fused. When its job's turn comes, its unit may
                  not fit even over one layer. After PATIENCE iterations other jobs wait too, so that slack adds up, and the
                  unit may take all of the slack, over the ITL cap. After OVERDUE iterations the unit may last until the first
                  request would become infeasible, and other jobs go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from coserve.core import Direction, OptimizerSlice, PassCost, Unit, UnitCost, WorkUnit
from coserve.scheduler.deadlines import UNBOUNDED
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase

WINDOWS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)
FUSED_WINDOWS = (512, 256, 128, 64, 32, 16)
REFERENCE_ROWS = 1024
"""Rows of the window that sets the best rate."""
LEAST_EFFICIENCY = 0.85
"""A unit runs if its efficiency is at least this share of what the largest window that is left would have. Otherwise it waits
for an iteration with more time."""
PATIENCE = 8
"""Iterations for which units wait for more time."""
OVERDUE = 64
"""Iterations after which a stuck unit may delay requests."""
MAX_UNITS = 16
"""Units and optimizer slices of one iteration."""
LEAST_SLICE = 1 << 16
"""Elements of the smallest optimizer slice."""


class Candidate(NamedTuple):
    """A unit that could come next. cost: as the latency model takes it; None for a fused unit."""

    unit: WorkUnit
    work: float
    seconds: float
    cost: UnitCost | None

    @property
    def efficiency(self) -> float:
        return self.work / max(self.seconds, 1e-9)


class _Proposal(NamedTuple):
    """A unit that may come next, with its job and micro-batch."""

    job: JobWork
    work: MicrobatchWork
    candidate: Candidate


@dataclass(slots=True)
class Chosen:
    """What an iteration does for jobs.

    inference: the pass with its fused rows; None without a pass. costs: of the units that are not fused. tokens: what each job
    gets, in forward-token equivalents. seconds: predicted, of units and slices together. refresh_seconds: as in Contents.
    fused_efficiency: the efficiency of the fused rows, at least 1; 1 without any.
    """

    inference: PassCost | None
    units: list[WorkUnit] = field(default_factory=list)
    costs: list[UnitCost] = field(default_factory=list)
    optimizer: list[OptimizerSlice] = field(default_factory=list)
    tokens: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    refresh_seconds: float = 0.0
    fused_efficiency: float = 1.0


class StarvationGuard:
    """Counts the iterations for which units have waited, and says when they need not wait any more."""

    def __init__(self) -> None:
        self._idle = 0  # iterations in a row without a unit or a slice
        self._stuck = 0  # iterations in a row in which a unit on a grid did not fit

    def least_efficiency(self, patient: bool) -> float:
        """The share of the best efficiency that a unit must have. patient: whether waiting gains slack at all."""
        return LEAST_EFFICIENCY if patient and self._idle < PATIENCE else 0.0

    def may_stretch(self, patient: bool) -> bool:
        """Whether a stuck unit may take more than what is left of the iteration, and other jobs wait for it."""
        return self._stuck > PATIENCE or not patient

    @property
    def is_overdue(self) -> bool:
        """Whether a stuck unit may delay requests. Other jobs no longer wait for it."""
        return self._stuck > OVERDUE

    def on_turn(self, *, is_stuck: bool) -> None:
        """An iteration begins. is_stuck: whether the unit whose turn it is does not fit."""
        self._stuck = self._stuck + 1 if is_stuck else 0

    def on_stretched(self) -> None:
        """A stuck unit runs."""
        self._idle = self._stuck = 0

    def on_filled(self, *, is_empty: bool) -> None:
        """An iteration's time was filled as far as units fit."""
        self._idle = self._idle + 1 if is_empty else 0


class UnitPicker:
    """Picks units greedily: for the job that has had least, the most efficient shape that fits."""

    def __init__(self, latency: LatencyModel, num_layers: int, max_window: int) -> None:
        self.latency, self.num_layers, self.max_window = latency, num_layers, max_window
        self.guard = StarvationGuard()
        self._possible: dict[tuple[bool, int, float], float] = {}

    def pick(
        self, jobs: Sequence[JobWork], seconds: float, inference: PassCost | None, *, fuse: bool, patient: bool = True,
        only: MicrobatchWork | None = None, stretch: Callable[[bool], float] = lambda overdue: UNBOUNDED,
    ) -> Chosen:
        """Picks units and optimizer slices for `seconds`, and advances their micro-batches.

        jobs: in order of precedence. inference: the requests' pass. fuse: whether rows may ride in it. patient: whether units
        may wait for more time. only: the one micro-batch that may get units; None allows all. stretch: called with whether the
        wait is overdue, gives the seconds that a stuck unit may take.
        """
        chosen = Chosen(inference)
        stuck = self._stuck_unit(jobs, seconds, only)
        self.guard.on_turn(is_stuck=stuck is not None)
        if stuck is not None and self.guard.may_stretch(patient):
            if stuck.candidate.seconds <= stretch(self.guard.is_overdue):
                self.guard.on_stretched()
                self._add(chosen, stuck)
                chosen.seconds = stuck.candidate.seconds
                return chosen
            if not self.guard.is_overdue:
                return chosen
        left = seconds
        least = self.guard.least_efficiency(patient)
        while len(chosen.units) + len(chosen.optimizer) < MAX_UNITS:
            slice_seconds = self._add_slice(chosen, jobs, left)
            if slice_seconds is not None:
                left -= slice_seconds
                continue
            found = self._best(chosen, jobs, left, least, only, fuse=fuse)
            if found is None:
                break
            left -= found.candidate.seconds
            self._add(chosen, found)
        chosen.seconds = seconds - left
        self.guard.on_filled(is_empty=not (chosen.units or chosen.optimizer))
        return chosen

    def _add(self, chosen: Chosen, found: _Proposal) -> None:
        job, work, best = found
        unit = best.unit.unit
        chosen.units.append(best.unit)
        tokens = (unit.end - unit.start) * (unit.layer_end - unit.layer_start) / self.num_layers
        chosen.tokens[job.id] = chosen.tokens.get(job.id, 0.0) + tokens
        if best.cost is not None:
            chosen.costs.append(best.cost)
        else:
            assert chosen.inference is not None
            chosen.inference = self._with_fused(chosen.inference, work, unit)
            chosen.fused_efficiency = max(1.0, best.efficiency)
        work.advance(unit)

    def _add_slice(self, chosen: Chosen, jobs: Sequence[JobWork], left: float) -> float | None:
        """The next optimizer slice that fits, doubled as long as it still fits. Returns its seconds, None if none fits."""
        for job in jobs:
            if not job.optimizer_left:
                continue

            def seconds(elements: int, job: JobWork = job) -> float:
                return self.latency.optimizer_seconds(elements, job.slice_refresh_seconds(elements))

            elements = min(job.optimizer_left, LEAST_SLICE)
            while elements < job.optimizer_left and seconds(2 * elements) <= left:
                elements = min(2 * elements, job.optimizer_left)
            if seconds(elements) <= left:
                chosen.optimizer.append(job.take_slice(elements))
                chosen.refresh_seconds += job.slice_refresh_seconds(elements)
                return seconds(elements)
        return None

    def _stuck_unit(self, jobs: Sequence[JobWork], seconds: float, only: MicrobatchWork | None) -> _Proposal | None:
        """The smallest unit of the job whose turn it is, if it is on a grid and takes more than `seconds`; else None."""
        for job in jobs:
            if job.optimizer_left:
                return None
            ready = [work for work in job.microbatches.values() if work.ready and (only is None or work is only)]
            if ready:
                least = [(self._least(work), work) for work in ready if work.grid is not None]
                candidate, work = min(least, key=lambda item: item[0].seconds, default=(None, ready[0]))
                return _Proposal(job, work, candidate) if candidate is not None and candidate.seconds > seconds else None
        return None

    def _least(self, work: MicrobatchWork) -> Candidate:
        """The next unit of a micro-batch on a grid, over one layer."""
        *_, shape = self._shapes(work)
        found = self._fitted(work, shape._replace(layer_end=shape.layer_start + 1), UNBOUNDED)
        assert found is not None
        return found

    def whole_seconds(self, work: MicrobatchWork) -> float:
        """Predicts what is left of a micro-batch, if it runs in one go."""
        rows, total = work.num_tokens, 0.0
        if work.phase is Phase.FORWARD:
            start = work.start
            total += self.latency.unit_seconds(
                UnitCost(False, rows - start, self.num_layers, work.pairs(start, rows), work.labels(start, rows))
            )
        if not work.forward_only:
            layers = max(0, work.backward_layer + 1 - work.lowest)
            total += self.latency.unit_seconds(UnitCost(True, rows, layers, work.pairs(0, rows), 0, work.recompute_fraction))
        return total

    def _best(
        self, chosen: Chosen, jobs: Sequence[JobWork], left: float, least: float, only: MicrobatchWork | None, *, fuse: bool
    ) -> _Proposal | None:
        """The unit with the best efficiency, of the first job that has one that fits.

        chosen: what this plan has so far. least: the share of the best efficiency that a unit must have.

        At most one unit is fused. The pass runs before all other units, so that a micro-batch with units in this plan can't
        fuse later rows. Where fused rows are more efficient than rows at the best rate, a forward window had better ride in
        the next pass. Its efficiency is divided by theirs, so that backward units come first.
        """
        begun = {unit.microbatch for unit in chosen.units}
        inference = chosen.inference if fuse and not any(unit.fused for unit in chosen.units) else None

        def rank(item: tuple[Candidate, MicrobatchWork]) -> tuple[float, float]:
            candidate, _ = item
            waits = candidate.cost is not None and not candidate.cost.backward
            return round(candidate.efficiency / (chosen.fused_efficiency if waits else 1.0), 2), candidate.work

        for job in jobs:
            found: list[tuple[Candidate, MicrobatchWork]] = []
            for work in job.microbatches.values():
                if not work.ready or (only is not None and work is not only):
                    continue
                fitted = (self._fitted(work, shape, left) for shape in self._shapes(work))
                candidates = list(islice(filter(None, fitted), 1))
                if inference is not None and work.id not in begun:
                    candidates += self._fused_candidates(work, left, inference)
                bar = least * self._best_efficiency(work)
                found += [(candidate, work) for candidate in candidates if candidate.efficiency >= bar]
            if found:
                candidate, work = max(found, key=rank)
                return _Proposal(job, work, candidate)
        return None

    def _best_efficiency(self, work: MicrobatchWork) -> float:
        """The efficiency of all layers over the largest window that is left. A small micro-batch can't do better."""
        backward = work.phase is Phase.BACKWARD
        ahead = work.num_tokens - work.end if work.between_windows else work.end - work.row
        rows = min(work.backward_row if backward else ahead, work.grid or self.max_window)
        key = (backward, rows, work.recompute_fraction if backward else 0.0)
        known = self._possible.get(key)
        if known is None:
            cost = UnitCost(backward, rows, self.num_layers, 0, 0, key[2])
            known = self._possible[key] = min(1.0, self._ideal(cost) / max(self.latency.unit_seconds(cost), 1e-9))
        return known

    # --- shapes ---

    def _shapes(self, work: MicrobatchWork) -> Iterator[Unit]:
        """The units that may come next and are not fused, the largest first, each over as many layers as it may have."""
        if work.phase is Phase.BACKWARD:
            top, row = work.backward_layer + 1, work.backward_row
            if row == work.num_tokens <= (work.grid or self.max_window):
                yield Unit(Direction.BACKWARD, work.lowest, top, 0, row)
            for rows in self._sizes(row) if work.grid is None else [(row - 1) % work.grid + 1]:
                yield Unit(Direction.BACKWARD, top - 1, top, row - rows, row)
            return
        window = Unit(Direction.FORWARD, work.layer, self.num_layers, work.start, work.end)
        if work.between_windows:
            ahead = work.num_tokens - work.end
            for rows in self._sizes(ahead) if work.grid is None else [min(work.grid, ahead)]:
                yield window._replace(start=work.end, end=work.end + rows)
            return
        if work.row == work.start:
            yield window
        if work.grid is None:
            for rows in self._sizes(work.end - work.row):
                yield window._replace(layer_end=work.layer + 1, start=work.row, end=work.row + rows)

    def _sizes(self, rows: int) -> Iterator[int]:
        """Window sizes to try, the largest first. All `rows` at once are tried too, if the limit allows them."""
        limit = min(rows, self.max_window)
        yield limit
        for size in WINDOWS:
            if size < limit:
                yield size

    def _fitted(self, work: MicrobatchWork, shape: Unit, left: float) -> Candidate | None:
        """The unit over as many of its layers as fit into `left` seconds; None if not even one fits. Forward begins with the
        lowest layer, backward with the highest."""
        direction, first, last, start, end = shape
        backward = direction is Direction.BACKWARD
        pairs = work.pairs(start, end)

        def cost(layers: int) -> UnitCost:
            top = not backward and first + layers == self.num_layers
            labels, again = work.labels(start, end) if top else 0, work.recompute_fraction if backward else 0.0
            return UnitCost(backward, end - start, layers, pairs, labels, again)

        one = self.latency.unit_seconds(cost(1))
        if one > left:
            return None
        each = max(self.latency.unit_seconds(cost(2)) - one, 1e-9) if last - first > 1 else 1.0
        layers = min(last - first, 1 + int(min((left - one) / each, 1e6)))
        while layers > 1 and self.latency.unit_seconds(cost(layers)) > left:
            layers -= 1
        chosen = cost(layers)
        span = (last - layers, last) if backward else (first, first + layers)
        unit = Unit(direction, *span, start, end)
        seconds = self.latency.unit_seconds(chosen)
        return Candidate(WorkUnit(work.id, unit), self._work(chosen, seconds), seconds, chosen)

    def _work(self, cost: UnitCost, seconds: float) -> float:
        """The work of a unit that takes `seconds`: its rows at the best rate, attention and labels as they are."""
        return seconds - self.latency.unit_seconds(cost._replace(pairs=0, labels=0)) + self._ideal(cost)

    def _ideal(self, cost: UnitCost) -> float:
        """Seconds of a unit's rows and layers at the best rate, without attention and labels."""
        layers = self.num_layers
        whole = self.latency.unit_seconds(cost._replace(rows=REFERENCE_ROWS, layers=layers, pairs=0, labels=0))
        return whole * cost.rows * cost.layers / (REFERENCE_ROWS * layers)

    def _with_fused(self, inference: PassCost, work: MicrobatchWork, unit: Unit) -> PassCost:
        rows = unit.end - unit.start
        return inference._replace(
            rows=inference.rows + rows, fused_rows=rows, fused_pairs=work.pairs(unit.start, unit.end),
            fused_labels=work.labels(unit.start, unit.end),
        )

    def _fused_candidates(self, work: MicrobatchWork, left: float, inference: PassCost) -> Iterator[Candidate]:
        """New forward windows that ride in the pass, one of each size that fits."""
        if work.phase is not Phase.FORWARD or not work.between_windows or work.grid is not None:
            return
        alone = self.latency.pass_seconds(inference)
        for rows in FUSED_WINDOWS:
            rows = min(rows, work.num_tokens - work.end, self.max_window)
            unit = Unit(Direction.FORWARD, 0, self.num_layers, work.end, work.end + rows)
            seconds = self.latency.pass_seconds(self._with_fused(inference, work, unit)) - alone
            if seconds <= left:
                cost = UnitCost(False, rows, self.num_layers, work.pairs(unit.start, unit.end),
                                work.labels(unit.start, unit.end))
                ideal = self._work(cost, self.latency.unit_seconds(cost))
                yield Candidate(WorkUnit(work.id, unit, fused=True), ideal, max(seconds, 1e-9), None)
