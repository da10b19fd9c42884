"""Pass 6: from a pruned graph to flat programs: aliasing, merged products, and one offset per storage.

    values  --alias-->  classes (values that share memory)  --merge-->  storages  --place-->  offsets

An `add` right after the accumulating kernel that makes its second operand becomes that kernel adding into the first operand's
memory; in-place operators reuse their input's. Frozen linears of one input in one matrix become one product whose
outputs are column slices of one storage. Workspace offsets come from live ranges; kept values lie in the arena.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coserve.compiler.graph import Element, JointGraph, Node, Value, counterparts, producers
from coserve.compiler.program import Call, FusedLayer, Keep, LayerPlan, Place, Program, Slot, Storage
from coserve.compiler.rematerialize import Rematerialized
from coserve.ops.run import RUNNERS, Runner

_ALIGN = 16
_FOREVER = 1 << 30


@dataclass(slots=True)
class _Step:
    """A node to be emitted; accumulate: it adds into `outputs[0]`, whose old content is the value `base`."""

    node: Node
    outputs: tuple[str, ...]
    base: str | None = None


@dataclass(slots=True)
class _Memory:
    """Alias classes of values and where each lives."""

    values: Mapping[str, Value]
    fixed: dict[str, Slot]
    """Values whose slot is given from outside."""
    storages: list[Storage]
    immutable: set[str]
    parent: dict[str, str] = field(default_factory=dict)
    last_use: dict[str, int] = field(default_factory=dict)

    def root(self, name: str) -> str:
        while name in self.parent:
            name = self.parent[name]
        return name

    def members(self, root: str) -> list[str]:
        return [name for name in self.values if self.root(name) == root]

    def free_after(self, name: str, index: int) -> bool:
        """Whether the memory of `name` may be overwritten by step `index`."""
        members = self.members(self.root(name))
        return all(m not in self.immutable and self.last_use.get(m, -1) <= index for m in members)


def _fuse_adds(nodes: Sequence[Node], memory: _Memory) -> list[_Step]:
    """Turns nodes into steps; decides which outputs take over which memory."""
    make = producers(nodes)
    uses: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
            memory.last_use[name] = max(memory.last_use.get(name, -1), index)
    absorbed: set[str] = set()
    plan: list[_Step] = []
    for index, node in enumerate(nodes):
        if node.op == "add":
            first, second = node.inputs
            source = make.get(second)
            fusable = (
                source is nodes[index - 1] and source.row.accumulates and uses[second] == 1
                and second not in memory.immutable and memory.free_after(first, index)
                and (source.row.inplace or memory.root(first) not in {memory.root(name) for name in source.inputs})
                and node.outputs[0] not in memory.fixed
            )
            if fusable and source is not None:
                absorbed.add(second)
                memory.parent[node.outputs[0]] = memory.root(first)
                plan.append(_Step(source, node.outputs, base=first))
                continue
        if (
            node.row.inplace and memory.free_after(node.inputs[0], index)
            and node.outputs[0] not in memory.fixed
        ):
            memory.parent[node.outputs[0]] = memory.root(node.inputs[0])
        plan.append(_Step(node, node.outputs))
    return [step for step in plan if step.base is not None or not absorbed & set(step.outputs)]


def _merge(steps: list[_Step], merged: Mapping[str, tuple[str, ...]], same_place: Mapping[str, bool]) -> list[_Step]:
    """One step for frozen linears of one input that lie in one matrix, if all their outputs go to the same place."""
    result = list(steps)
    for name, sites in merged.items():
        group = [s for s in result if s.node.op == "linear" and s.node.weight in sites and s.base is None]
        if len(group) != len(sites) or len({s.node.inputs for s in group}) != 1:
            continue
        if len({same_place[s.outputs[0]] for s in group}) != 1:
            continue
        first = result.index(group[0])
        outputs = tuple(s.outputs[0] for s in sorted(group, key=lambda s: sites.index(s.node.weight or "")))
        result[first] = _Step(Node("linear", group[0].node.inputs, outputs, name), outputs)
        for step in group[1:]:
            result.remove(step)
    return result


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
    """Storages being assigned: which place, which columns, and how long each workspace storage lives."""

    def __init__(self, memory: _Memory, arena: set[str], itemsize: int) -> None:
        self.memory, self.arena, self.itemsize = memory, arena, itemsize
        self.slots: dict[str, Slot] = dict(memory.fixed)
        self.arena_bytes = 0
        self.spans: dict[int, tuple[int, int, int]] = {}

    def give(self, roots: Sequence[str]) -> None:
        """One storage for classes that lie side by side."""
        storages = self.memory.storages
        values = [self.memory.values[root] for root in roots]
        width = sum(value.width for value in values)
        kept = roots[0] in self.arena
        storage = Storage(Place.ARENA if kept else Place.WORK, width, values[0].element, self.arena_bytes if kept else 0)
        storages.append(storage)
        if kept:
            self.arena_bytes += _size(storage, self.itemsize)
        column = 0
        for root, value in zip(roots, values, strict=True):
            self.slots[root] = Slot(len(storages) - 1, column, value.width)
            column += value.width

    def touch(self, name: str, index: int) -> None:
        """Step `index` uses `name`: its workspace storage lives at least until then."""
        slot = self.slots.get(self.memory.root(name))
        if slot is None or self.memory.storages[slot.storage].place is not Place.WORK:
            return
        first = self.spans[slot.storage][0] if slot.storage in self.spans else index
        self.spans[slot.storage] = (first, index, _size(self.memory.storages[slot.storage], self.itemsize))


def _assemble(
    steps: list[_Step], memory: _Memory, arena: set[str], itemsize: int, outlive: Sequence[str] = ()
) -> tuple[Program, dict[str, Slot], int]:
    """Gives every class a storage and every step its slots. Returns the program, all slots by value, arena bytes.

    outlive: values that someone reads after the last step.
    """
    homes = _Homes(memory, arena, itemsize)
    packed = [root for root in arena if memory.values[root].element is Element.BYTE]
    if packed:  # side by side, as one would be padded; wide ones first, so that they begin on even columns
        homes.give(sorted(packed, key=lambda root: (-memory.values[root].width, root)))
    for index, step in enumerate(steps):
        roots = [root for name in step.outputs if (root := memory.root(name)) not in homes.slots and root[:3] != "dW:"]
        for together in [roots] if step.node.op == "linear" and roots else [[root] for root in roots]:
            homes.give(together)
        for name in (*step.outputs, *step.node.inputs):
            homes.touch(name, index)
    for name in outlive:
        homes.touch(name, len(steps))
    offsets, work_bytes = _place_work(homes.spans)
    for number, offset in offsets.items():
        memory.storages[number] = replace(memory.storages[number], offset=offset)
    slots = {name: homes.slots[root] for name in memory.values if (root := memory.root(name)) in homes.slots}
    return _emit(steps, slots, memory.storages, work_bytes), slots, homes.arena_bytes


def _emit(steps: list[_Step], slots: Mapping[str, Slot], storages: list[Storage], work_bytes: int) -> Program:
    numbers: dict[Slot, int] = {}

    def number(slot: Slot) -> int:
        return numbers.setdefault(slot, len(numbers))

    calls: list[Call] = []
    previous: _Step | None = None
    for step in steps:
        node = step.node
        outs: tuple[int, ...]
        beside = _beside(previous, step, slots)
        previous = step
        if beside is not None:
            both = (number(beside),)
            calls[-1] = replace(calls[-1], outs=both, ins=both)
            continue
        if node.op == "linear" and len(step.outputs) > 1:
            parts = [slots[name] for name in step.outputs]
            outs = (number(Slot(parts[0].storage, 0, sum(p.width for p in parts))),)
        else:
            outs = tuple(number(slots[name]) for name in step.outputs if not name.startswith("dW:"))
        ins = tuple(number(slots[name]) for name in node.inputs)
        calls.append(Call(RUNNERS[node.op], node.op, node.weight, node.attrs, step.base is not None, outs, ins))
    return Program(tuple(calls), tuple(numbers), tuple(storages), work_bytes)


def _beside(previous: _Step | None, step: _Step, slots: Mapping[str, Slot]) -> Slot | None:
    """The columns of two rotary embeddings in place, one beside the other: they are one operation per head."""
    if previous is None or previous.node.op != "rope" or step.node.op != "rope":
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


def lower(
    joint: JointGraph, remat: Rematerialized | None, *, merged: Mapping[str, tuple[str, ...]], itemsize: int
) -> LayerPlan:
    """Programs for one layer. `remat` None makes an inference plan: nothing is kept, K and V go where the batch says."""
    graph = joint.forward
    kept = tuple(k.name for k in remat.kept) if remat is not None else ()
    nodes = [node for node in graph.nodes if not node.row.packs or node.outputs[0] in kept]
    keeps_input = graph.input in kept
    storages = [Storage(Place.INPUT, graph.values[graph.input].width, Element.MODEL),
                Storage(Place.OUTPUT, graph.values[graph.output].width, Element.MODEL)]
    ends = {graph.input: Slot(0, 0, storages[0].width), graph.output: Slot(1, 0, storages[1].width)}
    memory = _Memory(graph.values, dict(ends), storages, {graph.input, graph.output, *kept})
    steps = _fuse_adds(nodes, memory)
    arena = {memory.root(name) for name in kept if name != graph.input}
    places = {name: memory.root(name) in arena for name in graph.values}
    steps = _merge(steps, merged, places)
    forward, slots, arena_bytes = _assemble(steps, memory, arena, itemsize)
    input_offset = arena_bytes
    if keeps_input:
        arena_bytes += _align(graph.values[graph.input].num_bytes(itemsize))
    attention = next((n for n in graph.nodes if n.op == "attention"), None)
    keys, values = (slots[n] if remat and attention else None for n in (attention.inputs[1:3] if attention else ("", "")))
    backward = None
    if remat is not None and joint.backward:
        backward = _lower_backward(joint, remat, {name: slots[name] for name in kept}, list(storages), merged, itemsize)
    return LayerPlan(
        joint=joint, forward=forward, backward=backward, kept=remat.kept if remat else (), arena=tuple(storages),
        arena_bytes=arena_bytes, keys=keys, values=values, keeps_input=keeps_input,
        input_offset=input_offset, kept_slots={name: slots[name] for name in kept if name != graph.input},
        recompute=remat.recompute if remat else (),
    )


def lower_fused(
    joint: JointGraph, own: LayerPlan, *, merged: Mapping[str, tuple[str, ...]], itemsize: int
) -> FusedLayer:
    """A forward program for rows of requests and of training together, of which the training rows are kept as `own` keeps them.

    All values lie in the workspace, over all rows; after the program, the training rows of the kept ones are copied to the
    arena, or packed into it. `joint` may have more bypass sites than `own`, those of requests' adapters.
    """
    graph = joint.forward
    storages = [Storage(Place.INPUT, graph.values[graph.input].width, Element.MODEL),
                Storage(Place.OUTPUT, graph.values[graph.output].width, Element.MODEL)]
    ends = {graph.input: Slot(0, 0, storages[0].width), graph.output: Slot(1, 0, storages[1].width)}
    names, kept = counterparts(own.joint.forward, graph), own.kept_slots
    packing = [node for node in own.joint.forward.nodes if node.row.packs and node.outputs[0] in kept]
    packed = {name for node in packing for name in node.outputs}
    values = {names[name] for name in kept.keys() - packed} | {names[node.inputs[0]] for node in packing}
    memory = _Memory(graph.values, dict(ends), storages, {graph.input, graph.output, *values})
    steps = _merge(_fuse_adds(graph.nodes, memory), merged, dict.fromkeys(graph.values, False))
    program, slots, _ = _assemble(steps, memory, set(), itemsize, outlive=tuple(values))
    whole = {own.keys, own.values}
    own_values = own.joint.forward.values

    def keep(name: str, targets: Iterable[str], pack: Runner | None) -> Keep:
        return Keep(slots[names[name]], own_values[name].width, tuple(kept[target] for target in targets), pack)

    copies = [keep(name, (name,), None) for name, slot in kept.items() if name not in packed and slot not in whole]
    packs = [keep(node.inputs[0], node.outputs, RUNNERS[node.op]) for node in packing]
    return FusedLayer(program=program, keeps=(*copies, *packs))


def _lower_backward(
    joint: JointGraph, remat: Rematerialized, kept: Mapping[str, Slot], storages: list[Storage],
    merged: Mapping[str, tuple[str, ...]], itemsize: int,
) -> Program:
    gradient = Slot(len(storages), 0, joint.values[joint.output_grad].width)
    storages.append(Storage(Place.GRAD, gradient.width, Element.MODEL))
    memory = _Memory(joint.values, {**kept, joint.output_grad: gradient}, storages, set(kept))
    nodes = _with_recompute(joint, remat.recompute)
    if joint.input_grad is not None:
        memory.last_use[joint.input_grad] = _FOREVER
    steps = _merge(_fuse_adds(nodes, memory), merged, dict.fromkeys(joint.values, False))
    program, slots, _ = _assemble(steps, memory, set(), itemsize)
    if joint.input_grad is not None and slots[joint.input_grad] != gradient:
        raise NotImplementedError("the layer's input gradient must end where its output gradient began")
    return program
