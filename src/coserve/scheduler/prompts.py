"""Prompts: which of them come into a pass, in which order, and in how large chunks.

    order     the least served tenant's prompts first; within a tenant as in waiting.py
    limit     what the pass may take with this prompt. A late prompt may take more than the budget.
    chunk     an even part of what is left of the prompt. If the limit is too short for it now, the prompt waits until running
              requests have gained slack. Beside a job, where rows up to the ridge cost almost nothing (riding.py), prompts that
              have time for it take only such rows.

A prompt that waits for slack holds up all behind it, except late ones of its own tenant. Owns: these rules. Does not own: who
waits and who has memory (admission.py), what running requests can spare (deadlines.py).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from coserve.config.settings import SchedulerConfig
from coserve.core import PassCost, Span
from coserve.scheduler.admission import Admission
from coserve.scheduler.deadlines import Deadlines
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.waiting import by_arrival, by_deadline, is_overdue

LEAST_CHUNK = 16
"""Tokens of the smallest chunk, unless less is left of the prompt."""
TYPICAL_STEP = 0.1
"""A new prompt moves the typical prompt's time by this share of their difference."""
MOST_SKIPPED = 16
"""While a prompt waits for slack, so many prompts behind it are searched for late ones."""
LATE = 0.8
"""Beside jobs a prompt isn't late before this share of its TTFT objective has passed."""

FREE_ROWS = 64
"""Prompts go into free rows only where there are at least so many of them, or a prompt would take many iterations."""
UNHURRIED = 0.5
"""A prompt has time if it is through before this share of its TTFT objective, even with free rows only."""


class PassDraft:
    """The requests' part of a pass while it is planned. requests: their numbers. Counts are kept apart from `cost`, since every
    token of every request is added one by one."""

    def __init__(self) -> None:
        self.decode: list[Span] = []
        self.prefill: list[Span] = []
        self.requests: set[int] = set()
        self.rows = self._head_rows = self._decode_context = self._prefill_pairs = 0
        self._adapters: set[PrefixKey] = set()

    @property
    def cost(self) -> PassCost:
        """Of a pass with these spans."""
        return PassCost(
            rows=self.rows, head_rows=self._head_rows, decode_rows=len(self.decode), decode_context=self._decode_context,
            prefill_pairs=self._prefill_pairs, fused_rows=0, fused_pairs=0, fused_labels=0,
            adapter_segments=len(self._adapters), prefill_spans=len(self.prefill),
        )

    def cost_with(self, request: RequestState, chunk: Span) -> PassCost:
        """The cost with one more chunk of a prompt."""
        cost = self.cost
        return cost._replace(
            rows=cost.rows + chunk.length, head_rows=cost.head_rows + chunk.logits,
            prefill_pairs=cost.prefill_pairs + _num_pairs(chunk), prefill_spans=cost.prefill_spans + 1,
            adapter_segments=cost.adapter_segments + (request.key.adapter is not None and request.key not in self._adapters),
        )

    def add(self, request: RequestState, length: int, *, decode: bool = False) -> None:
        """Plans the request's next `length` tokens. decode: it is a sampled token; otherwise a chunk of a prompt."""
        span = request.next_span(length)
        self.rows += length
        self._head_rows += span.logits
        if decode:
            self.decode.append(span)
            self._decode_context += span.end
        else:
            self.prefill.append(span)
            self._prefill_pairs += _num_pairs(span)
        self.requests.add(request.id)
        if request.key.adapter is not None:
            self._adapters.add(request.key)
        request.advance(span)

    def add_decode(self, request: RequestState) -> None:
        """The same as `add` of the one sampled token of a request that decodes, whose logits are wanted for itself alone."""
        number, start, key = request.id, request.computed, request.key
        request.computed = start + 1
        request.in_flight += 1
        self.rows += 1
        self._head_rows += 1
        self._decode_context += start + 1
        self.decode.append(Span(number, start, 1, 1, True))
        self.requests.add(number)
        if key.adapter is not None:
            self._adapters.add(key)


def _num_pairs(chunk: Span) -> int:
    """Pairs of a query and a key that a chunk's attention computes, per layer."""
    return chunk.length * (chunk.start + chunk.end + 1) // 2


