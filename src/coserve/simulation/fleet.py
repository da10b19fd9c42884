"""Many replicas behind several ingresses on a virtual clock: the real router, with everything around it simulated.

    arrival --> ingress: its own Router --delay--> replica --delay--> ingress: first token, end
                           ^--- reports, each delayed by its own time, for every ingress ---|

A replica that dies loses all that it had. Its ingresses hear of it a moment later, and send what it had elsewhere, to go on
from the tokens that clients have. A request that is refused comes again after a while, as clients do.

Owns: traffic, delays, deaths, the account of each request. Does not own: what a replica takes (replica.py), choices (cluster/).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np

from coserve.cluster.load import Ask, Choice, NoReplica
from coserve.cluster.router import Router
from coserve.core import CapacityError, percentile
from coserve.simulation.replica import TYPICAL_SPEEDS, FleetRequest, ReplicaSpeeds, ServedRequest, SimulatedReplica

ROUTER, BALANCED, RANDOM = "router", "balanced", "random"
POLICIES = (ROUTER, BALANCED, RANDOM)
"""BALANCED is a router that knows nothing of adapters and prompts."""
BLOCKS_OF_APP = 12
"""Blocks that prompts of one adapter have in common."""
NOTICE_S, RETRY_S = 0.2, 0.5
"""Until an ingress hears that a replica has died, and until a refused request comes again."""


class Burst(NamedTuple):
    """So many requests for one adapter at once; a cold one, since nobody else asks for it."""

    at_s: float
    requests: int
    adapter: str


class Death(NamedTuple):
    """A replica dies, and a new one takes its place `back_s` later."""

    at_s: float
    replica: int
    back_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTraffic:
    """What happens. rate: requests per second of the fleet. zipf: exponent of adapters' popularity. base_share: of requests for
    the base model. prompt_tokens, output_tokens: medians of log-normal lengths (sigma 0.6)."""

    rate: float
    duration_s: float
    num_adapters: int
    zipf: float = 1.0
    base_share: float = 0.1
    prompt_tokens: float = 300.0
    output_tokens: float = 60.0
    ttft_s: float = 1.0
    tpot_s: float = 0.1
    bursts: Sequence[Burst] = ()
    deaths: Sequence[Death] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLayout:
    """Who is there. policy: one of POLICIES. paces: one per
    replica, as in SimulatedReplica; none: all 1. report_delay_s, send_delay_s: from and to, in seconds."""

    num_replicas: int
    num_ingresses: int = 4
    policy: str = ROUTER
    speeds: ReplicaSpeeds = TYPICAL_SPEEDS
    paces: Sequence[float] = ()
    report_every_s: float = 0.1
    report_delay_s: tuple[float, float] = (0.005, 0.05)
    send_delay_s: tuple[float, float] = (0.0005, 0.003)


@dataclass(slots=True)
class FleetResult:
    """What became of the requests. work_s: by replica that lived throughout. loads: adapters that were read. copies: replicas
    that the adapter of each burst was on at its end."""

    requests: list[FleetRequest]
    work_s: list[float] = field(default_factory=list)
    deaths: int = 0
    refusals: int = 0
    copies: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """The numbers of a table. hits: the share of requests with an adapter that found it in memory; most_hits: if it were
        missing only where it is asked for the first time. most_work, least_work: of a replica, from the mean, as shares of
        it."""
        done = [request for request in self.requests if request.finished_s is not None]
        ttft = [request.first_token_s - request.arrival_s for request in done if request.first_token_s is not None]
        adapted = [request for request in done if request.ask.adapter is not None]
        mean = sum(self.work_s) / len(self.work_s)
        return {
            "requests": len(self.requests), "lost": len(self.requests) - len(done), "resent": sum(r.deaths for r in done),
            "refused": self.refusals, "hits": sum(r.hit for r in adapted) / len(adapted),
            "most_hits": 1 - len({r.ask.adapter for r in adapted}) / len(adapted),
            "cached": sum(r.cached_tokens for r in done) / sum(r.ask.prompt_tokens for r in done),
            "most_work": max(self.work_s) / mean - 1, "least_work": 1 - min(self.work_s) / mean,
            "ttft_p50_s": percentile(ttft, 0.5), "ttft_p99_s": percentile(ttft, 0.99),
            "late": sum(seconds > r.ask.ttft_s for seconds, r in zip(ttft, done, strict=True)) / len(done),
        }


def make_requests(traffic: FleetTraffic, num_ingresses: int, block_tokens: int) -> list[FleetRequest]:
    """All requests, in order of arrival; equal seeds give equal ones."""
    random = np.random.default_rng(traffic.seed)
    count = int(traffic.rate * traffic.duration_s)
    arrivals = np.sort(random.uniform(0, traffic.duration_s, count)).tolist()
    shares = np.cumsum(1.0 / np.arange(1, traffic.num_adapters + 1) ** traffic.zipf)
    adapters = np.searchsorted(shares, random.uniform(0, shares[-1], count)).tolist()
    bases = (random.uniform(size=count) < traffic.base_share).tolist()
    prompts = np.clip(random.lognormal(math.log(traffic.prompt_tokens), 0.6, count), 16, 4000).astype(int).tolist()
    outputs = np.clip(random.lognormal(math.log(traffic.output_tokens), 0.6, count), 1, 500).astype(int).tolist()
    asked = [
        (at_s, None if base else f"adapter-{adapter}", prompt, output)
        for at_s, adapter, base, prompt, output in zip(arrivals, adapters, bases, prompts, outputs, strict=True)
    ]
    for burst in traffic.bursts:
        asked += [(burst.at_s, burst.adapter, int(traffic.prompt_tokens), int(traffic.output_tokens))] * burst.requests
    asked.sort(key=lambda one: one[0])
    places = random.integers(num_ingresses, size=len(asked)).tolist()
    return [
        FleetRequest(
            number, Ask(
                prompt_tokens=prompt, blocks=_blocks(number, adapter, prompt // block_tokens), adapter=adapter,
                max_tokens=output, ttft_s=traffic.ttft_s, tpot_s=traffic.tpot_s,
            ), at_s, place,
        )
        for number, ((at_s, adapter, prompt, output), place) in enumerate(zip(asked, places, strict=True))
    ]


def _blocks(number: int, adapter: str | None, count: int) -> tuple[int, ...]:
    """Made-up hashes: the first blocks are the adapter's, the others the request's own."""
    common = hash_base(adapter)
    return tuple(common + depth if depth < BLOCKS_OF_APP else (number << 16) + depth for depth in range(count))


def hash_base(adapter: str | None) -> int:
    """Hashes of an adapter's common blocks begin here."""
    return 1 << 62 if adapter is None else (1 << 62) + (1 + int(adapter.rpartition("-")[2])) * 4096


