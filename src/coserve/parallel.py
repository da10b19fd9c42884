"""The ranks of a tensor-parallel group, as operators see them: collectives on rows of features.

Owns: the layout of what is sent, and the count of bytes. Does not own: which collectives run where (compiler/parallelize.py).
T rows, W features of a whole value, N ranks. Rank r of a split value has features [r W / N, (r + 1) W / N).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coserve.core import RankFailed


@dataclass(frozen=True, slots=True)
class Sharding:
    """How ranks hold a parameter [out, in] of an adapter. axis: along which it is split into `parts` slices; None: not at all.
    summed: whether its gradient is the sum of what the ranks that hold the same values compute. reads: the state (ops/table.py)
    of the value that is multiplied by it."""

    axis: int | None
    parts: int
    summed: bool
    reads: str

    def part(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Rank number `rank`'s part of a parameter, as a view. Where there are more ranks than parts, neighbours have the
        same."""
        return whole if self.axis is None else whole.chunk(self.parts, dim=self.axis)[rank * self.parts // size]


Shardings = Mapping[tuple[int, str], Sharding]
"""{(layer, parameter): how the ranks hold it}."""


class Ranks(ABC):
    """One rank's view of its group. sent_bytes: what it has sent since the start, counted as a ring sends it: of B bytes an
    all-reduce sends 2 (N - 1) / N, a gather or a scatter half of that. What rank 0 collects is counted where it comes from."""

    def __init__(self, rank: int, size: int, device: torch.device | None = None) -> None:
        """device: where tensors are that are sent; default: in the host's memory."""
        self.rank, self.size, self.sent_bytes = rank, size, 0
        self.device = device or torch.device("cpu")

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, *, largest: bool) -> None:
        """Replaces a contiguous tensor with its sum over ranks, or with the largest of each element."""

    @abstractmethod
    def _all_gather(self, parts: Tensor, own: Tensor) -> None:
        """Fills parts [N, ...] with every rank's `own`; both are contiguous."""

    @abstractmethod
    def _reduce_scatter(self, own: Tensor, parts: Tensor) -> None:
        """Fills `own` with the sum over ranks of each one's parts[rank]; parts: [N, ...]; both are contiguous."""

    @abstractmethod
    def _collect(self, parts: Tensor | None, own: Tensor) -> None:
        """Fills parts [N, ...], which rank 0 alone has, with every rank's `own`; both are contiguous."""

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's features of a whole value: a view [T, W / N] of [T, W]."""
        width = whole.shape[-1] // self.size
        return whole.narrow(-1, self.rank * width, width)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replaces a contiguous tensor with its sum over ranks, and returns it."""
        self._all_reduce(tensor, largest=False)
        self._count(2, tensor)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Replaces each element of a contiguous tensor with the largest that any rank has there, and returns it."""
        self._all_reduce(tensor, largest=True)
        self._count(2, tensor)
        return tensor

    def reduce(self, out: Tensor, partial: Tensor) -> None:
        """out [T, W] becomes the sum of the ranks' `partial` [T, W], which may be `out` itself."""
        own = out if out.is_contiguous() else torch.empty_like(partial, memory_format=torch.contiguous_format)
        if own.data_ptr() != partial.data_ptr():
            own.copy_(partial)
        self.sum(own)
        if own is not out:
            out.copy_(own)

    def gather(self, out: Tensor, own: Tensor) -> None:
        """out [T, W] becomes the ranks' features `own` [T, W / N], side by side."""
        parts = own.new_empty(self.size, *own.shape)
        self._all_gather(parts, own.contiguous())
        out.unflatten(-1, (self.size, -1)).copy_(parts.movedim(0, -2))
        self._count(1, out)

    def collect(self, own: Tensor) -> Tensor | None:
        """The ranks' features `own` [T, W / N] side by side, [T, W], on rank 0; None on the others."""
        parts = own.new_empty(self.size, *own.shape) if self.rank == 0 else None
        self._collect(parts, own.contiguous())
        if parts is None:
            self.sent_bytes += own.numel() * own.element_size()
            return None
        return parts.movedim(0, -2).flatten(-2)

    def require_alike(self, value: int, what: str) -> None:
        """Raises RankFailed on all ranks unless all have the same number, which fits into 63 bits. what: it tells about."""
        own = torch.tensor([value], dtype=torch.int64, device=self.device)
        found = own.new_empty(self.size, 1)
        self._all_gather(found, own)
        values = found.flatten().tolist()
        if others := [str(rank) for rank in range(self.size) if values[rank] != values[0]]:
            raise RankFailed(f"rank 0 and rank {', '.join(others)} differ in {what}")

    def scatter(self, out: Tensor, partial: Tensor) -> None:
        """out [T, W / N] becomes this rank's features of the sum of the ranks' `partial` [T, W]."""
        parts = partial.unflatten(-1, (self.size, -1)).movedim(-2, 0).contiguous()
        own = torch.empty_like(parts[0])
        self._reduce_scatter(own, parts)
        out.copy_(own)
        self._count(1, partial)

    def _count(self, moves: int, whole: Tensor) -> None:
        self.sent_bytes += moves * (self.size - 1) * whole.numel() * whole.element_size() // self.size


class Alone(Ranks):
    """A group of one."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _all_reduce(self, tensor: Tensor, *, largest: bool) -> None:
        pass

    def _all_gather(self, parts: Tensor, own: Tensor) -> None:
        parts[0].copy_(own)

    def _reduce_scatter(self, own: Tensor, parts: Tensor) -> None:
        own.copy_(parts[0])

    def _collect(self, parts: Tensor | None, own: Tensor) -> None:
        assert parts is not None
        parts[0].copy_(own)


ALONE = Alone()


# the names since PyTorch 2.13, and those before
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class ProcessRanks(Ranks):
    """A group of processes, by torch.distributed: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device)
        self._group = group

    def _all_reduce(self, tensor: Tensor, *, largest: bool) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._group)

    def _all_gather(self, parts: Tensor, own: Tensor) -> None:
        _all_gather(parts.flatten(0, 1), own, group=self._group)

    def _reduce_scatter(self, own: Tensor, parts: Tensor) -> None:
        _reduce_scatter(own, parts.flatten(0, 1), group=self._group)

    def _collect(self, parts: Tensor | None, own: Tensor) -> None:
        dist.gather(own, None if parts is None else list(parts.unbind()), group=self._group, group_dst=0)
