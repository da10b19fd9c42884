"""The kernels that run, on any device: library calls that write into planned memory. On a CPU the compiled kernels of `native`
take their place where they can.

T rows (packed tokens), D features, K head width, V vocabulary. Attention is in attention.py.

tests/numerics compares every function with `reference.py`. With `accumulate` a function adds to `out` instead of writing it.
Outputs and inputs may be column slices of wider rows (stride > width) unless a function says otherwise.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch
from torch import Tensor

from coserve.kernels.choose import runs_triton
from coserve.kernels.float8 import e4m3_values
from coserve.kernels.native import kernels_for
from coserve.kernels.reference import dropout_keep
from coserve.kernels.triton import crossentropy
from coserve.kernels.triton import rows as triton_rows

_FEW_ROWS, _SMALL_MATRIX = 8, 1 << 15
_FEW_GROUPED_ROWS, _SMALL_STACK = 32, 1 << 17
"""Rows and elements of the matrices. Up to these limits a bfloat16 product on a CPU is faster in float32, because the library's
bfloat16 product has a fixed cost of some 20 us, for every group again."""


def _costs_more_to_begin(x: Tensor, matrices: Tensor, rows: int, elements: int) -> bool:
    """Whether a product is small enough to be faster in float32 (`rows`, `elements`: the limits)."""
    small = x.shape[0] <= rows and matrices.numel() <= elements
    return small and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, accumulate: bool = False) -> None:
    """out (+)= alpha * a @ b."""
    if _costs_more_to_begin(a, b, _FEW_ROWS, _SMALL_MATRIX):
        product = (a.float() @ b.float()).mul_(alpha)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        out.addmm_(a, b, alpha=alpha)
    elif alpha == 1.0:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b, beta=0, alpha=alpha)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> None:
    """out += alpha * a @ b, where `out` may be of a wider type than a and b. On CUDA the product isn't rounded to theirs."""
    if out.dtype == b.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif b.device.type != "cuda":
        out.add_(a @ b, alpha=alpha)
    elif _adds_wider(b.device, b.dtype, out.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=alpha)


