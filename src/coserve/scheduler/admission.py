"""Which requests run. A request that runs has a seat (its adapter's slot) and blocks; every other request waits.

    waiting -- claim --> has a seat -- allocate --> has blocks too: running
    waiting <----------------- preempt --------------- running
    waiting -- claim, but no seat is free --> parked -- unpark --> waiting

Owns: these states, and whose memory is taken when there is too little. Does not own: which request is next (prompts.py), who
has a slot (engine/adapters.py), which block is whose (blocks.py).
"""

from __future__ import annotations

from collections.abc import Container

from coserve.core import CapacityError
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.fairness import TokenCounters
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.waiting import WaitingRequests


class Seats:
    """Who may run by its adapter's slot. Here every request may; the engine's requests have slots (engine/requesttable.py)."""

    def claim(self, request: RequestState) -> bool:
        """Takes a slot for the request; False if none is free now. The request then waits for `Admission.unpark`."""
        return True

    def unclaim(self, request: RequestState, *, has_run: bool) -> None:
        """Gives the request's slot back. has_run: False if the request could not begin after all."""


class Admission:
    """Requests by state. tenants: what each tenant has had; memory is taken from the tenant that has had most."""

    def __init__(self, pool: BlockPool, tenants: TokenCounters) -> None:
        self.pool, self.tenants = pool, tenants
        self.seats = Seats()
        self.waiting = WaitingRequests()
        self.running: dict[int, RequestState] = {}
        self.num_preemptions = 0
        self._parked: dict[PrefixKey, dict[int, RequestState]] = {}
        """By the adapter version in their keys. They cost an iteration nothing."""

    @property
    def num_waiting(self) -> int:
        """Requests that don't run, parked ones included."""
        return len(self.waiting) + sum(map(len, self._parked.values()))

    def remove(self, request: RequestState) -> None:
        """Forgets a request in any state. Its blocks are free."""
        if request.running:
            self._release(request)
            return
        self.waiting.discard(request)
        parked = self._parked.get(request.key, {})
        if parked.pop(request.id, None) is not None and not parked:
            del self._parked[request.key]

    def unpark(self, adapter: str, version: int) -> None:
        """Parked requests of an adapter version wait again, each in its tenant's order."""
        for key in [key for key in self._parked if (key.adapter, key.version) == (adapter, version)]:
            for request in self._parked.pop(key).values():
                self.waiting.add(request)

    def claim(self, request: RequestState) -> bool:
        """Gives a waiting request a seat, and sets its `computed` to the tokens that the prefix cache has. Without a free seat
        the request is parked, and False is returned."""
        if not self.seats.claim(request):
            self.waiting.discard(request)
            self._parked.setdefault(request.key, {})[request.id] = request
            return False
        request.computed = self.pool.touch(request.key, request.tokens()) if request.cacheable else 0
        return True

    def allocate(self, request: RequestState, num_tokens: int, busy: Container[int]) -> bool:
        """Gives a request with a seat blocks for its first `num_tokens` tokens, so that it runs. False if there are too few.

        If the request runs already, others may be preempted for it: the latest arrival of the most served tenant. If that is
        the request itself, it is preempted only while nothing is planned, and otherwise waits for those that are. busy: the
        requests that are planned already, which can't be preempted.
        """
        if not request.running:
            return self._begin(request, num_tokens)
        while not self._grow(request, num_tokens):
            others = [r for r in self.running.values() if r.id not in busy]
            victim = max(others, key=lambda r: (self.tenants.served(r.tenant), r.arrival_s, r.id), default=None)
            if victim is None or (victim is request and busy):
                return False
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def preempt(self, request: RequestState) -> None:
        """Takes a running request's blocks and seat. It waits, to compute its tokens again under the same adapter version."""
        self._release(request)
        self.waiting.add(request)
        request.preemptions += 1
        self.num_preemptions += 1

    def _grow(self, request: RequestState, num_tokens: int) -> bool:
        """Takes blocks for the first `num_tokens` tokens, if there are enough."""
        try:
            self.pool.allocate(request.id, num_tokens)
        except CapacityError:
            return False
        return True

    def _begin(self, request: RequestState, num_tokens: int) -> bool:
        covered = self.pool.acquire(request.id, request.key, request.tokens() if request.cacheable else [])
        if not self._grow(request, num_tokens):
            self.pool.free(request.id)
            return False
        request.computed = request.cached_tokens = covered
        request.running = True
        self.waiting.discard(request)
        self.running[request.id] = request
        return True

    def _release(self, request: RequestState) -> None:
        self.pool.free(request.id)
        request.running, request.computed = False, 0
        del self.running[request.id]
        self.seats.unclaim(request, has_run=True)
