"""Requests that wait for a place, kept so that the next one is found without looking at all of them.

    served      tenant    its requests as (key, number), ascending
     120.5      "b"       (7.1, 12), (7.3, 15), ...      comes first: it has been served least
     300.0      "a"       (4.0,  3), (6.2,  9), ...

A heap over the first request of each tenant gives the order. The least served tenant's requests come first. Within a tenant the
request whose first token is due earliest comes first, until one has waited OVERDUE times as long as if requests were served as
they come (fairness.py). From then on the tenant's requests go in order of arrival, so that nobody is overtaken for ever.
Owns: that order. Does not own: whether there is a place, what a tenant has had (fairness.py).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterator, Sequence

from coserve.scheduler.requests import RequestState

OVERDUE = 1.5
_Key = tuple[float, int]


def by_arrival(request: RequestState) -> _Key:
    """Sorts by when the first token would come if requests were served as they come."""
    return request.fcfs_s, request.id


def is_overdue(request: RequestState, now: float) -> bool:
    """Whether it has waited so long that its tenant's requests go in order of arrival until it is served."""
    return now - request.arrival_s > OVERDUE * (request.fcfs_s - request.arrival_s)


def by_deadline(request: RequestState) -> _Key:
    """Sorts by when the first token is due."""
    return request.arrival_s + request.ttft_s, request.id


class WaitingRequests:
    """Adding or discarding a request costs a search in its tenant's list. Iterating over the first few is O(tenants)."""

    def __init__(self) -> None:
        self._requests: dict[int, RequestState] = {}
        self._come: dict[str, list[_Key]] = {}
        self._due: dict[str, list[_Key]] = {}
        self._begun: dict[int, RequestState] = {}  # preempted after their first token: few, some with a token in flight

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: RequestState) -> None:
        """A request begins to wait."""
        self._requests[request.id] = request
        if request.num_sampled:
            self._begun[request.id] = request
        else:
            insort(self._come.setdefault(request.tenant, []), by_arrival(request))
            insort(self._due.setdefault(request.tenant, []), by_deadline(request))

    def discard(self, request: RequestState) -> None:
        """Takes out a request, if it waits."""
        if self._requests.pop(request.id, None) is None or self._begun.pop(request.id, None) is not None:
            return
        for queues, key in ((self._come, by_arrival(request)), (self._due, by_deadline(request))):
            keys = queues[request.tenant]
            del keys[bisect_left(keys, key)]
            if not keys:
                del queues[request.tenant]

    def overdue(self, now: float) -> set[str]:
        """Tenants whose requests go in order of arrival by now."""
        return {tenant for tenant, keys in self._come.items() if is_overdue(self._requests[keys[0][1]], now)}

    def in_order(self, served: Callable[[str], float], overdue: Container[str]) -> Iterator[RequestState]:
        """Requests that may begin to run, in order. Requests may be added and discarded meanwhile.

        served: what a tenant has had. overdue: the tenants whose requests go in order of arrival.
        """
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
