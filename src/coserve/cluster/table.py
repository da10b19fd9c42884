"""The figures of all replicas side by side, so that a prediction for all of them is a few vector operations.

    place:    0     1     2    ...      a replica keeps its place until it is removed; then another one may get it
    tokens   120     0   4000           as reported, plus what this router has sent since
    outputs    3     1     64

Owns: places, the figures, what this router has sent to whom and no report counts yet. Does not own: the choice (router.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from coserve.cluster.affinity import name_hash
from coserve.cluster.load import Load

REPORT_LAG_S = 0.05
"""A request that was sent so shortly before a report came may not be in it. It counts as not reported until the next one."""
ORDINARY = 2
"""Outputs that a router sends to one replica between two reports without taking them for a burst."""
_FIRST_PLACES = 16
_FIGURES = np.dtype([
    ("seed", np.uint64), ("takes", np.bool_), ("reported_s", np.float64), ("outputs", np.float64), ("tokens", np.float64),
    ("free_blocks", np.float64), ("prefill_s", np.float64), ("iteration_s", np.float64), ("output_s", np.float64),
    ("max_running", np.float64), ("room", np.float64), ("end_s", np.float64), ("block_s", np.float64),
    ("block_tokens", np.float64), ("load_s", np.float64),
])
"""seed: for ranks of homes. takes: whether a replica is there and takes requests. reported_s: when its last report came.
outputs, tokens: under way, those sent included. free_blocks: less those that prompts sent need. iteration_s: with the outputs
sent. room: the most outputs that run and wait. block_s: seconds until one more block of key-value memory is free where all are
taken. The others are a report's."""


class SentWork(NamedTuple):
    """What a request adds to its replica until a report has it. outputs: that will run. tokens, blocks: of its prompt, to be
    computed and to be taken."""

    outputs: int
    tokens: int
    blocks: int


_NONE = SentWork(0, 0, 0)

@dataclass(slots=True, eq=False)
class KnownReplica:
    """A replica's last report, and what was sent to it since. sent: by request, in order, with the time of sending. total:
    their sum."""

    name: str
    place: int
    load: Load
    sent: dict[Hashable, tuple[float, SentWork]] = field(default_factory=dict)
    total: SentWork = _NONE

    def add(self, request: Hashable, work: SentWork, now: float) -> None:
        """A request was sent."""
        self.drop(request)
        self.sent[request] = now, work
        self._count(work, 1)

    def drop(self, request: Hashable) -> None:
        """A request ended, or a report counts it."""
        found = self.sent.pop(request, None)
        if found is not None:
            self._count(found[1], -1)

    def drop_prompt(self, request: Hashable) -> None:
        """A request's prompt is through; its outputs run."""
        found = self.sent.get(request)
        if found is not None:
            at_s, work = found
            self.sent[request] = at_s, work._replace(tokens=0)
            self._count(SentWork(0, work.tokens, 0), -1)

    def drop_reported(self, now: float) -> None:
        """A report has come, which counts all but the latest requests."""
        while self.sent:
            request = next(iter(self.sent))
            if self.sent[request][0] > now - REPORT_LAG_S:
                break
            self.drop(request)

    def _count(self, work: SentWork, sign: int) -> None:
        self.total = SentWork(*(have + sign * part for have, part in zip(self.total, work, strict=True)))
        assert min(self.total) >= 0


class ReplicaTable:
    """num_routers: how many send requests. size: places so far, those that are free again included. mask: a bit for each place
    with a replica."""

    def __init__(self, num_routers: int) -> None:
        self.num_routers = num_routers
        self.by_name: dict[str, KnownReplica] = {}
        self.size = self.mask = 0
        self._rows = np.zeros(_FIRST_PLACES, _FIGURES)
        self._names: list[str] = []

    @property
    def figures(self) -> np.ndarray:
        """A row for each place, as _FIGURES says. Rows of places without a replica don't take requests."""
        return self._rows[: self.size]

    def name(self, place: int) -> str:
        """The replica at a place."""
        return self._names[place]

    def reported_s(self, replica: KnownReplica) -> float:
        """When a replica's last report came."""
        return float(self._rows[replica.place]["reported_s"])

    def report(self, load: Load, now: float) -> KnownReplica:
        """Takes a report; an unknown replica gets a place."""
        replica = self.by_name.get(load.replica)
        if replica is None:
            replica = self.by_name[load.replica] = KnownReplica(load.replica, self._take_place(load.replica), load)
            self._rows[replica.place]["seed"] = name_hash(load.replica)
        replica.load = load
        replica.drop_reported(now)
        row = self._rows[replica.place]
        used = load.num_blocks - load.free_blocks
        row["takes"], row["reported_s"] = not load.draining, now
        row["prefill_s"], row["output_s"], row["load_s"] = load.prefill_s_per_token, load.output_s, load.adapter_load_s
        row["max_running"], row["room"] = load.max_running, load.max_running + load.max_waiting
        row["end_s"], row["block_s"] = load.end_s, load.end_s * max(1, load.running) / max(1, used)
        row["block_tokens"] = load.block_tokens
        self.settle(replica)
        return replica

    def settle(self, replica: KnownReplica) -> None:
        """Brings the figures up to date with what was sent, by others too, who see the same reports: a burst that this router
        sends is taken for its share of a larger one."""
        load, (outputs, tokens, blocks), row = replica.load, replica.total, self._rows[replica.place]
        factor = 1 + (self.num_routers - 1) * max(0.0, 1 - ORDINARY / outputs) if outputs else 1.0
        row["outputs"] = load.running + load.waiting + outputs
        row["tokens"] = load.queued_prompt_tokens + factor * tokens
        row["free_blocks"] = load.free_blocks - factor * blocks
        more = min(load.waiting + factor * outputs, max(0, load.max_running - load.running))
        row["iteration_s"] = load.iteration_s + load.output_s * more

    def remove(self, name: str) -> KnownReplica | None:
        """Forgets a replica, if it is known. Its place is free."""
        replica = self.by_name.pop(name, None)
        if replica is not None:
            self.mask &= ~(1 << replica.place)
            self._rows[replica.place]["takes"] = False
            self._names[replica.place] = ""
        return replica

    def _take_place(self, name: str) -> int:
        place = next(self._free_places(), self.size)
        if place == self.size:
            self.size += 1
            self._names.append(name)
            if self.size > len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros(len(self._rows), _FIGURES)])
        self._names[place] = name
        self.mask |= 1 << place
        return place

    def _free_places(self) -> Iterator[int]:
        return (place for place in range(self.size) if not self.mask >> place & 1)

    def check_integrity(self) -> None:
        """Asserts that places, names and sums of what was sent agree."""
        assert {replica.place: replica.name for replica in self.by_name.values()} == {
            place: name for place, name in enumerate(self._names) if name
        }
        assert self.mask == sum(1 << replica.place for replica in self.by_name.values())
        for replica in self.by_name.values():
            works = [work for _, work in replica.sent.values()]
            sums = [sum(part) for part in zip(*works, strict=True)] if works else [0, 0, 0]
            assert list(replica.total) == sums and min(replica.total) >= 0
            assert self._rows[replica.place]["outputs"] == replica.load.running + replica.load.waiting + replica.total.outputs
