"""The compiler asked for an adapter: each layer's bypass, and the plans of training, scoring, serving and fused passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from coserve.compiler.flops import SEQUENCE_LENGTH
from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.plan import LayerBypass, ModelPlan, TrainingPlans, plan_fused, plan_inference
from coserve.compiler.program import FusedLayer
from coserve.config.settings import Compression
from coserve.model.architecture import Architecture
from coserve.model.decoder import NoBypass
from coserve.parallel import Sharding, Shardings
from coserve.peft.adapter import Adapter, CompositeBypass, Kind


def layer_bypasses(arch: Architecture, adapter: Adapter | None, *, dropout: float = 0.0) -> list[LayerBypass]:
    """One entry per layer; `dropout` is the adapter's in training and 0 otherwise."""
    if adapter is None:
        return [_bypass((), {}, 0.0)] * arch.num_layers
    return [_bypass((adapter.kind,), adapter.factor_widths(layer), dropout) for layer in range(arch.num_layers)]


def _bypass(kinds: Collection[Kind], widths: Mapping[str, int], dropout: float) -> LayerBypass:
    """The bypass that parameters of these kinds make up. widths: {factor: out features}."""
    if not widths:
        return LayerBypass(key=(), bypass=NoBypass(), factor_widths={})
    names = frozenset(widths)
    key = (tuple(kinds), tuple(sorted(widths.items())), dropout)
    return LayerBypass(key=key, bypass=CompositeBypass([kind(names, dropout) for kind in kinds]), factor_widths=widths)


def adapter_shardings(arch: Architecture, adapter: Adapter, ranks: TensorParallel) -> Shardings:
    """Where the ranks of a group hold an adapter's parameters, for `TensorParallel.fix`. Dropout plays no part, so that
    training, validation and serving hold them alike. Raises ConfigError for what can't be had."""
    found: dict[object, Mapping[str, Sharding]] = {}
    shardings: dict[tuple[int, str], Sharding] = {}
    for index, bypass in enumerate(layer_bypasses(arch, adapter)):
        if bypass.key not in found:
            found[bypass.key] = ranks.parallelize(bypass.trace(arch, index).forward, index).shardings
        shardings |= {(index, name): sharding for name, sharding in found[bypass.key].items()}
    return shardings


def training_plans(
    arch: Architecture, adapter: Adapter, *, itemsize: int, sequence_length: int = SEQUENCE_LENGTH,
    compression: Compression = "lossless", ranks: TensorParallel | None = None,
) -> TrainingPlans:
    """All plans of an adapter's training, one per budget. sequence_length, compression, ranks: as for `TrainingPlans`."""
    bypasses = layer_bypasses(arch, adapter, dropout=adapter.dropout)
    return TrainingPlans(
        arch, bypasses, itemsize=itemsize, sequence_length=sequence_length, compression=compression, ranks=ranks
    )


def scoring_plan(
    arch: Architecture, adapter: Adapter | None, *, itemsize: int, ranks: TensorParallel | None = None
) -> ModelPlan:
    """Forward programs over training rows that keep only K and V, without dropout: validation and references. ranks: as for
    `TrainingPlans`."""
    return TrainingPlans(arch, layer_bypasses(arch, adapter), itemsize=itemsize, forward_only=True, ranks=ranks).plan()


def serving_plan(
    arch: Architecture, kinds: Collection[Kind], widths: Sequence[Mapping[str, int]], *, itemsize: int,
    ranks: TensorParallel | None = None,
) -> ModelPlan:
    """Forward programs for requests. kinds: those of their adapters. widths: per layer, {factor: out features} of them all.
    ranks: as for `TrainingPlans`."""
    return plan_inference(arch, [_bypass(kinds, layer, 0.0) for layer in widths], itemsize=itemsize, ranks=ranks)


def fused_plan(
    arch: Architecture, adapter: Adapter | None, kinds: Collection[Kind], widths: Sequence[Mapping[str, int]],
    own: ModelPlan, *, dropout: float, itemsize: int, ranks: TensorParallel | None = None,
) -> tuple[FusedLayer, ...]:
    """Forward programs for requests' rows and training rows of `adapter` together. own: the training rows' plan. The other
    arguments are as for `serving_plan`."""
    if adapter is not None:
        kinds = tuple(dict.fromkeys((*kinds, adapter.kind)))
    merged = []
    for layer, serving in enumerate(widths):
        trained = {} if adapter is None else whole_widths(adapter.factor_widths(layer), layer, ranks)
        both = {name: max(serving.get(name, 0), trained.get(name, 0)) for name in {**trained, **serving}}
        merged.append(_bypass(kinds, both, dropout))
    return plan_fused(arch, merged, own, itemsize=itemsize, ranks=ranks)


def whole_widths(own: Mapping[str, int], layer: int, ranks: TensorParallel | None) -> dict[str, int]:
    """{factor: out features} of whole factors in a layer, from those that one rank has."""
    if ranks is None:
        return dict(own)
    shardings = {name: ranks.fixed[layer, name] for name in own}
    return {name: width * (shardings[name].parts if shardings[name].axis == 0 else 1) for name, width in own.items()}
