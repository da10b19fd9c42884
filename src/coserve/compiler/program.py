"""What lowering produces: flat lists of bound calls over planned storages. Data only; the runtime executes it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.compiler.flops import NO_FLOPS, LayerFlops
from coserve.compiler.graph import Element, JointGraph, Node
from coserve.compiler.rematerialize import Kept
from coserve.ops.run import PAIRS, Runner


class Place(enum.Enum):
    """Where a storage lives."""

    WORK = "workspace"
    """Transient: window rows in the planned workspace."""
    ARENA = "arena"
    """Kept from forward to backward: a row range of the micro-batch's arena."""
    INPUT = "input"
    """The layer's input rows."""
    OUTPUT = "output"
    """The layer's output rows."""
    GRAD = "gradient"
    """The residual stream's gradient rows, rewritten in place from layer to layer."""


@dataclass(frozen=True, slots=True)
class Storage:
    """offset: bytes per row before it in its place (WORK and ARENA)."""

    place: Place
    width: int
    element: Element
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """Columns [column, column + width) of a storage."""

    storage: int
    column: int
    width: int


@dataclass(frozen=True, slots=True)
class Call:
    """One bound call: outs and ins are slot numbers. op names the operator; of operators that are joined, the last, which
    also has the parameter."""

    run: Runner
    op: str
    weight: str | None
    attrs: Mapping[str, Any]
    accumulate: bool
    outs: tuple[int, ...]
    ins: tuple[int, ...]

    @property
    def factors(self) -> tuple[str, ...]:
        """What it multiplies by, by name: the factors of several sites in a joined call (`compiler/factors.py`); else its
        weight, or the operator where there is none."""
        if self.run is PAIRS:
            return (*self.attrs["down"], *self.attrs["up"])
        return (self.weight or self.op,)


@dataclass(frozen=True, slots=True)
class Program:
    """calls in order; work_bytes: workspace bytes per row."""

    calls: tuple[Call, ...]
    slots: tuple[Slot, ...]
    storages: tuple[Storage, ...]
    work_bytes: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's programs, and what lies between them.

    arena: the storages that forward keeps, with offsets; arena_bytes per token. keys, values: where attention's K and V lie
    in the arena (None for an inference plan). keeps_input: whether the arena holds the layer's input rows, at input_offset.
    """

    joint: JointGraph
    forward: Program
    backward: Program | None
    kept: tuple[Kept, ...]
    arena: tuple[Storage, ...]
    arena_bytes: int
    keys: Slot | None
    values: Slot | None
    keeps_input: bool
    input_offset: int
    kept_slots: Mapping[str, Slot]
    """Where each kept value but the input lies in the arena."""
    recompute: tuple[Node, ...] = ()
    """Forward nodes that backward runs again, window by window."""
    flops: LayerFlops = NO_FLOPS


@dataclass(frozen=True, slots=True)
class Keep:
    """How one value comes into the arena: the first `width` columns of its rows in `source` are copied to `targets`, or packed
    into them by `pack`. The source may be wider: a product with an adapter's first factor has the width of the batch's largest
    rank."""

    source: Slot
    width: int
    targets: tuple[Slot, ...]
    pack: Runner | None = None


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A forward program over rows of requests, and of training if there are any. keeps: what follows it, for the training rows
    of the kept values; K and V are not among them, as attention writes them."""

    program: Program
    keeps: tuple[Keep, ...]
