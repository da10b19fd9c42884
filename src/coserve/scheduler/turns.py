"""When a request would have its first token if requests were served as they come.

This time is the request's fcfs_s. A prompt that still waits then is late (prompts.py). Once it has waited 1.5 times as long,
its tenant's prompts go in order of arrival (waiting.py).

Each tenant has a clock: a prompt begins when the tenant's prompts before it are through, and it gets the tenant's share of the
machine. Decoding isn't counted, so that a real engine that serves first come, first served is never earlier.
Owns: that clock. Does not own: what follows from it.
"""

from __future__ import annotations


class FairTurns:
    """The clocks of the tenants that have requests."""

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
