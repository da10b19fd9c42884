"""Which rows of training ride in the pass.

Rows that ride share the reading of the weights with the requests' rows. Up to the ridge, where products begin to take longer
than that reading, they cost almost nothing. So what counts is the time that they save: what the same rows would take in a large
window of their own, less what the pass takes longer because of them.

    few rows save most      the window with the greatest saving rides, and backward units take the rest of the time
    nothing else is ready   the window grows into the rest of the time, as long as each further row costs hardly more than in
                            a large window of its own

Owns: which window rides, and how many rows it has. Does not own: what else an iteration takes (units.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from coserve.core import PassCost
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.shapes import Candidate, Shapes
from coserve.scheduler.work import MicrobatchWork

LEAST_SAVING = 0.03
"""A window rides if it saves at least this share of the pass."""
LEAST_SHARE = 0.02
"""A window rides, or waits for a pass, if it saves at least this share of the iteration too. To wait has a price."""
LEAST_FURTHER = 0.9
"""A further row rides, where nothing else is ready, if its work is at least this share of the time that it takes."""
ALMOST = 0.95
"""A window saves almost as much as another if it saves at least this share."""
LEAST_REST = 64
"""A window that rides leaves at least so many rows of its micro-batch, or none."""
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Windows that are tried, beside those that bring the pass to a knot of the latency model."""


class FreeRows(NamedTuple):
    """Rows that had best ride in a pass, and the seconds that they save there; 0 and 0 if none do."""

    rows: int
    saved_s: float


NO_FREE_ROWS = FreeRows(0, 0.0)


class Riding:
    """Finds the window that rides. Predictions come from the shapes' latency model."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    @property
    def _latency(self) -> LatencyModel:
        return self.shapes.latency

    def best(self, work: MicrobatchWork, inference: PassCost, seconds: float) -> Candidate | None:
        """The window of a micro-batch that had best ride in the pass of the requests, where `seconds` are left for jobs. None
        if none saves enough.

        It is the smallest that saves almost as much as any. More rows would save in later passes what they don't save in this
        one.
        """
        alone = self._latency.pass_seconds(inference)
        fitting = [found for found in self.candidates(work, inference) if found.seconds <= seconds]
        most = max((found.saved_s for found in fitting), default=0.0)
        if most <= 0 or most < _least_saving(alone, alone + seconds):
            return None
        good = [found for found in fitting if found.saved_s >= ALMOST * most]
        ahead = work.num_tokens - work.end
        return next((found for found in good if not _leaves_little(ahead, _rows(found))), good[0])

    def free(self, inference: PassCost | None, seconds: float | None = None) -> FreeRows:
        """How many training rows had best ride in a pass of these requests. inference: None counts as one row.

        seconds: that the iteration may last; None: any time. Attention and labels cost as much in a pass as in a unit, so they
        don't count.
        """
        cost = inference or PassCost(1, 1, 1, 0, 0, 0, 0, 0, 0)
        alone, work = self._latency.pass_seconds(cost), self.shapes.bare_work(1)
        saved = {}
        for rows in self._sizes(cost.rows, self.shapes.max_window):
            ridden = self._latency.pass_seconds(cost._replace(rows=cost.rows + rows, fused_rows=rows))
            if seconds is None or ridden <= seconds:
                saved[rows] = rows * work - (ridden - alone)
        most = max(saved.values(), default=0.0)
        if most <= 0 or most < _least_saving(alone, seconds or 0.0):
            return NO_FREE_ROWS
        rows = next(rows for rows, saving in saved.items() if saving >= ALMOST * most)
        return FreeRows(rows, saved[rows])

    def candidates(self, work: MicrobatchWork, inference: PassCost) -> Iterator[Candidate]:
        """The windows of a micro-batch that are tried, the smallest first, whether they fit into the time or not."""
        alone = self._latency.pass_seconds(inference)
        most = min(work.num_tokens - work.end, self.shapes.max_window)
        return (self.shapes.ride(work, inference, alone, rows) for rows in self._sizes(inference.rows, most))

    def _sizes(self, rows: int, most: int) -> list[int]:
        """Windows to try beside `rows` rows of requests, in ascending order, the largest of `most` rows."""
        knots = (knot - rows for knot in self._latency.knots("inference", "rows"))
        return sorted({min(size, most) for size in (*SIZES, *knots) if size > 0})

    def grown(self, work: MicrobatchWork, inference: PassCost, best: Candidate, left: float) -> Candidate:
        """The largest window that fits into `left` seconds and whose rows beyond those of `best` are efficient; at least
        `best`."""
        alone = self._latency.pass_seconds(inference)
        ahead = work.num_tokens - work.end
        low, high = _rows(best), min(ahead, self.shapes.max_window)
        found = best
        while low < high:
            rows = (low + high + 1) // 2
            grown = self.shapes.ride(work, inference, alone, rows)
            more = grown.seconds - best.seconds
            if grown.seconds <= left and grown.work - best.work >= LEAST_FURTHER * more:
                found, low = grown, rows
            else:
                high = rows - 1
        rest = ahead - LEAST_REST
        return self.shapes.ride(work, inference, alone, rest) if _leaves_little(ahead, low) and rest >= _rows(best) else found


def _least_saving(pass_s: float, seconds: float) -> float:
    """What rows must save to ride in a pass of `pass_s` seconds, in an iteration of `seconds`."""
    return max(LEAST_SAVING * pass_s, LEAST_SHARE * seconds)


def _rows(found: Candidate) -> int:
    return found.unit.unit.end - found.unit.unit.start


def _leaves_little(ahead: int, rows: int) -> bool:
    """Whether a window of `rows` rows leaves so few of the `ahead` rows that they hardly save anything in the next pass."""
    return 0 < ahead - rows < LEAST_REST
