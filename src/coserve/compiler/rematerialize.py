"""Rematerialization: which values forward keeps, and which operators backward runs again to make the others.

A choice is a cut of a graph. Its vertices are the layer's values and nodes, a source and a sink; its edges have capacities:

    source --infinite---> a value that backward reads
    value  --its bytes--> the node that makes it           if this edge is cut, the value is kept
    node   --its FLOPs--> sink                             if this edge is cut, the node runs again
    node   --infinite---> each of its inputs               a node can run again only with its inputs
    a node that sends to other ranks --infinite---> sink   it never runs again

With fp8 a value that is made again differs a little from the first one, which needs one more edge:

    node   --infinite---> nodes whose output must match    log-sum-exp must belong to the q that backward sees

Bytes and FLOPs are made comparable by a price. At any price the minimum cut is exactly the cheapest choice. Over all prices
these choices form the lower convex hull of (bytes, FLOPs). One end keeps all that costs a matrix product; the other keeps
only the layer's input, K and V. Element-wise nodes cost nothing.

K and V are always kept. The forward pass of later windows reads them in every layer, so they lie in the arena until forward
ends. Making them again in backward would not lower the peak. Everything else can be made again window by window, attention
too: it takes the window's queries and the K and V that lie in the arena.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from coserve.compiler.flops import node_flops
from coserve.compiler.graph import JointGraph, Node

_FINE = 1 << 20
"""A node's FLOPs are multiplied by this, and its depth is added. So nodes of equal cost per byte differ a little, and a choice
may run some of them again and not the others."""
_SOURCE, _SINK = -1, -2
Vertex = str | int
"""A value's name or a node's number."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One value that forward stores, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rematerialized:
    """A choice for one layer. The default keeps nothing, as inference does.

    kept: values that forward stores, in forward order. recompute: forward nodes that backward runs again, in order. num_bytes:
    of what is kept, per token. flops: matrix FLOPs of what runs again, per token.
    """

    joint: JointGraph
    kept: tuple[Kept, ...] = ()
    recompute: tuple[Node, ...] = ()
    num_bytes: int = 0
    flops: int = 0

    def check(self) -> None:
        """Raises AssertionError unless backward finds all that it reads, kept or made again."""
        self.joint.check()
        there = {entry.name for entry in self.kept}
        for node in self.recompute:
            assert there.issuperset(node.inputs), f"{node} can't run again: an input is not kept"
            there.update(node.outputs)
        assert there.issuperset(self.joint.saved()), "backward reads a value that is neither kept nor made again"


