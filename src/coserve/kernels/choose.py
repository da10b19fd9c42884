"""Which kernels a device gets. `native` says whether there are compiled ones.

Owns: the choice. Does not own: what a kernel does with arguments that its library refuses; it falls back by itself.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from coserve.kernels import cuda_attention
from coserve.kernels import triton as triton_kernels

FLASH3_PACKAGE = "flash_attn_interface"
"""FlashAttention 3, for devices of compute capability 9: PyTorch lets it serve its own flash operators."""
_MAX_DIFFERENCE = 0.02
"""By how much results of two libraries may differ in bfloat16, as a part of their norm."""


def packs_attention(device: torch.device) -> bool:
    """Whether attention of several sequences is one call of `cuda_attention` there. Elsewhere `attention` takes them one by
    one."""
    if device.type != "cuda":
        return False
    flash_note(device)
    return True


@functools.cache
def flash_note(device: torch.device) -> str:
    """Chooses what serves PyTorch's flash operators on a CUDA device, once in a process, and says so in a line for the log."""
    own = "attention by PyTorch's flash kernels"
    activate = getattr(torch_attention, "activate_flash_attention_impl", None)
    if activate is not None and (chosen := torch_attention.current_flash_attention_impl()) is not None:
        return f"attention by {chosen}, in PyTorch's place"
    if activate is None or importlib.util.find_spec(FLASH3_PACKAGE) is None or torch.cuda.get_device_capability(device)[0] != 9:
        return own
    try:
        want = _probe(device)
        activate("FA3")
        for have, wanted in zip(_probe(device), want, strict=True):
            if not float((have - wanted).norm() / wanted.norm()) < _MAX_DIFFERENCE:
                raise RuntimeError("its results differ from PyTorch's own")
    except Exception as error:  # whatever an optional package does
        if torch_attention.current_flash_attention_impl() is not None:
            torch_attention.restore_flash_attention_impl()
        return f"{own}; {FLASH3_PACKAGE} is installed, but can't serve: {error}"
    return f"attention by FlashAttention 3 ({FLASH3_PACKAGE})"


def _probe(device: torch.device) -> list[Tensor]:
    """What the present library finds for two short sequences, the first of which sees earlier keys: outputs, log-sum-exps and
    gradients."""
    generator = torch.Generator().manual_seed(0)
    sequences = [cuda_attention.KeyedRows(0, 9, 40), cuda_attention.KeyedRows(40, 40, 41)]
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in cuda_attention.call_ends(sequences))
    call = cuda_attention.PackedCall(sequences, ends_q, ends_k, 31, 40)
    q, grad = (torch.randn(32, 4 * 128, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(41, 2 * 128, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    out, d_q, lse = torch.zeros_like(q), torch.zeros_like(q), torch.zeros(32, 4, device=device)
    d_k, d_v = (torch.zeros(41, 2 * 128, device=device) for _ in range(2))
    cuda_attention.attention(out, lse, q, k, v, call, width=128, window=None)
    cuda_attention.attention_dgrad(d_q, d_k, d_v, grad, q, k, v, out, lse, call, width=128, window=None)
    return [out, lse, d_q, d_k, d_v]


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels in `kernels.triton` run there: paged decode attention, products of many adapters,
    sampling, cross-entropy."""
    return device.type == "cuda" and triton_kernels.available()
