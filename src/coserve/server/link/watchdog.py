"""Notices that the engine process hangs: something that a thread has begun doesn't end within its bound.

    every second: read the page --> how long has each place been at the same thing --> Hang, if one is over its bound

    bound = max(timeout, FACTOR x predicted time)

Time counts only while this process runs too, so that a machine that was asleep, or both processes halted from a terminal, is
no hang. Owns: the bounds, the counting. Does not own: what follows (engineclient.py).
"""

from __future__ import annotations

import time
from typing import NamedTuple

from coserve.server.link.activity import PULSE, ActivityPage, Reading

LOOK_EVERY_S = 1.0
_MOST_PER_LOOK_S = 2.0
"""Seconds that one look counts at most, however long ago the look before was."""
FACTOR = 20.0
"""A thing may take so many times what was predicted: a machine that is loaded tenfold is no hang."""


class Hang(NamedTuple):
    """seconds: for which it has been seen at the same thing. beside: what other threads were busy with all that time."""

    reading: Reading
    seconds: float
    beside: tuple[Reading, ...] = ()

    def __str__(self) -> str:
        others = "".join(f"; at the same time: {reading.activity}" for reading in self.beside)
        return f"no end for {self.seconds:.0f} s of: {self.reading.activity}{others}"


class Watchdog:
    """The watch over one engine process. timeout_s: the bound of what is predicted to be short."""

    def __init__(self, page: ActivityPage, timeout_s: float) -> None:
        self._page, self._timeout_s = page, timeout_s
        self._seen: dict[int, tuple[int, float]] = {}  # place -> number, seconds
        self._looked: float | None = None

    def look(self, *, factor: float = FACTOR, now: float | None = None) -> Hang | None:
        """The worst hang, if there is one. factor: instead of FACTOR; now: of the monotonic clock."""
        now = time.monotonic() if now is None else now
        passed = 0.0 if self._looked is None else min(now - self._looked, _MOST_PER_LOOK_S)
        self._looked = now
        seen: dict[int, tuple[int, float]] = {}
        hangs: list[Hang] = []
        busy = self._page.read()
        for reading in busy:
            number, seconds = self._seen.get(reading.place, (-1, 0.0))
            seconds = seconds + passed if number == reading.number else 0.0
            seen[reading.place] = (reading.number, seconds)
            if seconds > max(self._timeout_s, factor * reading.predicted_s):
                hangs.append(Hang(reading, seconds))
        self._seen = seen
        if not hangs:
            return None
        # What somebody asked for says more than a pulse that is silent.
        worst = max(hangs, key=lambda hang: (hang.reading.place != PULSE, hang.seconds))
        stuck = [r for r in busy if r is not worst.reading and r.place != PULSE and seen[r.place][1] >= worst.seconds / 2]
        return worst._replace(beside=tuple(stuck))