@functools.cache
def _adds_wider(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether PyTorch adds a product of `dtype` to memory of type `wide` in one launch. Older releases refuse."""
    total, one = torch.zeros(16, 16, dtype=wide, device=device), torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def has_row_kernels(x: Tensor) -> bool:
    """Whether Triton's row-wise kernels take rows like `x`."""
    return x.dtype in triton_rows.DTYPES and runs_triton(x.device)


def grouped_matmul_into(out: Tensor, x: Tensor, weights_SKN: Tensor, ends_S: Tensor, *, accumulate: bool) -> None:
    """out (+)= x @ weights[s] for the rows of each group s, which end at ends_S[s] (int32, ascending; groups may be empty).

    The last group ends with the rows. float64 has no library kernel and goes group by group.
    """
    if x.dtype == torch.float64:
        start = 0
        for weight, end in zip(weights_SKN, ends_S.tolist(), strict=True):
            if end > start:
                matmul_into(out[start:end], x[start:end], weight, accumulate=accumulate)
            start = end
        return
    if _costs_more_to_begin(x, weights_SKN, _FEW_GROUPED_ROWS, _SMALL_STACK):
        x, weights_SKN = x.float(), weights_SKN.float()
    product = torch.nn.functional.grouped_mm(x, weights_SKN, offs=ends_S)
    out.add_(product) if accumulate else out.copy_(product)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


_CACHED_ROWS = 256
"""Rows that several passes are made over at once on a CPU, so that they stay in its cache."""


@functools.lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def _rstd(x_TgD: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x_TgD, dim=-1, keepdim=True, dtype=_wide(x_TgD.dtype))
    width, least = (_scalar(value, norm.dtype, norm.device) for value in (x_TgD.shape[-1], eps))
    return torch.addcdiv(least, norm.square_(), width).rsqrt_()  # 1 / width as a factor would be off alike in every layer


def _groups(x: Tensor, group: int) -> Tensor:
    """[T, D] as [T, D / group, group]; x itself where that is one group."""
    return x if x.shape[-1] == group else x.unflatten(-1, (-1, group))


def rmsnorm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out = x / rms(x) * weight, over groups of weight.numel() features."""
    if (compiled := kernels_for(x)) is not None:
        compiled.rmsnorm(out, x, weight, eps)
        return
    if has_row_kernels(x):
        triton_rows.rmsnorm(out, x, weight, eps)
        return
    x_g, out_g = _groups(x, weight.shape[0]), _groups(out, weight.shape[0])
    wide_g = x_g.to(_wide(x.dtype))
    rstd = _rstd(wide_g, eps)
    if x.dtype == wide_g.dtype:
        torch.mul(x_g, rstd, out=out_g)
    else:  # rounded to the model's dtype once before the weight, as Hugging Face does
        out_g.copy_(wide_g.mul_(rstd))
    out_g.mul_(weight)


def add_rmsnorm(total: Tensor, out: Tensor, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> None:
    """total = x + y; out = rmsnorm(total), over whole rows. `total` may be x or y."""
    if has_row_kernels(x):
        triton_rows.add_rmsnorm(total, out, x, y, weight, eps)
        return
    add(total, x, y)
    rmsnorm(out, total, weight, eps)


def rmsnorm_dgrad(out: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, accumulate: bool) -> None:
    """Input gradient of `rmsnorm`: rstd * (g - xhat * mean(g * xhat)), g = grad * weight."""
    if has_row_kernels(x):
        triton_rows.rmsnorm_dgrad(out, grad, x, weight, eps, accumulate)
        return
    if x.dtype != _wide(x.dtype):
        rows = _CACHED_ROWS if x.device.type == "cpu" else max(1, x.shape[0])
        for out_part, grad_part, x_part in zip(out.split(rows), grad.split(rows), x.split(rows), strict=True):
            dx = _wide_rmsnorm_dgrad(grad_part, x_part, weight, eps)
            out_part.add_(dx) if accumulate else out_part.copy_(dx)
        return
    x_g, out_g = _groups(x, weight.shape[0]), _groups(out, weight.shape[0])
    rstd = _rstd(x_g, eps)
    scaled = _groups(grad, weight.shape[0]) * weight
    factor = _norm_factor(scaled, x_g, rstd)
    if accumulate:
        out_g.addcmul_(scaled, rstd).addcmul_(x_g, factor)
    else:
        torch.mul(scaled, rstd, out=out_g)
        out_g.addcmul_(x_g, factor)


def _wide_rmsnorm_dgrad(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient, a new tensor in float32, for a narrower dtype."""
    group, wide = weight.shape[0], _wide(x.dtype)
    x_g, scaled = _groups(x, group).to(wide), _groups(grad, group).to(wide).mul_(weight)
    rstd = _rstd(x_g, eps)
    factor = _norm_factor(scaled, x_g, rstd)
    return scaled.mul_(rstd).addcmul_(x_g, factor).view_as(x)


def _norm_factor(scaled_TgD: Tensor, x_TgD: Tensor, rstd: Tensor) -> Tensor:
    """What x is multiplied by in the gradient: -rstd**3 * mean(scaled * x)."""
    dot = torch.linalg.vecdot(scaled_TgD, x_TgD).unsqueeze(-1)
    return dot.mul_(rstd.pow(3)).div_(-x_TgD.shape[-1])


def rope(out: Tensor, x: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, inverse: bool = False, scale: float = 1) -> None:
    """Rotary embedding per head (half-split layout), times `scale`; `inverse` turns back, which is its gradient. `out` may be
    `x`.

    sin_TK: its first half is negated, so that it multiplies a head whose halves are swapped.
    """
    if (compiled := kernels_for(x)) is not None:
        compiled.rope(out, x, cos_TK, sin_TK, -1 if inverse else 1)
    elif has_row_kernels(x):
        triton_rows.rope(out, x, cos_TK, sin_TK, inverse=inverse, scale=scale)
        return
    else:
        _rope(out, x, cos_TK, sin_TK, -1 if inverse else 1)
    if scale != 1:
        out.mul_(scale)


def _rope(out: Tensor, x: Tensor, cos_TK: Tensor, sin_TK: Tensor, direction: int) -> None:
    head = cos_TK.shape[-1]
    x_THK, out_THK = x.unflatten(-1, (-1, head)), out.unflatten(-1, (-1, head))
    swapped = x_THK.roll(head // 2, -1)
    torch.mul(x_THK, cos_TK.unsqueeze(1), out=out_THK)
    out_THK.addcmul_(swapped, sin_TK.unsqueeze(1), value=direction)


def silu_mul(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """out = silu(gate) * up."""
    if (compiled := kernels_for(gate)) is not None:
        compiled.silu_mul(out, gate, up)
        return
    if has_row_kernels(gate):
        triton_rows.silu_mul(out, gate, up)
        return
    torch.ops.aten.silu.out(gate, out=out)
    out.mul_(up)


def silu_mul_dgrad(d_gate: Tensor, d_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Gradients of `silu_mul` towards gate and up."""
    if has_row_kernels(gate):
        triton_rows.silu_mul_dgrad(d_gate, d_up, grad, gate, up)
        return
    torch.ops.aten.silu.out(gate, out=d_up)
    d_up.mul_(grad)
    torch.mul(grad, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)


def add(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out = x + y; `out` may be either."""
    if (compiled := kernels_for(x)) is not None:
        compiled.add(out, x, y)
        return
    torch.add(x, y, out=out)


def sign_bits(out: Tensor, x: Tensor) -> None:
    """out: uint8 [T, ceil(D / 8)]; bit i % 8 of byte i // 8 says whether x[:, i] > 0."""
    bits = torch.zeros(x.shape[0], out.shape[1] * 8, dtype=torch.uint8, device=x.device)
    torch.gt(x, 0, out=bits[:, : x.shape[1]])
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
    torch.sum(bits.unflatten(1, (-1, 8)) << shifts, dim=2, dtype=torch.uint8, out=out)


def sign_values(out: Tensor, bits: Tensor) -> None:
    """What `sign_bits` packed: 1 where x > 0, else 0."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    out.copy_(((bits[:, :, None] >> shifts) & 1).flatten(1)[:, : out.shape[1]])


_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = 0.875
"""Largest fraction of a row's power of two: e4m3's largest number is 448 = 0.875 * 2**9."""
_EXPONENT_BIAS = 127
_NOT_FINITE = 255
"""The exponent of a row that isn't finite."""


def fp8_encode(bits: Tensor, exponent: Tensor, x: Tensor, largest_T1: Tensor | None = None) -> None:
    """Packs x so that x = e4m3 * 2**e. Each row has its own e, for which its largest element just fits into e4m3.
    largest_T1: what must fit instead, at least as large as the rows' own magnitudes: parts of a row then share the row's e.

    bits: uint8 [T, D], the bits of the e4m3 elements. exponent: uint8 [T, 1], e + 127. Elements of at least 2**-15 of the row's
    largest keep 4 significant bits; smaller ones keep fewer. A row that isn't finite becomes NaN.
    """
    rows = _CACHED_ROWS if x.device.type == "cpu" else x.shape[0]
    least = -min(_EXPONENT_BIAS - 1, int(math.log2(torch.finfo(x.dtype).max)))  # float16 has no larger power to multiply by
    for start in range(0, x.shape[0], max(1, rows)):
        part, stored, power = (each[start : start + rows] for each in (x, bits.view(_FP8), exponent))
        largest = part.abs().amax(1, keepdim=True) if largest_T1 is None else largest_T1[start : start + rows]
        fraction, scale = torch.frexp(largest.to(_wide(x.dtype)))
        scale = (scale - 9 + (fraction > _FP8_LARGEST)).clamp_(least, _EXPONENT_BIAS)
        power.copy_((scale + _EXPONENT_BIAS).masked_fill_(~largest.isfinite(), _NOT_FINITE))
        stored.copy_(part * torch.exp2(-scale.to(x.dtype)))


def fp8_scales(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """What the rows of `fp8_encode` are multiplied by: a new [T, 1]. NaN for rows that aren't finite."""
    return torch.exp2(exponent.to(dtype) - _EXPONENT_BIAS).masked_fill_(exponent == _NOT_FINITE, torch.nan)


def fp8_decode(out: Tensor, bits: Tensor, exponent: Tensor) -> None:
    """Unpacks what `fp8_encode` packed, in the dtype of `out`."""
    scale = fp8_scales(exponent, out.dtype)
    if out.device.type != "cpu":
        out.copy_(bits.view(_FP8))
        out.mul_(scale)
        return
    for part, stored, factor in zip(out.split(_CACHED_ROWS), bits.split(_CACHED_ROWS), scale.split(_CACHED_ROWS), strict=True):
        e4m3_values(part, stored)
        part.mul_(factor)


def dropout(
    out: Tensor, x: Tensor, row_keys_T: Tensor, site_key: int, p: float, accumulate: bool = False, *, first_feature: int = 0
) -> None:
    """Inverted dropout by the counter hash; its own gradient. first_feature: the number of x's first feature."""
    mask = dropout_keep(row_keys_T, site_key, x.shape[-1], p, first_feature)
    if accumulate:
        out.addcmul_(x, mask.to(x.dtype), value=1 / (1 - p))
    else:
        torch.mul(x, mask, out=out)
        out.mul_(1 / (1 - p))


# --- the loss head ------------------------------------------------------------------------------------------------------


class Head(Protocol):
    """The output head's products; V vocabulary."""

    def logits(self, out: Tensor, x: Tensor) -> None:
        """out [T, V] from x [T, D]."""

    def input_grad(self, grad: Tensor) -> Tensor:
        """[T, D] from the logits' gradient [T, V]."""

    def rows(self, ids: Tensor) -> Tensor:
        """A new [T, D]: the head's weights of some tokens."""


def fused_head(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `label_rows` takes one kernel per chunk, which needs no memory beyond the chunk of logits."""
    return runs_triton(device) and dtype in crossentropy.DTYPES


def label_rows(
    logprob_T: Tensor, correct_T: Tensor, grad_TD: Tensor | None, hidden_TD: Tensor, labels_T: Tensor,
    norm: Tensor, eps: float, head: Head, logits_CV: Tensor,
) -> None:
    """Per label row: log p(label), whether it is the arg max, and d log p(label) / d hidden.

    hidden_TD: rows before the final norm. logprob_T: float32 (float64 in tests) [T]; correct_T: bool [T]; grad_TD: [T, D]
    or None (forward only). logits_CV: workspace of C rows; the tokens-by-vocabulary matrix never exists beyond it.
    """
    chunk = logits_CV.shape[0]
    for start in range(0, hidden_TD.shape[0], chunk):
        rows = slice(start, min(start + chunk, hidden_TD.shape[0]))
        hidden, labels = hidden_TD[rows], labels_T[rows, None]
        normed = torch.empty_like(hidden)
        rmsnorm(normed, hidden, norm, eps)
        logits = logits_CV[: hidden.shape[0]]
        head.logits(logits, normed)
        if fused_head(logits.device, logits.dtype):
            crossentropy.label_logprobs(
                logprob_T[rows], correct_T[rows], logits, labels[:, 0], probabilities=grad_TD is not None
            )
        else:
            logits = logits.to(_wide(logits.dtype))
            label_logit = logits.gather(1, labels)
            best_logit = logits.amax(dim=1, keepdim=True)
            torch.softmax(logits, dim=1, out=logits)
            # log-sum-exp from the largest entry, whose probability is never near 0
            lse = best_logit - logits.amax(dim=1, keepdim=True).log_()
            logprob_T[rows] = (label_logit - lse)[:, 0]
            correct_T[rows] = (label_logit == best_logit)[:, 0]
        if grad_TD is not None:
            d_normed = head.rows(labels[:, 0]).sub_(head.input_grad(logits.to(hidden.dtype)))
            rmsnorm_dgrad(grad_TD[rows], d_normed, hidden, norm, eps, accumulate=False)
