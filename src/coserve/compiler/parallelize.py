"""Parallelization: one layer's graph for all ranks of a tensor-parallel group.

The backbone is fixed, as in Megatron: q, k, v, gate and up are split by output features, o and down by input features. Values
between them are split by heads or by inner features, and the residual stream is whole on every rank. What a bypass does beside
it is searched: every operator may run in each way that its row of the table allows, and collectives are inserted where a value
is not held as its reader wants it. The cheapest graph wins.

    LoRA at q_proj                 parameters split            at o_proj                       parameters split
    x -A-> r -B-> + q              B by output                 x -A-> r -B-> + o -> reduce     A by input
    x -A-> r -gather-> -B-> + q    A by rank, B by output      x -A-> r -scatter-> -B-> + o    A by input, B by rank

Every rank runs the same graph on tensors of its own. Collectives come before differentiation, so that their gradients, pruning
and memory planning are those of any operator. Source: FlexLLM, dependent parallelization; Megatron-LM.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from coserve.compiler.graph import Graph, Node, Value
from coserve.core import ConfigError
from coserve.model.decoder import ROW_SITES, column_parts
from coserve.ops.table import COLLECTIVES, TABLE, Cost, State, Way
from coserve.parallel import Sharding, Shardings

Axes = Mapping[str, int | None]
"""{parameter: the axis of [out, in] along which ranks split it; None: every rank has all of it}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a choice is weighed by.

    flops: matrix FLOP/s of one rank. bandwidth: bytes per second that it reads from its memory. link_bandwidth: bytes per
    second between ranks. link_latency_s: seconds that a collective takes beside its bytes. itemsize: bytes of an element of the
    model's dtype. window_tokens: rows that run together. step_tokens: rows between two optimizer steps. update_bytes: that the
    optimizer reads and writes per parameter.
    """

    flops: float
    bandwidth: float
    link_bandwidth: float
    link_latency_s: float
    itemsize: int
    window_tokens: int
    step_tokens: int
    update_bytes: float

    def transfer_s(self, size: int, moves: int, width: int) -> float:
        """Seconds that a collective takes to send a window's rows of `width` elements. moves: as Operator.moves."""
        if moves == 0:
            return 0.0
        num_bytes = moves * (size - 1) / size * width * self.itemsize * self.window_tokens
        return self.link_latency_s + num_bytes / self.link_bandwidth


class RankForm(NamedTuple):
    """How ranks hold a value. parts: the number of different slices of a split one, else 1. It is smaller than the number of
    ranks for keys and values where there are fewer of their heads than ranks: several ranks then hold the same head."""

    state: State
    parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelized:
    """A layer's graph as every rank runs it, on tensors of its own. forms: of every value. shardings: of every parameter of the
    bypass. seconds: of a window of rows, forward and backward: what the bypass takes, with its share of an optimizer step, and
    all collectives. The backbone's own operators take the same time in every choice and are left out."""

    graph: Graph
    forms: Mapping[str, RankForm]
    shardings: Mapping[str, Sharding]
    seconds: float

    def check(self) -> None:
        """Raises AssertionError unless every operator runs in one of its ways and the layer's ends are whole."""
        for node in self.graph.nodes:
            ins = tuple(self.forms[name].state for name in node.inputs)
            outs = tuple(self.forms[name].state for name in node.outputs)
            assert any((way.inputs, way.outputs) == (ins, outs) for way in node.row.ways), f"{node} can't be shared like that"
        for name in (self.graph.input, self.graph.output):
            assert self.forms[name].state is State.WHOLE, f"{name} is not whole on every rank"


@dataclass(frozen=True, slots=True)
class ShardingCandidate:
    """One way to hold the parameters of a site's bypass. seconds: what the bypass adds to a window of the bare layer, forward
    and backward, with its share of an optimizer step."""

    axes: Axes
    seconds: float


class _Step(NamedTuple):
    """An operator of the new graph. made: its outputs with their forms. shardings: of its parameter. before: the one before."""

    node: Node
    made: Sequence[tuple[RankForm, Value]]
    shardings: Mapping[str, Sharding]
    before: _Step | None


@dataclass(frozen=True, slots=True)
class _Path:
    """A choice for the first operators of a layer. names: {(value, form): its name in the new graph} of what may still be read.
    last, seconds: of the new graph so far."""

    names: Mapping[tuple[str, RankForm], str]
    last: _Step | None = None
    seconds: float = 0.0

    def then(
        self, node: Node, made: Sequence[tuple[str, RankForm, Value]], seconds: float,
        shardings: Mapping[str, Sharding] = MappingProxyType({}),
    ) -> _Path:
        """With one operator more. made: of each of its outputs the value that it is of the old graph, its form, and what it is
        in the new one."""
        names = {**self.names, **{(old, form): value.name for old, form, value in made}}
        step = _Step(node, [(form, value) for _, form, value in made], shardings, self.last)
        return _Path(names, step, self.seconds + seconds)

    @property
    def steps(self) -> list[_Step]:
        """All operators, in order."""
        found, step = [], self.last
        while step is not None:
            found.append(step)
            step = step.before
        return found[::-1]


