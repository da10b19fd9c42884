"""The compiler's driver: all passes for every layer of a model, and what the result keeps, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

from coserve.compiler.compress import pack_signs, to_fp8
from coserve.compiler.differentiate import differentiate
from coserve.compiler.flops import SEQUENCE_LENGTH, layer_flops, mean_context
from coserve.compiler.graph import JointGraph
from coserve.compiler.lower import lower, lower_fused
from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.passes import run_passes
from coserve.compiler.program import FusedLayer, LayerPlan
from coserve.compiler.prune import prune
from coserve.compiler.rematerialize import Rematerialized, curve, rematerialize
from coserve.compiler.trace import trace
from coserve.config.settings import Compression
from coserve.core import ConfigError
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, Bypass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBypass:
    """What one layer trains or serves. factor_widths: {factor: out features} of the bypass's parameters. Layers with equal
    `key` share a plan."""

    key: tuple[object, ...]
    bypass: Bypass
    factor_widths: Mapping[str, int]

    def trace(self, arch: Architecture, layer: int) -> JointGraph:
        """The graph of layer number `layer`, before it is differentiated."""
        return JointGraph.of(trace(arch, self.bypass, self.factor_widths, rotary=layer not in arch.nope_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One plan per layer. Bytes are per token (arena) and per window row (work); FLOPs are matrix FLOPs per token, without the
    loss head."""

    layers: tuple[LayerPlan, ...]

    @property
    def arena_bytes(self) -> int:
        """Bytes kept per token, all layers."""
        return sum(layer.arena_bytes for layer in self.layers)

    @property
    def work_bytes(self) -> int:
        """Workspace bytes per row: the largest of any layer and direction."""
        programs = [p for layer in self.layers for p in (layer.forward, layer.backward) if p is not None]
        return max(program.work_bytes for program in programs)

    @property
    def forward_flops(self) -> int:
        """FLOPs of forward, adapters included."""
        return sum(layer.flops.forward for layer in self.layers)

    @property
    def trained_forward_flops(self) -> int:
        """FLOPs of forward in the layers that have a backward program."""
        return sum(layer.flops.forward for layer in self.layers if layer.backward is not None)

    @property
    def backward_flops(self) -> int:
        """FLOPs of backward, without the forward products that it runs again."""
        return sum(layer.flops.backward for layer in self.layers)

    @property
    def recompute_flops(self) -> int:
        """FLOPs of the forward products that backward runs again."""
        return sum(layer.flops.recompute for layer in self.layers)

    @property
    def extra_flops_ratio(self) -> float:
        """recompute_flops as a share of forward and backward."""
        return self.recompute_flops / max(1, self.forward_flops + self.backward_flops)

    @property
    def lowest_trained(self) -> int:
        """The lowest layer with a backward program: backward ends there. The number of layers if nothing trains."""
        return next((i for i, layer in enumerate(self.layers) if layer.backward is not None), len(self.layers))


class Point(NamedTuple):
    """A budget that can be met: the bytes kept per token over all layers, and the `extra_flops_ratio` that it costs."""

    arena_bytes: int
    extra_flops_ratio: float


