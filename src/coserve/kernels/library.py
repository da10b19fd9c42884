"""The kernels that run: library calls that write into planned memory, on any device.

T rows (packed tokens), D features, H query heads, G key-value heads, K head width, S context tokens, V vocabulary.
Every function is held against `reference.py` by tests/numerics. `accumulate` adds to `out` instead of writing it.
Outputs and inputs may be column slices of wider rows (stride > width) unless a function says otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coserve.kernels.reference import attention_mask, dropout_keep

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

QUERY_BLOCK = 256
"""Queries per attention call: a causal diagonal block, and its unmasked past."""


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, accumulate: bool = False) -> None:
    """out (+)= alpha * a @ b."""
    if accumulate:
        out.addmm_(a, b, alpha=alpha)
    elif alpha == 1.0:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b, beta=0, alpha=alpha)


def _rstd(x_TgD: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x_TgD, dim=-1, keepdim=True)
    return norm.square_().div_(x_TgD.shape[-1]).add_(eps).rsqrt_()


def _groups(x: Tensor, group: int) -> Tensor:
    return x.unflatten(-1, (-1, group))


def rmsnorm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out = x / rms(x) * weight, over groups of weight.numel() features."""
    x_g, out_g = _groups(x, weight.shape[0]), _groups(out, weight.shape[0])
    torch.mul(x_g, _rstd(x_g, eps), out=out_g)
    out_g.mul_(weight)


def rmsnorm_dgrad(out: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, accumulate: bool) -> None:
    """Input gradient of `rmsnorm`: rstd * (g - xhat * mean(g * xhat)), g = grad * weight."""
    group = weight.shape[0]
    x_g, out_g = _groups(x, group), _groups(out, group)
    rstd = _rstd(x_g, eps)
    scaled = _groups(grad, group) * weight
    dot = torch.linalg.vecdot(scaled, x_g).unsqueeze(-1)
    factor = dot.mul_(rstd.pow(3)).div_(-group)
    if accumulate:
        out_g.addcmul_(scaled, rstd).addcmul_(x_g, factor)
    else:
        torch.mul(scaled, rstd, out=out_g)
        out_g.addcmul_(x_g, factor)


def rope(out: Tensor, x: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, inverse: bool = False) -> None:
    """Rotary embedding per head (half-split layout); `inverse` turns back, which is its gradient. `out` may be `x`."""
    head = cos_TK.shape[-1]
    half = head // 2
    x_THK, out_THK = x.unflatten(-1, (-1, head)), out.unflatten(-1, (-1, head))
    cos, sin = cos_TK[:, None, :half], sin_TK[:, None, :half]
    x1, x2 = x_THK[..., :half], x_THK[..., half:]
    turned_1, turned_2 = x2 * sin, x1 * sin
    if out.data_ptr() != x.data_ptr():
        out_THK.copy_(x_THK)
    out_THK[..., :half].mul_(cos).add_(turned_1, alpha=1 if inverse else -1)
    out_THK[..., half:].mul_(cos).add_(turned_2, alpha=-1 if inverse else 1)


