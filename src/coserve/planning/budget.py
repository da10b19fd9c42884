"""How much memory a finetuning job needs under a plan, and the choice of a plan that fits into the memory there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.plan import ModelPlan, TrainingPlans
from coserve.config.settings import AdapterConfig, Compression, FinetuneConfig
from coserve.config.values import Quantization, read_memory
from coserve.core import CapacityError, Group
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, linear_shapes, rank_architecture
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
    """Bytes that the packed layout adds for linears of a merged matrix (as qkv_proj) that a plan also multiplies by alone."""
    shapes = linear_shapes(arch)
    parts = {site for sites in MERGED.values() for site in sites}
    total = 0
    for layer in plan.layers:
        calls = [*layer.forward.calls, *(layer.backward.calls if layer.backward is not None else ())]
        alone = {call.weight for call in calls if call.op == "linear"} & parts
        total += sum(math.prod(shapes[site]) for site in alone if site is not None)
    return itemsize * total


def shape_adapter(arch: Architecture, config: AdapterConfig) -> Adapter:
    """An adapter on the meta device, for planning: it has shapes and takes no memory."""
    return empty_adapter(arch, config, dtype=torch.float32, device=torch.device("meta"))


def training_bytes(
    arch: Architecture, plan: ModelPlan, num_parameters: int, *, microbatch_tokens: int, window_tokens: int, itemsize: int,
    packed: bool = False, one_copy: bool = False, fused_head: bool = False, quantization: Quantization = "none",
) -> dict[str, int]:
    """Bytes by purpose for one job whose largest micro-batch has `microbatch_tokens` tokens. packed: whether frozen matrices
    have a packed layout, as in `load_weights`. one_copy: whether each of those is held once instead of once per product.
    fused_head: as `head_rows` takes it. quantization: of the linears."""
    wide = max(itemsize, 4)
    window = min(window_tokens, microbatch_tokens)
    head = min(head_rows(arch.vocab_size, itemsize, fused=fused_head), window) * arch.vocab_size * itemsize
    streams = 3 * arch.hidden_size * itemsize + 2 * arch.num_kv_heads * arch.head_dim * wide
    layouts = 0
    if packed and quantization != "none":
        layouts = 0 if one_copy else packed_bytes(arch, itemsize, quantization=quantization)
    elif packed:
        layouts = (
            unpacked_bytes(arch, itemsize) if one_copy else packed_bytes(arch, itemsize) + split_bytes(arch, plan, itemsize)
        )
    return {
        "weights": weight_bytes(arch, itemsize, quantization),
        "packed copies of them": layouts,
        "kept activations": plan.arena_bytes * arena_rows(microbatch_tokens),
        "gradients": streams * microbatch_tokens,
        "workspace": max(plan.work_bytes * -(-window // _WORK_ALIGN) * _WORK_ALIGN, head),
        "adapter and optimizer": state_bytes(num_parameters, itemsize),
    }


def state_bytes(num_parameters: int, itemsize: int) -> int:
    """Bytes of an adapter that is trained: its values, its gradient, AdamW's two moments, and a wide copy of values that are
    not wide themselves."""
    wide = max(itemsize, 4)
    return num_parameters * (itemsize + 3 * wide + (0 if wide == itemsize else wide))


class Workload(NamedTuple):
    """What a plan is chosen for. num_tokens: of the largest micro-batch. sequence_length: of the example that an average token
    lies in, which sets attention's FLOPs. microbatches: of an optimizer step."""

    num_tokens: int
    sequence_length: int
    microbatches: int = 1

    @classmethod
    def of(cls, groups: Sequence[Group], batch_size: int, max_microbatch_tokens: int) -> Workload:
        """The workload of a job's groups, `batch_size` of them per optimizer step."""
        largest = sorted((group.num_tokens for group in groups), reverse=True)[:batch_size]
        lengths = [example.num_tokens for group in groups for example in group.examples]
        squares = sum(length * length for length in lengths)
        num_tokens = min(max_microbatch_tokens, sum(largest))
        return cls(num_tokens, math.ceil(squares / max(1, sum(lengths))), math.ceil(sum(largest) / max(1, num_tokens)))


class FittedPlan(NamedTuple):
    """A plan, and the bytes that its largest micro-batch, of `num_tokens` tokens, takes in flight. in_flight: how many of them
    may be at once."""

    plan: ModelPlan
    num_tokens: int
    num_bytes: int
    compression: Compression
    in_flight: int = 1

    def __str__(self) -> str:
        several = f", of which {self.in_flight} may be in flight" if self.in_flight > 1 else ""
        again = f"backward runs {self.plan.extra_flops_ratio:.1%} of the matrix products again"
        rounded = ", in fp8, which changes gradients a little" if self.compression == "fp8" else ""
        return (
            f"a micro-batch of {self.num_tokens} tokens takes {self.num_bytes / GIB:.3f} GiB{several}, {self.plan.arena_bytes} "
            f"bytes per token are kept{rounded}; {again if self.plan.recompute_flops else 'no matrix product is run again'}"
        )


