"""Attention made of library calls, over a contiguous key-value arena or over the gathered tokens of one request.

T rows (queries), S context tokens, H query heads, G key-value heads, K head width. Rows are [T, heads * K].

One call handles query rows [first, last) of one sequence whose keys start at row `begin` of the arena. Queries are cut into
blocks of R rows counted from `begin`, so that the causal diagonals of all whole blocks go into one batched call:

      keys:   begin ............ row ...... row + R
      block:  [  past, unmasked  | causal diagonal ]      R = QUERY_BLOCK query rows

The two parts are merged by their log-sum-exps. PyTorch's backward on a CPU runs one task per batch element and key-value head.
So that no thread waits for an odd task, the past goes in as a batch of two halves, and a single call has its heads expanded. If
a sliding window cuts a block's past, one masked call computes the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from coserve.kernels.reference import attention_mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

QUERY_BLOCK = 256
"""Query rows of a block."""
_PRODUCT_ROWS = 4
"""Query heads of a decode row's product are padded to a multiple: the library's batched product takes longer for 3 rows."""


def _heads(x: Tensor, width: int, batch: int = 1) -> Tensor:
    """Rows [batch * T, n * width] as [batch, n, T, width], without a copy."""
    return x.unflatten(-1, (-1, width)).unflatten(0, (batch, -1)).transpose(1, 2)


def _causal_mask(rows: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """Additive [rows, keys]; the last row sits on the last key."""
    allowed = attention_mask(rows, keys, window, like.device)
    return torch.zeros(rows, keys, dtype=like.dtype, device=like.device).masked_fill_(~allowed, -math.inf)


def _forward_part(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q: [B, H, T, K]; k, v: [B, G, S, K]. Returns out [B, H, T, K] and log-sum-exp [B, H, T]."""
    if q.is_cpu:
        return _flash(q, k, v, 0.0, causal, attn_mask=mask)
    if causal:
        mask = _causal_mask(q.shape[2], k.shape[2], None, q)
    share = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.repeat_interleave(share, 1).transpose(-1, -2)).to(wide) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores += mask
    lse = torch.logsumexp(scores, dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v.repeat_interleave(share, 1), lse


class _Saved(NamedTuple):
    """What a block's backward reads besides K and V. [B, H, T, K]; lse [B, H, T]."""

    grad: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor

    def twice(self) -> _Saved:
        return _Saved(*(t.expand(2, *t.shape[1:]) for t in self))


def _backward_part(
    saved: _Saved, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d_q [B, H, T, K], d_k and d_v [B, G, S, K] of this part of the keys; k, v: [B, G, S, K]."""
    kv_heads, share = k.shape[1], saved.q.shape[1] // k.shape[1]
    if saved.q.is_cpu and (share == 1 or k.shape[0] > 1):
        return _flash_backward(saved.grad, saved.q, k, v, saved.out, saved.lse, 0.0, causal, attn_mask=mask)
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    if saved.q.is_cpu:
        d_q, d_k, d_v = _flash_backward(saved.grad, saved.q, k, v, saved.out, saved.lse, 0.0, causal, attn_mask=mask)
    else:
        d_q, d_k, d_v = _plain_backward(saved, k, v, causal, mask)
    return d_q, d_k.unflatten(1, (kv_heads, share)).sum(2), d_v.unflatten(1, (kv_heads, share)).sum(2)


def _plain_backward(
    saved: _Saved, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_backward_part` in tensor operations, for devices without the library call; as many key-value as query heads."""
    grad, q, out, lse = saved
    if causal:
        mask = _causal_mask(q.shape[2], k.shape[2], None, q)
    scale, wide = 1 / math.sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    p = ((scores if mask is None else scores + mask) - lse.unsqueeze(-1)).exp()
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    ds = (p * ((grad @ v.transpose(-1, -2)).to(wide) - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ grad


class _Block(NamedTuple):
    """Query rows [row, row_end). keys_from: first key of a masked call; None for past + diagonal."""

    row: int
    row_end: int
    keys_from: int | None


def _blocks(begin: int, first: int, last: int, window: int | None) -> Iterator[_Block]:
    """Blocks of query rows [first, last), on a grid of QUERY_BLOCK from `begin`."""
    row = first
    while row < last:
        row_end = min(begin + ((row - begin) // QUERY_BLOCK + 1) * QUERY_BLOCK, last)
        masked = window is not None and row_end - begin > window
        yield _Block(row, row_end, max(begin, row - window + 1) if masked and window is not None else None)
        row = row_end


def _diagonals(blocks: list[_Block]) -> Iterator[tuple[int, int, int]]:
    """(row, row_end, number of blocks) of neighbouring unmasked blocks of equal size."""
    run: list[_Block] = []
    for block in [*blocks, None]:
        same = run and block and block.keys_from is None and block.row_end - block.row == run[0].row_end - run[0].row
        if run and not same:
            yield run[0].row, run[-1].row_end, len(run)
            run = []
        if block is not None and block.keys_from is None:
            run.append(block)


def attention(
    out: Tensor, lse_TH: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    *, width: int, begin: int, first: int, last: int, window: int | None,
) -> None:
    """Causal attention of rows [first, last) of an arena over keys [begin, row] of the same sequence.

    q, out: [last - first, H * K]; lse_TH: [last - first, H], float32 or float64; k_all, v_all: the arena's rows
    [N, G * K], of which [begin, last) are read. `width` is K; `window` a sliding window in tokens or None.
    """
    blocks = list(_blocks(begin, first, last, window))
    for row, row_end, batch in _diagonals(blocks):
        rows = slice(row - first, row_end - first)
        keys, values = (_heads(t[row:row_end], width, batch) for t in (k_all, v_all))
        o, lse = _forward_part(_heads(q[rows], width, batch), keys, values, True, None)
        _heads(out[rows], width, batch).copy_(o)
        lse_TH[rows].unflatten(0, (batch, -1)).transpose(1, 2).copy_(lse)
    for block in blocks:
        rows = slice(block.row - first, block.row_end - first)
        start, end = (begin, block.row) if block.keys_from is None else (block.keys_from, block.row_end)
        if start == end:
            continue
        mask = None if block.keys_from is None else _causal_mask(block.row_end - block.row, end - start, window, q)
        keys, values = _heads(k_all[start:end], width), _heads(v_all[start:end], width)
        o, lse = _forward_part(_heads(q[rows], width), keys, values, False, mask)
        out_h, lse_h = _heads(out[rows], width), lse_TH[rows].transpose(0, 1).unsqueeze(0)
        if mask is None:
            total = torch.logaddexp(lse_h, lse)
            share = (lse - total).exp_().unsqueeze(-1)
            o = torch.lerp(out_h.to(share.dtype), o.to(share.dtype), share)
            lse = total
        out_h.copy_(o)
        lse_h.copy_(lse)


def attention_dgrad(
    d_q: Tensor, d_k_all: Tensor, d_v_all: Tensor, grad: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    out: Tensor, lse_TH: Tensor, *, width: int, begin: int, first: int, last: int, window: int | None,
) -> None:
    """Gradients of `attention` for the same rows: writes d_q, ADDS to rows [begin, last) of d_k_all and d_v_all.

    Shapes as in `attention`; the accumulators [N, G * K] are float32 (float64 in tests). P is rebuilt from the saved
    log-sum-exp of the whole row, so that each part of the keys gives its exact share.
    """

    def saved(rows: slice, batch: int = 1) -> _Saved:
        lse = lse_TH[rows].unflatten(0, (batch, -1)).transpose(1, 2)
        return _Saved(_heads(grad[rows], width, batch), _heads(q[rows], width, batch), _heads(out[rows], width, batch), lse)

    def part(block: _Saved, start: int, end: int, batch: int, causal: bool, mask: Tensor | None) -> Tensor:
        keys, values = (_heads(t[start:end], width, batch) for t in (k_all, v_all))
        dq, dk, dv = _backward_part(block, keys, values, causal, mask)
        _heads(d_k_all[start:end], width, batch).add_(dk)
        _heads(d_v_all[start:end], width, batch).add_(dv)
        return dq

    blocks = list(_blocks(begin, first, last, window))
    for row, row_end, batch in _diagonals(blocks):
        rows = slice(row - first, row_end - first)
        _heads(d_q[rows], width, batch).copy_(part(saved(rows, batch), row, row_end, batch, True, None))
    for block in blocks:
        rows = slice(block.row - first, block.row_end - first)
        dq_h = _heads(d_q[rows], width)
        if block.keys_from is not None:
            mask = _causal_mask(block.row_end - block.row, block.row_end - block.keys_from, window, q)
            dq_h.copy_(part(saved(rows), block.keys_from, block.row_end, 1, False, mask))
            continue
        past = block.row - begin
        if past % 2 == 0 and past > 0:
            dq_h.add_(part(saved(rows).twice(), begin, block.row, 2, False, None).sum(0, keepdim=True))
        elif past:
            dq_h.add_(part(saved(rows), begin, block.row, 1, False, None))


def decode_attention(
    out: Tensor, q: Tensor, k_BGSK: Tensor, values_NK: Tensor, rows: Tensor, starts: Tensor, bias: Tensor
) -> None:
    """Attention of one row per sequence over its gathered keys, and over values where they lie.

    q, out: [B, G * H * K], H query heads of each key-value head; rows: int32 [B * G * H * S], rows of values_NK, once per query
    head; starts: int32 [B * G * H], where each query head's begin; bias: [B, 1, 1, S], 0 or -inf. Tokens that the bias excludes
    must be finite. Scores are float32 or wider: rounded to bfloat16 they would change weights by percents.
    """
    batch, kv_heads, _, width = k_BGSK.shape
    share, wide = q.shape[1] // (kv_heads * width), torch.promote_types(q.dtype, torch.float32)
    q_BGHK, k_BGSK = q.view(batch, kv_heads, share, width).to(wide), k_BGSK.to(wide)
    if share % _PRODUCT_ROWS and share > 1:
        q_BGHK = torch.nn.functional.pad(q_BGHK, (0, 0, 0, -share % _PRODUCT_ROWS))
    scores = torch.bmm(q_BGHK.flatten(0, 1), k_BGSK.flatten(0, 1).transpose(1, 2)).unflatten(0, (batch, kv_heads))
    weights = torch.softmax(torch.add(bias, scores[:, :, :share], alpha=1 / math.sqrt(width)), dim=-1)
    sums, *_ = torch.embedding_bag(
        values_NK, rows, starts, mode=0, per_sample_weights=weights.to(values_NK.dtype).flatten()
    )
    out.copy_(sums.view(batch, -1))