class TrainingPlans:
    """Forward and backward programs of every layer. A layer's input gradient exists only above the lowest bypass.

    Layers that are alike share a key, a graph and its choices, which are made when asked for.

    forward_only: trains nothing; what is kept is K and V, which later windows read. sequence_length: of a typical example,
    which sets attention's FLOPs. compression: of what is kept, as FinetuneConfig.activation_compression. ranks: the group that
    shares the model. Programs, bytes and FLOPs are then those of each rank. Raises ConfigError for shardings that can't be had.
    """

    def __init__(
        self, arch: Architecture, bypasses: Sequence[LayerBypass], *, itemsize: int, forward_only: bool = False,
        sequence_length: int = SEQUENCE_LENGTH, compression: Compression = "lossless", ranks: TensorParallel | None = None,
    ) -> None:
        self.itemsize, self.fp8 = itemsize, compression == "fp8"
        nothing = len(bypasses)
        lowest = nothing if forward_only else next((i for i, b in enumerate(bypasses) if b.factor_widths), nothing)
        self.keys: list[object] = []
        self.graphs: dict[object, JointGraph] = {}
        self.contexts: dict[object, float] = {}
        for index, bypass in enumerate(bypasses):
            context = mean_context(sequence_length, arch.sliding_windows[index])
            key = (bypass.key, index in arch.nope_layers, index > lowest, index >= lowest, context)
            self.keys.append(key)
            if key not in self.graphs:
                trainable = frozenset() if forward_only else frozenset(bypass.factor_widths)
                pruned = partial(prune, trainable=trainable.__contains__, input_gradient=index > lowest)
                packed = () if compression == "none" else (pack_signs,)
                self.graphs[key] = run_passes(_rank_graph(bypass, arch, index, ranks), differentiate, pruned, *packed)
                self.contexts[key] = context
        self._curves: dict[object, list[LayerPlan]] = {}

    @property
    def compresses(self) -> bool:
        """Whether some value may be kept in fewer bytes than forward computes it in."""
        return self.fp8 or any(node.row.packs for joint in self.graphs.values() for node in joint.forward.nodes)

    def lower(self, key: object, choice: Rematerialized) -> LayerPlan:
        """The programs of a choice for the layers of `key`."""
        choice = run_passes(choice, *((partial(to_fp8, self.itemsize),) if self.fp8 else ()))
        plan = lower(choice, merged=MERGED, itemsize=self.itemsize)
        return replace(plan, flops=layer_flops(choice.joint, choice.recompute, self.contexts[key]))

    @cached_property
    def first(self) -> ModelPlan:
        """The plan that keeps the fewest bytes without running a matrix product again."""
        plans = {key: self.lower(key, rematerialize(joint, self.itemsize, fp8=self.fp8)) for key, joint in self.graphs.items()}
        return ModelPlan(layers=tuple(plans[key] for key in self.keys))

    def curve(self, key: object) -> list[LayerPlan]:
        """The choices for the layers of `key` in order of rising FLOPs, each with fewer bytes than the one before."""
        if key not in self._curves:
            plans: list[LayerPlan] = []
            for remat in curve(self.graphs[key], self.itemsize, self.contexts[key], fp8=self.fp8):
                plan = self.lower(key, remat)
                if not plans or plan.arena_bytes < plans[-1].arena_bytes:
                    plans.append(plan)
            self._curves[key] = plans
        return self._curves[key]

    def steps(self) -> list[tuple[int, int]]:
        """All steps from the most bytes to the fewest, the cheapest byte first: (layer, number of its next choice)."""
        slopes: dict[object, list[float]] = {}
        for key in self.graphs:
            plans = self.curve(key)
            worst, slopes[key] = 0.0, []
            for plan, following in pairwise(plans):
                flops = following.flops.recompute - plan.flops.recompute
                worst = max(worst, flops / (plan.arena_bytes - following.arena_bytes))
                slopes[key].append(worst)
        order = [
            (slope, number, layer) for layer, key in enumerate(self.keys) for number, slope in enumerate(slopes[key], start=1)
        ]
        return [(layer, number) for _, number, layer in sorted(order)]

    def within(self, budget: float) -> list[LayerPlan]:
        """The plan of each layer, with the fewest FLOPs that keep at most `budget` bytes per token. Raises ConfigError."""
        chosen = [0] * len(self.keys)
        steps = self.steps()

        def size(layer: int, number: int) -> int:
            return self.curve(self.keys[layer])[number].arena_bytes

        total = most = sum(size(layer, 0) for layer in range(len(chosen)))
        done: list[tuple[int, int]] = []
        for layer, number in steps:
            if total <= budget:
                break
            total -= size(layer, number - 1) - size(layer, number)
            chosen[layer] = number
            done.append((layer, number))
        if total > budget:
            raise ConfigError(
                f"arena_budget: {budget:.0f} bytes per token are too few: the least that can be kept is {total}, and {most} "
                "without running a matrix product again", param="arena_budget",
            )
        for layer, number in reversed(done):  # the last step may have freed more than it had to
            larger = size(layer, number - 1) - size(layer, number)
            if chosen[layer] == number and total + larger <= budget:
                chosen[layer], total = number - 1, total + larger
        return [self.curve(key)[number] for key, number in zip(self.keys, chosen, strict=True)]

    def plan(self, arena_budget: float | None = None) -> ModelPlan:
        """The plan with the fewest FLOPs within a budget. Raises ConfigError if the budget can't be met.

        arena_budget: bytes per token kept over all layers, met by running those matrix products again that cost the fewest
        FLOPs per byte; None: none of them.
        """
        if arena_budget is None or self.first.arena_bytes <= arena_budget:
            return self.first
        return ModelPlan(layers=tuple(self.within(arena_budget)))

    def frontier(self, num_points: int = 25) -> tuple[Point, ...]:
        """Budgets from the most bytes to the fewest, in order of rising FLOPs: `num_points`, or all where there are fewer."""
        chosen = [self.curve(key)[0] for key in self.keys]
        work = sum(plan.flops.forward + plan.flops.backward for plan in chosen)
        arena_bytes, flops = sum(plan.arena_bytes for plan in chosen), 0
        points = [Point(arena_bytes, 0.0)]
        for layer, number in self.steps():
            plan, following = self.curve(self.keys[layer])[number - 1 : number + 1]
            arena_bytes -= plan.arena_bytes - following.arena_bytes
            flops += following.flops.recompute - plan.flops.recompute
            points.append(Point(arena_bytes, flops / max(1, work)))
        if len(points) <= num_points:
            return tuple(points)
        least, most = points[-1].arena_bytes, points[0].arena_bytes
        wanted = [most - (most - least) * number / (num_points - 1) for number in range(num_points)]
        return tuple(dict.fromkeys(next(p for p in points if p.arena_bytes <= size) for size in wanted))


