"""The clock of a simulation: seconds that pass only when somebody says so."""

from __future__ import annotations


class VirtualClock:
    """Called, it gives its time in seconds from the start. Only `advance` moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Lets 0 or more seconds pass."""
        assert seconds >= 0
        self.now_s += seconds
