"""What sets the time that iterations take apart from what the scheduler believes that they take.

    seconds = (host overhead + law(contents), its slopes times a factor) x (1 + noise) x (stall, now and then)
              x (what the machine's pace is at that time)

The scheduler has a latency model of its own, which learns from these times as it learns from a device's. Between two iterations
more time may pass, of which it does not learn.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from coserve.config.values import check_types, is_number, require
from coserve.core import Contents
from coserve.scheduler.latency import UNCAPTURED, Coefficient, LatencyModel

LARGEST_ERROR = 3.0
"""Noise is cut at so many standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """How the true times differ from the law. With the defaults they don't."""

    noise: float = 0.0
    """Standard deviation of an iteration's relative error, below 1/3."""
    stall_share: float = 0.0
    """Share of iterations that stall, from 0 to 1."""
    stall_factor: float = 10.0
    """How many times as long an iteration that stalls takes, at least 1."""
    slope: float = 1.0
    """What each row, pair, label and element takes, as a multiple of the law's. Constants stay."""
    host_s: float = 0.0
    """Seconds that the host adds to every iteration."""
    between_s: float = 0.0
    """Seconds that pass behind every iteration before the next one is planned. No iteration is said to have taken them."""
    pace: Sequence[tuple[float, float]] = ()
    """(time in seconds, factor), in order of time: an iteration that begins from that time on, and before the next one, takes
    so many times as long."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.noise < 1 / LARGEST_ERROR, "noise", f"must be from 0 to below 1/3, got {self.noise}")
        require(0 <= self.stall_share <= 1, "stall_share", f"must be from 0 to 1, got {self.stall_share}")
        require(is_number(self.stall_factor) and self.stall_factor >= 1, "stall_factor",
                f"must be a number from 1, got {self.stall_factor}")
        require(is_number(self.slope) and self.slope > 0, "slope", f"must be a positive number, got {self.slope}")
        for name in ("host_s", "between_s"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, f"must be 0 or more seconds, got {value}")
        ordered = all(before[0] <= after[0] for before, after in pairwise(self.pace))
        require(ordered and all(is_number(factor) and factor > 0 for _, factor in self.pace), "pace",
                "must be pairs of a time and a positive factor, in order of time")


EXACT = Disturbance()
"""Iterations take what the law says."""


def _is_constant(name: Coefficient, law: LatencyModel) -> bool:
    """Whether a coefficient doesn't grow with rows, pairs, labels or elements. Where a curve has a knot at 1, its first piece
    is what the first row costs, which is mostly the reading of weights."""
    group, field, knot = name
    return field in ("once", "layers", UNCAPTURED) or (knot == 0 and (group, field, 1) in law.coefficients)


class TrueLaw:
    """What iterations really take: a law that nothing corrects, and a disturbance. Equal seeds give equal times for equal
    iterations in equal order.

    law: with the disturbance's slopes and host overhead, without its noise and stalls.
    """

    def __init__(self, law: LatencyModel, disturbance: Disturbance = EXACT) -> None:
        self.disturbance = disturbance
        terms = {
            name: seconds if _is_constant(name, law) else seconds * disturbance.slope
            for name, seconds in law.coefficients.items()
        }
        terms["iteration", "once", 0] = terms.get(("iteration", "once", 0), 0.0) + disturbance.host_s
        self.law = LatencyModel(terms)
        self._random = random.Random(disturbance.seed)
        self._times = [time_s for time_s, _ in disturbance.pace]

    def expected(self, contents: Contents) -> float:
        """Seconds of an iteration without noise and stalls."""
        return self.law.seconds(contents)

    def factor(self, now: float = 0.0) -> float:
        """How many times the expected time the next iteration takes, which begins now. Each call is another iteration's."""
        disturbance = self.disturbance
        place = bisect_right(self._times, now) - 1
        factor = disturbance.pace[place][1] if place >= 0 else 1.0
        if disturbance.noise:
            error = self._random.gauss(0.0, 1.0)
            factor *= 1 + math.copysign(min(abs(error), LARGEST_ERROR), error) * disturbance.noise
        if disturbance.stall_share and self._random.random() < disturbance.stall_share:
            factor *= disturbance.stall_factor
        return factor
