"""One replica of a simulated fleet: an engine reduced to what a router can tell apart.

    sent --> parked, while its adapter is read --> prompts, one after another --> running: a token per iteration --> over

An iteration takes a constant, and more for each running output and each token of a prompt. Adapters have slots, of which the
least recently used idle one is taken, and are read one after another. Blocks of prompts stay in a cache of bounded size.

Owns: this engine. Does not own: events and delays (fleet.py), choices (cluster/). Requests are compared by identity.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from coserve.cluster.load import Ask, Load
from coserve.core import CapacityError

CHUNK_TOKENS = 512
"""Tokens of prompts in one iteration, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpeeds:
    """Seconds, and what fits in. The defaults are about those of an 8B model on one GPU."""

    iteration_s: float = 0.012
    output_s: float = 0.0006
    prompt_token_s: float = 0.00006
    adapter_load_s: float = 0.08
    slots: int = 96
    max_running: int = 64
    max_waiting: int = 256
    num_blocks: int = 16384
    block_tokens: int = 16
    cached_hashes: int = 1024


TYPICAL_SPEEDS = ReplicaSpeeds()


@dataclass(slots=True, eq=False)
class FleetRequest:
    """A request, wherever it is. emitted: output tokens that its client has. attempt: rises each time it is sent. hit: whether
    its adapter was in memory when it came to the replica that ended it, and cached_tokens what that had of its prompt. replica:
    where it was sent last; empty while it waits to be sent again."""

    number: int
    ask: Ask
    arrival_s: float
    ingress: int
    emitted: int = 0
    attempt: int = 0
    replica: str = ""
    hit: bool = True
    cached_tokens: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None
    refusals: int = 0
    deaths: int = 0


@dataclass(slots=True, eq=False)
class ServedRequest:
    """A request on a replica. left: tokens of its prompt to compute. until: the iteration that gives its last token."""

    request: FleetRequest
    attempt: int
    left: int
    tokens: int
    until: int = 0


@dataclass(frozen=True, slots=True)
class IterationEnd:
    """What an iteration gave. first: requests with their first token. over: requests with their last one."""

    first: Sequence[ServedRequest]
    over: Sequence[ServedRequest]