def plan_inference(
    arch: Architecture, bypasses: Sequence[LayerBypass], *, itemsize: int, ranks: TensorParallel | None = None
) -> ModelPlan:
    """Forward programs that keep nothing. ranks: as for `TrainingPlans`."""
    cache: dict[tuple[object, ...], LayerPlan] = {}
    layers = []
    for index, bypass in enumerate(bypasses):
        key = (bypass.key, index in arch.nope_layers)
        if key not in cache:
            nothing_kept = Rematerialized(run_passes(_rank_graph(bypass, arch, index, ranks)))
            cache[key] = lower(nothing_kept, merged=MERGED, itemsize=itemsize)
        layers.append(cache[key])
    return ModelPlan(layers=tuple(layers))


def plan_fused(
    arch: Architecture, bypasses: Sequence[LayerBypass], own: ModelPlan, *, itemsize: int,
    ranks: TensorParallel | None = None,
) -> tuple[FusedLayer, ...]:
    """Forward programs for requests and training rows together. own: the training rows' plan; `bypasses` have its sites and
    those of the requests' adapters. ranks: as for `TrainingPlans`."""
    cache: dict[tuple[object, ...], FusedLayer] = {}
    layers = []
    for index, (bypass, plan) in enumerate(zip(bypasses, own.layers, strict=True)):
        key = (bypass.key, id(plan))  # the plan of a layer without rotary embedding is never one of a layer with it
        if key not in cache:
            joint = run_passes(_rank_graph(bypass, arch, index, ranks))
            cache[key] = lower_fused(joint, plan, merged=MERGED, itemsize=itemsize)
        layers.append(cache[key])
    return tuple(layers)


def _rank_graph(bypass: LayerBypass, arch: Architecture, layer: int, ranks: TensorParallel | None) -> JointGraph:
    """The graph of a layer as each rank runs it, before it is differentiated. ranks: None if there is only one."""
    joint = bypass.trace(arch, layer)
    return joint if ranks is None else JointGraph.of(ranks.parallelize(joint.forward, layer).graph)
