"""The operator vocabulary on differentiable tensors: the decoder as an ordinary PyTorch model, which tests compare with.

T packed rows, K head width. Sequences are packed: `starts` gives the first row of each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coserve.kernels import reference


class TorchOps:
    """One layer's operators on tensors.

    norms: {name: [width]}; linears: {site: (weight [out, in], bias [out] or None)}; factors: {name: (matrix [out, in],
    scale)}, for a scaling (vector less 1 [width, 1], 1); cos, sin: [T, K], times the root of `score_scale`; starts: first row
    of each packed sequence; dropout_keys: int64 [T]; site_keys: {site: key}.
    """

    def __init__(
        self, *, eps: float, norms: Mapping[str, Tensor], linears: Mapping[str, tuple[Tensor, Tensor | None]],
        factors: Mapping[str, tuple[Tensor, float]], cos: Tensor, sin: Tensor, starts: tuple[int, ...],
        window: int | None = None, dropout_keys: Tensor | None = None, site_keys: Mapping[str, int] | None = None,
    ) -> None:
        self.eps, self.norms, self.linears, self.factors = eps, norms, linears, factors
        self.cos, self.sin, self.starts, self.window = cos, sin, starts, window
        self.dropout_keys, self.site_keys = dropout_keys, site_keys or {}

    def rmsnorm(self, x: Tensor, name: str) -> Tensor:
        return reference.rmsnorm(x, self.norms[name], self.eps)

    def linear(self, x: Tensor, site: str) -> Tensor:
        weight, bias = self.linears[site]
        return torch.nn.functional.linear(x, weight, bias)

    def segment_linear(self, x: Tensor, name: str) -> Tensor:
        matrix, scale = self.factors[name]
        return torch.nn.functional.linear(x, matrix) * scale

    def segment_scale(self, x: Tensor, name: str) -> Tensor:
        return x * self.factors[name][0][:, 0]

    def relu(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x)

    def rope(self, x: Tensor) -> Tensor:
        return reference.rope(x, self.cos, self.sin)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = (*self.starts[1:], q.shape[0])
        width = self.cos.shape[-1]
        parts = []
        for start, end in zip(self.starts, ends, strict=True):
            q_THK, k_SGK, v_SGK = (t[start:end].unflatten(-1, (-1, width)) for t in (q, k, v))
            out, _ = reference.attention(q_THK, k_SGK, v_SGK, window=self.window)
            parts.append(out.flatten(1))
        return torch.cat(parts)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return reference.silu_mul(gate, up)

    def add(self, a: Tensor, b: Tensor, name: str = "sum") -> Tensor:
        return a + b

    def dropout(self, x: Tensor, site: str, p: float) -> Tensor:
        assert self.dropout_keys is not None
        return reference.dropout(x, self.dropout_keys, self.site_keys[site], p)