class SimulatedReplica:
    """work_s: seconds that its prompts and outputs have cost so far, without constants."""

    def __init__(self, name: str, speeds: ReplicaSpeeds, *, pace: float = 1.0) -> None:
        """pace: how many times as long as `speeds` says everything takes."""
        self.name, self.speeds, self.pace = name, speeds, pace
        self.work_s = 0.0
        self.number_of_requests = 0
        self.live: dict[FleetRequest, ServedRequest] = {}
        self._ready_s: OrderedDict[str, float] = OrderedDict()
        """When each adapter with a slot has been read, or will have been; the one that was used last comes last."""
        self._users: Counter[str] = Counter()
        self._parked: dict[str, list[ServedRequest]] = {}
        self._reading_until_s = 0.0
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._prompts: deque[ServedRequest] = deque()
        self._running: list[tuple[int, int, ServedRequest]] = []
        self._iterations = self._reports = 0
        self._ends = 0
        self._ended_before, self._reported_s = 0, 0.0
        self._end_s = 0.0

    # --- requests ---

    def take(self, request: FleetRequest, now: float) -> None:
        """A request has come. Raises CapacityError if too many wait."""
        limits, ask = self.speeds, request.ask
        if len(self.live) >= limits.max_running + limits.max_waiting:
            raise CapacityError("too many requests wait", param="max_waiting")
        covered = 0
        for depth in range(len(ask.blocks), 0, -1):
            if ask.blocks[depth - 1] in self._cache:
                covered = depth * limits.block_tokens
                break
        request.cached_tokens = covered = min(covered, ask.prompt_tokens - 1)
        left = ask.prompt_tokens + request.emitted - covered
        served = ServedRequest(request, request.attempt, left, ask.max_tokens - request.emitted)
        self.live[request] = served
        self.number_of_requests += 1
        request.hit = True
        if ask.adapter is None:
            self._prompts.append(served)
            return
        request.hit = self._ready_s.get(ask.adapter, math.inf) <= now
        self._users[ask.adapter] += 1
        self._parked.setdefault(ask.adapter, []).append(served)
        self.advance(now)

    def advance(self, now: float) -> float | None:
        """Adapters that are wanted get slots, and prompts whose adapters are there by now can be computed. Returns when the
        next adapter will be there."""
        soon = None
        for adapter in list(self._parked):
            if adapter not in self._ready_s and not self._read(adapter, now):
                continue
            ready_s = self._ready_s[adapter]
            if ready_s <= now:
                self._ready_s.move_to_end(adapter)
                self._prompts.extend(self._parked.pop(adapter))
            elif soon is None or ready_s < soon:
                soon = ready_s
        return soon

    def _read(self, adapter: str, now: float) -> bool:
        """Begins to read an adapter into a slot, if there is one."""
        if len(self._ready_s) >= self.speeds.slots:
            idle = next((name for name in self._ready_s if not self._users[name]), None)
            if idle is None:
                return False
            del self._ready_s[idle]
        self._reading_until_s = max(self._reading_until_s, now) + self.speeds.adapter_load_s * self.pace
        self._ready_s[adapter] = self._reading_until_s
        return True

    # --- iterations ---

    @property
    def has_work(self) -> bool:
        """Whether an iteration would do something."""
        return bool(self._running or self._prompts)

    def run(self, now: float) -> tuple[float, IterationEnd]:
        """One iteration: its seconds, and what it gives at its end."""
        speeds = self.speeds
        self._iterations += 1
        budget, first = CHUNK_TOKENS, list[ServedRequest]()
        while self._prompts and budget and len(self._running) + len(first) < speeds.max_running:
            served = self._prompts[0]
            part = min(served.left, budget)
            served.left -= part
            budget -= part
            if served.left:
                break
            first.append(self._prompts.popleft())
        tokens = CHUNK_TOKENS - budget
        decoding = len(self._running)
        over = []
        while self._running and self._running[0][0] <= self._iterations:
            over.append(heapq.heappop(self._running)[2])
        for served in first:
            served.until = self._iterations + served.tokens - 1
            self._remember(served)
            if served.until <= self._iterations:
                over.append(served)
            else:
                heapq.heappush(self._running, (served.until, served.request.number, served))
        cost = self.pace * (decoding * speeds.output_s + tokens * speeds.prompt_token_s)
        self.work_s += cost
        return self.pace * speeds.iteration_s + cost, IterationEnd(first, over)

    def emitted(self, served: ServedRequest) -> int:
        """Output tokens of a request that have come, while an iteration runs that gives it one more or computes its prompt."""
        return served.tokens - (served.until - self._iterations) - 1 if served.until else 0

    def holds(self, adapter: str) -> bool:
        """Whether an adapter has a slot."""
        return adapter in self._ready_s

    def leave(self, served: ServedRequest) -> None:
        """A request is over."""
        del self.live[served.request]
        self._ends += 1
        if served.request.ask.adapter is not None:
            self._users[served.request.ask.adapter] -= 1

    def _remember(self, served: ServedRequest) -> None:
        """A prompt's blocks are in the cache."""
        for block in served.request.ask.blocks:
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self.speeds.cached_hashes:
            self._cache.popitem(last=False)

    # --- what it tells ---

    def report(self, now: float) -> Load:
        """Its load now."""
        speeds, self._reports = self.speeds, self._reports + 1
        waiting = len(self.live) - len(self._running)
        past_s, ended = now - self._reported_s, self._ends - self._ended_before
        self._reported_s, self._ended_before = now, self._ends
        if ended and past_s > 0:
            self._end_s += 0.2 * (past_s / ended - self._end_s)
        left = sum(served.left for served in self.live.values() if not served.until)
        held = sum(-(-served.request.ask.prompt_tokens // speeds.block_tokens) for served in self.live.values())
        iteration_s = speeds.iteration_s + len(self._running) * speeds.output_s
        return Load(
            replica=self.name, number=self._reports, queued_prompt_tokens=left, running=len(self._running), waiting=waiting,
            max_running=speeds.max_running, max_waiting=speeds.max_waiting, end_s=self._end_s,
            prefill_s_per_token=self.pace * (speeds.prompt_token_s + iteration_s / CHUNK_TOKENS),
            iteration_s=self.pace * iteration_s, output_s=self.pace * speeds.output_s,
            free_blocks=max(0, speeds.num_blocks - held), num_blocks=speeds.num_blocks, block_tokens=speeds.block_tokens,
            resident=[name for name, ready_s in self._ready_s.items() if ready_s <= now],
            adapter_load_s=self.pace * speeds.adapter_load_s,
            prefixes=list(self._cache) if self._reports % 5 == 1 else None,
        )