class PromptPicker:
    """Picks chunks of prompts. typical_s: seconds that a prompt adds to a pass, as a moving mean over requests."""

    def __init__(self, config: SchedulerConfig, latency: LatencyModel, deadlines: Deadlines, admission: Admission) -> None:
        self.config, self.latency, self.deadlines, self.admission = config, latency, deadlines, admission
        self.typical_s = 0.0

    def expect(self, request: RequestState) -> float:
        """Predicts the seconds that the tokens of a new request add to a pass, without what the prefix cache has of them."""
        cached = self.admission.pool.match(request.key, request.tokens()) if request.cacheable else 0
        rows = request.uncached_tokens = request.total - cached
        pairs = rows * (2 * cached + rows + 1) // 2
        least, whole = PassCost(1, 1, 0, 0, 1, 0, 0, 0, 0, 1), PassCost(rows, 1, 0, 0, pairs, 0, 0, 0, 0, 1)
        seconds = self.latency.pass_seconds(whole) - self.latency.pass_seconds(least)
        self.typical_s += TYPICAL_STEP * (seconds - self.typical_s)
        return seconds

    def share_places(self, now: float, num_tenants: int) -> None:
        """Gives a place to a waiting tenant that has fewer than its share, if all places are taken.

        The tenant that has most of them gives it: its latest request is preempted. When that request goes on, it finds most of
        its prefix in the cache. num_tenants: how many tenants have requests.
        """
        if len(self.admission.running) < self.config.max_num_seqs:
            return
        first = self._first_waiting(now)
        if first is None:
            return
        held = Counter(request.tenant for request in self.admission.running.values())
        tenant, most = held.most_common(1)[0]
        share = self.config.max_num_seqs // num_tenants
        if held[first.tenant] < share < most:
            others = (request for request in self.admission.running.values() if request.tenant == tenant)
            self.admission.preempt(max(others, key=lambda request: (request.arrival_s, request.id)))

    def pick(self, draft: PassDraft, now: float, budget: float, *, beside_jobs: bool, free_rows: int = 0) -> bool:
        """Adds chunks of prompts to a draft that holds the decode spans. Returns whether jobs must wait in this iteration.

        Jobs wait while a prompt waits for slack, and while the next request that waits for a place is late. budget: what the
        pass may take, in seconds, unless a prompt is late. beside_jobs: whether there are jobs. free_rows: how many rows beside
        the decode spans cost almost nothing.
        """
        running = list(self.admission.running.values())
        skipped, held_up, out_of_memory, ahead = 0, "", False, 0

        def has_place() -> bool:
            return not out_of_memory and skipped <= MOST_SKIPPED and len(running) < self.config.max_num_seqs

        for request in self._in_order(now, has_place):
            if draft.rows >= self.config.max_num_batched_tokens:
                break
            late, was_running = self._is_late(request, now, beside_jobs), request.running
            if skipped and not (late and request.tenant == held_up):
                skipped += 1
                continue
            ahead += request.total - request.computed
            most = self.config.max_num_batched_tokens - draft.rows
            if draft.decode and free_rows >= FREE_ROWS and self._has_time(request, running, now, ahead / free_rows):
                most = min(most, len(draft.decode) + free_rows - draft.rows)
                if most < LEAST_CHUNK:
                    continue
            limits = self._limits(request, running, now, budget, late=late) if draft.decode else (budget, budget)
            if not was_running and not self.admission.claim(request):
                continue  # it is parked
            chunk = self._chunk(request, draft, most, *limits)
            if chunk and self.admission.allocate(request, request.computed + chunk, draft.requests):
                if not was_running:
                    running.append(request)
                if request.begun_s is None:
                    request.begun_s = now
                draft.add(request, chunk)
                continue
            if not was_running:
                self.admission.seats.unclaim(request, has_run=False)
                request.computed = 0
            if chunk:
                out_of_memory = True
            else:
                skipped, held_up = skipped + 1, request.tenant
        first = self._first_waiting(now)
        return skipped > 0 or (first is not None and self._is_late(first, now, beside_jobs))

    def _first_waiting(self, now: float) -> RequestState | None:
        waiting = self.admission.waiting
        return next(waiting.in_order(self.admission.tenants.served, waiting.overdue(now)), None)

    def _in_order(self, now: float, has_place: Callable[[], bool]) -> Iterator[RequestState]:
        """Requests whose prompts are not through, in the order in which they get rows.

        While there is no place, only running ones: they must go on, or they would never give their memory back.
        """
        served, waiting = self.admission.tenants.served, self.admission.waiting
        running = self.admission.running.values()
        begun = [r for r in running if not (r.in_flight or r.decoding or r.sampled_enough)]
        overdue = {r.tenant for r in begun if is_overdue(r, now)} | waiting.overdue(now)

        def precedence(request: RequestState) -> tuple[float, float, int]:
            key = by_arrival if request.tenant in overdue else by_deadline
            return served(request.tenant), *key(request)

        queue = takewhile(lambda _: has_place(), waiting.in_order(served, overdue) if has_place() else ())
        for request in heapq.merge(sorted(begun, key=precedence), queue, key=precedence):
            if request.running or has_place():
                yield request

    def _is_late(self, request: RequestState, now: float, beside_jobs: bool) -> bool:
        """Whether a prompt would be through by now if requests were served as they come. Running requests wait for a late one.

        Jobs leave running requests no more slack than they need. Beside jobs a prompt is therefore late only when most of its
        TTFT objective has passed too.
        """
        allowed_s = request.arrival_s + LATE * self._ttft_seconds(request) if beside_jobs else 0.0
        return now > max(request.fcfs_s, allowed_s)

    def _has_time(self, request: RequestState, running: Sequence[RequestState], now: float, iterations: float) -> bool:
        """Whether a prompt may take so many iterations to be through, each as long as the least TPOT objective."""
        tpot_s = min((r.tpot_s for r in running if r.tpot_s < math.inf), default=self.deadlines.best_effort.tpot_s)
        return now + math.ceil(iterations) * tpot_s <= request.arrival_s + UNHURRIED * self._ttft_seconds(request)

    def _ttft_seconds(self, request: RequestState) -> float:
        """The request's TTFT objective beside jobs, where it has the profile's if it has none of its own."""
        return request.ttft_s if request.ttft_s < math.inf else self.deadlines.best_effort.ttft_s

    def _limits(
        self, request: RequestState, running: Sequence[RequestState], now: float, budget: float, *, late: bool
    ) -> tuple[float, float]:
        """Two times in seconds: what a pass with this prompt may take now, and what it could take once running requests have
        gained slack."""
        served = self.admission.tenants.served
        others = [r for r in running if r.tenant != request.tenant and served(r.tenant) <= served(request.tenant)]
        spared = self.deadlines.for_others_prompts(others, now, self.typical_s)
        limit = spared if late else min(budget, spared)
        return limit, max(limit, min(self.deadlines.cap(running), spared))

    def _chunk(self, request: RequestState, draft: PassDraft, most: int, limit: float, later_limit: float) -> int:
        """Tokens of the request's next chunk, at most `most`; 0 if the prompt had better wait.

        What is left of the prompt is cut into as few equal chunks as `later_limit` allows. Many small chunks cost more than a
        few large ones, so a chunk that is too long for `limit` is not cut further.
        """
        left, largest = request.total - request.computed, self._largest_chunk(request, draft, most, later_limit)
        even = -(-left // -(-left // largest)) if largest else 0
        return even if self._largest_chunk(request, draft, most, limit) >= even else 0

    def _largest_chunk(self, request: RequestState, draft: PassDraft, most: int, seconds: float) -> int:
        """The most tokens of a prompt with which the iteration is predicted to stay within `seconds`, found by bisection to
        within 8. A chunk always runs where the pass holds nothing else."""
        most = min(request.total - request.computed, most)
        least = min(most, LEAST_CHUNK)

        def fits(chunk: int) -> bool:
            cost = draft.cost_with(request, request.next_span(chunk))
            return self.latency.pass_seconds(cost) + self.latency.constant_seconds <= seconds

        if most <= 0:
            return 0
        if fits(most):
            return most
        if not fits(least):
            return 0 if draft.requests else least
        low, high = least, most
        while high - low > 8:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
