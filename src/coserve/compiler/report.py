"""A plan in numbers, for people: what is kept per token and why."""

from __future__ import annotations

from dataclasses import dataclass

from coserve.compiler.graph import producers
from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import LayerPlan
from coserve.ops.table import TABLE, Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptValue:
    """One kept value of a layer: elements and bytes per token (in fp8 with its exponent), and why it is kept."""

    name: str
    width: int
    num_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Layers with one plan. bytes are per token and layer; `all_bytes` is what keeping every forward value would take,
    `read_bytes` what backward reads before anything is recomputed, `arena_bytes` what is kept. recomputed: what backward
    reads and forward doesn't keep; products: the matrix products that run again for it."""

    layers: tuple[int, ...]
    kept: tuple[KeptValue, ...]
    recomputed: tuple[str, ...]
    products: tuple[str, ...]
    all_bytes: int
    read_bytes: int
    arena_bytes: int


def _describe(plan: LayerPlan, layers: tuple[int, ...], itemsize: int) -> LayerReport:
    graph = plan.joint.forward
    size = {name: value.num_bytes(itemsize) for name, value in graph.values.items()}
    packed = {node.outputs[0]: node.outputs for node in graph.nodes if node.row.packs}
    beside = {name for outputs in packed.values() for name in outputs[1:]}
    kept = tuple(
        KeptValue(
            name=k.name, width=graph.values[k.name].width, reason=k.reason,
            num_bytes=sum(size[name] for name in packed.get(k.name, (k.name,))),
        )
        for k in plan.kept if k.name not in beside
    )
    make = producers(node for node in plan.recompute if node.inputs[0] not in packed)
    recomputed = tuple(f"{name} by {make[name].op}" for name in plan.joint.saved() if name in make)
    again = (call for call in (plan.backward.calls if plan.backward else ()) if TABLE[call.op].gradients)
    products = tuple(call.weight or call.op for call in again if TABLE[call.op].cost is not Cost.ELEMENTWISE)
    return LayerReport(
        layers=layers, kept=kept, recomputed=recomputed, products=products,
        all_bytes=sum(size[name] for node in graph.nodes for name in node.outputs if not node.row.packs) + size[graph.input],
        read_bytes=sum(size[name] for name in plan.joint.saved()), arena_bytes=plan.arena_bytes,
    )


def report(plan: ModelPlan, *, itemsize: int) -> tuple[LayerReport, ...]:
    """One entry per distinct layer plan, in order of its first layer."""
    groups: dict[int, list[int]] = {}
    for index, layer in enumerate(plan.layers):
        groups.setdefault(id(layer), []).append(index)
    return tuple(_describe(plan.layers[layers[0]], tuple(layers), itemsize) for layers in groups.values())
