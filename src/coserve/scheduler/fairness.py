"""What each party has had, here and elsewhere, and when each tenant's prompts would be through.

Fair sharing is by virtual token counters: whoever has had the fewest tokens per weight is next. A party that comes back has its
counter lifted to that of the least served active party, so that nobody saves up credit while idle. Source: Sheng et al. 2024,
"Fairness in Serving Large Language Models" (VTC). Where several engines share the requests, a tenant is also charged for what
the others served it, within limits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

LEAD_TOKENS = 8192.0
"""What tenants were served elsewhere puts them behind others here by at most so many tokens at once."""
ELSEWHERE_SHARE = 0.75
"""In the long run it costs a tenant at most this share of its turns here, so that none of its requests waits for ever."""


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


class ElsewhereCharges:
    """Charges tenants for what other engines served them, within an allowance.

    A tenant's allowance is LEAD_TOKENS at first, and grows back by ELSEWHERE_SHARE of what the least served of the other active
    tenants gets here. So its requests here wait for at most a few times LEAD_TOKENS of others' tokens, and then have their
    turns.
    """

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._left: dict[str, tuple[float, float]] = {}
        """By tenant: what is left of its allowance, and the least counter of the others at its last charge."""

    def charge(self, tokens: Mapping[str, int], active: Iterable[str]) -> None:
        """Tenants were served so many tokens by other engines. active: tenants with requests here. Where nobody else is active,
        a charge changes nothing, as nobody waits for a turn."""
        least = sorted((self._counters.served(tenant), tenant) for tenant in active)[:2]
        for tenant, amount in tokens.items():
            level = next((served for served, other in least if other != tenant), None)
            if level is None:
                self._left.pop(tenant, None)
                continue
            left, before = self._left.get(tenant, (LEAD_TOKENS, level))
            left = min(LEAD_TOKENS, left + ELSEWHERE_SHARE * max(0.0, level - before))
            charged = min(float(amount), left)
            self._counters.charge(tenant, charged)
            self._left[tenant] = left - charged, level


class FairTurns:
    """When a request would have its first token if requests were served as they come: a clock per tenant with requests.

    This time is the request's fcfs_s. A prompt that still waits then is late (prompts.py). Once it has waited 1.5 times as
    long, its tenant's prompts go in order of arrival (waiting.py). A prompt begins when the tenant's prompts before it are
    through, and it gets the tenant's share of the machine. Decoding isn't counted, so that a real engine that serves first
    come, first served is never earlier.
    """

    def __init__(self) -> None:
        self._through: dict[str, float] = {}

    def enter(self, tenant: str, arrival_s: float, prompt_seconds: float, num_tenants: int) -> float:
        """When a new request would have its first token, in seconds of the engine's clock.

        prompt_seconds: what its prompt takes alone. num_tenants: how many share the machine now, this one included.
        """
        finish = max(arrival_s, self._through.get(tenant, arrival_s)) + prompt_seconds * num_tenants
        self._through[tenant] = finish
        return finish

    def leave(self, tenant: str) -> None:
        """Forgets a tenant that has no requests any more."""
        self._through.pop(tenant, None)