def silu_mul(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """out = silu(gate) * up."""
    torch.ops.aten.silu.out(gate, out=out)
    out.mul_(up)


def silu_mul_dgrad(d_gate: Tensor, d_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Gradients of `silu_mul` towards gate and up."""
    torch.ops.aten.silu.out(gate, out=d_up)
    d_up.mul_(grad)
    torch.mul(grad, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)


def dropout(out: Tensor, x: Tensor, row_keys_T: Tensor, site_key: int, p: float, accumulate: bool = False) -> None:
    """Inverted dropout by the counter hash; its own gradient."""
    mask = dropout_keep(row_keys_T, site_key, x.shape[-1], p)
    if accumulate:
        out.addcmul_(x, mask.to(x.dtype), value=1 / (1 - p))
    else:
        torch.mul(x, mask, out=out)
        out.mul_(1 / (1 - p))


# --- attention over a contiguous key-value arena -----------------------------------------------------------------------
#
# One call handles query rows [first, last) of one sequence whose keys start at row `begin` of the arena:
#
#      keys:   begin ............ row ...... row + R
#      block:  [  past, unmasked  | causal diagonal ]      R <= QUERY_BLOCK query rows
#
# The two parts are merged by their log-sum-exps. A sliding window that cuts a block's past falls back to one masked call.


def _heads(x: Tensor, width: int) -> Tensor:
    """Rows [T, n * width] as [1, n, T, width], without a copy."""
    return x.unflatten(-1, (-1, width)).transpose(0, 1).unsqueeze(0)


def _forward_part(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if q.is_cpu:
        return _flash(q, k, v, 0.0, causal, attn_mask=mask)
    if causal:
        allowed = attention_mask(q.shape[2], k.shape[2], None, q.device)
        mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -math.inf)
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.float() if mask is None else scores.float() + mask
    lse = torch.logsumexp(scores, dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v.repeat_interleave(share, 1), lse


def _backward_part(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cpu:
        return _flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask)
    if causal:
        allowed = attention_mask(q.shape[2], k.shape[2], None, q.device)
        mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -math.inf)
    kv_heads, share = k.shape[1], q.shape[1] // k.shape[1]
    k_full, v_full = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k_full.transpose(-1, -2)).float() * scale
    p = ((scores if mask is None else scores + mask) - lse.unsqueeze(-1)).exp()
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    ds = (p * ((grad @ v_full.transpose(-1, -2)).float() - delta) * scale).to(q.dtype)
    d_k, d_v = ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ grad
    return ds @ k_full, d_k.unflatten(1, (kv_heads, share)).sum(2), d_v.unflatten(1, (kv_heads, share)).sum(2)


def _blocks(begin: int, first: int, last: int, window: int | None) -> list[tuple[int, int, int, bool]]:
    """(row, row_end, key_begin, masked) per block of query rows [first, last)."""
    blocks = []
    for row in range(first, last, QUERY_BLOCK):
        row_end = min(row + QUERY_BLOCK, last)
        masked = window is not None and row_end - begin > window
        key_begin = max(begin, row - window + 1) if masked and window is not None else begin
        blocks.append((row, row_end, key_begin, masked))
    return blocks


def _window_mask(rows: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    allowed = attention_mask(rows, keys, window, like.device)
    return torch.zeros(rows, keys, dtype=like.dtype, device=like.device).masked_fill_(~allowed, -math.inf)


def attention(
    out: Tensor, lse_TH: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    *, width: int, begin: int, first: int, last: int, window: int | None,
) -> None:
    """Causal attention of rows [first, last) of an arena over keys [begin, row] of the same sequence.

    q, out: [last - first, H * K]; lse_TH: [last - first, H], float32 or float64; k_all, v_all: the arena's rows
    [T, G * K], of which [begin, last) are read. `width` is K; `window` a sliding window in tokens or None.
    """
    q_h, out_h, lse_h = _heads(q, width), _heads(out, width), lse_TH.transpose(0, 1).unsqueeze(0)
    k_h, v_h = _heads(k_all, width), _heads(v_all, width)
    for row, row_end, key_begin, masked in _blocks(begin, first, last, window):
        rows = slice(row - first, row_end - first)
        q_b = q_h[:, :, rows]
        if masked:
            keys = slice(key_begin, row_end)
            mask = _window_mask(row_end - row, row_end - key_begin, window, q)
            o, lse = _forward_part(q_b, k_h[:, :, keys], v_h[:, :, keys], False, mask)
        else:
            keys = slice(row, row_end)
            o, lse = _forward_part(q_b, k_h[:, :, keys], v_h[:, :, keys], True, None)
            if row > begin:
                past = slice(begin, row)
                o_past, lse_past = _forward_part(q_b, k_h[:, :, past], v_h[:, :, past], False, None)
                total = torch.logaddexp(lse, lse_past)
                share = (lse_past - total).exp_().unsqueeze(-1).to(o.dtype)
                o, lse = torch.lerp(o, o_past, share), total
        out_h[:, :, rows] = o
        lse_h[:, :, rows] = lse


def attention_dgrad(
    d_q: Tensor, d_k_all: Tensor, d_v_all: Tensor, grad: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor,
    out: Tensor, lse_TH: Tensor, *, width: int, begin: int, first: int, last: int, window: int | None,
) -> None:
    """Gradients of `attention` for the same rows: writes d_q, ADDS to rows [begin, last) of d_k_all and d_v_all.

    Shapes as in `attention`; the accumulators [T, G * K] are float32 (float64 in tests). P is rebuilt from the saved
    log-sum-exp of the whole row, so that each part of the keys gives its exact share.
    """
    q_h, out_h, grad_h, dq_h = (_heads(t, width) for t in (q, out, grad, d_q))
    k_h, v_h, dk_h, dv_h = (_heads(t, width) for t in (k_all, v_all, d_k_all, d_v_all))
    lse_h = lse_TH.transpose(0, 1).unsqueeze(0)
    for row, row_end, key_begin, masked in _blocks(begin, first, last, window):
        rows = slice(row - first, row_end - first)
        local = (grad_h[:, :, rows], q_h[:, :, rows])
        saved = (out_h[:, :, rows], lse_h[:, :, rows])
        parts: list[tuple[slice, bool, Tensor | None]] = []
        if masked:
            mask = _window_mask(row_end - row, row_end - key_begin, window, q)
            parts.append((slice(key_begin, row_end), False, mask))
        else:
            parts.append((slice(row, row_end), True, None))
            if row > begin:
                parts.append((slice(begin, row), False, None))
        for number, (keys, causal, mask) in enumerate(parts):
            dq, dk, dv = _backward_part(*local, k_h[:, :, keys], v_h[:, :, keys], *saved, causal, mask)
            if number == 0:
                dq_h[:, :, rows] = dq
            else:
                dq_h[:, :, rows] += dq
            dk_h[:, :, keys] += dk
            dv_h[:, :, keys] += dv


def gathered_attention(out: Tensor, q: Tensor, k_SGK: Tensor, v_SGK: Tensor, *, window: int | None) -> None:
    """Causal attention of one sequence's last T tokens over its S gathered tokens, without log-sum-exp.

    q, out: [T, H * K]; k_SGK, v_SGK: [S, G, K].
    """
    num_keys, kv_heads, width = k_SGK.shape
    rows = q.shape[0]
    if rows > 1:
        lse = torch.empty(rows, q.shape[1] // width, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        attention(out, lse, q, k_SGK.flatten(1), v_SGK.flatten(1), width=width, begin=0,
                  first=num_keys - rows, last=num_keys, window=window)
        return
    if window is not None and num_keys > window:
        k_SGK, v_SGK = k_SGK[-window:], v_SGK[-window:]
    q_GXK = q.view(kv_heads, -1, width)
    scores = torch.bmm(q_GXK, k_SGK.permute(1, 2, 0)).mul_(1 / math.sqrt(width))
    weights = torch.softmax(scores, dim=-1)
    out.view(kv_heads, -1, width).copy_(torch.bmm(weights, v_SGK.transpose(0, 1)))


# --- the loss head ------------------------------------------------------------------------------------------------------


def label_rows(
    logprob_T: Tensor, correct_T: Tensor, grad_TD: Tensor | None, hidden_TD: Tensor, labels_T: Tensor,
    norm: Tensor, eps: float, head_VD: Tensor, logits_CV: Tensor,
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
        torch.mm(normed, head_VD.T, out=logits)
        label_logit = logits.gather(1, labels)
        best_logit, best = logits.max(dim=1, keepdim=True)
        torch.softmax(logits, dim=1, out=logits)
        # log-sum-exp from the largest entry, whose probability is never near 0
        lse = best_logit - logits.gather(1, best).log_()
        logprob_T[rows] = (label_logit - lse)[:, 0]
        correct_T[rows] = (best == labels)[:, 0]
        if grad_TD is not None:
            d_normed = head_VD[labels[:, 0]].addmm_(logits, head_VD, alpha=-1)
            rmsnorm_dgrad(grad_TD[rows], d_normed, hidden, norm, eps, accumulate=False)