class _Search:
    """Finds the cheapest graph operator by operator, as Viterbi's algorithm does: a choice can't be part of the best one if a
    cheaper one holds the same values in the same forms, and perhaps more."""

    def __init__(
        self, graph: Graph, size: int, kv_heads: int, prices: Prices, forced: Axes, fixed: Mapping[str, Sharding],
        refused: Mapping[str, int],
    ) -> None:
        self.graph, self.size, self.kv_heads, self.prices = graph, size, kv_heads, prices
        self.forced, self.fixed, self.refused = forced, fixed, refused
        self.last_read = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
        self.wanted = self._backbone_forms()

    def _parts(self, site: str) -> int:
        return column_parts(self.kv_heads, site, self.size)

    def _backbone_forms(self) -> dict[str, RankForm]:
        """The form that the backbone has in mind for every value."""
        whole = RankForm(State.WHOLE)
        found = {self.graph.input: whole}
        for node in self.graph.nodes:
            if node.op == "linear":
                assert node.weight is not None
                row = node.weight in ROW_SITES
                form = RankForm(State.PARTIAL) if row else RankForm(State.SPLIT, self._parts(node.weight))
            else:
                form = found[node.inputs[0]]
                if form.state is State.PARTIAL and node.site is None:
                    form = whole
            found |= dict.fromkeys(node.outputs, form)
        return found

    def run(self) -> Parallelized | None:
        """The cheapest choice, or None if no choice has the parameters where they are forced to be."""
        start, end, whole = self.graph.input, self.graph.output, RankForm(State.WHOLE)
        paths = [_Path({(start, whole): start})]
        for index, node in enumerate(self.graph.nodes):
            longer = [self._forget(index, each) for path in paths for each in self._extend(path, node)]
            paths = []
            for path in sorted(longer, key=lambda each: each.seconds):
                if not any(better.names.keys() >= path.names.keys() for better in paths):
                    paths.append(path)
        ends = [longer for path in paths for longer in self._reach(path, end, whole)]
        if not ends:
            return None
        path = min(ends, key=lambda each: each.seconds)
        values, forms = {start: self.graph.values[start]}, {start: whole}
        shardings: dict[str, Sharding] = {}
        for step in path.steps:
            values |= {value.name: value for _, value in step.made}
            forms |= {value.name: form for form, value in step.made}
            shardings |= step.shardings
        graph = Graph(values, tuple(step.node for step in path.steps), start, path.names[end, whole])
        return Parallelized(graph=graph, forms=forms, shardings=shardings, seconds=path.seconds)

    def _forget(self, index: int, path: _Path) -> _Path:
        """Without the values that no operator after number `index` reads."""
        last, output = self.last_read, self.graph.output
        kept = {key: name for key, name in path.names.items() if last.get(key[0], -1) > index or key[0] == output}
        return _Path(kept, path.last, path.seconds)

    def _extend(self, path: _Path, node: Node) -> Iterator[_Path]:
        """The path with one operator more, in every way."""
        if node.op == "linear":
            assert node.weight is not None
            row = node.weight in ROW_SITES
            read = RankForm(State.SPLIT, self.size) if row else RankForm(State.ENTERED)
            yield from self._run(path, node, (read,), (self.wanted[node.outputs[0]],))
        elif node.site is None:
            own = self.wanted[node.inputs[0]]
            own = RankForm(State.WHOLE) if own.state is State.PARTIAL else own
            # attention's keys and values may have fewer parts than its queries
            ins = tuple(self.wanted[name] if own.state is State.SPLIT else own for name in node.inputs)
            yield from self._run(path, node, ins, (own,) * len(node.outputs))
        else:
            for way in node.row.ways:
                for parts in dict.fromkeys((self.size, self._parts(node.site))):
                    yield from self._in_way(path, node, way, parts)

    def _in_way(self, path: _Path, node: Node, way: Way, parts: int) -> Iterator[_Path]:
        """The path with an operator of a bypass in one way. parts: of what is split."""

        def form(state: State) -> RankForm:
            return RankForm(state, parts) if state is State.SPLIT else RankForm(state)

        split = State.SPLIT in (*way.inputs, *way.outputs)
        if not split and parts != self.size:
            return  # the same as with all parts
        if node.weight is not None:
            if node.weight in self.forced and self.forced[node.weight] != way.axis:
                return
            if way.axis is not None and self.refused.get(node.weight) == way.axis:
                return
            if way.axis == 1 and parts != self.size:
                return  # ranks that hold the same slice would add it twice
        yield from self._run(path, node, tuple(map(form, way.inputs)), tuple(map(form, way.outputs)), way)

    def _run(
        self, path: _Path, node: Node, ins: Sequence[RankForm], outs: Sequence[RankForm], way: Way | None = None
    ) -> Iterator[_Path]:
        """The path with an operator that reads and makes these forms, after whatever brings its inputs into them. way: of an
        operator of a bypass."""
        values = self.graph.values
        for name, form in (*zip(node.inputs, ins, strict=True), *zip(node.outputs, outs, strict=True)):
            if values[name].width % form.parts:
                return
        shardings: dict[str, Sharding] = {}
        if way is not None and node.weight is not None:
            shardings[node.weight] = sharding = self._sharding(way, (*ins, *outs))
            if self.fixed.get(node.weight, sharding) != sharding:
                return
        split_dropout = node.op == "dropout" and ins[0].state is State.SPLIT
        made = [
            (name, form, replace(values[name], width=values[name].width // form.parts))
            for name, form in zip(node.outputs, outs, strict=True)
        ]
        for ready in self._reach_all(path, node.inputs, ins):
            new = replace(
                node, inputs=tuple(ready.names[pair] for pair in zip(node.inputs, ins, strict=True)),
                attrs={**node.attrs, "split": True} if split_dropout else node.attrs,
            )
            yield ready.then(new, made, self._seconds(node, ins, outs, shardings), shardings)

    def _sharding(self, way: Way, forms: Sequence[RankForm]) -> Sharding:
        """Where the parameter of an operator in `way` lies. A rank that has all of it sees all of its gradient only if it has
        all of the rows and of the output's gradient."""
        reads = way.inputs[0].value
        if way.axis is None:
            return Sharding(None, 1, any(form.state is not State.WHOLE for form in forms), reads)
        parts = next(form.parts for form in forms if form.state is State.SPLIT)
        return Sharding(way.axis, parts, parts < self.size, reads)

    def _reach_all(self, path: _Path, values: Sequence[str], forms: Sequence[RankForm]) -> Iterator[_Path]:
        """The path with each value in its form."""
        if not values:
            yield path
            return
        for ready in self._reach(path, values[0], forms[0]):
            yield from self._reach_all(ready, values[1:], forms[1:])

    def _reach(self, path: _Path, value: str, form: RankForm, before: frozenset[State] = frozenset()) -> Iterator[_Path]:
        """The path with a value in a form, by every chain of collectives. before: states that the chain is on its way to."""
        if (value, form) in path.names:
            yield path
            return
        if form.state is State.SPLIT and form.parts != self.size:
            return
        for op, row in COLLECTIVES.items():
            (way,) = row.ways
            if way.outputs[0] is not form.state or way.inputs[0] in before:
                continue
            source = RankForm(way.inputs[0], self.size if way.inputs[0] is State.SPLIT else 1)
            if any(self.graph.values[value].width % each.parts for each in (source, form)):
                continue
            for ready in self._reach(path, value, source, before | {form.state}):
                yield self._collective(ready, op, value, source, form)

    def _collective(self, path: _Path, op: str, value: str, source: RankForm, form: RankForm) -> _Path:
        """The path with one collective more."""
        own = self.graph.values[value]
        made = replace(own, name=f"{value}.{op}", width=own.width // form.parts)
        node = Node(op, (path.names[value, source],), (made.name,))
        backward = TABLE[op].gradients[0].op
        rows = [TABLE[op], *([] if backward == "identity" else [TABLE[backward]])]
        seconds = sum(self.prices.transfer_s(self.size, row.moves, own.width) for row in rows)
        if source.parts != form.parts:  # it copies, in both directions
            elements = own.width // source.parts + own.width // form.parts
            seconds += 2 * self.prices.itemsize * self.prices.window_tokens * elements / self.prices.bandwidth
        return path.then(node, [(value, form, made)], seconds)

    def _seconds(
        self, node: Node, ins: Sequence[RankForm], outs: Sequence[RankForm], shardings: Mapping[str, Sharding]
    ) -> float:
        """Seconds of an operator of a bypass on one rank for a window, forward and backward, and its parameter's share of an
        optimizer step."""
        if node.site is None:
            return 0.0
        prices, rows = self.prices, self.prices.window_tokens
        widths = [
            self.graph.values[name].width // form.parts
            for name, form in zip((*node.inputs, *node.outputs), (*ins, *outs), strict=True)
        ]
        seconds, elements = 0.0, 0
        if node.row.cost is Cost.MATMUL:
            elements = widths[0] * widths[-1]
            moved = prices.itemsize * (rows * sum(widths) + elements) / prices.bandwidth
            seconds = (1 + len(node.row.gradients)) * max(2 * rows * elements / prices.flops, moved)
        else:
            elements = widths[-1] if node.weight is not None else 0
            seconds = 2 * prices.itemsize * rows * sum(widths) / prices.bandwidth
        for sharding in shardings.values():
            step = elements * prices.update_bytes / prices.bandwidth
            step += step_bytes(sharding, elements, self.size) / prices.link_bandwidth
            seconds += step * rows / prices.step_tokens
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """The group of ranks that share a model. size: of the group. kv_heads: of the model. forced: where parameters must lie, by
    their names in a layer. fixed: of adapters that lie somewhere already, as they do. refused: {name in a layer: the axis along
    which a parameter may not be split}. Where the others lie is chosen."""

    size: int
    kv_heads: int
    prices: Prices
    forced: Axes = field(default_factory=dict)
    fixed: Shardings = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)

    def fix(self, shardings: Shardings) -> TensorParallel:
        """The same group, with an adapter that lies where it lies."""
        return replace(self, fixed=shardings)

    def parallelize(self, graph: Graph, layer: int) -> Parallelized:
        """The cheapest graph of layer number `layer` for every rank. Raises ConfigError if parameters can't lie where they are
        forced to."""
        own = {name: sharding for (number, name), sharding in self.fixed.items() if number == layer}
        found = self._search(graph, self.forced, own)
        if found is None:
            assert self.forced, "every operator has a way, and an adapter lies where its own search put it"
            asked = ", ".join(f"{name} {axis_name(axis)}" for name, axis in self.forced.items())
            kept = "; in an engine no adapter is split along its rank" if self.refused else ""
            raise ConfigError(
                f"adapter_sharding: {asked} can't be had with {self.size} ranks in this layer; `coserve plan "
                f"--tensor-parallel-size {self.size}` lists the candidates{kept}", param="adapter_sharding",
            )
        found.check()
        return found

    def bytes_per_token(self, moves: int, width: int) -> int:
        """Bytes that each rank sends for a row of `width` elements (`Operator.moves`)."""
        return moves * (self.size - 1) * width * self.prices.itemsize // self.size

    def candidates(self, graph: Graph, site: str) -> tuple[ShardingCandidate, ...]:
        """Every sharding of the parameters of one site's bypass, the cheapest first. Sites don't depend on one another, as the
        backbone between them is fixed."""
        bare = self._search(only_site(graph, None), {})
        assert bare is not None, "the bare layer can be shared"
        own = only_site(graph, site)
        axes = {
            node.weight: sorted({way.axis for way in node.row.ways}, key=lambda axis: -1 if axis is None else axis)
            for node in own.nodes if node.site is not None and node.weight is not None
        }
        found = []
        for choice in itertools.product(*axes.values()):
            forced: dict[str, int | None] = dict(zip(axes, choice, strict=True))
            chosen = self._search(own, forced)
            if chosen is not None:
                found.append(ShardingCandidate(forced, chosen.seconds - bare.seconds))
        return tuple(sorted(found, key=lambda candidate: candidate.seconds))

    def _search(
        self, graph: Graph, forced: Axes, fixed: Mapping[str, Sharding] = MappingProxyType({})
    ) -> Parallelized | None:
        return _Search(graph, self.size, self.kv_heads, self.prices, forced, fixed, self.refused).run()


def step_bytes(sharding: Sharding, elements: int, size: int) -> int:
    """Bytes that each of `size` ranks sends per optimizer step for a parameter's gradient, of which it has `elements` elements
    in float32. What several ranks have the same slice of is gathered from all and then added up (peft/share.py)."""
    if not sharding.summed:
        return 0
    return (size - 1) * 4 * elements if sharding.axis is not None else 2 * (size - 1) * 4 * elements // size


def only_site(graph: Graph, site: str | None) -> Graph:
    """The graph without the bypasses of the other sites; with None, of all sites."""
    instead: dict[str, str] = {}
    nodes: list[Node] = []
    linears = {node.weight: node for node in graph.nodes if node.op == "linear"}
    done: set[str | None] = set()
    for node in graph.nodes:
        done |= {node.weight} if node.op == "linear" else set()
        if node.site is None or node.site == site:
            nodes.append(replace(node, inputs=tuple(instead.get(name, name) for name in node.inputs)))
            continue
        # what a bypass makes of the site's output stands for that output, what it makes of the input for the input
        linear = linears[node.site]
        own = linear.outputs[0] if node.site in done else instead.get(node.inputs[0], node.inputs[0])
        instead |= dict.fromkeys(node.outputs, own)
    made = {graph.input, *(name for node in nodes for name in node.outputs)}
    values = {name: value for name, value in graph.values.items() if name in made}
    return Graph(values, tuple(nodes), graph.input, instead.get(graph.output, graph.output))


def axis_name(axis: int | None) -> str:
    """For people: along which axis a parameter is split."""
    return "whole" if axis is None else ("out", "in")[axis]
