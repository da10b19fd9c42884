"""Lowering: from a pruned graph to flat programs of calls, in which every value has its place in memory.

Five passes work on the draft of a program:

    share_memory     an in-place operator writes over its input           q' = rope(q)          q' lies where q lay
    fuse_adds        a product and the sum it goes into are one step      b = B(x); c = a + b   a += B(x); c lies where a lay
    merge_linears    frozen linears of one input are one product          q, k, v = qkv_proj(x), side by side
    gather_factors   adapters' products of one input stand together      (`compiler/factors.py`)
    join_sums        a sum and the norm behind it are one step           h = a + b; n = rmsnorm(h)
    place            every value gets a storage and an offset: kept ones in the arena, others in the workspace by live ranges

Then the calls are written down. Rotary embeddings of q and k in place become one call with the attention behind them. Joined
calls (`ops.run.JOINED`) compute what their operators compute one after the other; a device may have one kernel for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from coserve.compiler.factors import gather_factors, join_factors
from coserve.compiler.graph import Element, JointGraph, Node, Value, counterparts
from coserve.compiler.passes import run_passes
from coserve.compiler.program import Call, FusedLayer, Keep, LayerPlan, Place, Program, Slot, Storage
from coserve.compiler.rematerialize import Rematerialized
from coserve.ops.run import JOINED, RUNNERS, Runner

_ALIGN = 16


@dataclass(frozen=True, slots=True)
class _Step:
    """One operator that will run. It writes `outputs`; if `base` is a value, it adds to that one's memory instead. first: the
    operator that runs right before it as part of the step, whose output is the step's first, or None."""

    node: Node
    outputs: tuple[str, ...]
    base: str | None = None
    first: Node | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the step reads that it hasn't made itself."""
        return self.node.inputs if self.first is None else self.first.inputs

    @property
    def inplace(self) -> bool:
        """Whether the first output may take the memory of the first input."""
        return (self.first or self.node).row.inplace


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One program on its way from nodes to calls. Every lowering pass returns a draft of which more is decided.

    values: all values of the graph, by name. steps: what runs, in order. itemsize: bytes of an element of the model's dtype.
    given: values that are there before the first step. pinned: values that no step may write over. outlive: values that are
    read after the last step. arena: values that the program keeps for backward.
    storages: first those that are given from outside. slots: where values lie; before `place`, only those that are given.
    roots: {value: the value whose memory it takes over}; a value that isn't there has memory of its own.
    arena_bytes, work_bytes: per row, after `place`.
    """

    values: Mapping[str, Value]
    steps: tuple[_Step, ...]
    itemsize: int
    given: frozenset[str]
    pinned: frozenset[str]
    outlive: tuple[str, ...]
    arena: frozenset[str] = frozenset()
    storages: tuple[Storage, ...]
    slots: Mapping[str, Slot]
    roots: Mapping[str, str] = field(default_factory=dict)
    arena_bytes: int = 0
    work_bytes: int = 0

    def root(self, name: str) -> str:
        """The value whose memory `name` lies in."""
        return self.roots.get(name, name)

    @property
    def kept_roots(self) -> frozenset[str]:
        """The roots of what is kept in the arena."""
        return frozenset(map(self.root, self.arena))

    def check(self) -> None:
        """Follows every value through memory: each step finds its inputs where they were left, and nothing has been written
        over them since; what is read after the last step is there too."""
        held = {name: self.slots.get(name) for name in self.given}
        for step in self.steps:
            reads = (*step.inputs, *((step.base,) if step.base is not None else ()))
            assert held.keys() >= {*reads}, f"{step.node} does not find {held.keys() ^ {*reads}}"
            for name in step.outputs:
                slot = self.slots.get(name)
                if slot is not None:
                    harmed = {other for other, place in held.items() if place is not None and self._overlap(place, slot)}
                    allowed = {step.base, step.inputs[0] if step.inplace else step.base}
                    if step.first is not None:  # row by row it reads before it writes
                        allowed |= {other for other in step.inputs if held.get(other) == slot}
                    assert harmed.intersection(reads) <= allowed, f"{step.node} writes over {harmed} while it reads them"
                    for other in harmed:
                        del held[other]
                held[name] = slot
        lost = {*self.outlive, *self.arena, *(self.pinned & self.given)} - held.keys()
        assert not lost, f"{lost} are read after the program and not there"

    def _overlap(self, one: Slot, other: Slot) -> bool:
        """Whether two slots share bytes of a row."""
        if one.storage == other.storage:
            return one.column < other.column + other.width and other.column < one.column + one.width
        first, second = self.storages[one.storage], self.storages[other.storage]
        if first.place is not second.place or first.place not in (Place.WORK, Place.ARENA):
            return False
        ends = first.offset + _size(first, self.itemsize), second.offset + _size(second, self.itemsize)
        return first.offset < ends[1] and second.offset < ends[0]


def share_memory(draft: Draft) -> Draft:
    """Lets an in-place operator write over its first input if nothing reads that memory afterwards."""
    last_read = {name: index for index, step in enumerate(draft.steps) for name in step.node.inputs}
    last_read |= dict.fromkeys((*draft.outlive, *draft.pinned), len(draft.steps))
    roots: dict[str, str] = {}
    last_in_class: dict[str, int] = {}
    for index, step in enumerate(draft.steps):
        node = step.node
        if not node.row.inplace or node.outputs[0] in draft.slots:
            continue
        (out, *_), (source, *_) = node.outputs, node.inputs
        root = roots.get(source, source)
        last = last_in_class.get(root, last_read.get(root, -1))
        if last <= index:
            roots[out] = root
            last_in_class[root] = max(last, last_read.get(out, -1))
    return replace(draft, roots=roots)


def fuse_adds(draft: Draft) -> Draft:
    """Makes one step of `b = kernel(x); c = a + b` where the kernel can add into memory and c takes over a's."""
    uses = Counter(name for step in draft.steps for name in step.node.inputs)
    steps: list[_Step] = []
    for step in draft.steps:
        if step.node.op == "add" and steps and step.outputs[0] in draft.roots:
            (base, added), source = step.node.inputs, steps[-1].node
            inputs = {draft.root(name) for name in source.inputs}
            if (
                added in source.outputs and source.row.accumulates and uses[added] == 1 and added not in draft.pinned
                and (source.row.inplace or draft.root(base) not in inputs)
            ):
                steps[-1] = _Step(source, step.outputs, base)
                continue
        steps.append(step)
    return replace(draft, steps=tuple(steps))


