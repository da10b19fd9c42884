"""Requests that wait for a place, kept so that finding the next one doesn't look at all of them.

    served      tenant -> (deadline of the first token, number), ascending     a heap over the tenants' heads gives the order
     120.5      "b"    -> [(7.1, 12), (7.3, 15), ...]
     300.0      "a"    -> [(4.0,  3), (6.2,  9), ...]

Order: those whose first token can still be in time, the least served tenant's first, then by deadline; then those that are
late. Owns: that order. Does not own: whether there is a place, or what a tenant has had (fairness.py).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

from coserve.scheduler.requests import RequestState

_Key = tuple[float, int]


class WaitingRequests:
    """Adding and taking out costs a search and a move of pointers; an iteration over the first few is O(tenants)."""

    def __init__(self) -> None:
        self._requests: dict[int, RequestState] = {}
        self._new: dict[str, list[_Key]] = {}
        self._begun: dict[int, RequestState] = {}  # preempted with tokens: few, and late at another time than the new ones

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: RequestState) -> None:
        """A request waits."""
        self._requests[request.id] = request
        if request.num_sampled:
            self._begun[request.id] = request
        else:
            insort(self._new.setdefault(request.tenant, []), self._key(request))

    def discard(self, request: RequestState) -> None:
        """It doesn't wait any more, if it did."""
        if self._requests.pop(request.id, None) is None or self._begun.pop(request.id, None) is not None:
            return
        keys = self._new[request.tenant]
        del keys[bisect_left(keys, self._key(request))]
        if not keys:
            del self._new[request.tenant]

    def in_order(self, now: float, served: Callable[[str], float]) -> Iterator[RequestState]:
        """Those that can be admitted, the first one first. Requests may be added and discarded meanwhile. served: what a tenant
        has had."""
        for late in (False, True):
            heap = [(amount, *keys[0], keys, 0) for amount, keys in self._queues(now, served, late)]
            heapq.heapify(heap)
            while heap:
                amount, _, number, keys, place = heap[0]
                if place + 1 < len(keys):
                    heapq.heapreplace(heap, (amount, *keys[place + 1], keys, place + 1))
                else:
                    heapq.heappop(heap)
                yield self._requests[number]

    def _queues(self, now: float, served: Callable[[str], float], late: bool) -> Iterator[tuple[float, Sequence[_Key]]]:
        for tenant, keys in self._new.items():
            split = bisect_left(keys, (now,))
            part = keys[:split] if late else keys[split:]
            if part:
                yield served(tenant), part
        for request in self._begun.values():
            if not request.in_flight and not request.sampled_enough and request.hopeless(now, 0.0) == late:
                yield served(request.tenant), [self._key(request)]

    @staticmethod
    def _key(request: RequestState) -> _Key:
        return request.arrival_s + request.ttft_s, request.id
