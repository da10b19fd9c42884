"""What may come next of one micro-batch, what it takes, and what it is worth.

A unit's work is counted in seconds at the best rate: what its rows and layers would cost in the window of its micro-batch that
takes the fewest seconds per row, mostly the largest. Its efficiency is its work divided by the seconds that it takes. What it
saves is its work less those seconds.

Owns: the shapes of units, their predicted seconds and their work. Does not own: which of them an iteration takes (riding.py,
units.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from coserve.core import Direction, PassCost, Unit, UnitCost, WorkUnit
from coserve.scheduler.deadlines import UNBOUNDED
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.work import MicrobatchWork, Phase

ROUND_ROWS = 16
"""A window that is cut to the time there is has a multiple of so many rows."""
STEPS = 8
"""It has one of so many sizes between a number of rows and its double. The first products of a size take longer: 5 ms more per
unit where oneDNN makes new kernels for them. So few sizes come again and again."""
BEST_ROWS = (1024, 512, 256, 128)
"""Windows that may take fewer seconds per row than the largest."""
LEAST_EFFICIENCY = 0.85
"""A unit is efficient if its efficiency is at least this share of what the largest window that is left would have. A window
that is cut leaves a rest that is efficient over one layer, if it is so itself."""


class Candidate(NamedTuple):
    """A unit that could come next. work, seconds: as in the module's text. cost: as the latency model takes it; None for a
    fused unit."""

    unit: WorkUnit
    work: float
    seconds: float
    cost: UnitCost | None

    @property
    def efficiency(self) -> float:
        return self.work / max(self.seconds, 1e-9)

    @property
    def saved_s(self) -> float:
        return self.work - self.seconds

    def __str__(self) -> str:
        unit = self.unit.unit
        how = "fused" if self.unit.fused else unit.direction.value
        return (
            f"{how} of micro-batch {self.unit.microbatch}, rows {unit.start} to {unit.end}, layers {unit.layer_start} to "
            f"{unit.layer_end}: {1e3 * self.seconds:.2f} ms for {1e3 * self.work:.2f} ms of work"
        )


class Shapes:
    """The units of micro-batches, by the latency model. max_window: rows of the largest window."""

    def __init__(self, latency: LatencyModel, num_layers: int, max_window: int) -> None:
        self.latency, self.num_layers, self.max_window = latency, num_layers, max_window
        self._sizes = window_sizes(max_window)
        self._possible: dict[tuple[bool, int, int, float], float] = {}
        self._best: dict[tuple[bool, int, float], int] = {}
        self._enough: dict[tuple[bool, int], int] = {}

    # --- units that are not fused ---

    def next_unit(self, work: MicrobatchWork, left: float, *, cut: bool = True) -> Candidate | None:
        """The next unit that is not fused, the largest that fits into `left` seconds. None if nothing fits. cut: whether it may
        have a part of a window's rows."""
        for shape in self._whole_windows(work):
            found = self._fitted(work, shape, left)
            if found is not None:
                return found
        return self._cut(work, _one_layer(shape), left) if cut and work.grid is None else None

    def whole_window(self, work: MicrobatchWork, left: float) -> Candidate | None:
        """A new forward window over all layers, the largest that fits into `left` seconds. None if too few rows fit."""
        ahead = min(work.num_tokens - work.end, self.max_window)
        shape = Unit(Direction.FORWARD, 0, self.num_layers, work.end, work.end + ahead)
        found = self._fitted(work, shape, left)
        if found is not None and found.unit.unit.layer_end == self.num_layers:
            return found
        return self._cut(work, shape, left)

    def least(self, work: MicrobatchWork) -> Candidate:
        """The smallest unit that a micro-batch may have next, over one layer. On a grid it has all rows of a window."""
        *_, shape = self._whole_windows(work)
        shape = _one_layer(shape)
        rows = min(ROUND_ROWS, shape.end - shape.start)
        if work.grid is None:
            backward = shape.direction is Direction.BACKWARD
            shape = shape._replace(start=shape.end - rows) if backward else shape._replace(end=shape.start + rows)
        found = self._fitted(work, shape, UNBOUNDED)
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

    def best_efficiency(self, work: MicrobatchWork) -> float:
        """The efficiency of all layers over the largest window that is left. A small micro-batch can't do better."""
        backward = work.phase is Phase.BACKWARD
        ahead = work.num_tokens - work.end if work.between_windows else work.end - work.row
        rows = min(work.backward_row if backward else ahead, work.grid or self.max_window)
        largest = self._largest(work)
        key = (backward, rows, largest, work.recompute_fraction if backward else 0.0)
        known = self._possible.get(key)
        if known is None:
            cost = UnitCost(backward, rows, self.num_layers, 0, 0, key[3])
            known = self._possible[key] = min(1.0, self._ideal(cost, largest) / max(self.latency.unit_seconds(cost), 1e-9))
        return known

    def _whole_windows(self, work: MicrobatchWork) -> Iterator[Unit]:
        """The units that may come next over the largest window that is allowed, each over as many layers as it may have."""
        if work.phase is Phase.BACKWARD:
            top, row = work.backward_layer + 1, work.backward_row
            if row == work.num_tokens <= (work.grid or self.max_window):
                yield Unit(Direction.BACKWARD, work.lowest, top, 0, row)
            rows = min(row, self.max_window) if work.grid is None else (row - 1) % work.grid + 1
            yield Unit(Direction.BACKWARD, top - 1, top, row - rows, row)
            return
        window = Unit(Direction.FORWARD, work.layer, self.num_layers, work.start, work.end)
        if work.between_windows:
            rows = min(work.num_tokens - work.end, work.grid or self.max_window)
            yield window._replace(start=work.end, end=work.end + rows)
            return
        if work.row == work.start:
            yield window
        if work.grid is None:
            yield window._replace(layer_end=work.layer + 1, start=work.row)

    def _cut(self, work: MicrobatchWork, shape: Unit, left: float) -> Candidate | None:
        """As many rows of a unit, over all of its layers, as fit into `left` seconds. None if not even ROUND_ROWS do."""
        whole = shape.end - shape.start

        def fitted(rows: int) -> Candidate | None:
            part = shape._replace(start=shape.end - rows) if shape.direction is Direction.BACKWARD else shape._replace(
                end=shape.start + rows)
            found = self._fitted(work, part, left)
            return found if found is not None and found.unit.unit == part else None

        sizes = [size for size in self._sizes if size < whole]
        low, high = 0, len(sizes)  # the first `low` sizes fit
        while low < high:
            middle = (low + high + 1) // 2
            if fitted(sizes[middle - 1]) is None:
                high = middle - 1
            else:
                low = middle
        rows, least = sizes[low - 1] if low else 0, self._least_rows(shape.direction is Direction.BACKWARD, self._largest(work))
        if whole - rows < least:
            rows = next((size for size in reversed(sizes[:low]) if whole - size >= least and size >= least), rows)
        return fitted(rows) if rows else None

    def _least_rows(self, backward: bool, largest: int) -> int:
        """Rows of the smallest window that is efficient over one layer. largest: of the largest window of its micro-batch."""
        key = (backward, largest)
        known = self._enough.get(key)
        if known is None:
            def efficiency(rows: int) -> float:
                cost = UnitCost(backward, rows, 1, 0, 0)
                return self._ideal(cost, largest) / max(self.latency.unit_seconds(cost), 1e-9)

            enough = LEAST_EFFICIENCY * efficiency(largest)
            sizes = range(ROUND_ROWS, largest, ROUND_ROWS)
            known = self._enough[key] = next((rows for rows in sizes if efficiency(rows) >= enough), largest)
        return known

    def _fitted(self, work: MicrobatchWork, shape: Unit, left: float) -> Candidate | None:
        """The unit over as many of its layers as fit into `left` seconds; None if not even one fits. Forward begins with the
        lowest layer, backward with the highest."""
        direction, first, last, start, end = shape
        backward = direction is Direction.BACKWARD
        pairs, again = work.pairs(start, end), work.recompute_fraction if backward else 0.0

        def cost(layers: int) -> UnitCost:
            top = not backward and first + layers == self.num_layers
            return UnitCost(backward, end - start, layers, pairs, work.labels(start, end) if top else 0, again)

        chosen = cost(1)
        one = self.latency.unit_seconds(chosen)
        if one > left:
            return None
        if last - first == 1:
            unit = WorkUnit(work.id, shape)
            return Candidate(unit, self._work(work, chosen, one), one, chosen)
        each = max(self.latency.unit_seconds(cost(2)) - one, 1e-9)
        layers = min(last - first, 1 + int(min((left - one) / each, 1e6)))
        while layers > 1 and self.latency.unit_seconds(cost(layers)) > left:
            layers -= 1
        chosen = cost(layers)
        span = (last - layers, last) if backward else (first, first + layers)
        seconds = self.latency.unit_seconds(chosen)
        unit = WorkUnit(work.id, Unit(direction, *span, start, end))
        return Candidate(unit, self._work(work, chosen, seconds), seconds, chosen)

    def _largest(self, work: MicrobatchWork) -> int:
        """Rows of the largest window of a micro-batch."""
        return min(work.num_tokens, work.grid or self.max_window)

    def _work(self, work: MicrobatchWork, cost: UnitCost, seconds: float) -> float:
        """The work of a unit that takes `seconds`: its rows at the best rate, attention and labels as they are."""
        backward, rows, layers, _, _, again = cost
        bare = self.latency.unit_seconds(UnitCost(backward, rows, layers, 0, 0, again))
        return seconds - bare + self._ideal(cost, self._largest(work))

    def _ideal(self, cost: UnitCost, largest: int) -> float:
        """Seconds of a unit's rows and layers, without attention and labels, at the best rate of a window of at most `largest`
        rows over all layers."""
        best = self._best_rows(cost, largest)
        whole = UnitCost(cost.backward, best, self.num_layers, 0, 0, cost.recompute_fraction)
        return self.latency.unit_seconds(whole) * cost.rows * cost.layers / (best * self.num_layers)

    def _best_rows(self, cost: UnitCost, largest: int) -> int:
        """Rows of the window over all layers that takes the fewest seconds per row."""
        key = (cost.backward, largest, cost.recompute_fraction)
        known = self._best.get(key)
        if known is None:
            def row_seconds(rows: int) -> float:
                bare = cost._replace(rows=rows, layers=self.num_layers, pairs=0, labels=0)
                return self.latency.unit_seconds(bare) / rows

            known = self._best[key] = min((largest, *(rows for rows in BEST_ROWS if rows < largest)), key=row_seconds)
        return known

    # --- units that are fused ---

    def can_ride(self, work: MicrobatchWork) -> bool:
        """Whether the next window may ride in a pass."""
        return work.phase is Phase.FORWARD and work.between_windows and work.grid is None

    def ride(self, work: MicrobatchWork, inference: PassCost, alone_s: float, rows: int) -> Candidate:
        """The next `rows` rows, riding in a pass, which takes `alone_s` without them. Its seconds are what the pass takes
        longer."""
        unit = Unit(Direction.FORWARD, 0, self.num_layers, work.end, work.end + rows)
        seconds = self.latency.pass_seconds(self.with_ride(work, inference, unit)) - alone_s
        cost = UnitCost(False, rows, self.num_layers, work.pairs(unit.start, unit.end), work.labels(unit.start, unit.end))
        ideal = self._work(work, cost, self.latency.unit_seconds(cost))
        return Candidate(WorkUnit(work.id, unit, fused=True), ideal, max(seconds, 1e-9), None)

    def bare_work(self, rows: int) -> float:
        """The work of `rows` rows of a large micro-batch in forward of all layers, without attention and labels."""
        return self._ideal(UnitCost(False, rows, self.num_layers, 0, 0), self.max_window)

    def with_ride(self, work: MicrobatchWork, inference: PassCost, unit: Unit) -> PassCost:
        """The pass with a window that rides in it."""
        rows = unit.end - unit.start
        return inference._replace(
            rows=inference.rows + rows, fused_rows=rows, fused_pairs=work.pairs(unit.start, unit.end),
            fused_labels=work.labels(unit.start, unit.end),
        )


def window_sizes(most: int) -> list[int]:
    """The rows that a window may have which is cut to the time there is, in ascending order, up to `most`."""
    sizes = [ROUND_ROWS]
    while sizes[-1] < most:
        doubling = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(ROUND_ROWS, doubling // STEPS))
    return [size for size in sizes if size <= most]


def _one_layer(shape: Unit) -> Unit:
    """The part of a unit that comes first: one layer of it."""
    if shape.direction is Direction.BACKWARD:
        return shape._replace(layer_start=shape.layer_end - 1)
    return shape._replace(layer_end=shape.layer_start + 1)
