"""Products of many adapters at once: each segment of rows times its own weight, in one launch.

T rows, S segments, K input features, N output features; one of K and N is an adapter's rank. A program takes a tile of rows of
one segment. How many tiles there are is known on the device only, so the grid is the upper bound ceil(T / tile) + S, and each
program finds its segment by a running sum over the segments' tile counts; those that are left over end at once.
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@jit(unspecialized=("num_segments",))
def _segment_kernel(
    out: tl.tensor, x: tl.tensor, weight: tl.tensor, offsets: tl.tensor, alpha: tl.tensor,
    num_segments: tl.tensor, num_in: tl.tensor, num_out: tl.tensor,
    out_stride: tl.tensor, x_stride: tl.tensor,
    weight_stride_s: tl.tensor, weight_stride_k: tl.tensor, weight_stride_n: tl.tensor,
    accumulate: tl.constexpr, segment_tile: tl.constexpr,
    t_tile: tl.constexpr, k_tile: tl.constexpr, n_tile: tl.constexpr,
) -> None:
    """One [t_tile, n_tile] tile of the output."""
    tile, column = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, segment_tile)
    real = index < num_segments
    ends = tl.load(offsets + index, mask=real, other=0)
    begins = tl.load(offsets + index - 1, mask=real & (index > 0), other=0)
    tiles = tl.where(real, (ends - begins + t_tile - 1) // t_tile, 0)
    tiles_before = tl.cumsum(tiles, 0) - tiles
    mine = (tiles_before <= tile) & (tile < tiles_before + tiles)
    # At most one segment is mine; where none is, all sums are 0 and the row range is empty.
    segment = tl.sum(tl.where(mine, index, 0), 0)
    last = tl.sum(tl.where(mine, ends, 0), 0)
    first = tl.sum(tl.where(mine, begins + (tile - tiles_before) * t_tile, 0), 0)
    if first < last:
        rows, columns = first + tl.arange(0, t_tile), column * n_tile + tl.arange(0, n_tile)
        inner = tl.arange(0, k_tile)
        real_rows, real_columns = rows < last, columns < num_out
        x_rows = x + rows.to(tl.int64)[:, None] * x_stride
        weight_columns = weight + segment.to(tl.int64) * weight_stride_s + columns[None, :] * weight_stride_n
        acc = tl.zeros([t_tile, n_tile], tl.float32)
        for start in range(0, num_in, k_tile):
            k = start + inner
            real_k = k < num_in
            a = tl.load(x_rows + k[None, :], mask=real_rows[:, None] & real_k[None, :], other=0.0)
            b = tl.load(weight_columns + k[:, None] * weight_stride_k, mask=real_k[:, None] & real_columns[None, :], other=0.0)
            if a.dtype != b.dtype:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc += tl.dot(a, b, input_precision="ieee")
        acc *= alpha
        target = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        wanted = real_rows[:, None] & real_columns[None, :]
        if accumulate:
            acc += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
        tl.store(target, acc.to(out.dtype.element_ty), mask=wanted)


def segment_linear(
    out_TN: Tensor, x_TK: Tensor, weight_SKN: Tensor, offsets_S: Tensor, *, alpha: float = 1.0, accumulate: bool = False
) -> None:
    """out[rows of segment s] = alpha * x[rows] @ weight[s], or += with `accumulate`.

    Segment s ends before row offsets_S[s] (int32, ascending, at most T) and begins where the one before it ends; segments may
    be empty. Rows from offsets_S[-1] on stay as they are. out and x may be column slices; weight may have any strides. Sums
    are float32; operands of different types are multiplied in float32.
    """
    (rows, num_in), (segments, _, num_out) = x_TK.shape, weight_SKN.shape
    assert out_TN.shape == (rows, num_out) and weight_SKN.shape[1] == num_in and offsets_S.shape == (segments,)
    assert offsets_S.dtype == torch.int32 and out_TN.stride(1) == x_TK.stride(1) == offsets_S.stride(0) == 1
    assert {out_TN.dtype, x_TK.dtype, weight_SKN.dtype} <= set(DTYPES)
    if rows == 0 or segments == 0:
        return
    t_tile = 16 if rows <= 32 * segments else 64
    n_tile = min(128, max(16, next_power(num_out)))
    launch: Any = _segment_kernel[(-(-rows // t_tile) + segments, -(-num_out // n_tile))]
    launch(
        out_TN, x_TK, weight_SKN, offsets_S, float(alpha), segments, num_in, num_out,
        out_TN.stride(0), x_TK.stride(0), *weight_SKN.stride(),
        accumulate=accumulate, segment_tile=next_power(segments), t_tile=t_tile,
        k_tile=min(64, max(16, next_power(num_in))), n_tile=n_tile,
    )
