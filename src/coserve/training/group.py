"""Where adapters lie on the ranks that share a model: of one job, or of an engine. Users may say where (`adapter_sharding`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from coserve.compiler.parallelize import Axes, Prices, TensorParallel, axis_name
from coserve.config.settings import LINEAR_SITES, AdapterConfig, BottleneckConfig, FinetuneConfig, IA3Config, LoraConfig
from coserve.config.values import require
from coserve.devices.prices import machine_device, parallel_prices
from coserve.model.architecture import Architecture
from coserve.peft.adapter import Adapter
from coserve.planning.budget import shape_adapter
from coserve.runtime.plans import adapter_shardings

_STEP_TOKENS = 4096
"""Tokens of an optimizer step by which an engine's choice is made, whatever its jobs will be."""
ALL_ADAPTERS: tuple[AdapterConfig, ...] = (
    LoraConfig(target_modules="all-linear"), LoraConfig(target_modules="all-linear", use_dora=True),
    IA3Config(target_modules=LINEAR_SITES, feedforward_modules=()),
    IA3Config(target_modules=LINEAR_SITES, feedforward_modules=LINEAR_SITES),
    BottleneckConfig(placement="houlsby", activation="relu"), BottleneckConfig(placement="houlsby", activation="gelu"),
)
"""Have all parameters that any adapter can have."""
AXES = {axis_name(axis): axis for axis in (None, 0, 1)}
"""Where a parameter may lie, by name: on every rank, or split along its outputs or its inputs."""


def make_group(
    arch: Architecture, settings: FinetuneConfig, size: int, device: torch.device, itemsize: int, step_tokens: int,
    adapter_sharding: str,
) -> TensorParallel:
    """The group of `size` ranks that train an adapter of these settings, with its shardings. step_tokens: of an optimizer
    step. adapter_sharding: as for `adapter_group`. Raises ConfigError."""
    prices = _prices(device, itemsize, settings.window_tokens, step_tokens)
    return adapter_group(arch, shape_adapter(arch, settings.adapter), size, prices, adapter_sharding)


def adapter_group(arch: Architecture, adapter: Adapter, size: int, prices: Prices, adapter_sharding: str) -> TensorParallel:
    """The group of `size` ranks that share an adapter. adapter_sharding: where its parameters must lie, as
    PARAMETER=whole, out or in, joined by commas; for the others the cheapest choice is made. Raises ConfigError."""
    forced = _read_axes(adapter_sharding, [adapter])
    group = TensorParallel(size=size, kv_heads=arch.num_kv_heads, prices=prices, forced=forced)
    return group.fix(adapter_shardings(arch, adapter, group))


@functools.lru_cache(maxsize=4)
def engine_group(
    arch: Architecture, size: int, device: torch.device, itemsize: int, window_tokens: int, adapter_sharding: str
) -> TensorParallel:
    """The group of `size` ranks that serve any adapters and train any others, with a sharding for every parameter.

    Rows of many adapters share a product, so that all adapters lie alike, whichever came first. Their ranks differ, and they
    are padded to the largest: so none is split along its rank. window_tokens: rows that run together. adapter_sharding: as for
    `adapter_group`. Raises ConfigError.
    """
    adapters = [shape_adapter(arch, config) for config in ALL_ADAPTERS]
    forced, prices = _read_axes(adapter_sharding, adapters), _prices(device, itemsize, window_tokens, _STEP_TOKENS)
    group = TensorParallel(size=size, kv_heads=arch.num_kv_heads, prices=prices, forced=forced)
    for adapter in adapters:
        ranks = {p.name: p.rank_axis for p in adapter.parameters if p.rank_axis is not None}
        group = replace(group, refused={**group.refused, **ranks})
        group = group.fix({**group.fixed, **adapter_shardings(arch, adapter, group)})
    return group


def require_ranks(adapter_sharding: str, size: int) -> None:
    """Raises ConfigError if it is said where parameters must lie, and one device has everything."""
    require(not adapter_sharding or size > 1, "adapter_sharding", "needs a tensor_parallel_size above 1")


def describe_sharding(adapter: Adapter, group: TensorParallel) -> str:
    """Where an adapter's parameters lie, as `adapter_group` takes it."""
    parts = (f"{p.name}={axis_name(group.fixed[p.layer, p.name].axis)}" for p in adapter.parameters)
    return ",".join(dict.fromkeys(parts))


def _read_axes(text: str, adapters: Sequence[Adapter]) -> Axes:
    """Where parameters must lie, as `adapter_group` takes it. adapters: those whose parameters may be named."""
    known = dict.fromkeys(p.name for adapter in adapters for p in adapter.parameters)
    read: dict[str, int | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, axis = (piece.strip() for piece in part.partition("="))
        require(bool(sign) and axis in AXES, "adapter_sharding",
                f"{part!r} is not PARAMETER={' or '.join(AXES)}, as in q_proj.lora_A=whole")
        require(name not in read, "adapter_sharding", f"{name} is given twice")
        require(name in known, "adapter_sharding", f"no parameter is called {name!r}; these exist: {', '.join(known)}")
        read[name] = AXES[axis]
    return read


def _prices(device: torch.device, itemsize: int, window_tokens: int, step_tokens: int) -> Prices:
    return parallel_prices(machine_device(device), itemsize=itemsize, window_tokens=window_tokens, step_tokens=step_tokens)
