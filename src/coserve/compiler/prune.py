"""Pass 3: drop gradients that nobody wants; pass 4: recompute element-wise values instead of keeping them.

What survives pruning is what a frozen backbone leaves: no gradients of frozen weights, nothing that only they read, and no
backward work below the lowest adapter. Source: FlexLLM, graph pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coserve.compiler.graph import JointGraph, Node, producers
from coserve.ops.table import Cost


def prune(joint: JointGraph, *, trainable: Callable[[str], bool], input_gradient: bool) -> JointGraph:
    """Keeps the backward nodes that a trainable parameter's gradient, or the layer's input gradient, needs."""
    weight_grads = {weight: grad for weight, grad in joint.weight_grads.items() if trainable(weight)}
    needed = set(weight_grads.values())
    if input_gradient and joint.input_grad is not None:
        needed.add(joint.input_grad)
    kept: list[Node] = []
    for node in reversed(joint.backward):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return replace(
        joint, backward=tuple(reversed(kept)), weight_grads=weight_grads,
        input_grad=joint.input_grad if input_gradient else None,
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """One value that forward stores, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rematerialized:
    """kept: stored by forward, in forward order. recompute: forward nodes that backward runs again, in order."""

    kept: tuple[Kept, ...]
    recompute: tuple[Node, ...]


def rematerialize(joint: JointGraph, itemsize: int = 4) -> Rematerialized:
    """Replaces a saved value by its element-wise recomputation wherever that needs fewer bytes kept.

    A value that is read for other tokens than the window's (K and V) always stays: recomputing it would be a layer prologue,
    not window-local. Latest values are decided first.
    """
    make = producers(joint.forward.nodes)
    whole = joint.read_whole()
    kept = set(joint.saved())
    recompute: set[str] = set()

    def size(names: set[str]) -> int:
        return sum(joint.values[name].num_bytes(itemsize) for name in names)

    def sources(name: str) -> tuple[set[str], set[str]] | None:
        """(values that must be kept in addition, values recomputed on the way) to remake `name` element-wise."""
        node = make.get(name)
        if node is None or node.row.cost is not Cost.ELEMENTWISE or name in whole:
            return None
        extra: set[str] = set()
        remade = {name}
        for value in node.inputs:
            if value in kept:
                continue
            deeper = sources(value)
            if deeper is not None and size(deeper[0] - kept) <= size({value}):
                extra |= deeper[0]
                remade |= deeper[1]
            else:
                extra.add(value)
        return extra - kept, remade

    for name in reversed(list(joint.forward.values)):
        if name not in kept:
            continue
        kept.remove(name)
        found = sources(name)
        if found is not None and size(found[0]) < size({name}):
            kept |= found[0]
            recompute |= found[1] - kept
        else:
            kept.add(name)
    readers = {value: node for node in reversed(joint.backward) for value in node.inputs}
    order = [name for name in joint.forward.values if name in kept or name in whole]
    nodes = tuple(n for n in joint.forward.nodes if recompute.intersection(n.outputs))
    reasons = {value: f"to recompute {n.outputs[0]}" for n in nodes for value in n.inputs}
    reasons |= {value: f"read by {node.op}" + (f" of {node.weight}" if node.weight else "") for value, node in readers.items()}
    return Rematerialized(
        kept=tuple(Kept(name, reasons.get(name, "read by later windows' forward attention")) for name in order),
        recompute=nodes,
    )
