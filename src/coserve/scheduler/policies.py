"""Ways to share a device, as settings of one scheduler.

    policy            inference   finetuning                                              its rows in the inference pass
    coserve           always      in the time that deadlines leave                        where that pays
    layer-sliced      always      in the time that deadlines leave                        never
    inference-only    always      never
    finetune-only     never       always
    temporal:N        N iterations, then one micro-batch from end to end                  never
    dynamic-temporal  until every running request can wait, then one micro-batch          never

`spatial` is two engines in two processes, one inference-only and one finetune-only (coserve.bench).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from coserve.config.settings import parse_policy
from coserve.core import StepPlan
from coserve.scheduler.deadlines import UNBOUNDED
from coserve.scheduler.work import MicrobatchWork, Phase


class Turn(enum.Enum):
    """What an iteration may hold."""

    BOTH = "both"
    INFERENCE = "inference"
    FINETUNING = "finetuning"


class Policy:
    """What one policy allows, and whose turn it is."""

    def __init__(self, name: str) -> None:
        self.kind, self.interval = parse_policy(name)
        self.inference = self.kind != "finetune-only"
        self.finetuning = self.kind != "inference-only"
        self.fuses = self.kind == "coserve"
        self.adapts = self.kind == "dynamic-temporal"
        self.takes_turns = self.kind in ("temporal", "dynamic-temporal")
        self.inference_s = 0.0
        """Predicted time of iterations with requests since the last one with units."""
        self._iterations = 0
        self._under_way: int | None = None

    def turn(self, has_inference: bool, has_finetuning: bool, can_wait: bool) -> Turn:
        """What the next iteration may hold. has_finetuning: whether there is a unit or an optimizer slice to run. can_wait:
        whether every running request can wait until a whole micro-batch is through."""
        if not self.inference:
            return Turn.FINETUNING
        if not self.takes_turns:
            return Turn.BOTH
        if not has_finetuning:
            return Turn.INFERENCE
        due = can_wait if self.adapts else self._iterations >= self.interval
        if self._under_way is not None or due or not has_inference:
            return Turn.FINETUNING
        return Turn.INFERENCE

    def seconds(self, turn: Turn, left: float) -> float:
        """The seconds that units may take. left: what requests leave. A whole micro-batch that takes turns with requests has no
        limit of its own."""
        return UNBOUNDED if self.takes_turns and turn is Turn.FINETUNING else left

    def microbatch(self, works: Sequence[MicrobatchWork]) -> MicrobatchWork | None:
        """The micro-batch whose turn it is; None if no unit can run, or if micro-batches don't take turns.

        It is the one under way, or the first ready one while that waits for another. works: those of jobs that are not paused.
        """
        if not self.takes_turns:
            return None
        if not any(work.id == self._under_way and work.phase is not Phase.DONE for work in works):
            self._under_way = None
        ready = [work for work in works if work.ready]
        return next((work for work in ready if work.id == self._under_way), ready[0] if ready else None)

    def on_planned(self, plan: StepPlan) -> None:
        """Takes note of a plan: counts iterations with requests, and remembers the micro-batch under way."""
        if plan.spans:
            self._iterations += 1
            self.inference_s += plan.predicted_s
        if plan.units:
            self._iterations, self.inference_s = 0, 0.0
            self._under_way = plan.units[0].microbatch
