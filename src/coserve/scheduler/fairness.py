"""Weighted fair sharing by virtual token counters: whoever has had the fewest tokens per weight is next.

A party that comes back has its counter lifted to that of the least served active party, so that nobody saves up credit while
idle. Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (VTC).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class TokenCounters:
    """Counts the tokens that each party has had, divided by its weight. A party is a tenant or a job."""

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._weights: dict[Hashable, float] = {}

    def enter(self, party: Hashable, active: Iterable[Hashable], weight: float = 1.0) -> None:
        """A party has work again. Its counter becomes at least that of the least served of the `active` parties."""
        level = min((self._served.get(other, 0.0) for other in active if other != party), default=0.0)
        self._served[party] = max(self._served.get(party, 0.0), level)
        self._weights[party] = weight

    def charge(self, party: Hashable, tokens: float) -> None:
        """A party was served `tokens`."""
        self._served[party] = self._served.get(party, 0.0) + tokens / self._weights.get(party, 1.0)

    def served(self, party: Hashable) -> float:
        """The tokens that a party has had, divided by its weight."""
        return self._served.get(party, 0.0)

    def leave(self, party: Hashable) -> None:
        """Forgets a party."""
        self._served.pop(party, None)
        self._weights.pop(party, None)
