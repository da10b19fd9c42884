"""Training attention on CUDA: one library call over a window's queries and all their keys, forward and backward.

T rows (queries), S keys that some query sees, H query heads, G key-value heads, K head width. Rows are [T, heads * K].

The library's causal mask is aligned at the bottom right: the last query sits on the last key, as a window's rows do, so that
neither blocks of queries nor masks are needed. Its backward rebuilds P from the saved log-sum-exp of whole rows and sums the
gradients of query heads that share keys. What the library does not take (other types, odd head widths or strides, older
devices, the CPU) goes to `kernels.attention`, whose signatures these are.

Not yet run on a device: none was there when this was written. tests/gpu/test_cuda_kernels.py is to be run on the first one.
Gradients of queries are summed by atomics, in any order, unless torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from coserve.kernels import attention as plain

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward

MAX_WIDTH = 256
"""Widest head that the library takes."""


def _fits(width: int, *rows: Tensor) -> bool:
    """Whether the library takes these rows: 16-bit floats, each head's row on a 16-byte boundary, an Ampere device or later."""
    if width % 8 or width > MAX_WIDTH or rows[0].dtype not in (torch.bfloat16, torch.float16) or not rows[0].is_cuda:
        return False
    aligned = all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in rows)
    return aligned and torch.cuda.get_device_capability(rows[0].device) >= (8, 0)


class _Call(NamedTuple):
    """What forward and backward calls share. keys: the arena rows that some query sees."""

    keys: slice
    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int
    window_left: int

    @classmethod
    def of(cls, begin: int, first: int, last: int, window: int | None, device: torch.device) -> _Call:
        start = begin if window is None else max(begin, first - window + 1)
        # [0, n] by a kernel: a copy from the host would wait for the device.
        ends_q, ends_k = (torch.arange(0, 2 * n, n, dtype=torch.int32, device=device) for n in (last - first, last - start))
        return cls(slice(start, last), ends_q, ends_k, last - first, last - start, -1 if window is None else window - 1)


def _heads(x: Tensor, width: int) -> Tensor:
    """Rows [T, n * K] as [T, n, K], without a copy."""
    return x.unflatten(-1, (-1, width))


def attention(
    out: Tensor, lse_TH: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    *, width: int, begin: int, first: int, last: int, window: int | None,
) -> None:
    """`kernels.attention.attention` on CUDA: causal attention of arena rows [first, last) over keys [begin, row].

    q, out: [last - first, H * K]; lse_TH: [last - first, H]; k_all, v_all: [N, G * K], of which [begin, last) are read.
    `width` is K; `window` a sliding window in tokens or None.
    """
    if not _fits(width, q, k_all, v_all):
        plain.attention(out, lse_TH, q, k_all, v_all, width=width, begin=begin, first=first, last=last, window=window)
        return
    call = _Call.of(begin, first, last, window, q.device)
    # The right edge is given besides is_causal: a single query would otherwise take a path of its own for decoding.
    o, lse_HT, *_ = _flash(
        _heads(q, width), _heads(k_all[call.keys], width), _heads(v_all[call.keys], width), call.ends_q, call.ends_k,
        call.max_q, call.max_k, 0.0, True, False,
        scale=1 / math.sqrt(width), window_size_left=call.window_left, window_size_right=0,
    )
    _heads(out, width).copy_(o)
    lse_TH.copy_(lse_HT.t())


def attention_dgrad(
    d_q: Tensor, d_k_all: Tensor, d_v_all: Tensor, grad: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    out: Tensor, lse_TH: Tensor, *, width: int, begin: int, first: int, last: int, window: int | None,
) -> None:
    """Gradients of `attention` for the same rows: writes d_q, ADDS to rows [begin, last) of d_k_all and d_v_all.

    Shapes as in `attention`; the accumulators [N, G * K] are float32. The library gives each window's share of dK and dV in
    16 bits; only their sum over windows is float32.
    """
    if not _fits(width, q, k_all, v_all):
        plain.attention_dgrad(d_q, d_k_all, d_v_all, grad, q, k_all, v_all, out, lse_TH,
                              width=width, begin=begin, first=first, last=last, window=window)
        return
    call = _Call.of(begin, first, last, window, q.device)
    # Without dropout the state of the random numbers is not read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _flash_backward(
        _heads(grad, width), _heads(q, width), _heads(k_all[call.keys], width), _heads(v_all[call.keys], width),
        _heads(out, width), lse_TH.t().contiguous(), call.ends_q, call.ends_k, call.max_q, call.max_k, 0.0, True, state, unused,
        scale=1 / math.sqrt(width), window_size_left=call.window_left, window_size_right=0,
    )
    _heads(d_q, width).copy_(dq)
    _heads(d_k_all[call.keys], width).add_(dk)
    _heads(d_v_all[call.keys], width).add_(dv)
