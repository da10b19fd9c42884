"""Which kernels a device gets. `native` says whether there are compiled ones.

Owns: the choice. Does not own: what a kernel does with arguments that its library refuses; it falls back by itself.
"""

from __future__ import annotations

from types import ModuleType

import torch

from coserve.kernels import attention, cuda_attention
from coserve.kernels import triton as triton_kernels


def attention_for(device: torch.device) -> ModuleType:
    """The module whose `attention` and `attention_dgrad` run there: the library's flash calls on CUDA, blocks elsewhere."""
    return cuda_attention if device.type == "cuda" else attention


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels in `kernels.triton` run there: paged decode attention, products of many adapters,
    sampling, cross-entropy."""
    return device.type == "cuda" and triton_kernels.available()
