"""Peak memory of training: after each stage of the compiler, and along the curve of memory against recomputation.

Owns: the stages, the parts of a total, and the choice of a plan for a total. Does not own: what the engine takes (budget.py),
or what may be kept or run again (compiler/rematerialize.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coserve.compiler.lower import lower
from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.plan import LayerBypass, ModelPlan, TrainingPlans
from coserve.compiler.program import LayerPlan
from coserve.compiler.rematerialize import Kept, Rematerialized
from coserve.config.settings import Compression
from coserve.config.values import Quantization
from coserve.core import CapacityError
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, rank_architecture
from coserve.planning.budget import choose_plan, training_bytes
from coserve.runtime.executor import head_rows
from coserve.runtime.microbatch import microbatch_layout

_IN_WINDOWS = "token-level"
STAGES: Mapping[str, str] = {
    "prune": "what the pruned backward reads",
    "rematerialize": "element-wise values made again",
    "budget": "matrix products made again, to fit",
    "compress": "kept values in fewer bytes",
    _IN_WINDOWS: "one window's transients instead of a micro-batch's",
}
"""Stage -> what it leaves in memory, in order. In all stages but the last a window is the whole micro-batch."""

_COMPRESSED: Mapping[Compression, str] = {
    "none": "as before: not asked for", "lossless": "bits where only signs are read",
    "fp8": "kept values in 8-bit floats, which changes gradients a little",
}

PARTS = ("kept activations", "gradients", "workspace", "loss")
"""The parts of a total. gradients: of the residual stream, its parked rows, and of one layer's keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A micro-batch of `num_tokens` tokens in sequences of `sequence_length`, trained in windows of `window_tokens`. itemsize:
    bytes per element of the model. num_parameters: of the adapter, on each rank. ranks: the group that shares the model; all
    bytes are those of one rank. quantization: of the linears."""

    arch: Architecture
    itemsize: int
    num_tokens: int
    sequence_length: int
    window_tokens: int
    num_parameters: int
    ranks: TensorParallel | None = None
    quantization: Quantization = "none"

    @property
    def rank_arch(self) -> Architecture:
        """What each rank has of the model."""
        return self.arch if self.ranks is None else rank_architecture(self.arch, self.ranks.size)

    def parts(self, plan: ModelPlan, window_tokens: int) -> dict[str, int]:
        """Bytes at the peak, by the names of PARTS."""
        layout = microbatch_layout(plan, self.num_tokens, self.rank_arch, self.itemsize, forward_only=False)
        return {
            "kept activations": layout.arena, "gradients": layout.total - layout.arena,
            "workspace": self._accounted(plan, window_tokens)["workspace"],
            "loss": loss_bytes(self.rank_arch, window_tokens, self.itemsize),
        }

    def total(self, plan: ModelPlan) -> int:
        """Bytes at the peak in windows of `self.window_tokens`: the sum of the parts."""
        return sum(self.parts(plan, self.window_tokens).values())

    def apart(self, plan: ModelPlan) -> dict[str, int]:
        """Bytes that no total includes: the backbone, and the adapter with its gradient, master and AdamW's state."""
        held = self._accounted(plan, self.window_tokens)
        return {name: held[name] for name in ("weights", "adapter and optimizer")}

    def _accounted(self, plan: ModelPlan, window_tokens: int) -> dict[str, int]:
        return training_bytes(
            self.rank_arch, plan, self.num_parameters, microbatch_tokens=self.num_tokens, window_tokens=window_tokens,
            itemsize=self.itemsize, quantization=self.quantization,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """bytes_per_token: kept from forward to backward, all layers. parts: bytes at the peak, by the names of PARTS.
    extra_flops_ratio: FLOPs of matrix products run again, relative to forward and backward."""

    name: str
    note: str
    bytes_per_token: int
    parts: Mapping[str, int]
    extra_flops_ratio: float

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One plan of the curve; the total is in windows of `Shape.window_tokens`."""

    bytes_per_token: int
    total_bytes: int
    extra_flops_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """plan: the plan for the limit. in_flight_bytes: what its micro-batch takes of the pool, which is what `activation_memory`
    limits. apart: as `Shape.apart`. checkpointing_flops_ratio: what gradient checkpointing would cost: one more forward,
    relative to forward and backward."""

    plan: ModelPlan
    stages: tuple[Stage, ...]
    curve: tuple[CurvePoint, ...]
    apart: Mapping[str, int]
    checkpointing_flops_ratio: float

    @property
    def in_flight_bytes(self) -> int:
        parts = self.stages[-1].parts
        return parts["kept activations"] + parts["gradients"]


def loss_bytes(arch: Architecture, window_tokens: int, itemsize: int) -> int:
    """Bytes of the loss head beyond the workspace: hidden and gradient rows of a window of labels, and four tensors of rows for
    a chunk of them. A dtype below 4 bytes adds the chunk's logits in float32 and their gradient. A fused head (CUDA) has
    chunks of at least 1,024 rows, which take nothing beyond the workspace; `training_bytes` counts them if told so, and
    estimates are without them."""
    rows = min(head_rows(arch.vocab_size, itemsize), window_tokens)
    streams = (2 * window_tokens + 4 * rows) * arch.hidden_size * itemsize
    return streams + (rows * arch.vocab_size * (4 + itemsize) if itemsize < 4 else 0)


def keep_everything(arch: Architecture, plan: ModelPlan, itemsize: int) -> ModelPlan:
    """The same training, but every value that the pruned backward reads is kept, and nothing is computed again."""
    cache: dict[int, LayerPlan] = {}
    for layer in plan.layers:
        joint = layer.joint
        if id(joint) not in cache:
            read = {*joint.saved(), *joint.read_whole()}
            kept = tuple(Kept(name, "read by backward") for name in joint.forward.values if name in read)
            cache[id(joint)] = lower(Rematerialized(joint, kept), merged=MERGED, itemsize=itemsize)
    return ModelPlan(layers=tuple(cache[id(layer.joint)] for layer in plan.layers))


def estimate(
    shape: Shape, bypasses: Sequence[LayerBypass], limit: float | None, num_points: int = 25,
    compression: Compression = "lossless",
) -> Estimate:
    """Memory after every stage, and the curve of memory against recomputation.

    limit: of the total in windows, in bytes; below 1, a share of the fastest plan's total. With None no matrix product is run
    again. Stages before `compress` show the plan for the same limit without compression, or the smallest if none fits. Raises
    CapacityError if no plan fits with compression.
    """

    def planned(how: Compression) -> TrainingPlans:
        return TrainingPlans(
            shape.arch, bypasses, itemsize=shape.itemsize, sequence_length=shape.sequence_length, compression=how,
            ranks=shape.ranks,
        )

    plans = planned(compression)
    whole = planned("none") if plans.compresses else plans
    fastest, first = plans.plan(), whole.plan()
    curve = [fastest, *(plans.plan(point.arena_bytes) for point in plans.frontier(num_points)[1:])]
    if limit is not None and limit < 1:
        limit *= shape.total(fastest)
    asked = before = fastest
    if limit is not None:
        asked = before = choose_plan(plans, limit, shape.total)
        _check_limit(shape, asked, limit)
    if whole is not plans:
        before = first if limit is None else choose_plan(whole, limit, shape.total)
    own = {"prune": keep_everything(shape.arch, first, shape.itemsize), "rematerialize": first, "budget": before}
    notes = {**STAGES, "compress": _COMPRESSED[compression] if whole is not plans else "as before: nothing to compress"}
    if before is first:
        notes["budget"] = "as before: nothing less was asked"
    work = fastest.forward_flops + fastest.backward_flops
    return Estimate(
        plan=asked, stages=tuple(_stage(shape, name, note, own.get(name, asked)) for name, note in notes.items()),
        curve=tuple(
            CurvePoint(bytes_per_token=p.arena_bytes, total_bytes=shape.total(p), extra_flops_ratio=p.extra_flops_ratio)
            for p in curve
        ),
        apart=shape.apart(asked), checkpointing_flops_ratio=fastest.forward_flops / max(1, work),
    )


def _check_limit(shape: Shape, least: ModelPlan, limit: float) -> None:
    if shape.total(least) > limit:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in shape.parts(least, shape.window_tokens).items())
        raise CapacityError(
            f"activation_memory: a micro-batch of {shape.num_tokens} tokens takes at least {shape.total(least) / 1e9:.3g} GB "
            f"({parts}), and {limit / 1e9:.3g} GB are allowed; lower max_microbatch_tokens or window_tokens",
            param="activation_memory",
        )


def _stage(shape: Shape, name: str, note: str, plan: ModelPlan) -> Stage:
    parts = shape.parts(plan, shape.window_tokens if name == _IN_WINDOWS else shape.num_tokens)
    ratio = plan.extra_flops_ratio if name != "prune" else 0.0
    return Stage(name=name, note=note, bytes_per_token=plan.arena_bytes, parts=parts, extra_flops_ratio=ratio)
