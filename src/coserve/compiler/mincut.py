"""The minimum cut of a small directed graph with integer capacities."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import networkx
from networkx.algorithms.flow import boykov_kolmogorov

N = TypeVar("N", bound=Hashable)


def source_side(edges: Iterable[tuple[N, N, int]], source: N, sink: N) -> set[N]:
    """Nodes on the source's side of a cut of least capacity; of several such cuts, the one with the fewest nodes there.

    edges: (from, to, capacity), of which two with the same ends count as one with both capacities. networkx gives the fewest
    nodes to the sink's side, so it is asked about the reversed graph. Capacities stay Python's integers, so that the cut is
    exact however large they are.
    """
    reversed_graph = networkx.DiGraph()
    reversed_graph.add_nodes_from((source, sink))
    for start, end, capacity in edges:
        parallel = reversed_graph.get_edge_data(end, start, {"capacity": 0})
        reversed_graph.add_edge(end, start, capacity=parallel["capacity"] + capacity)
    _, (_, side) = networkx.minimum_cut(reversed_graph, sink, source, flow_func=boykov_kolmogorov)
    return side
