"""Plans for adapters: what each layer of an adapter asks of the compiler."""

from __future__ import annotations

from coserve.compiler.plan import LayerBypass, ModelPlan, plan_inference, plan_training
from coserve.model.architecture import Architecture
from coserve.model.decoder import NoBypass
from coserve.peft.lora import LoraAdapter, LoraBypass


def layer_bypasses(arch: Architecture, adapter: LoraAdapter | None, *, dropout: float = 0.0) -> list[LayerBypass]:
    """One entry per layer; `dropout` is the adapter's in training and 0 otherwise."""
    if adapter is None:
        return [LayerBypass(key=(), bypass=NoBypass(), factor_widths={})] * arch.num_layers
    result = []
    for layer in range(arch.num_layers):
        widths = adapter.factor_widths(layer)
        sites = frozenset(name.rsplit(".", 1)[0] for name in widths)
        key = (tuple(sorted(widths.items())), dropout)
        result.append(LayerBypass(key=key, bypass=LoraBypass(sites, dropout), factor_widths=widths))
    return result


def training_plan(arch: Architecture, adapter: LoraAdapter | None, *, itemsize: int) -> ModelPlan:
    """Forward and backward programs for an adapter's training; with None, forward only (reference log-probabilities)."""
    dropout = 0.0 if adapter is None else adapter.config.dropout
    return plan_training(arch, layer_bypasses(arch, adapter, dropout=dropout), itemsize=itemsize)


def scoring_plan(arch: Architecture, adapter: LoraAdapter | None, *, itemsize: int) -> ModelPlan:
    """Forward programs over training rows that keep only K and V, without dropout: validation and references."""
    return plan_training(arch, layer_bypasses(arch, adapter), itemsize=itemsize, forward_only=True)


def serving_plan(arch: Architecture, adapter: LoraAdapter | None, *, itemsize: int) -> ModelPlan:
    """Forward programs for requests."""
    return plan_inference(arch, layer_bypasses(arch, adapter), itemsize=itemsize)
