"""A plan in numbers, for people: what is kept per token and why; and how several ranks share it, what they send and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coserve.compiler.graph import producers
from coserve.compiler.parallelize import ShardingCandidate, TensorParallel, step_bytes
from coserve.compiler.plan import LayerBypass, ModelPlan
from coserve.compiler.program import LayerPlan
from coserve.model.architecture import Architecture
from coserve.ops.table import TABLE, Cost
from coserve.parallel import Sharding


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
    products = tuple(name for call in again if TABLE[call.op].cost is not Cost.ELEMENTWISE for name in call.factors)
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


# --- several ranks ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One collective of a layer that sends something. num_bytes: that each rank sends per token. seconds: of a window."""

    direction: str
    op: str
    value: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTransfers:
    """What layers with one plan send, in order."""

    layers: tuple[int, ...]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLayers:
    """Layers that ranks share alike. shardings: of the bypass's parameters. candidates: by site, the chosen one first."""

    layers: tuple[int, ...]
    shardings: Mapping[str, Sharding]
    candidates: Mapping[str, tuple[ShardingCandidate, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksReport:
    """How a group of `size` ranks shares a model and an adapter. What each rank has: num_parameters, elements of the adapter.
    What it sends, in bytes: embedding_bytes per token and pass, label_bytes per label of training, and step_bytes per optimizer
    step for gradients, in float32."""

    size: int
    layers: tuple[SharedLayers, ...]
    transfers: tuple[LayerTransfers, ...]
    num_parameters: int
    embedding_bytes: int
    label_bytes: int
    step_bytes: int


def ranks_report(
    ranks: TensorParallel, arch: Architecture, bypasses: Sequence[LayerBypass], plan: ModelPlan,
    elements: Mapping[tuple[int, str], int],
) -> RanksReport:
    """Of a group whose adapter is fixed (`TensorParallel.fix`). bypasses: without dropout, as it was fixed. elements: {(layer,
    parameter): elements of the whole parameter}."""
    held = {key: count // ranks.fixed[key].parts for key, count in elements.items()}
    return RanksReport(
        size=ranks.size, layers=_shared_layers(ranks, arch, bypasses), transfers=_layer_transfers(ranks, plan),
        num_parameters=sum(held.values()), embedding_bytes=_embedding_bytes(ranks, arch), label_bytes=_label_bytes(ranks, arch),
        step_bytes=sum(step_bytes(ranks.fixed[key], count, ranks.size) for key, count in held.items()),
    )


def _shared_layers(ranks: TensorParallel, arch: Architecture, bypasses: Sequence[LayerBypass]) -> tuple[SharedLayers, ...]:
    groups: dict[object, list[int]] = {}
    for index, bypass in enumerate(bypasses):
        groups.setdefault(bypass.key, []).append(index)
    found = []
    for layers in groups.values():
        graph = bypasses[layers[0]].trace(arch, layers[0]).forward
        chosen = {name: sharding for (layer, name), sharding in ranks.fixed.items() if layer == layers[0]}
        sites = dict.fromkeys(node.site for node in graph.nodes if node.site is not None)
        candidates = {site: _chosen_first(ranks.candidates(graph, site), chosen) for site in sites}
        found.append(SharedLayers(layers=tuple(layers), shardings=chosen, candidates=candidates))
    return tuple(found)


def _embedding_bytes(ranks: TensorParallel, arch: Architecture) -> int:
    """Bytes per token that each rank sends to look up embeddings, of which each rank has some tokens' rows."""
    return ranks.bytes_per_token(2, arch.hidden_size)


def _label_bytes(ranks: TensorParallel, arch: Architecture) -> int:
    """Bytes per label that each rank sends for the loss: three numbers in float32 or wider, and the label's gradient row."""
    wide = max(4, ranks.prices.itemsize)
    return 2 * (ranks.size - 1) * 3 * wide // ranks.size + ranks.bytes_per_token(2, arch.hidden_size)


def _layer_transfers(ranks: TensorParallel, plan: ModelPlan) -> tuple[LayerTransfers, ...]:
    """What the layers of a plan send, one entry per distinct layer plan."""
    groups: dict[int, list[int]] = {}
    for index, layer in enumerate(plan.layers):
        groups.setdefault(id(layer), []).append(index)
    return tuple(
        LayerTransfers(layers=tuple(layers), transfers=tuple(_transfers(ranks, plan.layers[layers[0]])))
        for layers in groups.values()
    )


def _chosen_first(candidates: Sequence[ShardingCandidate], chosen: Mapping[str, Sharding]) -> tuple[ShardingCandidate, ...]:
    def rejected(candidate: ShardingCandidate) -> bool:
        return any(chosen[name].axis != axis for name, axis in candidate.axes.items())

    return tuple(sorted(candidates, key=rejected))


def _transfers(ranks: TensorParallel, plan: LayerPlan) -> Iterator[Transfer]:
    joint = plan.joint
    for direction, nodes in (("forward", joint.forward.nodes), ("backward", joint.backward)):
        for node in nodes:
            if node.row.moves:
                width = max(joint.values[name].width for name in (*node.inputs, *node.outputs))
                yield Transfer(
                    direction=direction, op=node.op, value=node.inputs[0],
                    num_bytes=ranks.bytes_per_token(node.row.moves, width),
                    seconds=ranks.prices.transfer_s(ranks.size, node.row.moves, width),
                )
