"""Row-wise kernels: what a layer does between its matrix products, one launch for each.

T rows (packed tokens), D features, H query heads, G key-value heads, K head width. Rows may be column slices of wider tensors.

A kernel reads its values once, computes in float32 and rounds where it stores. The norm is the exception, since the value is
rounded to the model's dtype before the weight as well, as Hugging Face does. A rotated head has the same bits whichever kernel
rotates it: all call `turned`, which says itself where products and sums are joined.
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

TILE = 1024
"""Elements of a row that a program holds, where a row can be cut."""

HEADS = 8
"""Heads that a program rotates."""

_PER_THREAD = 16
"""Elements of a norm that a thread holds."""


@jit()
def _rstd(value: tl.tensor, eps: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """[g, 1] float32: 1 / rms of the groups `value` [g, d], which are 0 beyond `width`."""
    mean = tl.div_rn(tl.sum(value * value, 1), width * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]


@jit()
def _weighted(out: tl.tensor, value: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """value * weight, with the value rounded to the dtype of `out` first."""
    return value.to(out.dtype.element_ty).to(tl.float32) * weight


@jit()
def _rmsnorm_kernel(
    out: tl.tensor, x: tl.tensor, weight: tl.tensor, eps: tl.tensor, groups: tl.tensor,
    out_stride: tl.tensor, x_stride: tl.tensor, width: tl.constexpr, g_tile: tl.constexpr, d_tile: tl.constexpr,
) -> None:
    """g_tile groups of one row."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * g_tile + tl.arange(0, g_tile)
    feature = tl.arange(0, d_tile)
    real, column = (group < groups)[:, None] & (feature < width)[None, :], group[:, None] * width + feature[None, :]
    spread = feature[None, :] + tl.zeros([g_tile, d_tile], tl.int32)
    factors = tl.load(weight + spread, mask=real, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_stride + column, mask=real, other=0.0).to(tl.float32)
    normed = _weighted(out, value * _rstd(value, eps, width), factors)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=real)


@jit()
def _add_rmsnorm_kernel(
    total: tl.tensor, out: tl.tensor, x: tl.tensor, y: tl.tensor, weight: tl.tensor, eps: tl.tensor,
    total_stride: tl.tensor, out_stride: tl.tensor, x_stride: tl.tensor, y_stride: tl.tensor,
    width: tl.constexpr, d_tile: tl.constexpr,
) -> None:
    """One row: its sum, and the norm of the rounded sum."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, d_tile)[None, :]
    real = feature < width
    factors = tl.load(weight + feature, mask=real, other=0.0).to(tl.float32)
    first = tl.load(x + row * x_stride + feature, mask=real, other=0.0).to(tl.float32)
    second = tl.load(y + row * y_stride + feature, mask=real, other=0.0).to(tl.float32)
    rounded = (first + second).to(total.dtype.element_ty)
    tl.store(total + row * total_stride + feature, rounded, mask=real)
    value = rounded.to(tl.float32)
    normed = _weighted(out, value * _rstd(value, eps, width), factors)
    tl.store(out + row * out_stride + feature, normed.to(out.dtype.element_ty), mask=real)


@jit()
def _rmsnorm_dgrad_kernel(
    out: tl.tensor, grad: tl.tensor, x: tl.tensor, weight: tl.tensor, eps: tl.tensor, groups: tl.tensor,
    out_stride: tl.tensor, grad_stride: tl.tensor, x_stride: tl.tensor,
    width: tl.constexpr, g_tile: tl.constexpr, d_tile: tl.constexpr, accumulate: tl.constexpr,
) -> None:
    """g_tile groups of one row: rstd * g - x * rstd**3 * mean(g * x), where g = grad * weight."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * g_tile + tl.arange(0, g_tile)
    feature = tl.arange(0, d_tile)
    real, column = (group < groups)[:, None] & (feature < width)[None, :], group[:, None] * width + feature[None, :]
    spread = feature[None, :] + tl.zeros([g_tile, d_tile], tl.int32)
    factors = tl.load(weight + spread, mask=real, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_stride + column, mask=real, other=0.0).to(tl.float32)
    scaled = tl.load(grad + row * grad_stride + column, mask=real, other=0.0).to(tl.float32) * factors
    rstd = _rstd(value, eps, width)
    mean = tl.div_rn(tl.sum(scaled * value, 1), width * 1.0)[:, None]
    result = rstd * (scaled - value * (rstd * rstd * mean))
    target = out + row * out_stride + column
    if accumulate:
        result += tl.load(target, mask=real, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=real)


