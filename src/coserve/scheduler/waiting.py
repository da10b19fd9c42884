"""Requests that wait for a place, kept so that finding the next one doesn't look at all of them.

    served      tenant -> (key, number), ascending      a heap over the tenants' heads gives the order
     120.5      "b"    -> [(7.1, 12), (7.3, 15), ...]
     300.0      "a"    -> [(4.0,  3), (6.2,  9), ...]

Order: the least served tenant's requests come first. Within a tenant the earliest deadline of a first token comes first, until
a request has waited OVERDUE times as long as it would if requests were served as they come. From then on the tenant's requests
go in order of arrival, so that nobody is overtaken for ever.
Owns: that order. Does not own: whether there is a place, or what a tenant has had (fairness.py).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterator, Sequence

from coserve.scheduler.requests import RequestState

OVERDUE = 1.5
_Key = tuple[float, int]


def by_arrival(request: RequestState) -> _Key:
    """First come, first served."""
    return request.fcfs_s, request.id


def is_overdue(request: RequestState, now: float) -> bool:
    """Whether its tenant's requests go in order of arrival until it is served."""
    return now - request.arrival_s > OVERDUE * (request.fcfs_s - request.arrival_s)


def by_deadline(request: RequestState) -> _Key:
    """The first token that is due earliest first."""
    return request.arrival_s + request.ttft_s, request.id


class WaitingRequests:
    """Adding and taking out costs a search and a move of pointers; an iteration over the first few is O(tenants)."""

    def __init__(self) -> None:
        self._requests: dict[int, RequestState] = {}
        self._come: dict[str, list[_Key]] = {}
        self._due: dict[str, list[_Key]] = {}
        self._begun: dict[int, RequestState] = {}  # preempted with tokens: few, and some can't be admitted yet

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: RequestState) -> None:
        """A request waits."""
        self._requests[request.id] = request
        if request.num_sampled:
            self._begun[request.id] = request
        else:
            insort(self._come.setdefault(request.tenant, []), by_arrival(request))
            insort(self._due.setdefault(request.tenant, []), by_deadline(request))

    def discard(self, request: RequestState) -> None:
        """It doesn't wait any more, if it did."""
        if self._requests.pop(request.id, None) is None or self._begun.pop(request.id, None) is not None:
            return
        for queues, key in ((self._come, by_arrival(request)), (self._due, by_deadline(request))):
            keys = queues[request.tenant]
            del keys[bisect_left(keys, key)]
            if not keys:
                del queues[request.tenant]

    def overdue(self, now: float) -> set[str]:
        """Tenants whose requests go in order of arrival."""
        return {tenant for tenant, keys in self._come.items() if is_overdue(self._requests[keys[0][1]], now)}

    def in_order(self, served: Callable[[str], float], overdue: Container[str]) -> Iterator[RequestState]:
        """Those that can be admitted, the first one first. Requests may be added and discarded meanwhile. served: what a tenant
        has had; overdue: tenants whose requests go in order of arrival."""
        heap = [(served(tenant), *keys[0], keys, 0) for tenant, keys in self._queues(overdue)]
        heapq.heapify(heap)
        while heap:
            amount, _, number, keys, place = heap[0]
            if place + 1 < len(keys):
                heapq.heapreplace(heap, (amount, *keys[place + 1], keys, place + 1))
            else:
                heapq.heappop(heap)
            yield self._requests[number]

    def _queues(self, overdue: Container[str]) -> Iterator[tuple[str, Sequence[_Key]]]:
        for tenant, keys in self._come.items():
            yield tenant, list(keys if tenant in overdue else self._due[tenant])
        for request in self._begun.values():
            if not request.in_flight and not request.sampled_enough:
                yield request.tenant, [by_arrival(request) if request.tenant in overdue else by_deadline(request)]
