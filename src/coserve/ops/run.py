"""What runs each operator: adapts a bound call to the kernels.

Every runner has one signature, run(rows, weight, attrs, accumulate, outs, ins): `rows` is the batch it runs on, `weight` the
layer's parameter (a FrozenLinear, a norm vector, or the name of an adapter's factor), `attrs` the node's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coserve.kernels import library


class Factor(NamedTuple):
    """One factor of one adapter for one site of one layer.

    matrix: [out, in] in the model's dtype; scale multiplies the product; grad: float32 [out, in] or None when not trained.
    """

    matrix: Tensor
    scale: float
    grad: Tensor | None


class FactorStack(NamedTuple):
    """One factor of many adapters: rows before ends[0] use matrices[0], and so on. matrices: [adapters, in, out]; ends: int32
    [adapters], ascending; scale: of every row, or [rows, 1]."""

    matrices: Tensor
    ends: Tensor
    scale: Tensor | float


class RowContext(Protocol):
    """What operators may ask of the batch they run on. T rows: those of requests first, then those of training."""

    num_serving: int
    """Rows of requests at the front: they have no dropout."""

    cos: Tensor
    """[T, K]"""
    sin: Tensor
    """[T, K]"""
    dropout_keys: Tensor | None
    """int64 [T], or None outside training."""

    def segments(self, name: str) -> Iterable[tuple[slice, Factor | FactorStack]]:
        """Row ranges that have adapters with the factor `name` in the present layer, with that factor."""

    def dropout_site(self, name: str) -> int:
        """Key of a dropout site in the present layer."""

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Attention of the batch's query rows over all tokens of their sequences."""

    def attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Its gradients; on return d_k and d_v hold the window's final rows."""


Runner = Callable[[RowContext, Any, Mapping[str, Any], bool, Sequence[Tensor], Sequence[Tensor]], None]


def _rmsnorm(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    library.rmsnorm(outs[0], ins[0], weight, attrs["eps"])


def _rmsnorm_dgrad(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    library.rmsnorm_dgrad(outs[0], ins[0], ins[1], weight, attrs["eps"], accumulate)


def _linear(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    weight.forward(outs[0], ins[0], accumulate)


def _linear_dgrad(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    weight.input_grad(outs[0], ins[0], accumulate)


def _segment_linear(
    rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any
) -> None:
    for part, factor in rows.segments(weight):
        out, x = outs[0][part], ins[0][part]
        if isinstance(factor, FactorStack):
            _, num_in, num_out = factor.matrices.shape
            out, x = out[:, :num_out], x[:, :num_in]
            scaled = x if isinstance(factor.scale, float) and factor.scale == 1.0 else x * factor.scale
            library.grouped_matmul_into(out, scaled, factor.matrices, factor.ends, accumulate=accumulate)
        else:
            _low_rank(out, x, factor, accumulate)


def _low_rank(out: Tensor, x: Tensor, factor: Factor, accumulate: bool) -> None:
    """One adapter's rows, of which the rank-sized value may be wider: it has the width of the batch's largest rank."""
    num_out, num_in = factor.matrix.shape
    library.matmul_into(out[:, :num_out], x[:, :num_in], factor.matrix.T, alpha=factor.scale, accumulate=accumulate)


def _segment_linear_dgrad(
    rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any
) -> None:
    for part, factor in rows.segments(weight):
        assert isinstance(factor, Factor)
        library.matmul_into(outs[0][part], ins[0][part], factor.matrix, alpha=factor.scale, accumulate=accumulate)


def _segment_linear_wgrad(
    rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any
) -> None:
    for part, factor in rows.segments(weight):
        assert isinstance(factor, Factor) and factor.grad is not None
        grad, x = ins[0][part], ins[1][part]
        if factor.grad.dtype == x.dtype:
            factor.grad.addmm_(grad.T, x, alpha=factor.scale)
        else:
            factor.grad.add_(grad.T @ x, alpha=factor.scale)


def _rope(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    library.rope(outs[0], ins[0], rows.cos, rows.sin)


def _rope_dgrad(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    library.rope(outs[0], ins[0], rows.cos, rows.sin, inverse=True)


def _attention(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    rows.attention(outs[0], outs[1], *ins)


def _attention_dgrad(
    rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any
) -> None:
    d_q, d_k, d_v = outs
    grad, q, _, _, out, lse = ins
    rows.attention_dgrad(d_q, d_k, d_v, grad, q, out, lse)


def _silu_mul(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    library.silu_mul(outs[0], *ins)


def _silu_mul_dgrad(
    rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any
) -> None:
    library.silu_mul_dgrad(*outs, *ins)


def _add(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    torch.add(ins[0], ins[1], out=outs[0])


def _dropout(rows: RowContext, weight: Any, attrs: Mapping[str, Any], accumulate: bool, outs: Any, ins: Any) -> None:
    assert rows.dropout_keys is not None
    serving, training = slice(None, rows.num_serving), slice(rows.num_serving, None)
    out, x = outs[0], ins[0]
    if rows.num_serving:
        out[serving].add_(x[serving]) if accumulate else out[serving].copy_(x[serving])
    key = rows.dropout_site(attrs["site"])
    library.dropout(out[training], x[training], rows.dropout_keys, key, attrs["p"], accumulate)


RUNNERS: dict[str, Runner] = {
    "rmsnorm": _rmsnorm,
    "rmsnorm_dgrad": _rmsnorm_dgrad,
    "linear": _linear,
    "linear_dgrad": _linear_dgrad,
    "segment_linear": _segment_linear,
    "segment_linear_dgrad": _segment_linear_dgrad,
    "segment_linear_wgrad": _segment_linear_wgrad,
    "rope": _rope,
    "rope_dgrad": _rope_dgrad,
    "attention": _attention,
    "attention_dgrad": _attention_dgrad,
    "silu_mul": _silu_mul,
    "silu_mul_dgrad": _silu_mul_dgrad,
    "add": _add,
    "dropout": _dropout,
    "dropout_dgrad": _dropout,
}
