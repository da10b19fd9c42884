"""Which machine each replica runs on, and what it may take there. Pure policy: machines come as figures.

    replicas go one by one to the machine that has fewest of them, among those that have room

A replica's ranks are processes of one machine, so what they take together is asked for at once: nothing of a replica is placed
without the rest of it. Owns: these rules. Does not own: who starts processes there (raycluster.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from coserve.core import CapacityError
from coserve.server.settings import ServerConfig

_GPU_RANK_CPUS = 1
"""Processors that a rank on a GPU is given."""


class Machine(NamedTuple):
    """A node of the cluster. address: of the machine that it runs on; tests have several nodes on one. cpus, gpus: how many it
    offers."""

    id: str
    address: str
    cpus: float
    gpus: float


class Needs(NamedTuple):
    """What one replica takes."""

    cpus: int
    gpus: int

    def fit(self, machine: Machine) -> int:
        """How many such replicas a machine has room for."""
        parts = [(machine.cpus, self.cpus), (machine.gpus, self.gpus)]
        return int(min([has // needs for has, needs in parts if needs], default=0))

    def __str__(self) -> str:
        return f"{self.gpus} GPUs and {self.cpus} CPUs" if self.gpus else f"{self.cpus} CPUs"


def needs_of(config: ServerConfig, machines: Sequence[Machine]) -> Needs:
    """What each of the settings' replicas takes: a GPU for each rank where there are any, else `threads` processors. Where
    those are not given, replicas share the processors of their machines evenly."""
    ranks, count = config.tensor_parallel_size, config.replicas or 1
    on_gpu = config.device == "cuda" or (config.device == "auto" and any(machine.gpus for machine in machines))
    if on_gpu:
        return Needs(config.threads or ranks * _GPU_RANK_CPUS, ranks)
    if config.threads is not None:
        return Needs(config.threads, 0)
    cpus = [int(machine.cpus) for machine in machines if machine.cpus >= 1]
    return Needs(max(1, min(cpus) // math.ceil(count / len(cpus))) if cpus else 1, 0)


def place(machines: Sequence[Machine], count: int, needs: Needs, taken: Sequence[str] = ()) -> list[str | None]:
    """The node of each of `count` more replicas; None: there is no room for it now.

    taken: the node of each replica that runs already.
    """
    on, left = Counter(taken), {machine.id: needs.fit(machine) for machine in machines}
    chosen: list[str | None] = []
    for _ in range(count):
        able = [machine for machine in machines if on[machine.id] < left[machine.id]]
        best = min(able, key=lambda machine: (on[machine.id], -machine.gpus, -machine.cpus, machine.id), default=None)
        chosen.append(None if best is None else best.id)
        if best is not None:
            on[best.id] += 1
    return chosen


def check_room(machines: Sequence[Machine], count: int, needs: Needs) -> None:
    """Raises CapacityError if the machines can't hold so many replicas together."""
    if None in place(machines, count, needs):
        has = ", ".join(f"{machine.address}: {machine.gpus:g} GPUs, {machine.cpus:g} CPUs" for machine in machines)
        raise CapacityError(
            f"replicas: {count} replicas of {needs} each don't fit ({has}); take fewer, add machines, or lower --threads or "
            "--tensor-parallel-size", param="replicas",
        )


def sharers(machines: Sequence[Machine], places: Sequence[str | None]) -> int:
    """The most replicas that share one machine's memory."""
    addresses = {machine.id: machine.address for machine in machines}
    counts = Counter(addresses[node] for node in places if node in addresses)
    return max(counts.values(), default=1)
