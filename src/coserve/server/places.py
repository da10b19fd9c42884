"""Places in the engine's queue, shared among tenants before anything is sent to the engine.

    room                  whoever asks gets places, all of them if nobody else wants any
    no room               each tenant's share is the capacity divided by the tenants that hold or want places:
        over its share    the one who asks is refused (429)
        within it         the newest request of the tenant that holds the most is refused instead, one that hasn't begun if
                          there is one

So a tenant that stays within its share is never refused for what others send. Owns: who holds how many places, who must give
them back. Does not own: the order in which waiting requests begin (the engine's scheduler).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from coserve.core import CapacityError

_LATER = "try again later"


@dataclass(slots=True, eq=False)
class Claim:
    """Places of one request, one for each output. begun: whether tokens have come."""

    tenant: str
    count: int
    refuse: Callable[[CapacityError], None]
    begun: bool = False


class Places:
    """Belongs to one event loop."""

    def __init__(self, capacity: int, most: int | None = None) -> None:
        """capacity: outputs that run or wait; most: of one tenant, even where nobody else wants any."""
        self._capacity, self._most = capacity, capacity if most is None else most
        self._held: Counter[str] = Counter()
        self._claims: dict[Claim, None] = {}  # oldest first

    def take(self, tenant: str, count: int, refuse: Callable[[CapacityError], None]) -> Claim:
        """Places for a request of so many outputs. refuse: called if they must be given back; they are gone then.

        Raises CapacityError.
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
        """An output has ended; None: all that are left."""
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
