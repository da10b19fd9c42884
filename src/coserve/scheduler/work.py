"""Finetuning work as the scheduler sees it: how far each micro-batch is, in integers, and what may come next.

Forward: windows go from left to right. The window under way is [start, end). All its rows have passed layers [0, layer), and
its rows [start, row) have passed the next layer too. So a window can go through a layer in pieces. At the last layer it often
must, because the loss head of a large window can cost more than all layers.

Backward: layers go from the top down, from right to left in each. Rows [backward_row, num_tokens) of layer `backward_layer` are
done.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from coserve.core import Direction, OptimizerSlice, Unit


class Phase(enum.Enum):
    FORWARD = "forward"
    OBJECTIVE = "objective"
    """All rows are through forward, and the training objective has not given its coefficients yet."""
    BACKWARD = "backward"
    DONE = "done"


@dataclass(slots=True, kw_only=True)
class MicrobatchWork:
    """One micro-batch in flight.

    lowest: the lowest trained layer. bounds: rows [first, end) of each example. label_rows: rows with a label, ascending.
    forward_only: whether it has no backward, as for validation and references. grid: windows begin at multiples of it and go
    through layers whole, so that no sum depends on how much time there was; None allows any windows. recompute_fraction: the
    share of forward, by matrix FLOPs, that its backward runs again, from 0 to 1.
    """

    id: int
    job: int
    num_tokens: int
    num_layers: int
    lowest: int
    bounds: Sequence[tuple[int, int]]
    label_rows: Sequence[int]
    forward_only: bool = False
    grid: int | None = None
    recompute_fraction: float = 0.0
    phase: Phase = Phase.FORWARD
    start: int = 0
    end: int = 0
    layer: int = 0
    row: int = 0
    backward_layer: int = field(init=False)
    backward_row: int = field(init=False)
    _pairs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.backward_layer, self.backward_row = self.num_layers - 1, self.num_tokens
        self._pairs = [0]
        for first, end in self.bounds:
            base, length = self._pairs[-1], end - first
            self._pairs += [base + i * (i + 1) // 2 for i in range(1, length + 1)]

    def pairs(self, start: int, end: int) -> int:
        """Query-key pairs of rows [start, end), per layer."""
        return self._pairs[end] - self._pairs[start]

    def labels(self, start: int, end: int) -> int:
        """Label rows in [start, end)."""
        return bisect.bisect_left(self.label_rows, end) - bisect.bisect_left(self.label_rows, start)

    @property
    def ready(self) -> bool:
        """Whether a unit may come next."""
        return self.phase in (Phase.FORWARD, Phase.BACKWARD)

    def on_objective(self) -> None:
        """The training objective has given its coefficients, so that backward may begin."""
        assert self.phase is Phase.OBJECTIVE
        self.phase = Phase.DONE if self.forward_only or self.lowest >= self.num_layers else Phase.BACKWARD

    def advance(self, unit: Unit) -> None:
        """Goes on behind a unit that was planned."""
        if unit.direction is Direction.FORWARD:
            self._advance_forward(unit)
            return
        self.backward_row = unit.start
        if unit.start == 0:
            self.backward_layer, self.backward_row = unit.layer_start - 1, self.num_tokens
            if self.backward_layer < self.lowest:
                self.phase = Phase.DONE

    @property
    def between_windows(self) -> bool:
        """Whether the next forward unit begins a window."""
        return self.start == self.end

    def _advance_forward(self, unit: Unit) -> None:
        if self.between_windows:
            self.start, self.end = unit.start, unit.end
        self.layer, self.row = unit.layer_start, unit.end
        if self.row < self.end:
            return
        self.layer, self.row = unit.layer_end, self.start
        if self.layer == self.num_layers:
            self.start = self.row = self.end
            self.layer = 0
            if self.end == self.num_tokens:
                self.phase = Phase.OBJECTIVE


@dataclass(slots=True, kw_only=True)
class JobWork:
    """One job: its micro-batches in flight and its optimizer step.

    weight: its share among jobs. optimizer_elements: parameters that the optimizer step under way updates; 0 without a step.
    optimizer_done: how many first ones of them are planned. refresh_seconds: how long it takes per step to refresh what
    adapters derive from the parameters, such as DoRA's norms; it was measured once.
    """

    id: int
    tenant: str
    weight: float = 1.0
    paused: bool = False
    microbatches: dict[int, MicrobatchWork] = field(default_factory=dict)
    optimizer_elements: int = 0
    optimizer_done: int = 0
    refresh_seconds: float = 0.0

    def take_slice(self, elements: int) -> OptimizerSlice:
        """The next slice of the optimizer step, of at most `elements`."""
        end = min(self.optimizer_elements, self.optimizer_done + elements)
        part = OptimizerSlice(self.id, self.optimizer_done, end)
        self.optimizer_done = end
        return part

    @property
    def optimizer_left(self) -> int:
        return self.optimizer_elements - self.optimizer_done

    def slice_refresh_seconds(self, elements: int) -> float:
        """The part of refresh_seconds that falls to a slice of the present step."""
        return self.refresh_seconds * elements / self.optimizer_elements
