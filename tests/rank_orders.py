"""What ranks are told to do in tests/runtime/test_rank_orders.py: their processes find these functions by name."""

from __future__ import annotations

import gc
import weakref

import torch

from coserve.core import InvalidRequest
from coserve.parallel import Ranks

MADE: weakref.WeakSet[Box] = weakref.WeakSet()


class Box:
    """Holds a number. Each rank has boxes of its own."""

    def __init__(self, value: float) -> None:
        self.value = value
        MADE.add(self)


def make(ranks: Ranks) -> Box:
    return Box(10.0 ** ranks.rank)


def total(ranks: Ranks, box: Box, factor: float) -> float:
    """The sum of all ranks' numbers, times a factor that all were told."""
    return float(ranks.sum(torch.tensor([box.value * factor])))


def count(ranks: Ranks) -> float:
    """The boxes of all ranks."""
    gc.collect()
    return float(ranks.sum(torch.tensor([float(len(MADE))])))


def refuse_on(ranks: Ranks, refusing: tuple[int, ...]) -> None:
    """Some ranks raise what would be the caller's error."""
    if ranks.rank in refusing:
        raise InvalidRequest("refused")


def fail_on(ranks: Ranks, failing: int) -> None:
    """A rank has a bug."""
    if ranks.rank == failing:
        raise ZeroDivisionError("a bug")
