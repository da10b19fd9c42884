r"""Decode attention over the paged cache: one query row per request, the context cut into splits that run side by side.

B requests, N blocks of a table, H query heads, G key-value heads, X = H / G, K head width, S splits.

      context:  [ outside the window | split 0 | split 1 | ... | last split, cut short ]
                                       program   program         program                  per request and key-value head
                                          \_________|_______________/
                                          combine: weights by log-sum-exp                 per request and query head

A split's length follows from `max_context` alone, and up to MAX_SPLITS * SPLIT_TOKENS tokens it doesn't change at all: a
request's result is then the same bits in every batch. Splits beyond a request's own context cost a program that ends at once;
what they would have written is not read. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coserve.kernels.triton import jit, next_power, require_aligned

try:
    import triton.language as tl
except ImportError:
    tl = None

SPLIT_TOKENS = 256
"""Context tokens of a split: short enough that one request's heads fill a device, long enough that partials stay cheap."""

MAX_SPLITS = 64
"""Longer contexts get longer splits: the combining program holds all partials of a head."""

TILE_TOKENS = 64
"""Context tokens that a program holds at a time."""

NO_WINDOW = 1 << 30
"""A sliding window that cuts nothing."""


@jit(unspecialized=("tables", "contexts", "layer", "window"))
def _split_kernel(
    partial: tl.tensor, partial_lse: tl.tensor, q: tl.tensor, cache: tl.tensor, tables: tl.tensor, contexts: tl.tensor,
    layer: tl.tensor, num_layers: tl.tensor, q_stride: tl.tensor, cache_stride: tl.tensor, table_stride: tl.tensor,
    split_tokens: tl.tensor, window: tl.tensor, scale: tl.tensor,
    kv_heads: tl.constexpr, share: tl.constexpr, width: tl.constexpr, block_tokens: tl.constexpr,
    x_tile: tl.constexpr, k_tile: tl.constexpr, s_tile: tl.constexpr,
) -> None:
    """One split of one request's context for the query heads of one key-value head.

    Writes the normalized partial [B, H, S, K] and its log-sum-exp [B, H, S]. A split beyond the context writes nothing.
    """
    request, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    context = tl.load(contexts + request)
    first = tl.maximum(context - window, 0) + split * split_tokens
    last = tl.minimum(first + split_tokens, context)
    if first >= last:
        return

    heads, features, tokens = tl.arange(0, x_tile), tl.arange(0, k_tile), tl.arange(0, s_tile)
    real_heads, real_features = heads < share, features < width
    head = group * share + heads
    q_tile = tl.load(
        q + request.to(tl.int64) * q_stride + head[:, None] * width + features[None, :],
        mask=real_heads[:, None] & real_features[None, :], other=0.0,
    )

    peak = tl.full([x_tile], float("-inf"), tl.float32)
    total = tl.zeros([x_tile], tl.float32)
    acc = tl.zeros([x_tile, k_tile], tl.float32)
    for start in range(first, last, s_tile):
        position = start + tokens
        real = position < last
        block = tl.load(tables + request.to(tl.int64) * table_stride + position // block_tokens, mask=real, other=0)
        key_row = ((block.to(tl.int64) * num_layers + layer) * 2) * kv_heads + group
        offset = (position % block_tokens) * width
        key = key_row * cache_stride + offset
        value = (key_row + kv_heads) * cache_stride + offset
        wanted = real[:, None] & real_features[None, :]
        keys = tl.load(cache + key[:, None] + features[None, :], mask=wanted, other=0.0)
        values = tl.load(cache + value[:, None] + features[None, :], mask=wanted, other=0.0)

        scores = tl.dot(q_tile, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(real[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - new_peak)
        p = tl.exp(scores - new_peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        peak = new_peak

    row = (request.to(tl.int64) * (kv_heads * share) + head) * num_splits + split
    tl.store(
        partial + row[:, None] * width + features[None, :], acc / total[:, None],
        mask=real_heads[:, None] & real_features[None, :],
    )
    tl.store(partial_lse + row, peak + tl.log(total), mask=real_heads)


@jit(unspecialized=("contexts", "num_splits", "window"))
def _combine_kernel(
    out: tl.tensor, partial: tl.tensor, partial_lse: tl.tensor, contexts: tl.tensor, out_stride: tl.tensor,
    num_splits: tl.tensor, split_tokens: tl.tensor, window: tl.tensor,
    width: tl.constexpr, split_tile: tl.constexpr, k_tile: tl.constexpr,
) -> None:
    """One request's output for one query head from the splits that its context has; zeros where it is empty."""
    request, head = tl.program_id(0), tl.program_id(1)
    splits, features = tl.arange(0, split_tile), tl.arange(0, k_tile)
    row = (request.to(tl.int64) * tl.num_programs(1) + head) * num_splits + splits
    used = tl.cdiv(tl.minimum(tl.load(contexts + request), window), split_tokens)
    real = splits < used
    lse = tl.load(partial_lse + row, mask=real, other=float("-inf"))
    peak = tl.max(lse, 0)
    weights = tl.exp(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    parts = tl.load(
        partial + row[:, None] * width + features[None, :],
        mask=real[:, None] & (features < width)[None, :], other=0.0,
    )
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + request.to(tl.int64) * out_stride + head * width + features,
        merged.to(out.dtype.element_ty), mask=features < width,
    )


def split_sizes(max_context: int, window: int | None) -> tuple[int, int]:
    """(number of splits, tokens of a split) for the longest context of a batch."""
    span = max_context if window is None else min(max_context, window)
    tiles = -(-span // (MAX_SPLITS * TILE_TOKENS))
    length = max(SPLIT_TOKENS, tiles * TILE_TOKENS)
    return max(1, -(-span // length)), length


def partial_bytes(rows: int, heads: int, width: int) -> int:
    """The most bytes that partial results of so many requests take, however long their contexts are."""
    return rows * heads * MAX_SPLITS * (width + 1) * torch.float32.itemsize


def paged_decode_attention(
    out_BD: Tensor, q_BD: Tensor, cache_rows: Tensor, *, layer: int, num_layers: int, kv_heads: int, block_tokens: int,
    tables_BN: Tensor, context_B: Tensor, max_context: int, window: int | None, scale: float,
) -> None:
    """Attention of one query row per request over its cached context, of which the query's own token is the last.

    out_BD, q_BD: [B, H * K], rows may be slices of wider ones. cache_rows: [blocks * L * 2 * G, block_tokens * K], where row
    ((block * L + layer) * 2 + kv) * G + g holds head g's keys (kv 0) or values (kv 1) of a block's tokens, [block_tokens, K].
    tables_BN: int32, the blocks of each request in order. context_B: int32, tokens of each request; 0 gives a row of zeros.
    max_context: no entry of context_B may be larger. window: sliding window in tokens. Accumulates in float32, with
    probabilities of the cache's type. Rows of out_BD, q_BD and cache_rows begin at multiples of 16 bytes.
    """
    width = cache_rows.shape[1] // block_tokens
    batch, features = q_BD.shape
    heads = features // width
    assert features == heads * width and heads % kv_heads == 0 and out_BD.shape == q_BD.shape
    assert q_BD.stride(1) == out_BD.stride(1) == cache_rows.stride(1) == tables_BN.stride(1) == context_B.stride(0) == 1
    assert tables_BN.dtype == context_B.dtype == torch.int32 and tables_BN.shape[0] == context_B.shape[0] == batch
    if batch == 0:
        return
    require_aligned(out_BD, q_BD, cache_rows)
    splits, length = split_sizes(max_context, window)
    cut = NO_WINDOW if window is None else window
    partial = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=q_BD.device)
    lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q_BD.device)
    share, k_tile = heads // kv_heads, max(16, next_power(width))
    launch: Any = _split_kernel[(batch, kv_heads, splits)]
    launch(
        partial, lse, q_BD, cache_rows, tables_BN, context_B, layer, num_layers, q_BD.stride(0), cache_rows.stride(0),
        tables_BN.stride(0), length, cut, scale,
        kv_heads=kv_heads, share=share, width=width, block_tokens=block_tokens,
        x_tile=max(16, next_power(share)), k_tile=k_tile, s_tile=TILE_TOKENS,
    )
    launch = _combine_kernel[(batch, heads)]
    launch(
        out_BD, partial, lse, context_B, out_BD.stride(0), splits, length, cut, width=width, split_tile=next_power(splits),
        k_tile=k_tile,
    )
