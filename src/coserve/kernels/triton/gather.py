"""Keys and values of several requests out of the paged cache, side by side as a call of many sequences wants them.

      cache:   block 7 | block 2 | block 5 ...      each [G, block_tokens, K] per layer, keys and values
      result:  | request 0: tokens first .. | request 1: tokens first .. |      [S, G * K]

B requests, N blocks of a table, S gathered tokens of all requests, G key-value heads, K head width. A program copies a tile of
one request's tokens for one head, keys and values. A copy, so results are the cache's bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coserve.kernels.triton import jit, next_power

try:
    import triton.language as tl
except ImportError:
    tl = None

TILE_TOKENS = 64
"""Tokens that a program copies."""


@jit(unspecialized=("layer",))
def _gather_kernel(
    keys: tl.tensor, values: tl.tensor, cache: tl.tensor, tables: tl.tensor, firsts: tl.tensor, ends: tl.tensor,
    layer: tl.tensor, num_layers: tl.tensor, cache_stride: tl.tensor, table_stride: tl.tensor,
    kv_heads: tl.constexpr, width: tl.constexpr, block_tokens: tl.constexpr, s_tile: tl.constexpr, k_tile: tl.constexpr,
) -> None:
    """One request's tile of tokens for one head. Tiles behind a request's last token do nothing."""
    tile, request, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(ends + request), tl.load(ends + request + 1)
    tokens, features = begin + tile * s_tile + tl.arange(0, s_tile), tl.arange(0, k_tile)
    real = tokens < end
    position = tl.load(firsts + request) + tokens - begin
    block = tl.load(tables + request.to(tl.int64) * table_stride + position // block_tokens, mask=real, other=0)
    key_row = ((block.to(tl.int64) * num_layers + layer) * 2) * kv_heads + head
    offset = (position % block_tokens) * width
    wanted = real[:, None] & (features < width)[None, :]
    target = (tokens.to(tl.int64) * kv_heads + head) * width
    for kv in tl.static_range(2):
        source = (key_row + kv * kv_heads) * cache_stride + offset
        found = tl.load(cache + source[:, None] + features[None, :], mask=wanted, other=0.0)
        tl.store((keys if kv == 0 else values) + target[:, None] + features[None, :], found, mask=wanted)


def gather_context(
    keys_SD: Tensor, values_SD: Tensor, cache_rows: Tensor, *, layer: int, num_layers: int, kv_heads: int, block_tokens: int,
    tables_BN: Tensor, firsts_B: Tensor, ends: Tensor, max_tokens: int,
) -> None:
    """Copies tokens [firsts_B[b], firsts_B[b] + ends[b + 1] - ends[b]) of each request b to rows [ends[b], ends[b + 1]).

    keys_SD, values_SD: [S, G * K], contiguous. cache_rows, tables_BN: as in `paged_decode_attention`. firsts_B: int32. ends:
    int32 [B + 1], ascending from 0. max_tokens: no request may have more. Nothing waits for the device.
    """
    width, batch = cache_rows.shape[1] // block_tokens, firsts_B.shape[0]
    assert keys_SD.is_contiguous() and values_SD.is_contiguous() and keys_SD.shape == values_SD.shape
    assert keys_SD.shape[1] == kv_heads * width and keys_SD.dtype == values_SD.dtype == cache_rows.dtype
    assert cache_rows.stride(1) == tables_BN.stride(1) == firsts_B.stride(0) == ends.stride(0) == 1
    assert tables_BN.dtype == firsts_B.dtype == ends.dtype == torch.int32 and ends.shape == (batch + 1,)
    if batch == 0 or max_tokens == 0:
        return
    launch: Any = _gather_kernel[(-(-max_tokens // TILE_TOKENS), batch, kv_heads)]
    launch(
        keys_SD, values_SD, cache_rows, tables_BN, firsts_B, ends, layer, num_layers, cache_rows.stride(0), tables_BN.stride(0),
        kv_heads=kv_heads, width=width, block_tokens=block_tokens, s_tile=TILE_TOKENS, k_tile=next_power(width),
    )
