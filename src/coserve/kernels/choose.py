"""Which kernels a device gets. `native` says whether there are compiled ones.

Owns: the choice. Does not own: what a kernel does with arguments that its library refuses; it falls back by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from coserve.kernels import attention, cuda_attention
from coserve.kernels import triton as triton_kernels


class AttentionKernels(NamedTuple):
    """Attention over contiguous keys, with the signatures of `kernels.attention`."""

    forward: Callable[..., None]
    dgrad: Callable[..., None]


def attention_for(device: torch.device) -> AttentionKernels:
    """The library's flash calls on CUDA, blocks of CPU calls elsewhere."""
    module = cuda_attention if device.type == "cuda" else attention
    return AttentionKernels(module.attention, module.attention_dgrad)


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels in `kernels.triton` run there: paged decode attention, products of many adapters."""
    return device.type == "cuda" and triton_kernels.available()
