"""Capacity: the highest rate at which a load still holds its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable

from coserve.core import ConfigError

HELD_SHARE = 0.99
_MOST_DOUBLINGS = 8


def allowed_misses(num_requests: int) -> int:
    """The most misses at which HELD_SHARE of the requests still meet their objectives."""
    return math.floor(num_requests * (1 - HELD_SHARE) + 1e-9)


def find_capacity(holds: Callable[[float], bool], *, start: float, tolerance: float) -> float:
    """Doubles or halves from `start` (requests per second) to a rate that holds beside one that doesn't, then bisects.

    Returns a rate that held; one at most (1 + tolerance) times it did not. Raises ConfigError if none is found.
    """
    low, high = (start, 0.0) if holds(start) else (0.0, start)
    for _ in range(_MOST_DOUBLINGS):
        if low and high:
            break
        rate = low * 2 if low else high / 2
        if holds(rate):
            low = rate
        else:
            high = rate
    if not low:
        raise ConfigError(
            f"tpot_ms: even {high:.3g} requests/s miss the objectives beside no other work; give longer objectives",
            param="tpot_ms",
        )
    if not high:
        raise ConfigError(
            f"capacity: {low:.3g} requests/s still hold; give the capacity, or a start nearer to it", param="capacity"
        )
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