class SimulatedFleet:
    """Runs traffic through routers and replicas."""

    def __init__(self, layout: FleetLayout, traffic: FleetTraffic) -> None:
        self.layout, self.traffic = layout, traffic
        self.now_s = 0.0
        self.routers = [
            Router(seed=place, num_routers=layout.num_ingresses) for place in range(layout.num_ingresses)
        ]
        self.replicas: dict[str, SimulatedReplica] = {}
        self._members: list[dict[str, None]] = [{} for _ in self.routers]
        """What each ingress believes to live."""
        self._random = Random(traffic.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._running: set[str] = set()
        self._wakes: dict[str, float] = {}
        self.requests = make_requests(traffic, layout.num_ingresses, layout.speeds.block_tokens)
        self.result = FleetResult(self.requests)
        self._left = len(self.requests)

    # --- events ---

    def run(self, most_s: float = math.inf) -> FleetResult:
        """Runs until every request is over, or `most_s` of the virtual clock have passed."""
        for place in range(self.layout.num_replicas):
            self._join(place, 0)
        for request in self.requests:
            self._at(request.arrival_s, lambda request=request: self._send(request))  # type: ignore[misc]
        for death in self.traffic.deaths:
            self._at(death.at_s, lambda death=death: self._die(death))  # type: ignore[misc]
        for burst in self.traffic.bursts:
            self._at(burst.at_s + 5.0, lambda burst=burst: self._count_copies(burst))  # type: ignore[misc]
        while self._left and self._events and self._events[0][0] <= most_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        dead = {f"replica-{death.replica}" for death in self.traffic.deaths}
        self.result.work_s = [
            replica.work_s for name, replica in self.replicas.items() if name.rpartition(".")[0] not in dead
        ]
        return self.result

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _soon(self, delay_s: tuple[float, float], event: Callable[[], None]) -> None:
        self._at(self.now_s + self._random.uniform(*delay_s), event)

    # --- replicas ---

    def _join(self, place: int, life: int) -> None:
        """A replica starts; a new one has a name of its own."""
        paces = self.layout.paces
        replica = SimulatedReplica(
            f"replica-{place}.{life}", self.layout.speeds, pace=paces[place % len(paces)] if paces else 1.0
        )
        self.replicas[replica.name] = replica
        self._at(self.now_s + self._random.uniform(0, self.layout.report_every_s), lambda: self._report(replica))

    def _alive(self, replica: SimulatedReplica) -> bool:
        return self.replicas.get(replica.name) is replica

    def _report(self, replica: SimulatedReplica) -> None:
        if not self._alive(replica):
            return
        load = replica.report(self.now_s)

        def arrive(place: int) -> None:
            if self._alive(replica) or load.replica in self._members[place]:
                self._members[place][load.replica] = None
                if self.layout.policy != RANDOM:
                    self.routers[place].report(load, self.now_s)

        for place in range(len(self.routers)):
            self._soon(self.layout.report_delay_s, lambda place=place: arrive(place))  # type: ignore[misc]
        self._at(self.now_s + self.layout.report_every_s, lambda: self._report(replica))

    def _die(self, death: Death) -> None:
        name = next(name for name in self.replicas if name.startswith(f"replica-{death.replica}."))
        replica = self.replicas.pop(name)
        self.result.deaths += 1
        lost = [(served.request, served.attempt, replica.emitted(served)) for served in replica.live.values()]
        for request, attempt, emitted in lost:
            if request.attempt == attempt:
                request.emitted += emitted

        def notice(place: int) -> None:
            self._members[place].pop(name, None)
            self.routers[place].remove(name)
            for request in self.requests:
                if request.replica == name and request.ingress == place and request.finished_s is None:
                    request.deaths += 1
                    self._send(request)

        for place in range(len(self.routers)):
            self._soon((NOTICE_S / 2, NOTICE_S), lambda place=place: notice(place))  # type: ignore[misc]
        life = int(name.rpartition(".")[2]) + 1
        self._at(self.now_s + death.back_s, lambda: self._join(death.replica, life))

    def _count_copies(self, burst: Burst) -> None:
        self.result.copies[burst.adapter] = sum(replica.holds(burst.adapter) for replica in self.replicas.values())

    # --- requests ---

    def _send(self, request: FleetRequest, exclude: frozenset[str] = frozenset()) -> None:
        """An ingress chooses a replica for a request, or for what is left of it."""
        request.attempt += 1
        request.replica = ""
        attempt, ask = request.attempt, self._left_of(request)
        try:
            choice = self._choose(request.ingress, ask, exclude)
        except (NoReplica, CapacityError) as error:
            request.refusals += isinstance(error, CapacityError)
            self.result.refusals += isinstance(error, CapacityError)
            self._at(self.now_s + RETRY_S, lambda: self._send(request))
            return
        request.replica = choice.replica
        router = self.routers[request.ingress]
        router.sent(request.number, choice, ask, self.now_s)

        def arrive() -> None:
            replica = self.replicas.get(choice.replica)
            if replica is None or request.attempt != attempt:
                return  # its ingress hears of the death
            try:
                replica.take(request, self.now_s)
            except CapacityError:
                self._soon(self.layout.send_delay_s, lambda: self._send(request, frozenset([choice.replica])))
                return
            self._wake(replica)

        self._soon(self.layout.send_delay_s, arrive)

    def _left_of(self, request: FleetRequest) -> Ask:
        ask, emitted = request.ask, request.emitted
        if self.layout.policy != ROUTER:
            ask = ask._replace(adapter=None, blocks=())
        return ask if not emitted else ask._replace(
            prompt_tokens=ask.prompt_tokens + emitted, max_tokens=ask.max_tokens - emitted
        )

    def _choose(self, ingress: int, ask: Ask, exclude: frozenset[str]) -> Choice:
        if self.layout.policy != RANDOM:
            return self.routers[ingress].choose(ask, self.now_s, exclude=exclude)
        names = [name for name in self._members[ingress] if name not in exclude]
        if not names:
            raise NoReplica("no replica is known")
        return Choice(self._random.choice(names), 0.0, True, True, ask.prompt_tokens)

    def _wake(self, replica: SimulatedReplica) -> None:
        """Begins an iteration if none runs, or waits for an adapter."""
        if replica.name in self._running or not self._alive(replica):
            return
        ready_s = replica.advance(self.now_s)
        if not replica.has_work:
            if ready_s is not None and self._wakes.get(replica.name) != ready_s:
                self._wakes[replica.name] = ready_s
                self._at(ready_s, lambda: self._wake(replica))
            return
        seconds, end = replica.run(self.now_s)
        self._running.add(replica.name)

        def finish() -> None:
            self._running.discard(replica.name)
            if not self._alive(replica):
                return
            for served in end.first:
                self._first_token(served)
            for served in end.over:
                replica.leave(served)
                self._finish(served)
            self._wake(replica)

        self._at(self.now_s + seconds, finish)

    def _first_token(self, served: ServedRequest) -> None:
        request, at_s = served.request, self.now_s
        if request.attempt == served.attempt:
            if request.first_token_s is None:
                request.first_token_s = at_s
            self._soon(
                self.layout.send_delay_s, lambda: self.routers[request.ingress].first_token(request.number, self.now_s)
            )

    def _finish(self, served: ServedRequest) -> None:
        request = served.request
        if request.attempt != served.attempt:
            return
        assert request.finished_s is None, "a request has ended twice"
        assert request.emitted + served.tokens == request.ask.max_tokens, "a token is lost or doubled"
        request.finished_s = self.now_s
        self._left -= 1
        self._soon(self.layout.send_delay_s, lambda: self.routers[request.ingress].ended(request.number))
