"""The least cut of a small directed graph with integer capacities."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from itertools import pairwise
from typing import TypeVar

N = TypeVar("N", bound=Hashable)


def source_side(edges: Iterable[tuple[N, N, int]], source: N, sink: N) -> set[N]:
    """Nodes on the source's side of a cut of least capacity; of several such cuts, the one with the fewest nodes there.

    edges: (from, to, capacity). Shortest augmenting paths (Edmonds and Karp).
    """
    residual: dict[N, dict[N, int]] = {source: {}, sink: {}}
    for start, end, capacity in edges:
        there = residual.setdefault(start, {})
        there[end] = there.get(end, 0) + capacity
        residual.setdefault(end, {}).setdefault(start, 0)
    while True:
        before = {source: source}
        waiting = deque([source])
        while waiting and sink not in before:
            node = waiting.popleft()
            for following, left in residual[node].items():
                if left and following not in before:
                    before[following] = node
                    waiting.append(following)
        if sink not in before:
            return set(before)
        path = [sink]
        while path[-1] != source:
            path.append(before[path[-1]])
        steps = [(start, end) for end, start in pairwise(path)]
        flow = min(residual[start][end] for start, end in steps)
        for start, end in steps:
            residual[start][end] -= flow
            residual[end][start] += flow