@jit()
def turned(
    first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor, direction: tl.tensor, factor: tl.tensor,
    column: tl.tensor, feature: tl.tensor, real: tl.tensor, half: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Halves of rotated heads, in float32: (x * cos + swapped x * sin * direction) * factor. cos, sin: pointers to a row."""
    spread = feature[None, :] + tl.zeros_like(column)  # each thread loads its 16 bytes, which are in the cache by then
    cos_1 = tl.load(cos + spread, mask=real, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + spread + half, mask=real, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + spread, mask=real, other=0.0).to(tl.float32) * direction
    sin_2 = tl.load(sin + spread + half, mask=real, other=0.0).to(tl.float32) * direction
    return tl.fma(second, sin_1, first * cos_1) * factor, tl.fma(first, sin_2, second * cos_2) * factor


@jit()
def turn(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, direction: tl.tensor, factor: tl.tensor,
    column: tl.tensor, feature: tl.tensor, real: tl.tensor, half: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`turned` of the heads at `column` of the row that x points to."""
    first = tl.load(x + column, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x + column + half, mask=real, other=0.0).to(tl.float32)
    return turned(first, second, cos, sin, direction, factor, column, feature, real, half)


@jit()
def _rope_kernel(
    out: tl.tensor, x: tl.tensor, cos: tl.tensor, sin: tl.tensor, direction: tl.tensor, factor: tl.tensor, heads: tl.tensor,
    out_stride: tl.tensor, x_stride: tl.tensor, width: tl.constexpr, h_tile: tl.constexpr, half_tile: tl.constexpr,
) -> None:
    """h_tile heads of one row."""
    half: tl.constexpr = width // 2
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * h_tile + tl.arange(0, h_tile)
    feature = tl.arange(0, half_tile)
    real, column = (head < heads)[:, None] & (feature < half)[None, :], head[:, None] * width + feature[None, :]
    cos_row, sin_row = cos + row * width, sin + row * width
    first, second = turn(x + row * x_stride, cos_row, sin_row, direction, factor, column, feature, real, half)
    target = out + row * out_stride + column
    tl.store(target, first.to(out.dtype.element_ty), mask=real)
    tl.store(target + half, second.to(out.dtype.element_ty), mask=real)


@jit(unspecialized=("cached_rows",))
def _rotary_write_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, cos: tl.tensor, sin: tl.tensor, factor: tl.tensor,
    cache_keys: tl.tensor, cache_values: tl.tensor, token_rows: tl.tensor, keys: tl.tensor, values: tl.tensor,
    cached_rows: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    keys_stride: tl.tensor, values_stride: tl.tensor, heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr,
    h_tile: tl.constexpr, half_tile: tl.constexpr,
) -> None:
    """h_tile heads of one row of q, k or v."""
    half: tl.constexpr = width // 2
    q_tiles: tl.constexpr = (heads + h_tile - 1) // h_tile
    kv_tiles: tl.constexpr = (kv_heads + h_tile - 1) // h_tile
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, feature = tl.arange(0, h_tile), tl.arange(0, half_tile)
    cos_row, sin_row = cos + row * width, sin + row * width
    if tile < q_tiles:
        head = tile * h_tile + lane
        real, column = (head < heads)[:, None] & (feature < half)[None, :], head[:, None] * width + feature[None, :]
        first, second = turn(q + row * q_stride, cos_row, sin_row, 1.0, factor, column, feature, real, half)
        tl.store(q + row * q_stride + column, first.to(q.dtype.element_ty), mask=real)
        tl.store(q + row * q_stride + column + half, second.to(q.dtype.element_ty), mask=real)
    else:
        head = (tile - q_tiles) % kv_tiles * h_tile + lane
        real, column = (head < kv_heads)[:, None] & (feature < half)[None, :], head[:, None] * width + feature[None, :]
        is_key = tile < q_tiles + kv_tiles
        if is_key:
            first, second = turn(k + row * k_stride, cos_row, sin_row, 1.0, factor, column, feature, real, half)
            low, high = first.to(k.dtype.element_ty), second.to(k.dtype.element_ty)
            tl.store(k + row * k_stride + column, low, mask=real)
            tl.store(k + row * k_stride + column + half, high, mask=real)
        else:
            low = tl.load(v + row * v_stride + column, mask=real, other=0.0)
            high = tl.load(v + row * v_stride + column + half, mask=real, other=0.0)
        if row < cached_rows:
            token_row = tl.load(token_rows + row * kv_heads + head, mask=head < kv_heads, other=0)
            place = token_row[:, None] * width + feature[None, :]
            cache = cache_keys if is_key else cache_values
            tl.store(cache + place, low, mask=real)
            tl.store(cache + place + half, high, mask=real)
        else:
            dense = keys + (row - cached_rows) * keys_stride if is_key else values + (row - cached_rows) * values_stride
            tl.store(dense + column, low, mask=real)
            tl.store(dense + column + half, high, mask=real)


