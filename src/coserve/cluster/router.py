"""Which replica a request goes to: by what it would wait there.

    predicted TTFT = what is ahead: prompts that wait, or places or memory that must become free; as the engine has reported it,
                     plus what this router has sent there since
                   + the prompt, less the longest prefix that the engine has reported in its cache
                   + an iteration
                   + the adapter's load, unless it is in memory there

    feasible       TTFT and TPOT are predicted to hold
    comfortable    feasible, and the wait is at most COMFORT of the TTFT objective, at most PATIENCE_S
    cost           predicted TTFT and output: what the request takes there in all

A request goes to a comfortable replica that has its adapter, unless one of the adapter's homes (affinity.py) costs clearly less
although it has to load it. Failing all these, to the next comfortable replica in the order of homes, so that a burst loads an
adapter on as many replicas as it needs and no more. If nothing is comfortable, the least late serve it, preferably those with
the adapter. This is judged for each request. Among the replicas left, those of nearly least cost (in which a cached prefix
counts by what it saves) with the longest prefix are equals: two of them are drawn, and the one of less cost is taken, so that
several routers with the same reports don't all choose alike.

A report older than STALE_S makes a replica suspect: it gets requests only if no other is there. The time is always an argument,
of any clock that rises. Owns: the decision, its account of requests under way. Does not own: connections, which replicas exist,
retries (server/replicas/).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from coserve.cluster.affinity import AdapterHeat, rendezvous_order
from coserve.cluster.holders import HolderIndex, bool_array
from coserve.cluster.load import Ask, Choice, Load, NoReplica
from coserve.cluster.signals import RouterSignals, RouterSummary
from coserve.cluster.table import KnownReplica, ReplicaTable, SentWork
from coserve.core import CapacityError

STALE_S = 1.0
"""Seconds after its last report from which a replica is suspect."""
COMFORT, PATIENCE_S = 0.5, 2.0
"""A request stays with its adapter while it is predicted to wait at most this share of its TTFT objective and at most so many
seconds."""
COST_TOKENS = 64
"""A replica's cost is the predicted TTFT plus so many iterations, or max_tokens if that is less."""
STAY = 0.1
"""A home without the adapter costs this share of the least cost with it more, and twice the adapter's load: once for the
request that waits, and once for the memory and the reading that the replica's others could have had."""
SPARE_HOMES = 3
"""A cold adapter gets the best of so many homes more than it needs, which keeps load even at no loss: it stays there."""
NEAR = 0.1
"""Costs that differ by at most this share are equal."""
_WORSE = 1.5
"""Where nothing is comfortable, a request stays with its adapter up to this many times the least cost."""
_COMING_S, _COMING_LOADS = 1.0, 4.0
"""An adapter that a request was sent with counts as coming for so many seconds, or so many times what a load takes."""
_MOST_COMING = 4096


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A request that was sent and has not ended. waits: for its first token."""

    replica: KnownReplica | None
    adapter: str | None
    outputs: int
    sent_s: float
    predicted_s: float
    waits: bool = True


class _Forecast(NamedTuple):
    """For each place: what the request would meet there. uncached: tokens of its prompt to compute. usable: whether it may go
    there at all."""

    ttft_s: np.ndarray
    cost: np.ndarray
    feasible: np.ndarray
    usable: np.ndarray
    uncached: np.ndarray


class Router:
    """A router's picture of its replicas. Not thread-safe.

    seed: of the draws among equals; different routers should have different ones. num_routers: how many routers share the
    requests evenly, this one included; may be changed at any time.
    """

    def __init__(self, *, seed: int = 0, num_routers: int = 1) -> None:
        self._random = Random(seed)
        self._table = ReplicaTable(num_routers)
        self._adapters, self._blocks = HolderIndex[str](), HolderIndex[int]()
        self._heat, self._signals = AdapterHeat(), RouterSignals()
        self._coming: dict[str, dict[int, float]] = {}
        """By adapter: the places it is being loaded at, and until when that is believed."""
        self._under_way: dict[Hashable, _UnderWay] = {}
        self._now = 0.0

    @property
    def num_routers(self) -> int:
        return self._table.num_routers

    @num_routers.setter
    def num_routers(self, count: int) -> None:
        self._table.num_routers = count

    # --- replicas ---

    @property
    def replicas(self) -> Collection[str]:
        """The ids of those that are known."""
        return self._table.by_name.keys()

    def report(self, load: Load, now: float) -> None:
        """Takes a replica's report, which makes it known if it wasn't. A report that is not newer than the last one is ignored,
        unless that is old: the engine has started again then."""
        self._now = max(self._now, now)
        known = self._table.by_name.get(load.replica)
        if known is not None and load.number <= known.load.number and now - self._table.reported_s(known) <= STALE_S:
            return
        place = self._table.report(load, now).place
        self._adapters.update(place, load.resident)
        if load.prefixes is not None:
            self._blocks.update(place, load.prefixes)

    def remove(self, replica: str) -> None:
        """A replica has gone: nothing is sent there, until it reports again. What was sent there is still under way, until it
        is sent again or has ended."""
        known = self._table.remove(replica)
        if known is None:
            return
        self._adapters.update(known.place, ())
        self._blocks.update(known.place, ())
        for places in self._coming.values():
            places.pop(known.place, None)
        for request in self._under_way.values():
            if request.replica is known:
                request.replica = None

    # --- the decision ---

    def choose(self, ask: Ask, now: float, *, exclude: Collection[str] = frozenset(), again: bool = False) -> Choice:
        """Where a request had best go now. exclude: replicas that it must not go to. again: whether it was chosen for before;
        `summary` counts a request once. Changes nothing else: `sent` tells that it went. Raises NoReplica, and CapacityError
        where every queue is over its bound."""
        self._now = max(self._now, now)
        usable = self._usable(now, exclude)
        figures = self._table.figures
        usable &= figures["outputs"] + ask.outputs <= figures["room"]
        if not np.count_nonzero(usable):
            if not again:
                self._signals.on_refusal(now)
            raise CapacityError("every replica has as many requests as may wait; try again later", param="max_waiting")
        held = self._held(ask, now)
        forecast = self._forecast(ask, usable, held[0])
        place = self._draw(ask, self._candidates(ask, forecast, held, now), forecast)
        choice = Choice(
            self._table.name(place), float(forecast.ttft_s[place]), bool(forecast.feasible[place]),
            held[0] is None or bool(held[0][place]), int(forecast.uncached[place]),
        )
        if not again:
            self._signals.on_choice(now, feasible=choice.feasible, resident=None if ask.adapter is None else choice.resident)
        return choice

    def _usable(self, now: float, exclude: Iterable[str]) -> np.ndarray:
        """Whether each place has a replica that takes requests; suspect ones count only if there is no other."""
        figures = self._table.figures
        takes: np.ndarray = figures["takes"].copy()
        for name in exclude:
            known = self._table.by_name.get(name)
            if known is not None:
                takes[known.place] = False
        if not np.count_nonzero(takes):
            raise NoReplica("no replica takes requests now; try again in a few seconds")
        fresh: np.ndarray = takes & (figures["reported_s"] >= now - STALE_S)
        return fresh if np.count_nonzero(fresh) else takes

    def _held(self, ask: Ask, now: float) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Whether each place has the adapter in memory, and whether it has it or is believed to be loading it; None without an
        adapter."""
        if ask.adapter is None:
            return None, None
        size = self._table.size
        resident = held = self._adapters.holders(ask.adapter)
        coming = self._coming.get(ask.adapter)
        if coming:
            for place in [place for place, until_s in coming.items() if until_s < now]:
                del coming[place]
            for place in coming:
                held |= 1 << place
        return bool_array(resident, size), bool_array(held, size)

    def _forecast(self, ask: Ask, usable: np.ndarray, resident: np.ndarray | None) -> _Forecast:
        figures = self._table.figures
        uncached = self._uncached(ask)
        outputs = figures["outputs"]
        need = (uncached + ask.outputs) / figures["block_tokens"]
        ahead_s = np.maximum(outputs + ask.outputs - figures["max_running"], 0.0) * figures["end_s"]
        np.maximum(ahead_s, np.maximum(need - figures["free_blocks"], 0.0) * figures["block_s"], out=ahead_s)
        np.maximum(ahead_s, figures["tokens"] * figures["prefill_s"], out=ahead_s)
        tpot_s = figures["iteration_s"] + ask.outputs * figures["output_s"]
        ttft_s = ahead_s + uncached * figures["prefill_s"] + tpot_s
        if resident is not None:
            ttft_s += np.where(resident, 0.0, figures["load_s"])
        feasible = usable & (ttft_s <= ask.ttft_s) & (tpot_s <= ask.tpot_s)
        return _Forecast(ttft_s, ttft_s + min(COST_TOKENS, ask.max_tokens) * tpot_s, feasible, usable, uncached)

    def _uncached(self, ask: Ask) -> np.ndarray:
        """Tokens of the prompt that each place would have to compute, at least one."""
        covered, left = np.zeros(self._table.size), self._table.mask
        holders = self._blocks.holders
        if len(self._blocks):
            for depth in range(len(ask.blocks), 0, -1):
                found = holders(ask.blocks[depth - 1]) & left
                if found:
                    covered[bool_array(found, self._table.size)] = depth
                    left ^= found
                    if not left:
                        break
        uncached: np.ndarray = np.maximum(ask.prompt_tokens - covered * self._table.figures["block_tokens"], 1.0)
        return uncached

    def _candidates(
        self, ask: Ask, forecast: _Forecast, held: tuple[np.ndarray | None, np.ndarray | None], now: float
    ) -> np.ndarray:
        """The places among which cost decides; at least one."""
        feasible, near = forecast.feasible, held[1]
        if ask.adapter is None or near is None:
            return feasible if np.count_nonzero(feasible) else forecast.usable
        comfort_s = PATIENCE_S if ask.ttft_s == math.inf else min(COMFORT * ask.ttft_s, PATIENCE_S)
        comfortable = feasible & (forecast.ttft_s <= comfort_s)
        order = rendezvous_order(ask.adapter, self._table.figures["seed"])
        order = order[forecast.usable[order]]
        wanted = self._heat.num_homes(ask.adapter, len(order), self._table.num_routers, now)
        homes = np.zeros_like(comfortable)
        homes[order[: wanted + SPARE_HOMES]] = True
        around = comfortable & (near | homes)
        if np.count_nonzero(around):
            self._add_moves(forecast.cost, around, near, order[:wanted])
            return around
        further = order[comfortable[order]]
        if further.size:
            alone = np.zeros_like(comfortable)
            alone[further[0]] = True
            return alone
        return self._least_late(forecast, near, homes)

    def _add_moves(self, cost: np.ndarray, around: np.ndarray, near: np.ndarray, wanted: np.ndarray) -> None:
        """Adds to the cost what it counts to bring the adapter to one more replica. wanted: the homes that it needs; while
        fewer replicas have it, these homes count no more than the load itself."""
        held = cost[around & near]
        if held.size:
            moves = np.where(near, 0.0, self._table.figures["load_s"] + STAY * held.min())
            if held.size < len(wanted):
                moves[wanted] = 0.0
            cost += moves

    @staticmethod
    def _least_late(forecast: _Forecast, near: np.ndarray, homes: np.ndarray) -> np.ndarray:
        """Where nothing is comfortable: the feasible places, or all. Of these the ones with the adapter unless they are much
        worse, else its homes unless they are."""
        places = forecast.feasible if np.count_nonzero(forecast.feasible) else forecast.usable
        least = forecast.cost[places].min()
        for close in (places & near, places & (near | homes)):
            if np.count_nonzero(close) and forecast.cost[close].min() <= _WORSE * least:
                return close
        return places

    def _draw(self, ask: Ask, candidates: np.ndarray, forecast: _Forecast) -> int:
        """The better of two random places among those of nearly least cost and with the longest prefix."""
        places = np.flatnonzero(candidates)
        costs = forecast.cost[places]
        equals = np.flatnonzero(costs <= (1 + NEAR) * costs.min())
        if len(equals) > 1 and ask.blocks:
            uncached = forecast.uncached[places[equals]]
            equals = equals[uncached == uncached.min()]
        if len(equals) > 2:
            count = len(equals)
            first = self._random.randrange(count)
            second = (first + 1 + self._random.randrange(count - 1)) % count
            equals = equals[[first, second]]
        if len(equals) == 2 and costs[equals[0]] == costs[equals[1]]:
            return int(places[equals[self._random.randrange(2)]])
        return int(places[equals[costs[equals].argmin()]])

    # --- what becomes of requests ---

    def sent(self, id: Hashable, choice: Choice, ask: Ask, now: float) -> None:
        """A request was sent where it was chosen to go. One that was sent before, and that goes elsewhere now, is counted there
        no more."""
        self._now = max(self._now, now)
        self.ended(id)
        replica = self._table.by_name.get(choice.replica)
        self._under_way[id] = _UnderWay(replica, ask.adapter, ask.outputs, now, choice.predicted_ttft_s)
        self._heat.add(ask.adapter, ask.outputs, now)
        if replica is None:
            return
        blocks = -(-(choice.uncached_tokens + ask.outputs) // replica.load.block_tokens)
        replica.add(id, SentWork(ask.outputs, choice.uncached_tokens, blocks), now)
        self._table.settle(replica)
        if ask.adapter is not None and not choice.resident:
            self._expect(ask.adapter, replica, now)

    def _expect(self, adapter: str, replica: KnownReplica, now: float) -> None:
        """An adapter is going to be loaded. The first request of several sets how long that is believed."""
        if len(self._coming) >= _MOST_COMING:
            self._coming = {
                name: places for name, places in self._coming.items() if any(until_s >= now for until_s in places.values())
            }
        until_s = now + max(_COMING_S, _COMING_LOADS * replica.load.adapter_load_s)
        self._coming.setdefault(adapter, {}).setdefault(replica.place, until_s)

    def first_token(self, id: Hashable, now: float) -> None:
        """A request's first token has come, so its prompt is through."""
        self._now = max(self._now, now)
        request = self._under_way.get(id)
        if request is None or not request.waits:
            return
        request.waits = False
        self._signals.on_first_token(request.predicted_s, now - request.sent_s, now)
        if request.replica is not None:
            request.replica.drop_prompt(id)
            self._table.settle(request.replica)

    def ended(self, id: Hashable) -> None:
        """A request has ended, was cancelled or has failed; one that is not known is ignored."""
        request = self._under_way.pop(id, None)
        if request is None:
            return
        self._heat.add(request.adapter, -request.outputs, self._now)
        if request.replica is not None:
            request.replica.drop(id)
            self._table.settle(request.replica)

    @property
    def num_under_way(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._under_way)

    # --- metrics ---

    def summary(self, now: float | None = None, *, job_backlog: float = 0.0) -> RouterSummary:
        """Numbers for metrics and autoscaling. now: None takes the latest time that was told. job_backlog: jobs that wait."""
        at_s = self._now if now is None else now
        known = self._table.by_name.values()
        suspect = sum(self._table.reported_s(one) < at_s - STALE_S for one in known)
        return self._signals.summary([one.load for one in known], suspect=suspect, job_backlog=job_backlog)

    def check_integrity(self) -> None:
        """Asserts that all accounts agree."""
        self._table.check_integrity()
        self._adapters.check_integrity()
        self._blocks.check_integrity()
        for replica in self._table.by_name.values():
            for request in replica.sent:
                assert self._under_way[request].replica is replica
