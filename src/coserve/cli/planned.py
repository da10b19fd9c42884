"""What `coserve plan` plans: a training that is asked for, on one device or shared among several.

Owns: what is asked for, and the order in which its figures are computed. Does not own: the figures (planning/estimate.py,
compiler/report.py, compiler/baselines.py), how they are shown (planview.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from coserve.compiler import baselines
from coserve.compiler.baselines import Baselines
from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.report import LayerReport, RanksReport, ranks_report, report
from coserve.config.data import adapter_of_kind, finetune_config_from_dict, size_field
from coserve.config.settings import AdapterConfig, Compression
from coserve.config.values import Quantization, read_memory, read_quantization, require
from coserve.devices.prices import parallel_prices
from coserve.devices.table import find_device
from coserve.model.architecture import Architecture, read_architecture
from coserve.model.decoder import rank_architecture
from coserve.peft.adapter import Adapter
from coserve.peft.share import num_on_rank
from coserve.planning.budget import shape_adapter
from coserve.planning.estimate import Estimate, Shape, estimate
from coserve.runtime.plans import layer_bypasses
from coserve.training.group import adapter_group, require_ranks

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be trained; None is the default of the kind. rank: for a bottleneck its width. targets: modules' names, or
    "all-linear"."""

    kind: str
    rank: int | None
    targets: tuple[str, ...] | str | None
    dropout: float | None

    def settings(self) -> AdapterConfig:
        """The adapter's settings. Raises ConfigError, also for a setting that the kind doesn't have."""
        asked = {"rank": self.rank, "target_modules": self.targets, "dropout": self.dropout}
        words = {name: name for name in asked} | {"rank": size_field(adapter_of_kind(self.kind, {}, {})) or "r"}
        return adapter_of_kind(self.kind, {word: value for word, value in asked.items() if value is not None}, words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Everything that is shown. num_parameters: of the whole adapter. limit: of the total, as it was asked for. seconds: that
    planning took, without baselines."""

    model: str
    shape: Shape
    num_parameters: int
    kind: str
    settings: AdapterConfig
    dtype: str
    quantization: Quantization
    limit: str
    compression: Compression
    estimate: Estimate
    kept: tuple[LayerReport, ...]
    ranks: RanksReport | None
    baselines: Baselines
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRanks:
    """How many devices share the model, which ones (`find_device`), and where parameters of the adapter must lie
    (`adapter_group`)."""

    size: int = 1
    device: str = "H100"
    adapter: str = ""


def make_plan(
    directory: Path, adapter: Asked, *, dtype: str, sequence_length: int, num_tokens: int, window_tokens: int, limit: str,
    compression: str = "lossless", quantization: str = "none", with_baselines: bool, among: AskedRanks = AskedRanks(),
) -> Planned:
    """Plans training for a model directory. limit: of the total, for `read_memory`; compression: as
    FinetuneConfig.activation_compression; quantization: of the model's linears. among: how many devices share the model. Raises
    ConfigError, CapacityError."""
    settings = adapter.settings()
    require(dtype in DTYPES, "dtype", f"must be {', '.join(DTYPES)}, got {dtype!r}")
    coded = read_quantization(quantization)
    for name, value in (("sequence_length", sequence_length), ("window_tokens", window_tokens)):
        require(value >= 1, name, f"must be at least 1, got {value}")
    require(num_tokens >= sequence_length, "max_microbatch_tokens",
            f"{num_tokens} is less than one sequence of {sequence_length} tokens")
    start = time.perf_counter()
    arch = read_architecture(directory)
    empty = shape_adapter(arch, settings)
    bypasses = layer_bypasses(arch, empty, dropout=empty.dropout)
    window_tokens = min(window_tokens, num_tokens)
    ranks = _ranks(arch, among, empty, DTYPES[dtype].itemsize, window_tokens, num_tokens)
    held = empty.flat.numel() if ranks is None else num_on_rank(empty.parameters, ranks.fixed)
    shape = Shape(
        arch=arch, itemsize=DTYPES[dtype].itemsize, num_tokens=num_tokens, sequence_length=sequence_length,
        window_tokens=window_tokens, num_parameters=held, ranks=ranks, quantization=coded,
    )
    stored = finetune_config_from_dict({"activation_compression": compression}).activation_compression
    result = estimate(shape, bypasses, read_memory(limit), compression=stored)
    kept = report(result.plan, itemsize=shape.itemsize)
    elements = {(p.layer, p.name): p.shape[0] * p.shape[1] for p in empty.parameters}
    shared = None if ranks is None else ranks_report(ranks, arch, layer_bypasses(arch, empty), result.plan, elements)
    seconds = time.perf_counter() - start
    beside = Baselines(peft=None, checkpointing=None, reason="left out (--no-baselines)")
    if with_baselines:
        beside = baselines.measure(
            directory, adapter=adapter.kind, rank=rank_of(settings), targets=targets_of(settings), dtype=DTYPES[dtype],
            sequence_length=sequence_length, num_tokens=num_tokens, dropout=getattr(settings, "dropout", 0.0),
        )
    return Planned(
        model=directory.name, shape=shape, num_parameters=empty.flat.numel(), kind=adapter.kind, settings=settings,
        dtype=dtype, quantization=coded, limit=limit, compression=stored, estimate=result, kept=kept, ranks=shared,
        baselines=beside, seconds=seconds,
    )


def _ranks(
    arch: Architecture, asked: AskedRanks, adapter: Adapter, itemsize: int, window_tokens: int, num_tokens: int
) -> TensorParallel | None:
    """The group that shares the model, with the adapter's shardings, if several devices do. Raises ConfigError."""
    require_ranks(asked.adapter, asked.size)
    if asked.size == 1:
        return None
    rank_architecture(arch, asked.size)
    prices = parallel_prices(
        find_device(asked.device), itemsize=itemsize, window_tokens=window_tokens, step_tokens=num_tokens
    )
    return adapter_group(arch, adapter, asked.size, prices, asked.adapter)


def rank_of(settings: AdapterConfig) -> int:
    """An adapter's rank, or a bottleneck's width; 0 for a kind that has neither."""
    field = size_field(settings)
    return 0 if field is None else getattr(settings, field)


def targets_of(settings: AdapterConfig) -> tuple[str, ...] | str:
    """The modules that an adapter's settings name, "all-linear", or none for a kind that has a place of its own."""
    return getattr(settings, "target_modules", ())
