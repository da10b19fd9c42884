"""Ranks that are threads of one process, for tests: every collective meets at a barrier and combines in rank order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from coserve.parallel import Ranks

T = TypeVar("T")
PATIENCE_S = 60


class Meeting:
    """Where the threads of a group leave their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.tensors: list[Tensor] = [torch.empty(0)] * size


class LoopbackRanks(Ranks):
    """One thread's view."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self._meeting = meeting

    def _exchange(self, own: Tensor) -> Sequence[Tensor]:
        self._meeting.tensors[self.rank] = own.clone()
        self._meeting.barrier.wait()
        found = tuple(self._meeting.tensors)
        self._meeting.barrier.wait()
        return found

    def _all_reduce(self, tensor: Tensor, *, largest: bool) -> None:
        parts = torch.stack(tuple(self._exchange(tensor)))
        tensor.copy_(parts.amax(0) if largest else parts.sum(0))

    def _reduce_scatter(self, own: Tensor, parts: Tensor) -> None:
        own.copy_(sum((each[self.rank] for each in self._exchange(parts)), torch.zeros_like(own)))

    def _collect(self, parts: Tensor | None, own: Tensor) -> None:
        found = torch.stack(tuple(self._exchange(own)))
        if parts is not None:
            parts.copy_(found)

    def _all_gather(self, parts: Tensor, own: Tensor) -> None:
        parts.copy_(torch.stack(tuple(self._exchange(own))))


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Runs `work` on every rank of a group of threads. Raises what the first rank that failed raised."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(LoopbackRanks(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    failures = [future.exception() for future in futures if future.exception() is not None]
    first = next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), None)
    if first is not None:
        raise first
    return [future.result() for future in futures]
