"""The compiler's driver: all passes for every layer of a model, and what the result keeps, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coserve.compiler.differentiate import differentiate
from coserve.compiler.lower import lower, lower_fused
from coserve.compiler.program import FusedLayer, LayerPlan
from coserve.compiler.prune import prune, rematerialize
from coserve.compiler.trace import trace
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, Bypass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBypass:
    """What one layer trains or serves: the bypass, {factor: out features} of its parameters. Layers with equal `key` share
    a plan."""

    key: tuple[object, ...]
    bypass: Bypass
    factor_widths: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One plan per layer. Bytes are per token (arena) and per window row (work)."""

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
    def lowest_trained(self) -> int:
        """The lowest layer with a backward program: backward ends there. The number of layers if nothing trains."""
        return next((i for i, layer in enumerate(self.layers) if layer.backward is not None), len(self.layers))


def plan_training(
    arch: Architecture, bypasses: Sequence[LayerBypass], *, itemsize: int, forward_only: bool = False
) -> ModelPlan:
    """Forward and backward programs of every layer. A layer's input gradient exists only above the lowest bypass.

    `forward_only` trains nothing: what is kept is K and V, which later windows read.
    """
    cache: dict[tuple[object, ...], LayerPlan] = {}
    nothing = len(bypasses)
    lowest = nothing if forward_only else next((i for i, b in enumerate(bypasses) if b.factor_widths), nothing)
    layers = []
    for index, bypass in enumerate(bypasses):
        key = (bypass.key, index > lowest, index >= lowest)
        if key not in cache:
            joint = differentiate(trace(arch, bypass.bypass, bypass.factor_widths))
            trainable = frozenset() if forward_only else frozenset(bypass.factor_widths)
            pruned = prune(joint, trainable=trainable.__contains__, input_gradient=index > lowest)
            cache[key] = lower(pruned, rematerialize(pruned, itemsize), merged=MERGED, itemsize=itemsize)
        layers.append(cache[key])
    return ModelPlan(layers=tuple(layers))


def plan_inference(arch: Architecture, bypasses: Sequence[LayerBypass], *, itemsize: int) -> ModelPlan:
    """Forward programs that keep nothing."""
    cache: dict[tuple[object, ...], LayerPlan] = {}
    layers = []
    for bypass in bypasses:
        if bypass.key not in cache:
            joint = differentiate(trace(arch, bypass.bypass, bypass.factor_widths))
            pruned = prune(joint, trainable=lambda _: False, input_gradient=False)
            cache[bypass.key] = lower(pruned, None, merged=MERGED, itemsize=itemsize)
        layers.append(cache[bypass.key])
    return ModelPlan(layers=tuple(layers))


def plan_fused(
    arch: Architecture, bypasses: Sequence[LayerBypass], own: ModelPlan, *, itemsize: int
) -> tuple[FusedLayer, ...]:
    """Forward programs for requests and training rows together. own: the training rows' plan; `bypasses` have its sites and
    those of the requests' adapters."""
    cache: dict[tuple[object, ...], FusedLayer] = {}
    layers = []
    for bypass, plan in zip(bypasses, own.layers, strict=True):
        key = (bypass.key, id(plan))
        if key not in cache:
            joint = differentiate(trace(arch, bypass.bypass, bypass.factor_widths))
            cache[key] = lower_fused(joint, plan, merged=MERGED, itemsize=itemsize)
        layers.append(cache[key])
    return tuple(layers)
