"""Notices that the engine process hangs: what a thread has begun doesn't end within a bound.

    every second: read the page --> how long has each thread done the same thing --> Hang, if one is over its bound

    bound = max(timeout, FACTOR x predicted time)

Time counts only while this process runs too: it is no hang if the machine was asleep, or both processes were halted from a
terminal. Owns: the bounds, the counting. Does not own: what follows from a hang (supervisor.py).
"""

from __future__ import annotations

import time
from typing import NamedTuple

from coserve.server.link.activity import PULSE, ActivityPage, Reading

LOOK_EVERY_S = 1.0
_MAX_PER_LOOK_S = 2.0
"""The most seconds that count between two looks, however long ago the first one was."""
FACTOR = 20.0
"""An activity may take so many times as long as was predicted: it is no hang if the machine has ten times too much to do."""


class Hang(NamedTuple):
    """seconds: for how long the place was seen with this activity. beside: what other threads did for at least half of that."""

    reading: Reading
    seconds: float
    beside: tuple[Reading, ...] = ()

    def __str__(self) -> str:
        others = "".join(f"; at the same time: {reading.activity}" for reading in self.beside)
        return f"no end for {self.seconds:.0f} s of: {self.reading.activity}{others}"


class Watchdog:
    """The watch over one engine process. timeout_s: the bound of an activity that is predicted to be short."""

    def __init__(self, page: ActivityPage, timeout_s: float) -> None:
        self._page, self._timeout_s = page, timeout_s
        self._seen: dict[int, tuple[int, float]] = {}  # place -> number, seconds
        self._looked: float | None = None

    def look(self, *, factor: float = FACTOR, now: float | None = None) -> Hang | None:
        """The worst hang, if there is one. factor: replaces FACTOR. now: seconds of the monotonic clock; None: read it."""
        now = time.monotonic() if now is None else now
        passed = 0.0 if self._looked is None else min(now - self._looked, _MAX_PER_LOOK_S)
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
