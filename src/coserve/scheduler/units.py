"""Which units of finetuning fit into a span of time: the shapes with the best predicted work per second.

Work is counted in seconds at the best rate: what a unit's rows and layers would cost in a large window. A unit's efficiency is
work / predicted seconds. On a CPU large windows over few layers win; where a pass is bound by reading weights, rows that ride
in it (fused) do. The choice is the latency model's.

A micro-batch on a grid has no choice of windows, and is never fused. When it is its job's turn and not even one layer fits,
the job is stuck: after PATIENCE such iterations other jobs wait too, so that slack adds up, and one unit may take all of the
slack, over the ITL cap. After OVERDUE iterations the unit may last until the first request would become infeasible, and the
other jobs go on.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
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
"""A unit runs if its efficiency is at least this share of what the largest windows that are left would have. Otherwise it
waits for an iteration with more time, since slack that is not used adds up."""
PATIENCE = 8
"""Iterations for which units wait for more time."""
OVERDUE = 64
"""Iterations after which a unit on a grid that fits nowhere may delay requests."""
MAX_UNITS = 16
"""Units and optimizer slices of one iteration."""
LEAST_SLICE = 1 << 16
"""Elements of the smallest optimizer slice."""


class Candidate(NamedTuple):
    """A unit that could come next. work and seconds as above; cost as the latency model wants it (None for a fused unit)."""

    unit: WorkUnit
    work: float
    seconds: float
    cost: UnitCost | None

    @property
    def efficiency(self) -> float:
        return self.work / max(self.seconds, 1e-9)


class Chosen(NamedTuple):
    """What an iteration does for jobs. inference: the pass, fused rows included; tokens: by job, forward-token equivalents;
    refresh_seconds: as in Contents."""

    units: tuple[WorkUnit, ...]
    costs: tuple[UnitCost, ...]
    optimizer: tuple[OptimizerSlice, ...]
    inference: PassCost | None
    seconds: float
    tokens: dict[int, float]
    refresh_seconds: float = 0.0


class UnitPicker:
    """Picks units greedily: for the job that has had least, the most efficient shape that fits."""

    def __init__(self, latency: LatencyModel, num_layers: int, max_window: int) -> None:
        self.latency, self.num_layers, self.max_window = latency, num_layers, max_window
        self._waited = self._stuck = 0
        self._possible: dict[tuple[bool, int, float], float] = {}

    def pick(
        self, jobs: Sequence[JobWork], seconds: float, inference: PassCost | None, *, fuse: bool, patient: bool = True,
        only: MicrobatchWork | None = None, stretch: Callable[[bool], float] = lambda overdue: UNBOUNDED,
    ) -> Chosen:
        """Units for `seconds`, advancing the micro-batches. jobs: in order of precedence; only: of this micro-batch; stretch:
        seconds that a unit on a grid may take where `seconds` is too little for it, asked only then."""
        stuck = self._stuck_unit(jobs, seconds, only)
        self._stuck = 0 if stuck is None else self._stuck + 1
        if stuck is not None and (self._stuck > PATIENCE or not patient):
            overdue = self._stuck > OVERDUE
            if stuck[2].seconds <= stretch(overdue):
                self._stuck = 0
                return self._alone(*stuck, inference)
            if not overdue:
                return Chosen((), (), (), inference, 0.0, {})
        units: list[WorkUnit] = []
        costs: list[UnitCost] = []
        slices: list[OptimizerSlice] = []
        tokens: dict[int, float] = {}
        left, refreshing, fused_efficiency = seconds, 0.0, 1.0
        least = LEAST_EFFICIENCY if patient and self._waited < PATIENCE else 0.0
        while len(units) + len(slices) < MAX_UNITS:
            taken = self._optimizer_slice(jobs, left)
            if taken is not None:
                part, refresh = taken
                slices.append(part)
                refreshing += refresh
                left -= self.latency.optimizer_seconds(part.end - part.start, refresh)
                continue
            fusing = inference if fuse and not any(unit.fused for unit in units) else None
            found = self._best(jobs, left, fusing, least, only, fused_efficiency, {unit.microbatch for unit in units})
            if found is None:
                break
            job, work, best = found
            left -= best.seconds
            units.append(best.unit)
            tokens[job.id] = tokens.get(job.id, 0.0) + self._tokens(best.unit.unit)
            if best.cost is not None:
                costs.append(best.cost)
            else:
                assert inference is not None
                fused_efficiency = max(1.0, best.efficiency)
                inference = self._with_fused(inference, work, best.unit.unit)
            work.advance(best.unit.unit)
        self._waited = 0 if units or slices else self._waited + 1
        return Chosen(tuple(units), tuple(costs), tuple(slices), inference, seconds - left, tokens, refreshing)

    def _stuck_unit(
        self, jobs: Sequence[JobWork], seconds: float, only: MicrobatchWork | None
    ) -> tuple[JobWork, MicrobatchWork, Candidate] | None:
        """The least unit of the job whose turn it is, if that is more than `seconds`; only on a grid."""
        for job in jobs:
            if job.optimizer_left:
                return None
            ready = [work for work in job.microbatches.values() if work.ready and (only is None or work is only)]
            least = [(self._least(work), work) for work in ready if work.grid is not None]
            if ready:
                candidate, work = min(least, key=lambda item: item[0].seconds, default=(None, ready[0]))
                return (job, work, candidate) if candidate is not None and candidate.seconds > seconds else None
        return None

    def _least(self, work: MicrobatchWork) -> Candidate:
        """The next unit of a micro-batch on a grid, over one layer."""
        if work.phase is Phase.FORWARD:
            start, end = self._forward_window(work)
            found = self._layers(work, Direction.FORWARD, work.layer, work.layer + 1, start, end, UNBOUNDED)
        else:
            row, layer = work.backward_row, work.backward_layer
            found = self._layers(work, Direction.BACKWARD, layer, layer + 1, row - self._backward_rows(work), row, UNBOUNDED)
        assert found is not None
        return found

    def _alone(self, job: JobWork, work: MicrobatchWork, best: Candidate, inference: PassCost | None) -> Chosen:
        """One unit and nothing beside it."""
        assert best.cost is not None
        work.advance(best.unit.unit)
        self._waited = 0
        return Chosen((best.unit,), (best.cost,), (), inference, best.seconds, {job.id: self._tokens(best.unit.unit)})

    def whole_seconds(self, work: MicrobatchWork) -> float:
        """What is left of a micro-batch, run in one go."""
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

    def _tokens(self, unit: Unit) -> float:
        """A unit in forward-token equivalents: its rows x layers over all layers."""
        return (unit.end - unit.start) * (unit.layer_end - unit.layer_start) / self.num_layers

    def _best(
        self, jobs: Sequence[JobWork], left: float, inference: PassCost | None, least: float, only: MicrobatchWork | None,
        fused_efficiency: float, begun: Container[int],
    ) -> tuple[JobWork, MicrobatchWork, Candidate] | None:
        """The unit with the best efficiency, of the first job that has one that fits.

        least: the share of the best efficiency that a unit must have. begun: the micro-batches that have units in this plan.
        The pass runs before those units, so that it can't take later rows of them. fused_efficiency: the efficiency of rows
        that were fused into this plan's pass. Above 1, forward windows that are not fused are deferred to the next pass while
        there is backward work.
        """

        def rank(item: tuple[Candidate, MicrobatchWork]) -> tuple[float, float]:
            candidate, _ = item
            waits = candidate.cost is not None and not candidate.cost.backward
            return round(candidate.efficiency / (fused_efficiency if waits else 1.0), 2), candidate.work

        for job in jobs:
            found: list[tuple[Candidate, MicrobatchWork]] = []
            for work in job.microbatches.values():
                if not work.ready or (only is not None and work is not only):
                    continue
                candidates = [*self._candidates(work, left)]
                if inference is not None and work.id not in begun:
                    candidates += self._fused_candidates(work, left, inference)
                bar = least * self._best_efficiency(work)
                found += [(candidate, work) for candidate in candidates if candidate.efficiency >= bar]
            if found:
                candidate, work = max(found, key=rank)
                return job, work, candidate
        return None

    def _best_efficiency(self, work: MicrobatchWork) -> float:
        """Of all layers over the largest window that is left: a small micro-batch can't do better."""
        backward = work.phase is Phase.BACKWARD
        ahead = work.num_tokens - work.end if work.between_windows else work.end - work.row
        rows = min(work.backward_row if backward else ahead, work.grid or self.max_window)
        key = (backward, rows, work.recompute_fraction if backward else 0.0)
        known = self._possible.get(key)
        if known is None:
            cost = UnitCost(backward, rows, self.num_layers, 0, 0, key[2])
            known = self._possible[key] = min(1.0, self._ideal(cost) / max(self.latency.unit_seconds(cost), 1e-9))
        return known

    def _optimizer_slice(self, jobs: Sequence[JobWork], left: float) -> tuple[OptimizerSlice, float] | None:
        """A slice that fits, and the seconds that were measured of what follows from it."""
        for job in jobs:
            if not job.optimizer_left:
                continue

            def seconds(elements: int, job: JobWork = job) -> float:
                return self.latency.optimizer_seconds(elements, job.refreshing(elements))

            elements = min(job.optimizer_left, LEAST_SLICE)
            while elements < job.optimizer_left and seconds(2 * elements) <= left:
                elements = min(2 * elements, job.optimizer_left)
            if seconds(elements) <= left:
                return job.take_slice(elements), job.refreshing(elements)
        return None

    # --- shapes ---

    def _candidates(self, work: MicrobatchWork, left: float) -> Iterator[Candidate]:
        if work.phase is Phase.FORWARD:
            yield from self._forward(work, left)
        elif work.phase is Phase.BACKWARD:
            yield from self._backward(work, left)

    def _forward(self, work: MicrobatchWork, left: float) -> Iterator[Candidate]:
        """A new window, the largest that fits over one layer, or the one under way, over as many layers as fit; else a piece of
        it over one layer."""
        layers = self.num_layers
        if work.grid is not None:
            shapes = [(*self._forward_window(work), layers)]
        elif work.between_windows:
            shapes = [(work.end, work.end + rows, layers) for rows in self._sizes(work.num_tokens - work.end)]
        else:
            whole = [(work.start, work.end, layers)] if work.row == work.start else []
            pieces = ((work.row, work.row + rows, work.layer + 1) for rows in self._sizes(work.end - work.row))
            shapes = [*whole, *pieces]
        for start, end, last in shapes:
            candidate = self._layers(work, Direction.FORWARD, work.layer, last, start, end, left)
            if candidate is not None:
                yield candidate
                return

    def _backward(self, work: MicrobatchWork, left: float) -> Iterator[Candidate]:
        """Whole layers where the micro-batch fits into one window; else windows of one layer, from the right."""
        top = work.backward_layer + 1
        if work.backward_row == work.num_tokens <= (work.grid or self.max_window):
            candidate = self._layers(work, Direction.BACKWARD, work.lowest, top, 0, work.num_tokens, left)
            if candidate is not None:
                yield candidate
                return
        for rows in self._sizes(work.backward_row) if work.grid is None else [self._backward_rows(work)]:
            start = work.backward_row - rows
            candidate = self._layers(work, Direction.BACKWARD, top - 1, top, start, work.backward_row, left)
            if candidate is not None:
                yield candidate
                return

    @staticmethod
    def _forward_window(work: MicrobatchWork) -> tuple[int, int]:
        """The next window on a grid, or the one under way."""
        assert work.grid is not None
        return (work.end, min(work.end + work.grid, work.num_tokens)) if work.between_windows else (work.start, work.end)

    @staticmethod
    def _backward_rows(work: MicrobatchWork) -> int:
        """Rows down to the next multiple of the grid."""
        assert work.grid is not None
        return (work.backward_row - 1) % work.grid + 1

    def _sizes(self, rows: int) -> Iterator[int]:
        """Window sizes to try, largest first; an odd remainder counts as one."""
        limit = min(rows, self.max_window)
        yield limit
        for size in WINDOWS:
            if size < limit:
                yield size

    def _layers(
        self, work: MicrobatchWork, direction: Direction, first: int, last: int, start: int, end: int, left: float
    ) -> Candidate | None:
        """The unit over as many of the layers [first, last) as fit: from below for forward, from above for backward."""
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
        """Seconds at the best rate: attention and labels as they are, rows as in a large window."""
        bare = cost._replace(pairs=0, labels=0)
        return seconds - self.latency.unit_seconds(bare) + self._ideal(cost)

    def _ideal(self, cost: UnitCost) -> float:
        """A unit's rows and layers at the best rate."""
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
        """A window that rides in the pass, at each size that fits."""
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
                extra = self.latency.unit_seconds(cost) - self.latency.unit_seconds(cost._replace(pairs=0, labels=0))
                ideal = extra + self._ideal(cost)
                yield Candidate(WorkUnit(work.id, unit, fused=True), ideal, max(seconds, 1e-9), None)
