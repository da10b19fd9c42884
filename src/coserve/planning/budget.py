"""How much memory a finetuning job needs, counted from its plan, how much there is, and the plan that fits into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from coserve.compiler.plan import ModelPlan
from coserve.config.settings import AdapterConfig, Compression, FinetuneConfig
from coserve.config.values import read_memory
from coserve.core import CapacityError, Group
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, linear_shapes
from coserve.model.memory import GIB, packed_bytes, unpacked_bytes, weight_bytes
from coserve.peft.adapter import Adapter
from coserve.peft.kinds import empty_adapter
from coserve.runtime.executor import head_rows
from coserve.runtime.memory import arena_rows
from coserve.runtime.microbatch import microbatch_layout
from coserve.runtime.plans import training_plans

_WORK_ALIGN = 64
"""The workspace rounds its rows up to this (runtime/memory.py)."""


def split_bytes(arch: Architecture, plan: ModelPlan, itemsize: int) -> int:
    """Bytes that the packed layout adds for linears of a merged matrix that a plan also multiplies by alone."""
    shapes = linear_shapes(arch)
    parts = {site for sites in MERGED.values() for site in sites}
    total = 0
    for layer in plan.layers:
        calls = [*layer.forward.calls, *(layer.backward.calls if layer.backward is not None else ())]
        alone = {call.weight for call in calls if call.op == "linear"} & parts
        total += sum(math.prod(shapes[site]) for site in alone if site is not None)
    return itemsize * total


def shape_adapter(arch: Architecture, config: AdapterConfig) -> Adapter:
    """An adapter without memory, for planning."""
    return empty_adapter(arch, config, dtype=torch.float32, device=torch.device("meta"))


def training_bytes(
    arch: Architecture, plan: ModelPlan, num_parameters: int, *, microbatch_tokens: int, window_tokens: int, itemsize: int,
    packed: bool = False, one_copy: bool = False,
) -> dict[str, int]:
    """Bytes by purpose for one job whose largest micro-batch has `microbatch_tokens` tokens. packed: as in `load_weights`;
    one_copy: whether of packed matrices each is held once."""
    wide = max(itemsize, 4)
    window = min(window_tokens, microbatch_tokens)
    head = min(head_rows(arch.vocab_size, itemsize), window) * arch.vocab_size * itemsize
    streams = 3 * arch.hidden_size * itemsize + 2 * arch.num_kv_heads * arch.head_dim * wide
    copies = itemsize + 3 * wide + (0 if wide == itemsize else wide)
    layouts = 0
    if packed:
        layouts = (
            unpacked_bytes(arch, itemsize) if one_copy else packed_bytes(arch, itemsize) + split_bytes(arch, plan, itemsize)
        )
    return {
        "weights": weight_bytes(arch, itemsize),
        "packed copies of them": layouts,
        "kept activations": plan.arena_bytes * arena_rows(microbatch_tokens),
        "gradients": streams * microbatch_tokens,
        "workspace": max(plan.work_bytes * -(-window // _WORK_ALIGN) * _WORK_ALIGN, head),
        "adapter and optimizer": num_parameters * copies,
    }


class Workload(NamedTuple):
    """What a plan is chosen for: tokens of the largest micro-batch, tokens of the sequence that a token sees on average."""

    num_tokens: int
    sequence_length: int

    @classmethod
    def of(cls, groups: Sequence[Group], batch_size: int, max_microbatch_tokens: int) -> Workload:
        """Of a job's groups."""
        largest = sorted((group.num_tokens for group in groups), reverse=True)[:batch_size]
        lengths = [example.num_tokens for group in groups for example in group.examples]
        squares = sum(length * length for length in lengths)
        return cls(min(max_microbatch_tokens, sum(largest)), math.ceil(squares / max(1, sum(lengths))))


class FittedPlan(NamedTuple):
    """A plan and what its largest micro-batch takes in flight: kept values, hidden and gradient rows."""

    plan: ModelPlan
    num_tokens: int
    num_bytes: int
    fits: bool
    compression: Compression

    def __str__(self) -> str:
        again = f"backward runs {self.plan.extra_flops_ratio:.1%} of the matrix products again"
        rounded = ", in fp8, which changes gradients a little" if self.compression == "fp8" else ""
        return (
            f"a micro-batch of {self.num_tokens} tokens takes {self.num_bytes / GIB:.3f} GiB, {self.plan.arena_bytes} bytes "
            f"per token are kept{rounded}; {again if self.plan.recompute_flops else 'no matrix product is run again'}"
        )


def fit_plan(
    arch: Architecture, adapter: Adapter, room: float, workload: Workload, *, itemsize: int,
    compression: Compression = "lossless",
) -> FittedPlan:
    """The plan with the fewest FLOPs whose largest micro-batch takes at most `room` bytes in flight; if none does, the smallest
    plan."""

    plans = training_plans(
        arch, adapter, itemsize=itemsize, sequence_length=workload.sequence_length, compression=compression
    )

    def fitted(arena_budget: float | None) -> FittedPlan:
        plan = plans.plan(arena_budget)
        layout = microbatch_layout(plan, workload.num_tokens, arch, itemsize, forward_only=False)
        return FittedPlan(plan, workload.num_tokens, layout.total, layout.total <= room, compression)

    most = fitted(None)
    if most.fits:
        return most
    layout = microbatch_layout(most.plan, workload.num_tokens, arch, itemsize, forward_only=False)
    budget = (room - layout.total + layout.arena) // 64 * 64 / arena_rows(workload.num_tokens)
    return fitted(max(budget, plans.frontier(num_points=2)[-1].arena_bytes))


def asked_plan(
    arch: Architecture, adapter: Adapter, workload: Workload, config: FinetuneConfig, *, itemsize: int
) -> FittedPlan:
    """The plan for a job's settings, whatever memory there is. Raises CapacityError if no plan meets them."""
    limit, compression = read_memory(config.activation_memory), config.activation_compression
    most = fit_plan(arch, adapter, math.inf, workload, itemsize=itemsize, compression=compression)
    if limit is None:
        return most
    room = limit * most.num_bytes if limit < 1 else limit
    found = fit_plan(arch, adapter, room, workload, itemsize=itemsize, compression=compression)
    if not found.fits:
        raise CapacityError(
            f"activation_memory: a micro-batch of {workload.num_tokens} tokens takes at least {found.num_bytes} bytes, "
            f"{most.num_bytes} without running a product again, and {room:.0f} are allowed; raise it, or lower "
            "max_microbatch_tokens", param="activation_memory",
        )
    return found


def require_memory(needed: Mapping[str, int], available: int | None) -> None:
    """Raises CapacityError with every part of the sum if the device has too little."""
    total = sum(needed.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
    raise CapacityError(
        f"not enough memory: {total / GIB:.2f} GiB are needed ({parts}) and {available / GIB:.2f} GiB are available; lower "
        "max_microbatch_tokens, or use a smaller model or dtype", param="max_microbatch_tokens",
    )
