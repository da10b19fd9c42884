"""What is left to do when the library has attention's gradients of a window: one launch.

T rows of the window, S keys that they see, of which the last T are their own; H query heads, G key-value heads, K head width.

      keys:   | E earlier ones ...... | the window's own T |          S = E + T
      d_k     added to the sums         added to the sums, turned back, rounded: these rows' gradient is complete
      d_v     added to the sums         added to the sums, rounded
      d_q                               turned back
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coserve.kernels.triton import jit
from coserve.kernels.triton.rows import HEADS, check_rows, head_tiles, turn, turned

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(unspecialized=("earlier",))
def _window_grads_kernel(
    d_q: tl.tensor, d_k: tl.tensor, d_v: tl.tensor, sum_k: tl.tensor, sum_v: tl.tensor,
    part_q: tl.tensor, part_k: tl.tensor, part_v: tl.tensor, cos: tl.tensor, sin: tl.tensor, factor: tl.tensor,
    earlier: tl.tensor, d_q_stride: tl.tensor, d_k_stride: tl.tensor, d_v_stride: tl.tensor,
    sum_k_stride: tl.tensor, sum_v_stride: tl.tensor, heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr,
    h_tile: tl.constexpr, half_tile: tl.constexpr,
) -> None:
    """h_tile heads of one key's row of dK or dV, or of dQ for the query that sits there."""
    half: tl.constexpr = width // 2
    q_tiles: tl.constexpr = (heads + h_tile - 1) // h_tile
    kv_tiles: tl.constexpr = (kv_heads + h_tile - 1) // h_tile
    key, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, feature = tl.arange(0, h_tile), tl.arange(0, half_tile)
    row = key - earlier
    if tile < q_tiles:
        if row >= 0:
            head = tile * h_tile + lane
            real, column = (head < heads)[:, None] & (feature < half)[None, :], head[:, None] * width + feature[None, :]
            source, target = part_q + row * (heads * width), d_q + row * d_q_stride + column
            first, second = turn(source, cos + row * width, sin + row * width, -1.0, factor, column, feature, real, half)
            tl.store(target, first.to(d_q.dtype.element_ty), mask=real)
            tl.store(target + half, second.to(d_q.dtype.element_ty), mask=real)
    else:
        head = (tile - q_tiles) % kv_tiles * h_tile + lane
        real, column = (head < kv_heads)[:, None] & (feature < half)[None, :], head[:, None] * width + feature[None, :]
        is_key = tile < q_tiles + kv_tiles
        part = part_k if is_key else part_v
        total = sum_k + key * sum_k_stride if is_key else sum_v + key * sum_v_stride
        part += key * (kv_heads * width)
        first = tl.load(part + column, mask=real, other=0.0).to(tl.float32)
        second = tl.load(part + column + half, mask=real, other=0.0).to(tl.float32)
        first += tl.load(total + column, mask=real, other=0.0)
        second += tl.load(total + column + half, mask=real, other=0.0)
        if row < 0:
            tl.store(total + column, first, mask=real)
            tl.store(total + column + half, second, mask=real)
        else:
            target = d_k + row * d_k_stride if is_key else d_v + row * d_v_stride
            if is_key:
                first, second = turned(
                    first, second, cos + row * width, sin + row * width, -1.0, factor, column, feature, real, half
                )
            tl.store(target + column, first.to(d_k.dtype.element_ty), mask=real)
            tl.store(target + column + half, second.to(d_k.dtype.element_ty), mask=real)


def window_grads(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, sum_k: Tensor, sum_v: Tensor, parts: Sequence[Tensor], cos_TK: Tensor,
    sin_TK: Tensor, scale: float,
) -> None:
    """Writes a window's gradients before its rotary embedding, and adds what later windows don't see any more to the sums.

    d_q: [T, H * K]; d_k, d_v: [T, G * K]. parts: the library's dQ [T, H, K], dK and dV [S, G, K], contiguous. sum_k, sum_v:
    float32 [S, G * K], of which the first S - T rows are added to; what the others hold counts too, and stays. scale: as
    rotary embedding's.
    """
    check_rows(d_q, d_k, d_v, cos_TK, sin_TK)
    check_rows(sum_k, sum_v)
    part_q, part_k, part_v = parts
    width = cos_TK.shape[1]
    heads, kv_heads = d_q.shape[1] // width, d_k.shape[1] // width
    keys = sum_k.shape[0]
    assert all(part.is_contiguous() for part in (*parts, cos_TK, sin_TK))
    assert part_q.numel() == d_q.numel() and part_k.shape == part_v.shape == (keys, kv_heads, width)
    half_tile, warps = head_tiles(width)
    launch: Any = _window_grads_kernel[(keys, -(-heads // HEADS) + 2 * -(-kv_heads // HEADS))]
    launch(
        d_q, d_k, d_v, sum_k, sum_v, part_q, part_k, part_v, cos_TK, sin_TK, float(scale), keys - d_q.shape[0],
        d_q.stride(0), d_k.stride(0), d_v.stride(0), sum_k.stride(0), sum_v.stride(0),
        heads=heads, kv_heads=kv_heads, width=width, h_tile=HEADS, half_tile=half_tile, num_warps=warps,
    )
