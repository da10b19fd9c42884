"""Lowering: from a pruned graph to flat programs of calls, in which every value has its place in memory.

Passes work on the draft of a program (`compiler/draft.py`):

    share_memory     an in-place operator writes over its input           q' = rope(q)          q' lies where q lay
    fuse_adds        a product and the sum it goes into are one step      b = B(x); c = a + b   a += B(x); c lies where a lay
    merge_linears    frozen linears of one input are one product          q, k, v = qkv_proj(x), side by side
    merge_dgrads     and so are their gradients towards that input       (`compiler/merge.py`)
    gather_factors   adapters' products of one input stand together      (`compiler/factors.py`)
    join_sums        a sum and the norm behind it are one step           h = a + b; n = rmsnorm(h)
    place            every value gets a storage and an offset: kept ones in the arena, others in the workspace by live ranges

Then the calls are written down. Rotary embeddings in place become one call with the attention beside them
(`compiler/turns.py`). Joined calls (`ops.run.JOINED`) compute what their operators compute one after the other; a device may
have one kernel for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from coserve.compiler.draft import Draft, DraftStep, align, row_bytes
from coserve.compiler.factors import gather_factors, join_factors
from coserve.compiler.graph import Element, JointGraph, Node, counterparts
from coserve.compiler.merge import merge_dgrads, merge_linears
from coserve.compiler.passes import run_passes
from coserve.compiler.program import Call, FusedLayer, Keep, LayerPlan, Place, Program, Slot, Storage
from coserve.compiler.rematerialize import Rematerialized
from coserve.compiler.turns import beside, join_turns
from coserve.ops.run import JOINED, RUNNERS, Runner


def share_memory(draft: Draft) -> Draft:
    """Lets an in-place operator write over its first input if nothing reads that memory afterwards.

    If its output's place is given, as the layer's is, that place is its input's too in programs that keep nothing for backward.
    Where some plans could do so and others not, their bits would differ.
    """
    last_read = {name: index for index, step in enumerate(draft.steps) for name in step.node.inputs}
    last_read |= dict.fromkeys((*draft.outlive, *draft.pinned), len(draft.steps))
    roots: dict[str, str] = {}
    last_in_class: dict[str, int] = {}
    fixed, keeps = {*draft.slots, *draft.pinned, *draft.outlive, *draft.arena}, bool(draft.arena) or len(draft.outlive) > 1
    for index, step in enumerate(draft.steps):
        node = step.node
        if not node.row.inplace:
            continue
        (out, *_), (source, *_) = node.outputs, node.inputs
        root = roots.get(source, source)
        last = last_in_class.get(root, last_read.get(root, -1))
        if last <= index and out in draft.slots:
            alike = {name for name in draft.values if roots.get(name, name) == root}
            if not keeps and not fixed & alike and replace(draft.values[out], name=root) == draft.values[root]:
                roots |= dict.fromkeys(alike, out)
        elif last <= index:
            roots[out] = root
            last_in_class[root] = max(last, last_read.get(out, -1))
    return replace(draft, roots=roots)


def fuse_adds(draft: Draft) -> Draft:
    """Makes one step of `b = kernel(x); c = a + b` where the kernel can add into memory and c takes over a's."""
    uses = Counter(name for step in draft.steps for name in step.node.inputs)
    steps: list[DraftStep] = []
    for step in draft.steps:
        if step.node.op == "add" and steps and draft.root(step.outputs[0]) == draft.root(step.node.inputs[0]):
            (base, added), source = step.node.inputs, steps[-1].node
            inputs = {draft.root(name) for name in source.inputs}
            if (
                added in source.outputs and source.row.accumulates and uses[added] == 1 and added not in draft.pinned
                and (source.row.inplace or draft.root(base) not in inputs)
            ):
                steps[-1] = DraftStep(source, step.outputs, base)
                continue
        steps.append(step)
    return replace(draft, steps=tuple(steps))


def join_sums(draft: Draft) -> Draft:
    """Makes one step of a sum and the norm of it that follows. What the sum reads is then still there when the norm is written,
    but for a second term that nothing reads any more: the norm's rows take exactly the place of its rows."""
    steps: list[DraftStep] = []
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
            steps[-1] = DraftStep(step.node, (total, out), first=last.node)
        else:
            steps.append(step)
    return replace(draft, steps=tuple(steps), roots=roots)


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
            self.arena_bytes += row_bytes(storage, self.draft.itemsize)
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
        self.spans[slot.storage] = (first, index, row_bytes(self.storages[slot.storage], self.draft.itemsize))


def place(draft: Draft) -> Draft:
    """Gives every value a slot: kept ones in the arena, all others in the workspace, at offsets found from live ranges."""
    homes = _Homes(draft)
    packed = [root for root in homes.kept if draft.values[root].element is Element.BYTE]
    if packed:  # side by side, as one would be padded; wide ones first, so that they begin on even columns
        homes.give(sorted(packed, key=lambda root: (-draft.values[root].width, root)))
    groups = {root: roots for group in draft.beside for roots in [[*map(draft.root, group)]] for root in roots}
    for index, step in enumerate(draft.steps):
        roots = [root for name in step.outputs if (root := draft.root(name)) not in homes.slots and root[:3] != "dW:"]
        for together in [roots] if step.node.op == "linear" and roots else [groups.get(root, [root]) for root in roots]:
            if together[0] not in homes.slots:
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
    merges = partial(merge_linears, merged), partial(merge_dgrads, merged)
    return run_passes(draft, share_memory, fuse_adds, *merges, _gather_factors, join_sums, place)


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
        columns = beside(previous, step, slots)
        if columns is not None:
            both = (number(columns),)
            calls[-1] = replace(calls[-1], outs=both, ins=both)
            continue
        outs: tuple[int, ...]
        if node.op == "linear" and len(step.outputs) > 1:
            parts = [slots[name] for name in step.outputs]
            outs = (number(Slot(parts[0].storage, 0, sum(p.width for p in parts))),)
        else:
            outs = tuple(number(slots[name]) for name in step.outputs if not name.startswith("dW:"))
        ins = tuple(number(slots[name]) for name in step.inputs)
        if node.op == "linear_dgrad" and len(ins) > 1:
            parts = [slots[name] for name in step.inputs]
            ins = (number(Slot(parts[0].storage, 0, sum(p.width for p in parts))),)
        run = RUNNERS[node.op] if step.first is None else JOINED[step.first.op, node.op]
        calls.append(Call(run, node.op, node.weight, node.attrs, step.base is not None, outs, ins))
    order = tuple(numbers)
    calls = join_factors(join_turns(calls, order), order)
    return Program(tuple(calls), order, draft.storages, draft.work_bytes)


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
        values=graph.values, steps=tuple(DraftStep(node, node.outputs) for node in nodes), itemsize=itemsize,
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
        arena_bytes=draft.arena_bytes + (align(graph.values[graph.input].num_bytes(itemsize)) if keeps_input else 0),
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
        values=joint.values, steps=tuple(DraftStep(node, node.outputs) for node in nodes), itemsize=forward.itemsize,
        given=frozenset({*kept, joint.output_grad}), pinned=frozenset(kept),
        outlive=() if joint.input_grad is None else (joint.input_grad,),
        storages=(*forward.storages, Storage(Place.GRAD, gradient.width, Element.MODEL)),
        slots={**kept, joint.output_grad: gradient},
    ), merged)
    if joint.input_grad is not None and draft.slots[joint.input_grad] != gradient:
        raise NotImplementedError("the layer's input gradient must end where its output gradient began")
    return _emit(draft)
