"""Where adapters lie on the ranks that share a model: of one job, or of an engine."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from coserve.compiler.parallelize import TensorParallel
from coserve.config.settings import LINEAR_SITES, AdapterConfig, BottleneckConfig, FinetuneConfig, IA3Config, LoraConfig
from coserve.devices.prices import machine_device, parallel_prices
from coserve.model.architecture import Architecture
from coserve.planning.budget import shape_adapter
from coserve.runtime.plans import adapter_shardings

_STEP_TOKENS = 4096
"""Tokens of an optimizer step by which an engine's choice is made, whatever its jobs will be."""
_ALL_ADAPTERS: tuple[AdapterConfig, ...] = (
    LoraConfig(target_modules="all-linear"), LoraConfig(target_modules="all-linear", use_dora=True),
    IA3Config(target_modules=LINEAR_SITES, feedforward_modules=()),
    IA3Config(target_modules=LINEAR_SITES, feedforward_modules=LINEAR_SITES),
    BottleneckConfig(placement="houlsby", activation="relu"), BottleneckConfig(placement="houlsby", activation="gelu"),
)
"""Have all parameters that any adapter can have."""


def make_group(
    arch: Architecture, settings: FinetuneConfig, size: int, device: torch.device, itemsize: int, step_tokens: int
) -> TensorParallel:
    """The group of `size` ranks that train an adapter of these settings, with its shardings. step_tokens: of an optimizer
    step."""
    group = _bare_group(arch, size, device, itemsize, settings.window_tokens, step_tokens)
    return group.fix(adapter_shardings(arch, shape_adapter(arch, settings.adapter), group))


@functools.lru_cache(maxsize=4)
def engine_group(arch: Architecture, size: int, device: torch.device, itemsize: int, window_tokens: int) -> TensorParallel:
    """The group of `size` ranks that serve any adapters and train any others, with a sharding for every parameter.

    Rows of many adapters share a product, so that all adapters lie alike, whichever came first. Their ranks differ, and they
    are padded to the largest: so none is split along its rank. window_tokens: rows that run together.
    """
    group = _bare_group(arch, size, device, itemsize, window_tokens, _STEP_TOKENS)
    for config in _ALL_ADAPTERS:
        adapter = shape_adapter(arch, config)
        ranks = {p.name: p.rank_axis for p in adapter.parameters if p.rank_axis is not None}
        group = replace(group, refused={**group.refused, **ranks})
        group = group.fix({**group.fixed, **adapter_shardings(arch, adapter, group)})
    return group


def _bare_group(
    arch: Architecture, size: int, device: torch.device, itemsize: int, window_tokens: int, step_tokens: int
) -> TensorParallel:
    prices = parallel_prices(machine_device(device), itemsize=itemsize, window_tokens=window_tokens, step_tokens=step_tokens)
    return TensorParallel(size=size, kv_heads=arch.num_kv_heads, prices=prices)
