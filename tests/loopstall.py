"""How long an event loop was not free: the longest time between two turns of a task that wants one every few milliseconds.

What runs on the loop itself and threads that keep Python's lock both show in it. So does a busy machine: `least_stall` tries
again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

BEAT_S = 0.004


class StallMeter:
    """Measures the loop that `start` is called on. Reading and `reset` may come from another thread."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; on the loop."""
        self._task = asyncio.get_running_loop().create_task(self._beat())

    def stop(self) -> None:
        """Ends; on the loop."""
        if self._task is not None:
            self._task.cancel()

    def reset(self) -> None:
        """Forgets what was measured."""
        self.longest_s = 0.0

    async def _beat(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(BEAT_S)
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last - BEAT_S)
            last = now


def least_stall(meter: StallMeter, work: Callable[[], object], limit_s: float, tries: int = 6) -> float:
    """The longest stall during `work`, in seconds: the least of some tries, as what else the machine does only adds to it."""
    found = float("inf")
    for _ in range(tries):
        time.sleep(3 * BEAT_S)
        meter.reset()
        work()
        time.sleep(3 * BEAT_S)
        found = min(found, meter.longest_s)
        if found < limit_s:
            break
    return found
