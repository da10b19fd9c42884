"""Places in the engine's queue, which are shared among tenants before a request is sent to the engine.

    places are free       whoever asks gets them, all of them if nobody else wants any
    none is free          each tenant's share is the capacity divided by the number of tenants that hold or want places.
        over its share    a tenant that asks is refused (429).
        within it         it gets the places of another request, which is refused instead: the newest one of the tenant that
                          holds the most places, and rather one that hasn't begun.

So a tenant that stays within its share is never refused because of what others send. Owns: who holds how many places, who must
give them back. Does not own: the order in which waiting requests begin (the engine's scheduler).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from coserve.core import CapacityError

_LATER = "try again later"


@dataclass(slots=True, eq=False)
class Claim:
    """The places of one request, one for each output that has not ended. begun: whether tokens have come."""

    tenant: str
    count: int
    refuse: Callable[[CapacityError], None]
    begun: bool = False


class Places:
    """All places of a server. It belongs to one event loop."""

    def __init__(self, capacity: int, most: int | None = None) -> None:
        """capacity: how many outputs run or wait. most: how many of one tenant may, even if nobody else wants any places."""
        self._capacity, self._most = capacity, capacity if most is None else most
        self._held: Counter[str] = Counter()
        self._claims: dict[Claim, None] = {}  # oldest first

    def take(self, tenant: str, count: int, refuse: Callable[[CapacityError], None]) -> Claim:
        """Places for a request of so many outputs. Raises CapacityError.

        refuse: is called if the request loses its places to another tenant.
        """
        wanted = self._held[tenant] + count
        if wanted > self._most:
            raise CapacityError(f"{self._held[tenant]} of your outputs run or wait, of at most {self._most}; {_LATER}")
        self._make_room(tenant, count, wanted)
        claim = Claim(tenant, count, refuse)
        self._held[tenant] += count
        self._claims[claim] = None
        return claim

    def give_back(self, claim: Claim, count: int | None = None) -> None:
        """So many of the request's outputs have ended; None: all of them."""
        count = claim.count if count is None else min(count, claim.count)
        claim.count -= count
        self._held[claim.tenant] -= count
        if not self._held[claim.tenant]:
            del self._held[claim.tenant]
        if not claim.count:
            self._claims.pop(claim, None)

    def _make_room(self, tenant: str, count: int, wanted: int) -> None:
        while self._held.total() + count > self._capacity:
            share = self._capacity // len({*self._held, tenant})
            if wanted > share:
                raise CapacityError(
                    f"{self._held.total()} outputs run or wait, {self._held[tenant]} of them yours; your share is {share} now; "
                    f"{_LATER}"
                )
            largest = max(self._held, key=lambda other: self._held[other])
            claims = [claim for claim in self._claims if claim.tenant == largest]
            newest = max(enumerate(claims), key=lambda item: (not item[1].begun, item[0]))[1]
            self.give_back(newest)
            newest.refuse(CapacityError(f"other tenants need the places of your waiting requests; {_LATER}"))