@dataclass(frozen=True)
class _Choices:
    """All choices of one layer."""

    joint: JointGraph
    itemsize: int
    context: float
    fp8: bool

    @cached_property
    def whole(self) -> frozenset[str]:
        return self.joint.read_whole()

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        as_they_are = self.whole | self.joint.read_exactly() if self.fp8 else self.joint.forward.values.keys()
        return {
            name: value.num_bytes(self.itemsize) if name in as_they_are else value.fp8_bytes(self.itemsize)
            for name, value in self.joint.forward.values.items()
        }

    @cached_property
    def make(self) -> Mapping[str, int]:
        """The number of the node that makes each value."""
        return {name: number for number, node in enumerate(self.joint.forward.nodes) for name in node.outputs}

    @cached_property
    def flops(self) -> tuple[int, ...]:
        """FLOPs by node times _FINE, plus a little for deeper nodes. Depth counts products, so that products of one input get
        the same addition. They may be merged, and should be kept or run again together."""
        depths = {self.joint.forward.input: 0}
        result = []
        for node in self.joint.forward.nodes:
            flops = node_flops(node, self.joint.forward.values, self.context)
            depth = max(depths[name] for name in node.inputs) + (flops > 0)
            depths |= dict.fromkeys(node.outputs, depth)
            result.append(flops * (_FINE + depth))
        return tuple(result)

    def cut(self, byte_price: int, flop_price: int) -> frozenset[int]:
        """Numbers of the nodes to run again for the least cost; among equals, the fewest nodes."""
        nodes = self.joint.forward.nodes
        finest = len(nodes) + 1
        forever = finest * (byte_price * sum(self.sizes.values()) + flop_price * sum(self.flops) + 1)

        def edges() -> Iterator[tuple[Vertex, Vertex, int]]:
            for name in self.joint.saved():
                yield _SOURCE, name, forever
            for name, size in self.sizes.items():
                if name not in self.whole:
                    yield name, self.make.get(name, _SINK), size * byte_price * finest
            for number, node in enumerate(nodes):
                yield number, _SINK, forever if node.row.moves else self.flops[number] * flop_price * finest + 1
                for name in node.inputs:
                    yield number, name, forever
                for name in node.exact_inputs if self.fp8 else ():
                    if name in self.make:
                        yield self.make[name], number, forever

        return frozenset(n for n in source_side(edges(), _SOURCE, _SINK) if isinstance(n, int) and n >= 0)

    def needed(self, recomputed: frozenset[int]) -> set[str]:
        """Values that are kept if these nodes run again."""
        nodes = self.joint.forward.nodes
        read = {*self.joint.saved(), *(name for number in recomputed for name in nodes[number].inputs)}
        return {name for name in read if self.make.get(name) not in recomputed} | self.whole

    def cost(self, recomputed: frozenset[int]) -> tuple[int, int]:
        """(bytes kept, fine FLOPs run again) per token."""
        return sum(self.sizes[name] for name in self.needed(recomputed)), sum(self.flops[number] for number in recomputed)

    def hull(self) -> list[frozenset[int]]:
        """Every choice that is best at some price, in order of rising FLOPs."""
        most_bytes, most_flops = sum(self.sizes.values()) + 1, sum(self.flops) + 1
        ends = self.cut(1, most_bytes), self.cut(most_flops, 1)
        found = [ends[0]]

        def between(left: frozenset[int], right: frozenset[int]) -> None:
            (high, few), (low, many) = self.cost(left), self.cost(right)
            if high <= low or many <= few:
                return
            byte_price, flop_price = many - few, high - low
            middle = self.cut(byte_price, flop_price)
            num_bytes, flops = self.cost(middle)
            if byte_price * num_bytes + flop_price * flops < byte_price * high + flop_price * few:
                between(left, middle)
                between(middle, right)
            else:
                found.append(right)

        between(*ends)
        return found

    def describe(self, recomputed: frozenset[int]) -> Rematerialized:
        joint, kept = self.joint, self.needed(recomputed)
        recompute = tuple(node for number, node in enumerate(joint.forward.nodes) if number in recomputed)
        made = {name for node in recompute for name in node.outputs}
        readers = {value: node for node in reversed(joint.backward) for value in node.inputs}
        reasons = {value: f"to recompute {n.outputs[0]}" for n in recompute for value in n.inputs}
        reasons |= {v: f"read by {node.op}" + (f" of {node.weight}" if node.weight else "") for v, node in readers.items()}
        assert made.isdisjoint(kept)
        return Rematerialized(
            joint, kept=tuple(
                Kept(name, reasons.get(name, "read by later windows' forward attention")) for name in joint.forward.values
                if name in kept
            ),
            recompute=recompute, num_bytes=self.cost(recomputed)[0],
            flops=sum(node_flops(node, joint.forward.values, self.context) for node in recompute),
        )


def source_side(edges: Iterable[tuple[Vertex, Vertex, int]], source: Vertex, sink: Vertex) -> set[Vertex]:
    """Nodes on the source's side of a cut of least capacity; of several such cuts, the one with the fewest nodes there.

    edges: (from, to, capacity), of which two with the same ends count as one with both capacities. networkx gives the fewest
    nodes to the sink's side, so it is asked about the reversed graph. Capacities stay Python's integers, so that the cut is
    exact however large they are.
    """
    import networkx  # takes a fifth of a second, which only those who plan training pay
    from networkx.algorithms.flow import boykov_kolmogorov

    reversed_graph = networkx.DiGraph()
    reversed_graph.add_nodes_from((source, sink))
    for start, end, capacity in edges:
        parallel = reversed_graph.get_edge_data(end, start, {"capacity": 0})
        reversed_graph.add_edge(end, start, capacity=parallel["capacity"] + capacity)
    _, (_, side) = networkx.minimum_cut(reversed_graph, sink, source, flow_func=boykov_kolmogorov)
    return side


def rematerialize(joint: JointGraph, itemsize: int = 4, *, fp8: bool = False) -> Rematerialized:
    """The choice with the fewest bytes that runs no matrix product again. fp8: whether sizes are those of fp8 (compress.py)."""
    choices = _Choices(joint, itemsize, 1.0, fp8)
    return choices.describe(choices.cut(1, sum(choices.sizes.values()) + 1))


def curve(joint: JointGraph, itemsize: int, context: float, *, fp8: bool = False) -> tuple[Rematerialized, ...]:
    """All choices of one layer that are cheapest at some price, from "no matrix product runs again" to the fewest bytes.

    context: the number of tokens that a query sees on average (`flops.mean_context`). fp8: as for `rematerialize`.
    """
    choices = _Choices(joint, itemsize, context, fp8)
    return tuple(choices.describe(recomputed) for recomputed in choices.hull())
