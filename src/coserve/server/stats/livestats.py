"""Sliding windows: numbers measured by requests, and rates of the engine's counters.

Owns: what is remembered, and for how long. Does not own: what a metric means (metrics.py), a clock (callers give the time).
Reading doesn't change the figures, so that several viewers see the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple


class Moment(NamedTuple):
    """Values of one moment, by name."""

    time_s: float
    values: Mapping[str, float]


class Window:
    """The numbers of the last `span_s` seconds; of more than `limit` numbers the latest ones."""

    def __init__(self, span_s: float, limit: int = 20_000) -> None:
        self.span_s = span_s
        self._entries: deque[tuple[float, float]] = deque(maxlen=limit)

    def add(self, time_s: float, value: float) -> None:
        """Adds a number. Times may be slightly out of order."""
        self._entries.append((time_s, value))

    def values(self, now_s: float) -> list[float]:
        """The numbers that are not too old, in order of time."""
        while self._entries and self._entries[0][0] < now_s - self.span_s:
            self._entries.popleft()
        return [value for time_s, value in self._entries if time_s >= now_s - self.span_s]

    def mean(self, now_s: float) -> float | None:
        """The mean of the numbers; None without any."""
        values = self.values(now_s)
        return sum(values) / len(values) if values else None


class Counters:
    """Samples of rising counters, of the last `span_s` seconds. When a counter falls, the engine has been restarted, and older
    samples are forgotten."""

    def __init__(self, span_s: float, spacing_s: float = 0.2) -> None:
        self.span_s, self.spacing_s = span_s, spacing_s
        self._samples: deque[Moment] = deque()

    def add(self, time_s: float, values: Mapping[str, float]) -> None:
        """Adds a sample. It is left out if the last one is less than `spacing_s` seconds older, as with many readers."""
        if self._samples:
            last = self._samples[-1]
            if any(values[name] < value for name, value in last.values.items() if name in values):
                self._samples.clear()
            elif time_s - last.time_s < self.spacing_s:
                return
        self._samples.append(Moment(time_s, dict(values)))
        while self._samples[0].time_s < time_s - self.span_s:
            self._samples.popleft()

    def clear(self) -> None:
        """Forgets all samples, since the engine is down."""
        self._samples.clear()

    def rises(self, span_s: float) -> tuple[float, Mapping[str, float]] | None:
        """How much each counter rose: (in how many seconds, by how much), up to the newest sample. None with fewer than two.

        span_s: over how many seconds; more if the last two samples are further apart.
        """
        if len(self._samples) < 2:
            return None
        last, before = self._samples[-1], self._samples[-2]
        since = min(last.time_s - span_s, before.time_s)
        first = next(sample for sample in self._samples if sample.time_s >= since)
        seconds = last.time_s - first.time_s
        return seconds, {name: value - first.values.get(name, value) for name, value in last.values.items()}
