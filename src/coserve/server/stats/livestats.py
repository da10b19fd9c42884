"""Sliding windows: percentiles of what requests measured, and rates of the engine's counters.

Owns: what is remembered and for how long. Does not own: what a metric means (metrics.py), and no clock: callers give seconds.
Readers don't change anything, so that several viewers see the same figures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple


class Moment(NamedTuple):
    """A value, or several of one moment, by name."""

    time_s: float
    values: Mapping[str, float]


class Window:
    """Numbers of the last `span_s` seconds, at most `limit` of them."""

    def __init__(self, span_s: float, limit: int = 20_000) -> None:
        self.span_s = span_s
        self._entries: deque[tuple[float, float]] = deque(maxlen=limit)

    def add(self, time_s: float, value: float) -> None:
        """Times may come slightly out of order."""
        self._entries.append((time_s, value))

    def values(self, now_s: float) -> list[float]:
        """What is not too old."""
        while self._entries and self._entries[0][0] < now_s - self.span_s:
            self._entries.popleft()
        return [value for time_s, value in self._entries if time_s >= now_s - self.span_s]

    def mean(self, now_s: float) -> float | None:
        """None without values."""
        values = self.values(now_s)
        return sum(values) / len(values) if values else None


class Counters:
    """Samples of rising counters of the last `span_s` seconds. A counter that fell tells of a restart,
    which forgets what was before."""

    def __init__(self, span_s: float, spacing_s: float = 0.2) -> None:
        self.span_s, self.spacing_s = span_s, spacing_s
        self._samples: deque[Moment] = deque()

    def add(self, time_s: float, values: Mapping[str, float]) -> None:
        """Samples closer to the last one than `spacing_s` are left out, however many readers there are."""
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
        """Nothing is known any more: the engine is down."""
        self._samples.clear()

    def rises(self, span_s: float) -> tuple[float, Mapping[str, float]] | None:
        """(seconds, by how much each counter rose) over the last `span_s` before the newest sample, or since the sample before
        it if that is longer ago; None with one sample."""
        if len(self._samples) < 2:
            return None
        last, before = self._samples[-1], self._samples[-2]
        since = min(last.time_s - span_s, before.time_s)
        first = next(sample for sample in self._samples if sample.time_s >= since)
        seconds = last.time_s - first.time_s
        return seconds, {name: value - first.values.get(name, value) for name, value in last.values.items()}
