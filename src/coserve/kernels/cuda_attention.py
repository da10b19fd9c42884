"""Attention on CUDA: one library call for all sequences of a training window, or of a batch's prompts; forward and backward.

T rows (queries) and S keys of B sequences, H query heads, G key-value heads, K head width. Rows are [T, heads * K].

      rows:  | sequence 0 | sequence 1 | 2 |           the queries of one sequence lie behind those of the one before,
      keys:  | begin ......... | begin ... | .. |      and so do its keys: two tables of ends describe a call

The library's causal mask is aligned at the bottom right of each sequence: its last query sits on its last key, as a window's
rows do, so that neither blocks of queries nor masks are needed. Its backward rebuilds P from the saved log-sum-exp of whole
rows and sums the gradients of query heads that share keys. What the library does not take (other types, odd head widths or
strides, older devices, the CPU) goes to `kernels.attention`, sequence by sequence.

Not yet run on a device: none was there when this was written. tests/gpu/test_cuda_kernels.py is to be run on the first one.
Gradients of queries are summed by atomics, in any order, unless torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coserve.kernels import attention as plain

_flash = torch.ops.aten._flash_attention_forward
_flash_into: Any = getattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace", None)
"""The same into given memory. None: this release of the library has no such call."""
_flash_backward = torch.ops.aten._flash_attention_backward

MAX_WIDTH = 256
"""Widest head that the library takes."""


class KeyedRows(NamedTuple):
    """One sequence of a call: queries sit on key rows [first, last), and see keys from row `begin` to their own."""

    begin: int
    first: int
    last: int


class PackedCall(NamedTuple):
    """What calls for the same sequences share. sequences: each begins at the key row where the one before ends. ends_q, ends_k:
    int32 [B + 1] on the device, from `call_ends`: where each one's queries and keys begin and end, from 0. max_q, max_k: of the
    longest sequence."""

    sequences: Sequence[KeyedRows]
    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int

    @property
    def keys(self) -> slice:
        """The key rows that some query sees."""
        return slice(self.sequences[0].begin, self.sequences[-1].last)


def call_ends(sequences: Sequence[KeyedRows]) -> tuple[list[int], list[int]]:
    """The ends of a call's queries and of its keys, each with a 0 in front."""
    ends_q, origin = [0], sequences[0].begin
    for one, following in itertools.pairwise(sequences):
        assert one.last == following.begin, "a call's keys lie side by side"
    for one in sequences:
        ends_q.append(ends_q[-1] + one.last - one.first)
    return ends_q, [0, *(one.last - origin for one in sequences)]


@functools.cache
def _recent(device: torch.device) -> bool:
    """Whether a CUDA device is Ampere's or later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _fits(width: int, *rows: Tensor) -> bool:
    """Whether the library takes these rows: 16-bit floats, each head's row on a 16-byte boundary, an Ampere device or later."""
    if width % 8 or width > MAX_WIDTH or rows[0].dtype not in (torch.bfloat16, torch.float16) or not rows[0].is_cuda:
        return False
    return all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in rows) and _recent(rows[0].device)


def _heads(x: Tensor, width: int) -> Tensor:
    """Rows [T, n * K] as [T, n, K], without a copy."""
    return x.unflatten(-1, (-1, width))


def _edges(width: int, window: int | None) -> dict[str, Any]:
    """The right edge is given besides is_causal: a single query would otherwise take a path of its own for decoding."""
    return {
        "scale": 1 / math.sqrt(width), "window_size_left": -1 if window is None else window - 1, "window_size_right": 0,
    }


def attention(
    out: Tensor, lse_TH: Tensor | None, q: Tensor, k_all: Tensor, v_all: Tensor, call: PackedCall,
    *, width: int, window: int | None,
) -> None:
    """Causal attention of a call's sequences.

    q, out: [T, H * K]; lse_TH: [T, H], or None if nobody needs the log-sum-exps; k_all, v_all: [N, G * K], of which `call.keys`
    are read. `width` is K; `window` a sliding window in tokens or None. Keys that no query's window reaches may be left out of
    the sequences.
    """
    if not _fits(width, out, q, k_all, v_all):
        _by_sequence(out, lse_TH, q, k_all, v_all, call, width=width, window=window)
        return
    keys = call.keys
    inputs = (
        _heads(q, width), _heads(k_all[keys], width), _heads(v_all[keys], width), call.ends_q, call.ends_k,
        call.max_q, call.max_k, 0.0, True, False,
    )
    if _flash_into is None:
        o, lse_HT, *_ = _flash(*inputs, **_edges(width, window))
        _heads(out, width).copy_(o)
    else:
        lse_HT = _flash_into(_heads(out, width), *inputs, **_edges(width, window))
    if lse_TH is not None:
        lse_TH.copy_(lse_HT.t())


def _rows(sequences: Sequence[KeyedRows]) -> list[slice]:
    """Each sequence's rows among the queries."""
    ends, _ = call_ends(sequences)
    return [slice(first, last) for first, last in itertools.pairwise(ends)]


def _by_sequence(
    out: Tensor, lse_TH: Tensor | None, q: Tensor, k_all: Tensor, v_all: Tensor, call: PackedCall,
    *, width: int, window: int | None,
) -> None:
    if lse_TH is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        lse_TH = torch.empty(q.shape[0], q.shape[1] // width, dtype=wide, device=q.device)
    for rows, (begin, first, last) in zip(_rows(call.sequences), call.sequences, strict=True):
        plain.attention(
            out[rows], lse_TH[rows], q[rows], k_all, v_all, width=width, begin=begin, first=first, last=last, window=window
        )


def attention_dgrad(
    d_q: Tensor, d_k_all: Tensor, d_v_all: Tensor, grad: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    out: Tensor, lse_TH: Tensor, call: PackedCall, *, width: int, window: int | None,
) -> None:
    """Gradients of `attention` for the same call: writes d_q, ADDS to rows `call.keys` of d_k_all and d_v_all.

    Shapes as in `attention`; the accumulators [N, G * K] are float32. The library gives each window's share of dK and dV in
    16 bits; only their sum over windows is float32.
    """
    shares = gradient_shares(grad, q, k_all, v_all, out, lse_TH, call, width=width, window=window)
    if shares is None:
        for rows, (begin, first, last) in zip(_rows(call.sequences), call.sequences, strict=True):
            plain.attention_dgrad(
                d_q[rows], d_k_all, d_v_all, grad[rows], q[rows], k_all, v_all, out[rows], lse_TH[rows],
                width=width, begin=begin, first=first, last=last, window=window,
            )
        return
    dq, dk, dv = shares
    _heads(d_q, width).copy_(dq)
    _heads(d_k_all[call.keys], width).add_(dk)
    _heads(d_v_all[call.keys], width).add_(dv)


def gradient_shares(
    grad: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor, out: Tensor, lse_TH: Tensor, call: PackedCall,
    *, width: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `attention_dgrad` writes and adds: new tensors [T, H, K] and twice [rows of call.keys, G, K] in the inputs' type;
    None if the library doesn't take the rows."""
    if not _fits(width, q, k_all, v_all):
        return None
    keys = call.keys
    # Without dropout the state of the random numbers is not read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _flash_backward(
        _heads(grad, width), _heads(q, width), _heads(k_all[keys], width), _heads(v_all[keys], width),
        _heads(out, width), lse_TH.t().contiguous(), call.ends_q, call.ends_k, call.max_q, call.max_k, 0.0, True, state, unused,
        **_edges(width, window),
    )
    return dq, dk, dv
