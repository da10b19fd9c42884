"""The kinds of adapter by their settings."""

from __future__ import annotations

import torch

from coserve.config.settings import AdapterConfig, IA3Config, LoraConfig
from coserve.model.architecture import Architecture
from coserve.model.weights import ModelWeights
from coserve.peft.adapter import Adapter, Kind, Parameter, num_elements
from coserve.peft.bottleneck import BottleneckBypass, bottleneck_layout
from coserve.peft.ia3 import IA3Bypass, ia3_layout
from coserve.peft.lora import LoraAdapter, lora_layout


def adapter_layout(arch: Architecture, config: AdapterConfig) -> tuple[Parameter, ...]:
    """The parameters that an adapter's settings give it, without memory. Raises ConfigError for a name that matches no
    module."""
    if isinstance(config, LoraConfig):
        return tuple(p for site in lora_layout(arch, config) for p in site.parameters)
    return ia3_layout(arch, config) if isinstance(config, IA3Config) else bottleneck_layout(arch, config)


def empty_adapter(arch: Architecture, config: AdapterConfig, *, dtype: torch.dtype, device: torch.device) -> Adapter:
    """An adapter whose values have not been written. Raises ConfigError for a target that matches no module."""
    if isinstance(config, LoraConfig):
        return LoraAdapter.empty(arch, config, dtype=dtype, device=device)
    kind: Kind = IA3Bypass if isinstance(config, IA3Config) else BottleneckBypass
    parameters = adapter_layout(arch, config)
    flat = torch.empty(num_elements(parameters), dtype=dtype, device=device)
    return Adapter(config, kind, parameters, flat, num_layers=arch.num_layers)


def new_adapter(weights: ModelWeights, config: AdapterConfig, *, seed: int) -> Adapter:
    """An adapter as a job starts it, for a backbone: it changes nothing yet."""
    adapter = empty_adapter(weights.architecture, config, dtype=weights.dtype, device=weights.device)
    adapter.bind(weights)
    return adapter.start(seed)
