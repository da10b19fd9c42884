"""Ways to share a device, as settings of one scheduler.

    policy            inference   finetuning                                              fuses
    coserve           always      what the deadlines leave                                where it pays
    layer-sliced      always      the same, never in the inference pass                   no
    inference-only    always      never                                                   -
    finetune-only     never       always                                                  -
    temporal:N        N iterations, then one micro-batch from end to end                  no
    dynamic-temporal  until every running request can wait, then one micro-batch          no

`spatial` is two engines in two processes, one inference-only and one finetune-only (coserve.bench).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from coserve.config import parse_policy
from coserve.core import StepPlan
from coserve.scheduler.units import WHOLE
from coserve.scheduler.work import MicrobatchWork, Phase


class Turn(enum.Enum):
    """What an iteration may hold."""

    BOTH = "both"
    INFERENCE = "inference"
    FINETUNING = "finetuning"


class Policy:
    """One policy's state: whose turn it is."""

    def __init__(self, name: str) -> None:
        self.kind, self.interval = parse_policy(name)
        self.inference = self.kind != "finetune-only"
        self.finetuning = self.kind != "inference-only"
        self.fuses = self.kind == "coserve"
        self.adapts = self.kind == "dynamic-temporal"
        self.takes_turns = self.kind in ("temporal", "dynamic-temporal")
        self._iterations = 0
        self._under_way: int | None = None

    def turn(self, has_inference: bool, can_wait: bool) -> Turn:
        """The next iteration's. can_wait: every running request can wait for a whole micro-batch."""
        if not self.inference:
            return Turn.FINETUNING
        if not self.takes_turns:
            return Turn.BOTH
        due = can_wait if self.adapts else self._iterations >= self.interval
        if self._under_way is not None or due or not has_inference:
            return Turn.FINETUNING
        return Turn.INFERENCE

    def seconds(self, turn: Turn, left: float) -> float:
        """Time for units: what is left, or as long as a whole micro-batch takes."""
        return WHOLE if self.takes_turns and turn is Turn.FINETUNING else left

    def ran(self, plan: StepPlan, works: Sequence[MicrobatchWork]) -> None:
        """Counts inference iterations, and follows the micro-batch under way to its end."""
        if not self.takes_turns:
            return
        if plan.spans:
            self._iterations += 1
        if plan.units:
            self._iterations = 0
            self._under_way = plan.units[0].microbatch
        if self._under_way is not None and not any(w.id == self._under_way and w.phase is not Phase.DONE for w in works):
            self._under_way = None