class JobPlans:
    """The plans to choose a job's from. They differ in what is kept from forward to backward, and so in memory and FLOPs.

    itemsize: bytes per element of the model. compression: of kept values, as FinetuneConfig's activation_compression. ranks:
    the group that shares the model; bytes are then those of one rank.
    """

    def __init__(
        self, arch: Architecture, adapter: Adapter, workload: Workload, *, itemsize: int, compression: Compression = "lossless",
        ranks: TensorParallel | None = None,
    ) -> None:
        self._arch = arch if ranks is None else rank_architecture(arch, ranks.size)
        self._itemsize, self._compression = itemsize, compression
        self.num_tokens, self.microbatches, self.num_layers = workload.num_tokens, workload.microbatches, arch.num_layers
        self.num_pairs = workload.num_tokens * (workload.sequence_length + 1) // 2
        """Query-key pairs of the largest micro-batch, per layer."""
        self._plans = training_plans(
            arch, adapter, itemsize=itemsize, sequence_length=workload.sequence_length, compression=compression, ranks=ranks
        )

    def bytes_in_flight(self, plan: ModelPlan) -> int:
        """Bytes that the largest micro-batch takes in flight: kept values, hidden rows and gradients."""
        return microbatch_layout(plan, self.num_tokens, self._arch, self._itemsize, forward_only=False).total

    def fastest(self) -> FittedPlan:
        """The plan with the fewest FLOPs, whatever memory it takes. It runs no matrix product again."""
        return self._fitted(self._plans.plan())

    def fit(self, limit: float, cost: Callable[[ModelPlan], float] | None = None) -> FittedPlan:
        """The plan with the fewest FLOPs that costs at most `limit` bytes; if there is none, the one that costs least. cost:
        maps a plan to bytes; default `bytes_in_flight`."""
        return self._fitted(choose_plan(self._plans, limit, cost or self.bytes_in_flight))

    def asked(self, config: FinetuneConfig) -> FittedPlan:
        """The plan for a job's `activation_memory`, without regard to free memory. Raises CapacityError if no plan meets it."""
        limit, most = read_memory(config.activation_memory), self.fastest()
        if limit is None:
            return most
        room = limit * most.num_bytes if limit < 1 else limit
        found = self.fit(room)
        if found.num_bytes > room:
            raise CapacityError(
                f"activation_memory: a micro-batch of {found.num_tokens} tokens takes at least {found.num_bytes} bytes, "
                f"{most.num_bytes} without running a product again, and {room:.0f} are allowed; raise it, or lower "
                "max_microbatch_tokens", param="activation_memory",
            )
        return found

    def for_job(
        self, config: FinetuneConfig, asked: FittedPlan, limit: float | None, cost: Callable[[ModelPlan], float] | None = None
    ) -> FittedPlan:
        """The plan for a job's settings if `limit` bytes are free (None: unknown). asked: `asked(config)`. cost: as for `fit`.
        If no plan fits it costs more, which the caller checks. A deterministic job's plan depends on its settings alone, so
        that it stays the same on a resume."""
        cost = cost or self.bytes_in_flight
        if limit is None or config.deterministic or cost(asked.plan) <= limit:
            return asked
        # A plan that takes more in flight than was asked for is excluded, even if its total cost is less.
        return self.fit(limit, lambda plan: cost(plan) if self.bytes_in_flight(plan) <= asked.num_bytes else math.inf)

    def _fitted(self, plan: ModelPlan) -> FittedPlan:
        return FittedPlan(plan, self.num_tokens, self.bytes_in_flight(plan), self._compression)


def plan_within(plans: JobPlans, config: FinetuneConfig, room: int, *, remedy: str = "raise memory_bytes") -> FittedPlan:
    """The plan with the fewest FLOPs whose largest micro-batch fits into `room`, the bytes of an engine's pool that jobs may
    have. remedy: what gives more room. Raises CapacityError if no plan fits."""
    chosen = plans.for_job(config, plans.asked(config), room)
    least = "" if config.deterministic else "at least "
    require_room(chosen.num_tokens, chosen.num_bytes, room, least=least, remedy=remedy)
    return chosen


def require_room(num_tokens: int, needed: int, room: int, *, least: str = "", remedy: str = "raise memory_bytes") -> None:
    """Raises CapacityError if a micro-batch of `num_tokens` tokens needs more bytes than the pool has for jobs. least: said
    before what it needs."""
    if needed > room:
        raise CapacityError(
            f"max_microbatch_tokens: a micro-batch of {num_tokens} tokens needs {least}{needed / GIB:.2f} GiB and jobs may "
            f"have {room / GIB:.2f} GiB of the pool; lower max_microbatch_tokens, or {remedy}",
            param="max_microbatch_tokens",
        )


def recompute_fraction(plan: ModelPlan) -> float:
    """The share of forward's matrix FLOPs that backward runs again under a plan, as the scheduler counts it."""
    return plan.recompute_flops / max(1, plan.trained_forward_flops)


def choose_plan(plans: TrainingPlans, limit: float, cost: Callable[[ModelPlan], float]) -> ModelPlan:
    """The plan with the fewest FLOPs that costs at most `limit` bytes; if no point of the frontier does, the point that costs
    least. It is searched for between the first point that fits and the one before, which doesn't."""
    frontier = [plans.plan(), *(plans.plan(point.arena_bytes) for point in plans.frontier()[1:])]
    fitting = next((number for number, point in enumerate(frontier) if cost(point) <= limit), None)
    if fitting is None:
        return min(frontier, key=cost)
    found = frontier[fitting]
    low, high = found.arena_bytes, frontier[max(0, fitting - 1)].arena_bytes
    while high - low > 1:
        budget = (low + high) // 2
        tried = plans.plan(budget)
        if cost(tried) <= limit:
            found, low = tried, budget
        else:
            high = budget
    return found


def require_memory(needed: Mapping[str, int], available: int | None) -> None:
    """Raises CapacityError, listing all parts, if the sum of `needed` is over `available` bytes (None: unknown)."""
    total = sum(needed.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
    raise CapacityError(
        f"not enough memory: {total / GIB:.2f} GiB are needed ({parts}) and {available / GIB:.2f} GiB are available; lower "
        "max_microbatch_tokens, or use a smaller model or dtype", param="max_microbatch_tokens",
    )
