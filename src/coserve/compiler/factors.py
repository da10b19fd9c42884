"""Products of adapters' factors, several sites at a time: a device that has a kernel for them starts it once instead of often.

    q += B_q(A_q(x))                        A_q(x)  A_k(x)  A_v(x)          one call, whose CPU runner does the same
    k += B_k(A_k(x))    --gather_factors->  q += B_q  k += B_k  v += B_v    --join_factors->  products one after the other
    v += B_v(A_v(x))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Protocol, TypeVar

from coserve.compiler.graph import Node
from coserve.compiler.program import Call, Slot
from coserve.ops.run import PAIRS

_OP = "segment_linear"


class AnyStep(Protocol):
    """A step of a draft (`compiler/lower.py`)."""

    @property
    def node(self) -> Node: ...

    @property
    def base(self) -> str | None: ...


S = TypeVar("S", bound=AnyStep)


def gather_factors(steps: Sequence[S], has_own_memory: Callable[[str], bool]) -> tuple[S, ...]:
    """Within each run of products with adapters' factors, moves those of one input to the first of them. They write memory of
    their own, so nothing else is computed; their outputs live longer."""
    ordered: list[S] = []
    behind: dict[str, int] = {}
    """Where the run's next product of an input belongs."""
    for step in steps:
        node = step.node
        if node.op != _OP:
            behind = {}
        if node.op == _OP and step.base is None and has_own_memory(node.outputs[0]):
            at = behind.get(node.inputs[0], len(ordered))
            behind = {name: number + (number >= at) for name, number in behind.items()} | {node.inputs[0]: at + 1}
            ordered.insert(at, step)
        else:
            ordered.append(step)
    return tuple(ordered)


def join_factors(calls: Sequence[Call], slots: Sequence[Slot]) -> list[Call]:
    """Makes one call of products with first factors and, right behind them, those of their outputs with second ones, which are
    added to memory of each site."""
    joined: list[Call] = []
    for call in calls:
        joined.append(call)
        count = _pairs(joined, slots)
        if count:
            down, up = joined[-2 * count : -count], joined[-count:]
            names = {"down": tuple(one.weight for one in down), "up": tuple(one.weight for one in up)}
            outs = (*(one.outs[0] for one in down), *(one.outs[0] for one in up))
            joined[-2 * count :] = [replace(call, run=PAIRS, weight=None, attrs=names, outs=outs, ins=down[0].ins)]
    return joined


def _pairs(calls: Sequence[Call], slots: Sequence[Slot]) -> int:
    """How many sites the last calls are the products of; 0 if they aren't yet."""
    count = 0
    while count < len(calls) and calls[-1 - count].op == _OP and calls[-1 - count].accumulate:
        count += 1
    down, up = calls[len(calls) - 2 * count : len(calls) - count], calls[len(calls) - count :]
    if not count or len(down) < count:
        return 0
    plain = all(one.op == _OP and not one.accumulate and one.run is not PAIRS and one.ins == down[0].ins for one in down)
    chained = plain and all(one.outs == other.ins for one, other in zip(down, up, strict=True))
    return count if chained and not any(_meet(*pair, slots) for pair in combinations(up, 2)) else 0


def _meet(one: Call, other: Call, slots: Sequence[Slot]) -> bool:
    """Whether two calls add to the same memory."""
    first, second = slots[one.outs[0]], slots[other.outs[0]]
    return first.storage == second.storage and (
        first.column < second.column + second.width and second.column < first.column + first.width
    )