@jit()
def _silu_mul_kernel(
    out: tl.tensor, gate: tl.tensor, up: tl.tensor, features: tl.tensor,
    out_stride: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor, tile: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    real = column < features
    x = tl.load(gate + row * gate_stride + column, mask=real, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, (x / (1.0 + tl.exp(-x)) * y).to(out.dtype.element_ty), mask=real)


@jit()
def _silu_mul_dgrad_kernel(
    d_gate: tl.tensor, d_up: tl.tensor, grad: tl.tensor, gate: tl.tensor, up: tl.tensor, features: tl.tensor,
    d_gate_stride: tl.tensor, d_up_stride: tl.tensor, grad_stride: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor,
    tile: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    real = column < features
    g = tl.load(grad + row * grad_stride + column, mask=real, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + column, mask=real, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=real, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    tl.store(d_up + row * d_up_stride + column, (g * (x * sigmoid)).to(d_up.dtype.element_ty), mask=real)
    slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(d_gate + row * d_gate_stride + column, (g * y * slope).to(d_gate.dtype.element_ty), mask=real)


def check_rows(*tensors: Tensor) -> None:
    """Features of a row lie side by side, and all have as many rows."""
    assert all(t.dim() == 2 and t.stride(1) == 1 and t.shape[0] == tensors[0].shape[0] for t in tensors)


def _warps(elements: int) -> int:
    return min(16, max(1, elements // (32 * _PER_THREAD)))


def _norm_tiles(features: int, width: int) -> tuple[int, int, int]:
    """(groups of a row, groups of a program, padded width of a group)."""
    groups, d_tile = features // width, next_power(width)
    assert features == groups * width
    return groups, min(next_power(groups), max(1, TILE // d_tile)), d_tile


def rmsnorm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """`library.rmsnorm`: out, x [T, D], groups of weight.numel() features."""
    check_rows(out, x)
    width = weight.shape[0]
    groups, g_tile, d_tile = _norm_tiles(x.shape[1], width)
    launch: Any = _rmsnorm_kernel[(x.shape[0], -(-groups // g_tile))]
    launch(out, x, weight, eps, groups, out.stride(0), x.stride(0), width=width, g_tile=g_tile, d_tile=d_tile,
           num_warps=_warps(g_tile * d_tile))


def add_rmsnorm(total: Tensor, out: Tensor, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> None:
    """total = x + y, rounded; out = rmsnorm(total) over whole rows [T, D]. `total` may be x or y."""
    check_rows(total, out, x, y)
    width = weight.shape[0]
    assert x.shape[1] == width
    d_tile = next_power(width)
    launch: Any = _add_rmsnorm_kernel[(x.shape[0],)]
    launch(total, out, x, y, weight, eps, total.stride(0), out.stride(0), x.stride(0), y.stride(0),
           width=width, d_tile=d_tile, num_warps=_warps(d_tile))


def rmsnorm_dgrad(out: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, accumulate: bool) -> None:
    """`library.rmsnorm_dgrad`: out, grad, x [T, D]; adds to `out` with `accumulate`, rounding the sum once."""
    check_rows(out, grad, x)
    width = weight.shape[0]
    groups, g_tile, d_tile = _norm_tiles(x.shape[1], width)
    launch: Any = _rmsnorm_dgrad_kernel[(x.shape[0], -(-groups // g_tile))]
    launch(out, grad, x, weight, eps, groups, out.stride(0), grad.stride(0), x.stride(0),
           width=width, g_tile=g_tile, d_tile=d_tile, accumulate=accumulate, num_warps=_warps(g_tile * d_tile))


def head_tiles(width: int) -> tuple[int, int]:
    """(padded half of a head, warps of a program that rotates HEADS heads)."""
    half_tile = next_power(width // 2)
    return half_tile, min(16, max(1, HEADS * half_tile // 256))


def rope(out: Tensor, x: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, inverse: bool, scale: float) -> None:
    """`library.rope`: out, x [T, heads * K]; `out` may be `x`. The result is multiplied by `scale` before it is rounded."""
    check_rows(out, x, cos_TK, sin_TK)
    width = cos_TK.shape[1]
    heads, (half_tile, warps) = x.shape[1] // width, head_tiles(width)
    assert cos_TK.is_contiguous() and sin_TK.is_contiguous() and x.shape[1] == heads * width and width % 2 == 0
    launch: Any = _rope_kernel[(x.shape[0], -(-heads // HEADS))]
    launch(out, x, cos_TK, sin_TK, -1.0 if inverse else 1.0, float(scale), heads, out.stride(0), x.stride(0),
           width=width, h_tile=HEADS, half_tile=half_tile, num_warps=warps)


def rotary_write(
    q: Tensor, k: Tensor, v: Tensor, cos_TK: Tensor, sin_TK: Tensor, scale: float, *, cache_keys: Tensor, cache_values: Tensor,
    token_rows: Tensor, dense: tuple[Tensor, Tensor] | None,
) -> None:
    """Rotates q [T, H * K] and k [T, G * K] in place, and stores k and v [T, G * K] where attention reads them.

    cache_keys, cache_values: a layer's memory in the paged cache as rows of K elements. token_rows: int64 [R * G], the row of
    each head of the first R rows of the batch there. dense: keys and values [T - R, G * K] that the other rows go to; None
    where R is T.
    """
    check_rows(q, k, v, cos_TK, sin_TK)
    width = cos_TK.shape[1]
    heads, kv_heads = q.shape[1] // width, k.shape[1] // width
    assert cos_TK.is_contiguous() and sin_TK.is_contiguous() and width % 2 == 0 and k.shape == v.shape
    assert token_rows.dtype == torch.int64 and token_rows.is_contiguous() and cache_keys.shape[1] == width
    cached = token_rows.shape[0] // kv_heads
    keys, values = (k, v) if dense is None else dense
    assert dense is not None or cached == k.shape[0]
    assert dense is None or keys.shape == values.shape == (k.shape[0] - cached, k.shape[1])
    half_tile, warps = head_tiles(width)
    launch: Any = _rotary_write_kernel[(q.shape[0], -(-heads // HEADS) + 2 * -(-kv_heads // HEADS))]
    launch(q, k, v, cos_TK, sin_TK, float(scale), cache_keys, cache_values, token_rows, keys, values, cached,
           q.stride(0), k.stride(0), v.stride(0), keys.stride(0), values.stride(0),
           heads=heads, kv_heads=kv_heads, width=width, h_tile=HEADS, half_tile=half_tile, num_warps=warps)


def silu_mul(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """`library.silu_mul`: all [T, D]."""
    check_rows(out, gate, up)
    launch: Any = _silu_mul_kernel[(out.shape[0], -(-out.shape[1] // TILE))]
    launch(out, gate, up, out.shape[1], out.stride(0), gate.stride(0), up.stride(0), tile=TILE, num_warps=4)


def silu_mul_dgrad(d_gate: Tensor, d_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """`library.silu_mul_dgrad`: all [T, D]; either result may take the memory of an input."""
    check_rows(d_gate, d_up, grad, gate, up)
    launch: Any = _silu_mul_dgrad_kernel[(grad.shape[0], -(-grad.shape[1] // TILE))]
    launch(d_gate, d_up, grad, gate, up, grad.shape[1], d_gate.stride(0), d_up.stride(0), grad.stride(0), gate.stride(0),
           up.stride(0), tile=TILE, num_warps=4)
