"""Copies between host and device that do not wait for the device.

A copy from ordinary host memory makes CUDA wait for everything before it; one from pinned memory is queued like a kernel.
Pinned memory comes from PyTorch's cache, which reuses it only after the copy has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(host: Tensor | np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """The same values on `device`; the host's own memory where that is the device. Integers in a sequence become int64."""
    if isinstance(host, np.ndarray):
        host = torch.from_numpy(host)
    elif not isinstance(host, Tensor):
        host = torch.tensor(host, dtype=torch.int64)
    if device.type != "cuda" or not host.numel():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A tensor's values on their way to the host. Nothing waits for them before `wait`."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory().copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The values in the host's memory, when all work that was queued before the copy has run."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


_ALIGNED = 16
"""Parts of one copy begin at multiples of this many elements, 64 bytes: kernels are compiled for aligned memory."""


def to_device_together(parts: Sequence[np.ndarray | Sequence[int]], device: torch.device) -> list[Tensor]:
    """Integers as int32 tensors on `device`, of the parts' shapes, sent in one copy."""
    arrays = [np.asarray(part, np.int32) for part in parts]
    sizes = [-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]
    host = np.zeros(sum(sizes), np.int32)
    for array, begin in zip(arrays, np.cumsum([0, *sizes]), strict=False):
        host[begin : begin + array.size] = array.ravel()
    sent = to_device(host, device).split(sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(sent, arrays, strict=True)]
