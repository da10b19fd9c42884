"""Homes: the replicas where an adapter had best be in memory.

    replicas by rank for "a/french":   r3  r7  r1  r9 ...      ranks by rendezvous hashing, the same for every router
    two homes:                         ^^  ^^                  of three homes the first two stay the same

A replica that joins or leaves changes the homes of only those adapters that it is, or was, a home of. An adapter gets more
homes as it gets hotter: by its share of all requests under way, averaged over HOT_S, so that a burst alone makes no adapter
hot.

Owns: ranks, how hot adapters are. Does not own: which replicas may be chosen, where adapters are in memory (router.py).
Source: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates".
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

HOT_S = 10.0
"""Time constant of the mean number of requests under way, in seconds."""
PER_HOME = 4.0
"""An adapter with fewer outputs under way than this has one home, however idle the others are."""
SPARE = 1.25
"""Homes for this many times an adapter's even share of the load, since load is never even."""
_FORGET = 0.01
"""An adapter with so few outputs under way on average is forgotten."""
_SWEEP_EVERY = 4096

_MIX = tuple(np.uint64(number) for number in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFTS = tuple(np.uint64(number) for number in (30, 27, 31))


def name_hash(name: str) -> int:
    """64 bits of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def rendezvous_order(adapter: str, seeds: np.ndarray) -> np.ndarray:
    """The places of replicas [n] by their rank for an adapter, the best first. seeds: uint64 [n], the hashes of their names."""
    mixed = seeds ^ np.uint64(name_hash(adapter))  # then splitmix64's finalizer
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MIX[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MIX[1]
    return np.argsort(~(mixed ^ (mixed >> _SHIFTS[2])), kind="stable")


@dataclass(slots=True)
class _Heat:
    """outputs: under way now. mean: as of `at_s`."""

    outputs: int = 0
    mean: float = 0.0
    at_s: float = 0.0

    def settle(self, now: float) -> float:
        """The mean, brought up to date."""
        if now > self.at_s:
            self.mean = self.outputs + (self.mean - self.outputs) * math.exp((self.at_s - now) / HOT_S)
            self.at_s = now
        return self.mean


class AdapterHeat:
    """How many outputs of each adapter are under way on average, and how many homes that makes."""

    def __init__(self) -> None:
        self._adapters: dict[str, _Heat] = {}
        self._all = _Heat()
        self._changes = 0

    def add(self, adapter: str | None, outputs: int, now: float) -> None:
        """So many more outputs of an adapter are under way; fewer, if `outputs` is negative."""
        self._all.settle(now)
        self._all.outputs += outputs
        if adapter is None:
            return
        heat = self._adapters.get(adapter)
        if heat is None:
            heat = self._adapters[adapter] = _Heat(at_s=now)
        heat.settle(now)
        heat.outputs += outputs
        assert heat.outputs >= 0 and self._all.outputs >= 0
        self._changes += 1
        if self._changes % _SWEEP_EVERY == 0:
            self._sweep(now)

    def num_homes(self, adapter: str, num_replicas: int, num_routers: int, now: float) -> int:
        """How many homes an adapter has, at least one. num_routers: how many share the requests evenly with this one."""
        heat = self._adapters.get(adapter)
        if heat is None:
            return 1
        mean, total = heat.settle(now), self._all.settle(now)
        even = math.ceil(SPARE * num_replicas * mean / total) if total > 0 else 1
        return max(1, min(num_replicas, even, math.ceil(mean * num_routers / PER_HOME)))

    def __len__(self) -> int:
        return len(self._adapters)

    def _sweep(self, now: float) -> None:
        cold = [name for name, heat in self._adapters.items() if not heat.outputs and heat.settle(now) < _FORGET]
        for name in cold:
            del self._adapters[name]
