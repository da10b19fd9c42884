"""Moments in the work of a device: when it has got so far, and how long it took from one to another.

    host:    plan n | launch n | wait for tokens n | texts n, plan n + 1 | launch n + 1 | ...
    device:           pass n, sampling n, units n ............................. | pass n + 1 ...
             mark ----^                                                       ^---- mark

On CUDA a mark is an event in the stream, which the host may ask for or wait for. A CPU has done its work when the call returns,
so a mark there is a time of the engine's clock. Owns: marks, and which iterations are not over yet. Does not own: what runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

import torch

from coserve.core import MeasuredStep, StepPlan


class Mark(Protocol):
    """A moment in the device's work."""

    def passed(self) -> bool:
        """Whether the device has got so far. Does not wait."""

    def wait(self) -> None:
        """Waits until it has."""

    def seconds_since(self, earlier: Self) -> float:
        """From an earlier mark to this one, both of which the device has passed."""


class ClockMark:
    """A mark of a device that has done all that it was told: now, by `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.time_s = clock()

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def seconds_since(self, earlier: ClockMark) -> float:
        return self.time_s - earlier.time_s


class CudaMark:
    """An event in the device's present stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def passed(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: CudaMark) -> float:
        return earlier._event.elapsed_time(self._event) / 1e3


class _Running(NamedTuple):
    plan: StepPlan
    began: Mark
    ended: Mark


class RunningSteps:
    """Iterations that the device was told and that may not be over."""

    def __init__(self) -> None:
        self._running: deque[_Running] = deque()

    def __len__(self) -> int:
        return len(self._running)

    def add(self, plan: StepPlan, began: Mark, ended: Mark) -> None:
        """An iteration has been launched behind the others."""
        self._running.append(_Running(plan, began, ended))

    def wait_for_all_but(self, last: int) -> None:
        """Waits until at most the `last` newest may still run."""
        if len(self._running) > last:
            self._running[-1 - last].ended.wait()

    def take_ended(self) -> Iterator[MeasuredStep]:
        """Those that are over, oldest first; each is given once."""
        while self._running and self._running[0].ended.passed():
            step = self._running.popleft()
            yield MeasuredStep(step.plan, step.ended.seconds_since(step.began))
