"""Copies from host to device that do not wait for the device.

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