def merge_linears(merged: Mapping[str, tuple[str, ...]], draft: Draft) -> Draft:
    """Makes one step of frozen linears of one input that lie in one matrix, if all their outputs go to the same place."""
    steps, kept = list(draft.steps), draft.kept_roots
    for name, sites in merged.items():
        group = [s for s in steps if s.node.op == "linear" and s.node.weight in sites and s.base is None]
        if len(group) != len(sites) or len({s.node.inputs for s in group}) != 1:
            continue
        if len({draft.root(s.outputs[0]) in kept for s in group}) != 1:
            continue
        outputs = tuple(s.outputs[0] for s in sorted(group, key=lambda s: sites.index(s.node.weight or "")))
        steps[steps.index(group[0])] = _Step(Node("linear", group[0].node.inputs, outputs, name), outputs)
        for step in group[1:]:
            steps.remove(step)
    return replace(draft, steps=tuple(steps))


def join_sums(draft: Draft) -> Draft:
    """Makes one step of a sum and the norm of it that follows. What the sum reads is then still there when the norm is written,
    but for a second term that nothing reads any more: the norm's rows take exactly the place of its rows."""
    steps: list[_Step] = []
    roots = dict(draft.roots)
    reads = [(*step.node.inputs, *([] if step.base is None else [step.base])) for step in draft.steps]
    last_read = {draft.root(name): index for index, names in enumerate(reads) for name in names}
    fixed = {draft.root(name) for name in (*draft.slots, *draft.pinned, *draft.outlive, *draft.arena)}
    for index, step in enumerate(draft.steps):
        last = steps[-1] if steps else None
        if last is not None and (last.node.op, step.node.op) == ("add", "rmsnorm") and step.node.inputs == last.outputs:
            total, out, term = *last.outputs, *step.outputs, draft.root(last.node.inputs[1])
            free = last_read[term] < index and not fixed & {term, draft.root(out)} and term != draft.root(total)
            if free and replace(draft.values[out], name=term) == draft.values[term]:
                roots |= {name: term for name in draft.values if draft.root(name) == out}
            steps[-1] = _Step(step.node, (total, out), first=last.node)
        else:
            steps.append(step)
    return replace(draft, steps=tuple(steps), roots=roots)


