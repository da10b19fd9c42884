"""Copies of a device's tensors to the host's memory, for files. They stop neither the device nor the thread that feeds it.

    device:   source  --side stream-->  pinned chunk 0 | 1  --this thread-->  result, in ordinary memory

An ordinary `Tensor.cpu()` is queued behind everything that the device has to do, and what is queued later waits until all
bytes have crossed the bus. Here they cross on a stream of their own, while kernels run. Whoever calls it waits: it is for
threads that write files.

Owns: these copies. Does not own: that nobody writes to the tensors meanwhile; what training goes on with is cloned first.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
"""Size of a pinned chunk. There are two, so that one fills while the other is emptied."""


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in the host's memory, detached: tensors that lie there already share theirs with the result.

    Those on a CUDA device must come from the calling thread's present stream or from one that it has waited for, and must not
    change until this returns. Blocks until all are there.
    """
    return to_host_later(tensors)()


def to_host_later(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """`to_host` in two steps: this notes what the calling thread has queued by now, and blocks nobody. Another thread calls the
    result, once or again; the tensors must not change before that returns."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    made = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def copy() -> dict[str, Tensor]:
        result = {name: tensor.detach() for name, tensor in tensors.items()}
        for device, event in made.items():
            names = [name for name, tensor in result.items() if tensor.device == device]
            result.update(zip(names, _copied([result[name] for name in names], device, event), strict=True))
        return result

    return copy


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _pinned(num_bytes: int) -> Tensor:
    """Page-locked memory, from PyTorch's cache."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _queue(chunk: Tensor, source: Tensor) -> None:
    """Queues a copy on the current stream."""
    chunk.copy_(source, non_blocking=True)


def _copied(tensors: Sequence[Tensor], device: torch.device, made: Any) -> list[Tensor]:
    """Copies of tensors of one CUDA device, all in the host's memory on return. made: the event after which they are there."""
    side = _side_stream(device)
    side.wait_event(made)
    results = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    size = max(1, min(CHUNK_BYTES, max(result.nbytes for result in results)))
    free = deque(_pinned(size) for _ in range(2))
    under_way: deque[tuple[Any, Tensor, Tensor, Tensor]] = deque()

    def empty_oldest() -> None:
        arrived, chunk, filled, target = under_way.popleft()
        arrived.synchronize()
        target.copy_(filled)
        free.append(chunk)

    with torch.cuda.stream(side):
        for tensor, result in zip(tensors, results, strict=True):
            source, target = (t.contiguous().view(-1).view(torch.uint8) for t in (tensor, result))
            for start in range(0, result.nbytes, size):
                if not free:
                    empty_oldest()
                chunk, part = free.popleft(), slice(start, min(start + size, result.nbytes))
                filled = chunk[: part.stop - part.start]
                _queue(filled, source[part])
                arrived = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
                arrived.record(side)
                under_way.append((arrived, chunk, filled, target[part]))
        while under_way:
            empty_oldest()
    return results
