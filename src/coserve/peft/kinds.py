"""The kinds of adapter by their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from coserve.config.settings import AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.model.architecture import Architecture
from coserve.model.weights import ModelWeights
from coserve.peft.adapter import Adapter, Kind, Parameter, num_elements
from coserve.peft.bottleneck import BottleneckBypass, bottleneck_layout
from coserve.peft.ia3 import IA3Bypass, ia3_layout
from coserve.peft.lora import LoraAdapter, lora_layout


class _Row(NamedTuple):
    layout: Callable[[Architecture, Any], tuple[Parameter, ...]]
    bypass: Kind


_KINDS: Mapping[type[AdapterConfig], _Row] = {
    IA3Config: _Row(ia3_layout, IA3Bypass), BottleneckConfig: _Row(bottleneck_layout, BottleneckBypass)
}
"""By the class of their settings: all kinds but LoRA and DoRA, which have a class of adapter of their own."""


def adapter_layout(arch: Architecture, config: AdapterConfig) -> tuple[Parameter, ...]:
    """The parameters that an adapter's settings give it, without memory. Raises ConfigError for a name that matches no
    module."""
    if isinstance(config, LoraConfig):
        return tuple(p for site in lora_layout(arch, config) for p in site.parameters)
    return _KINDS[type(config)].layout(arch, config)


def empty_adapter(arch: Architecture, config: AdapterConfig, *, dtype: torch.dtype, device: torch.device) -> Adapter:
    """An adapter whose values have not been written. Raises ConfigError for a target that matches no module."""
    if isinstance(config, LoraConfig):
        return LoraAdapter.empty(arch, config, dtype=dtype, device=device)
    parameters = adapter_layout(arch, config)
    flat = torch.empty(num_elements(parameters), dtype=dtype, device=device)
    return Adapter(config, _KINDS[type(config)].bypass, parameters, flat, num_layers=arch.num_layers)


def new_adapter(weights: ModelWeights, config: AdapterConfig, *, seed: int) -> Adapter:
    """An adapter as a job starts it, for a backbone: it changes nothing yet."""
    adapter = empty_adapter(weights.architecture, config, dtype=weights.dtype, device=weights.device)
    adapter.bind(weights)
    return adapter.start(seed)