def _align(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _place_work(spans: Mapping[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """First-fit offsets for {storage: (first step, last step, bytes per row)}; and the total."""
    placed: list[tuple[int, int, int, int]] = []  # offset, size, first, last
    offsets: dict[int, int] = {}
    for name, (first, last, size) in sorted(spans.items(), key=lambda item: (item[1][0], -item[1][2])):
        offset = 0
        for other, other_size, begin, end in sorted(placed):
            if first <= end and begin <= last and offset < other + other_size and other < offset + size:
                offset = other + other_size
        placed.append((offset, size, first, last))
        offsets[name] = offset
    return offsets, max((o + s for o, s, _, _ in placed), default=0)


def _size(storage: Storage, itemsize: int) -> int:
    return _align(storage.width * storage.element.num_bytes(itemsize))


class _Homes:
    """Storages being handed out: in which place, at which columns, and how long each workspace storage lives."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.kept = draft, draft.kept_roots
        self.storages, self.slots = list(draft.storages), dict(draft.slots)
        self.arena_bytes = 0
        self.spans: dict[int, tuple[int, int, int]] = {}

    def give(self, roots: Sequence[str]) -> None:
        """Gives values one storage, in which they lie side by side."""
        values = [self.draft.values[root] for root in roots]
        kept = roots[0] in self.kept
        storage = Storage(
            Place.ARENA if kept else Place.WORK, sum(value.width for value in values), values[0].element,
            self.arena_bytes if kept else 0,
        )
        self.storages.append(storage)
        if kept:
            self.arena_bytes += _size(storage, self.draft.itemsize)
        column = 0
        for root, value in zip(roots, values, strict=True):
            self.slots[root] = Slot(len(self.storages) - 1, column, value.width)
            column += value.width

    def touch(self, name: str, index: int) -> None:
        """Step `index` uses `name`: its workspace storage lives at least until then."""
        slot = self.slots.get(self.draft.root(name))
        if slot is None or self.storages[slot.storage].place is not Place.WORK:
            return
        first = self.spans[slot.storage][0] if slot.storage in self.spans else index
        self.spans[slot.storage] = (first, index, _size(self.storages[slot.storage], self.draft.itemsize))


def place(draft: Draft) -> Draft:
    """Gives every value a slot: kept ones in the arena, all others in the workspace, at offsets found from live ranges."""
    homes = _Homes(draft)
    packed = [root for root in homes.kept if draft.values[root].element is Element.BYTE]
    if packed:  # side by side, as one would be padded; wide ones first, so that they begin on even columns
        homes.give(sorted(packed, key=lambda root: (-draft.values[root].width, root)))
    for index, step in enumerate(draft.steps):
        roots = [root for name in step.outputs if (root := draft.root(name)) not in homes.slots and root[:3] != "dW:"]
        for together in [roots] if step.node.op == "linear" and roots else [[root] for root in roots]:
            homes.give(together)
        for name in (*step.outputs, *step.inputs):
            homes.touch(name, index)
    for name in draft.outlive:
        homes.touch(name, len(draft.steps))
    offsets, work_bytes = _place_work(homes.spans)
    storages = tuple(
        replace(storage, offset=offsets[number]) if number in offsets else storage
        for number, storage in enumerate(homes.storages)
    )
    slots = {name: homes.slots[root] for name in draft.values if (root := draft.root(name)) in homes.slots}
    return replace(draft, storages=storages, slots=slots, arena_bytes=homes.arena_bytes, work_bytes=work_bytes)


def _gather_factors(draft: Draft) -> Draft:
    """`gather_factors` of a draft's steps."""
    return replace(draft, steps=gather_factors(
        draft.steps, lambda name: draft.root(name) == name and name not in draft.slots
    ))


def _decide(draft: Draft, merged: Mapping[str, tuple[str, ...]]) -> Draft:
    """All lowering passes: what runs, and where every value lies."""
    passes = (share_memory, fuse_adds, partial(merge_linears, merged), _gather_factors, join_sums, place)
    return run_passes(draft, *passes)


def _emit(draft: Draft) -> Program:
    """The calls of a draft whose values all have slots."""
    numbers: dict[Slot, int] = {}

    def number(slot: Slot) -> int:
        return numbers.setdefault(slot, len(numbers))

    calls: list[Call] = []
    slots = draft.slots
    for previous, step in pairwise((None, *draft.steps)):
        assert step is not None
        node = step.node
        beside = _beside(previous, step, slots)
        if beside is not None:
            both = (number(beside),)
            calls[-1] = replace(calls[-1], outs=both, ins=both)
            continue
        outs: tuple[int, ...]
        if node.op == "linear" and len(step.outputs) > 1:
            parts = [slots[name] for name in step.outputs]
            outs = (number(Slot(parts[0].storage, 0, sum(p.width for p in parts))),)
        else:
            outs = tuple(number(slots[name]) for name in step.outputs if not name.startswith("dW:"))
        ins = tuple(number(slots[name]) for name in step.inputs)
        run = RUNNERS[node.op] if step.first is None else JOINED[step.first.op, node.op]
        calls.append(Call(run, node.op, node.weight, node.attrs, step.base is not None, outs, ins))
    order = tuple(numbers)
    calls = join_factors(_join_turns(calls, order), order)
    return Program(tuple(calls), order, draft.storages, draft.work_bytes)


def _join_turns(calls: Sequence[Call], slots: Sequence[Slot]) -> list[Call]:
    """Joins rotary embeddings of q and k with the attention behind them."""
    joined: list[Call] = []
    for call in calls:
        turns = _turns(joined, call, slots) if call.op == "attention" else ()
        if turns:
            del joined[-len(turns) :]
            ins = (*call.ins, *(number for turn in turns for number in turn.outs))
            call = replace(call, run=JOINED["rope", "attention"], attrs=turns[0].attrs, ins=ins)
        joined.append(call)
    return joined


def _turns(calls: Sequence[Call], attention: Call, slots: Sequence[Slot]) -> Sequence[Call]:
    """The last calls, if they are rotary embeddings in place of all of attention's q and k and of nothing else: one call where
    q and k lie side by side, else two."""
    q, k, _ = attention.ins
    side_by_side = Slot(slots[q].storage, slots[q].column, slots[q].width + slots[k].width)
    for count, wanted in ((1, {side_by_side}), (2, {slots[q], slots[k]})):
        turns = calls[-count:]
        in_place = all(turn.op == "rope" and turn.outs == turn.ins and turn.attrs == turns[0].attrs for turn in turns)
        if len(turns) == count and in_place and {slots[turn.outs[0]] for turn in turns} == wanted:
            return turns
    return ()


def _beside(previous: _Step | None, step: _Step, slots: Mapping[str, Slot]) -> Slot | None:
    """The columns of two rotary embeddings in place, one beside the other: they are one operation per head."""
    if previous is None or previous.node.op != "rope" or step.node.op != "rope" or previous.node.attrs != step.node.attrs:
        return None
    first, second = slots[previous.outputs[0]], slots[step.outputs[0]]
    in_place = first == slots[previous.node.inputs[0]] and second == slots[step.node.inputs[0]]
    if not in_place or first.storage != second.storage or first.column + first.width != second.column:
        return None
    return Slot(first.storage, first.column, first.width + second.width)


def _with_recompute(joint: JointGraph, recompute: Sequence[Node]) -> list[Node]:
    """Backward nodes, each recomputation right before its first reader."""
    waiting = {name: node for node in recompute for name in node.outputs}
    result: list[Node] = []

    def bring(name: str) -> None:
        node = waiting.get(name)
        if node is not None:
            for output in node.outputs:
                del waiting[output]
            for value in node.inputs:
                bring(value)
            result.append(node)

    for node in joint.backward:
        for name in node.inputs:
            bring(name)
        result.append(node)
    return result


def _forward_draft(joint: JointGraph, nodes: Iterable[Node], itemsize: int, kept: Iterable[str], *, to_arena: bool) -> Draft:
    """A forward program to be. kept: values that backward reads; to_arena: whether the program itself keeps them there."""
    graph = joint.forward
    source, target = graph.values[graph.input], graph.values[graph.output]
    kept = tuple(kept)
    return Draft(
        values=graph.values, steps=tuple(_Step(node, node.outputs) for node in nodes), itemsize=itemsize,
        given=frozenset({graph.input}), pinned=frozenset({graph.input, graph.output, *kept}),
        outlive=(graph.output, *(() if to_arena else kept)),
        arena=frozenset(kept) - {graph.input} if to_arena else frozenset(),
        storages=(Storage(Place.INPUT, source.width, Element.MODEL), Storage(Place.OUTPUT, target.width, Element.MODEL)),
        slots={graph.input: Slot(0, 0, source.width), graph.output: Slot(1, 0, target.width)},
    )


def lower(choice: Rematerialized, *, merged: Mapping[str, tuple[str, ...]], itemsize: int) -> LayerPlan:
    """Programs for one layer. If nothing is kept it is a plan for inference: K and V go where the batch says."""
    joint, graph = choice.joint, choice.joint.forward
    kept = tuple(k.name for k in choice.kept)
    nodes = (node for node in graph.nodes if not node.row.packs or node.outputs[0] in kept)
    draft = _decide(_forward_draft(joint, nodes, itemsize, kept, to_arena=True), merged)
    keeps_input = graph.input in kept
    kept_slots = {name: draft.slots[name] for name in kept}
    attention = next((n for n in graph.nodes if n.op == "attention"), None)
    keys, values = (kept_slots.get(name) for name in (attention.inputs[1:3] if attention else ("", "")))
    backward = _lower_backward(choice, draft, merged) if joint.backward else None
    return LayerPlan(
        joint=joint, forward=_emit(draft), backward=backward, kept=choice.kept, arena=draft.storages,
        arena_bytes=draft.arena_bytes + (_align(graph.values[graph.input].num_bytes(itemsize)) if keeps_input else 0),
        keys=keys, values=values, keeps_input=keeps_input, input_offset=draft.arena_bytes,
        kept_slots={name: slot for name, slot in kept_slots.items() if name != graph.input}, recompute=choice.recompute,
    )


def lower_fused(
    joint: JointGraph, own: LayerPlan, *, merged: Mapping[str, tuple[str, ...]], itemsize: int
) -> FusedLayer:
    """A forward program for rows of requests and of training together, of which the training rows are kept as `own` keeps them.

    All values lie in the workspace, over all rows; after the program, the training rows of the kept ones are copied to the
    arena, or packed into it. `joint` may have more bypass sites than `own`, those of requests' adapters.
    """
    names, kept = counterparts(own.joint.forward, joint.forward), own.kept_slots
    packing = [node for node in own.joint.forward.nodes if node.row.packs and node.outputs[0] in kept]
    packed = {name for node in packing for name in node.outputs}
    values = {names[name] for name in kept.keys() - packed} | {names[node.inputs[0]] for node in packing}
    draft = _decide(_forward_draft(joint, joint.forward.nodes, itemsize, values, to_arena=False), merged)
    whole = {own.keys, own.values}
    own_values = own.joint.forward.values

    def keep(name: str, targets: Iterable[str], pack: Runner | None) -> Keep:
        return Keep(draft.slots[names[name]], own_values[name].width, tuple(kept[target] for target in targets), pack)

    copies = [keep(name, (name,), None) for name, slot in kept.items() if name not in packed and slot not in whole]
    packs = [keep(node.inputs[0], node.outputs, RUNNERS[node.op]) for node in packing]
    return FusedLayer(program=_emit(draft), keeps=(*copies, *packs))


def _lower_backward(choice: Rematerialized, forward: Draft, merged: Mapping[str, tuple[str, ...]]) -> Program:
    """The backward program that finds in `forward`'s storages what that keeps."""
    joint = choice.joint
    kept = {k.name: forward.slots[k.name] for k in choice.kept}
    gradient = Slot(len(forward.storages), 0, joint.values[joint.output_grad].width)
    nodes = _with_recompute(joint, choice.recompute)
    draft = _decide(Draft(
        values=joint.values, steps=tuple(_Step(node, node.outputs) for node in nodes), itemsize=forward.itemsize,
        given=frozenset({*kept, joint.output_grad}), pinned=frozenset(kept),
        outlive=() if joint.input_grad is None else (joint.input_grad,),
        storages=(*forward.storages, Storage(Place.GRAD, gradient.width, Element.MODEL)),
        slots={**kept, joint.output_grad: gradient},
    ), merged)
    if joint.input_grad is not None and draft.slots[joint.input_grad] != gradient:
        raise NotImplementedError("the layer's input gradient must end where its output gradient began")
    return _emit(draft)
