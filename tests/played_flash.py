"""PyTorch's flash operators of many sequences, played on the CPU by the reference and held to their contract.

T queries and S keys of B sequences, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.kernels import cuda_attention, reference
from coserve.runtime import rows, spans


def _sequences(q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """Rows and keys of each sequence."""
    parts = []
    for ends, total, longest in ((ends_q, len(q), max_q), (ends_k, len(k), max_k)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends[0] == 0 and ends[-1] == total
        assert longest == int(ends.diff().max()) and int(ends.diff().min()) > 0
        parts.append([slice(*pair) for pair in itertools.pairwise(ends.tolist())])
    return list(zip(*parts, strict=True))


def play_forward(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:
    """Outputs [T, H, K] and log-sum-exps [H, T]."""
    assert causal and not debug and dropout == 0 == window_size_right
    assert scale == pytest.approx(q.shape[-1] ** -0.5)
    window = None if window_size_left < 0 else window_size_left + 1
    found = [
        reference.attention(q[mine], k[keys], v[keys], window=window)
        for mine, keys in _sequences(q, k, ends_q, ends_k, max_q, max_k)
    ]
    out, lse = (torch.cat(part) for part in zip(*found, strict=True))
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    return out.to(q.dtype), lse.t().contiguous(), torch.empty(2), torch.empty(0), torch.empty(0)


def play_into(out: Tensor, *inputs: Any, **edges: Any) -> Tensor:
    """The same into `out`."""
    found, lse, *_ = play_forward(*inputs, **edges)
    out.copy_(found)
    return lse


def play_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends_q: Tensor, ends_k: Tensor,
    max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, **edges: Any,
) -> tuple[Tensor, ...]:
    """By autograd. out and lse must be what forward found."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        want, want_lse, *_ = play_forward(
            leaves[0], leaves[1], leaves[2], ends_q, ends_k, max_q, max_k, dropout, causal, False, **edges
        )
    assert lse.is_contiguous()
    torch.testing.assert_close(out, want.detach(), equal_nan=True)
    torch.testing.assert_close(lse, want_lse.detach(), equal_nan=True)
    return tuple(torch.autograd.grad(want, leaves, grad))


def play_flash(monkeypatch: pytest.MonkeyPatch, *, into: bool = True) -> Counter[str]:
    """The CPU takes the place of a device that has the operators. into: whether one of them takes memory for its result.
    Returns how often they were called, by name."""
    calls: Counter[str] = Counter()

    def counted(name: str, play: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return play(*args, **options)
        return call

    monkeypatch.setattr(cuda_attention, "_fits", lambda width, *rows: True)
    monkeypatch.setattr(cuda_attention, "_flash", counted("forward", play_forward))
    monkeypatch.setattr(cuda_attention, "_flash_into", counted("forward", play_into) if into else None)
    monkeypatch.setattr(cuda_attention, "_flash_backward", counted("backward", play_backward))
    for module in (rows, spans):
        monkeypatch.setattr(module, "packs_attention", lambda device: True)
    return calls
