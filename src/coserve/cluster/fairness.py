"""What tenants have been served by all replicas, so that each engine's turns take account of the whole fleet.

    ingress: served here --> TenantLedger.add --> close_round, once a second --> each engine: what tenants got elsewhere,
                                                                                 which it charges (scheduler/fairness.py)

Every token is served through one ingress. So each ingress keeps a ledger of its own requests alone and tells every engine, and
no token is charged twice, however many ingresses there are. Owns: the sums of a round. Does not own: what a charge does to a
tenant's turns, messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


class TenantLedger:
    """Tokens served since the last round, by replica and tenant."""

    def __init__(self) -> None:
        self._served: dict[str, Counter[str]] = {}

    def add(self, replica: str, tenant: str, tokens: int) -> None:
        """A replica served a tenant: tokens of a prompt that it computed, or tokens of outputs."""
        assert tokens >= 0
        self._served.setdefault(replica, Counter())[tenant] += tokens

    def close_round(self, replicas: Iterable[str]) -> Mapping[str, Mapping[str, int]]:
        """For each of the replicas: what tenants have been served elsewhere since the last round. Those with nothing are left
        out. The next round begins."""
        total: Counter[str] = Counter()
        for served in self._served.values():
            total.update(served)
        rounds = {}
        for replica in replicas:
            own = self._served.get(replica)
            elsewhere = {
                tenant: tokens - (own[tenant] if own else 0) for tenant, tokens in total.items()
                if tokens > (own[tenant] if own else 0)
            }
            if elsewhere:
                rounds[replica] = elsewhere
        self._served.clear()
        return rounds
