"""Which kernels a device gets: the one place that asks.

Owns: the choice. Does not own: what a kernel does where its library doesn't take the arguments (it falls back by itself).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from coserve.kernels import attention, cuda_attention, native
from coserve.kernels import triton as triton_kernels
from coserve.kernels.triton import paged_decode


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


def paged_decode_for(cache_rows: torch.Tensor, block_tokens: int) -> Callable[..., None] | None:
    """Decode attention that reads the cache where it lies, with the signature of `triton.paged_decode`'s; None where keys have
    to be gathered. cache_rows: [rows, block_tokens * K]."""
    if runs_triton(cache_rows.device):
        return paged_decode.paged_decode_attention
    compiled = native.kernels_for(cache_rows)
    fits = native.attends(cache_rows.shape[1] // block_tokens, block_tokens)
    return None if compiled is None or not fits else compiled.paged_decode_attention
