"""When a request would have its first token if requests were served as they come.

    arrival            first come, first served (fcfs_s)  fair_s
    |---- wait --------|---- as long again ---------------|
    prompts by deadline| from here on in order of arrival | from here on running requests wait if they must

First come, first served is a clock per tenant: a prompt begins when the tenant's prompts before it are through, and gets the
tenant's share of the machine. Decoding isn't counted, so the clock is never later than a real engine of that kind. Owns: that
clock. Does not own: the order of requests (waiting.py), how much of an iteration prompts get (hybrid.py).
"""

from __future__ import annotations


class FairTurns:
    """The clocks of the tenants that have requests."""

    def __init__(self) -> None:
        self._through: dict[str, float] = {}

    def enter(self, tenant: str, arrival_s: float, prompt_seconds: float, num_tenants: int) -> float:
        """When a new request would have its first token, in seconds of the engine's clock.

        prompt_seconds: what its prompt takes alone. num_tenants: how many share the machine at present, this one included.
        """
        finish = max(arrival_s, self._through.get(tenant, arrival_s)) + prompt_seconds * num_tenants
        self._through[tenant] = finish
        return finish

    def leave(self, tenant: str) -> None:
        """A tenant has no requests any more."""
        self._through.pop(tenant, None)
