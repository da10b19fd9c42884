"""Numbers for metrics and autoscaling, from what a router sees: pure sums and moving shares.

Owns: these numbers. Does not own: what is done about them (Ray's autoscaler, an operator).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from coserve.cluster.load import Load

WINDOW_S = 60.0
"""Time constant of moving shares, in seconds."""


class RouterSummary(NamedTuple):
    """What a router knows of its replicas.

    replicas: known ones. suspect: those whose last report is too old. draining: those that take nothing new. running, waiting:
    outputs in reports. chosen, refused: requests since the start. missing_share: of the requests of about the last minute,
    those predicted to miss an objective, refused ones included. resident_share: of those with an adapter, those that went to a
    replica which had it. ttft_error_s: the mean absolute error of predicted TTFT. kv_pressure: share of all key-value blocks
    that requests hold. fullest: that share where it is largest. queue_s: seconds of prompts that wait, as the mean over
    replicas. headroom: share of the machines' time that training could have. job_backlog: jobs that wait, as given.
    """

    replicas: int
    suspect: int
    draining: int
    running: int
    waiting: int
    chosen: int
    refused: int
    missing_share: float
    resident_share: float
    ttft_error_s: float
    kv_pressure: float
    fullest: float
    queue_s: float
    headroom: float
    job_backlog: float


class MovingMean:
    """The mean of values, in which a value counts less the longer ago it came. value: 0 where none has come."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._sum = self._weight = self._at_s = 0.0

    def add(self, value: float, now: float) -> None:
        """One more value."""
        fade = math.exp(min(0.0, self._at_s - now) / self._window_s)
        self._sum, self._weight = self._sum * fade + value, self._weight * fade + 1.0
        self._at_s = max(self._at_s, now)

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0


class RouterSignals:
    """Counts what a router decides."""

    def __init__(self) -> None:
        self.chosen = self.refused = 0
        self._missing, self._resident, self._error = MovingMean(), MovingMean(), MovingMean()

    def on_choice(self, now: float, *, feasible: bool, resident: bool | None) -> None:
        """A request got a replica. resident: whether that has its adapter; None without one."""
        self.chosen += 1
        self._missing.add(not feasible, now)
        if resident is not None:
            self._resident.add(resident, now)

    def on_refusal(self, now: float) -> None:
        """A request got none, since all queues are over their bound."""
        self.refused += 1
        self._missing.add(1.0, now)

    def on_first_token(self, predicted_s: float, measured_s: float, now: float) -> None:
        """A first token has come."""
        self._error.add(abs(measured_s - predicted_s), now)

    def summary(self, loads: Sequence[Load], *, suspect: int, job_backlog: float) -> RouterSummary:
        """The numbers of now. loads: the last report of each replica."""
        blocks, free = sum(load.num_blocks for load in loads), sum(load.free_blocks for load in loads)
        count = max(1, len(loads))
        return RouterSummary(
            replicas=len(loads), suspect=suspect, draining=sum(load.draining for load in loads),
            running=sum(load.running for load in loads), waiting=sum(load.waiting for load in loads), chosen=self.chosen,
            refused=self.refused, missing_share=self._missing.value, resident_share=self._resident.value,
            ttft_error_s=self._error.value, kv_pressure=1 - free / blocks if blocks else 0.0,
            fullest=max((1 - load.free_blocks / load.num_blocks for load in loads if load.num_blocks), default=0.0),
            queue_s=sum(load.queued_prompt_tokens * load.prefill_s_per_token for load in loads) / count,
            headroom=sum(load.headroom for load in loads) / count, job_backlog=job_backlog,
        )
