"""What runs each operator: adapts a bound call to the kernels.

Every runner has one signature, run(rows, weight, attrs, accumulate, outs, ins): `rows` is the batch it runs on, `weight` the
layer's parameter (a FrozenLinear, a norm vector, or the name of an adapter's factor), `attrs` the node's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coserve.kernels import library
from coserve.kernels.triton import segments
from coserve.kernels.triton.segments import SlotFactors
from coserve.parallel import ALONE, Ranks


class Factor(NamedTuple):
    """One factor of one adapter for one site of one layer.

    matrix: [out, in] in the model's dtype; scale multiplies the product; grad: float32 [out, in] or None when not trained.
    A scaling's matrix is its vector less 1, [width, 1]; it scales the distance from `center` [width], 0 if None. slope [width]:
    d vector / d parameter; None where the parameter is the vector.
    """

    matrix: Tensor
    scale: float
    grad: Tensor | None
    center: Tensor | None = None
    slope: Tensor | None = None


class FactorStack(NamedTuple):
    """One factor of many adapters: rows before ends[0] use matrices[0], and so on. matrices: [adapters, in, out]; ends: int32
    [adapters], ascending; center: as a Factor's, the same for all."""

    matrices: Tensor
    ends: Tensor
    center: Tensor | None = None


class RowContext:
    """What operators may ask of the batch they run on. T rows: those of requests first, then those of training.

    Unless a subclass says otherwise there are no adapters, no dropout and no backward.
    """

    num_serving: int
    """Rows of requests at the front: they have no dropout."""

    cos: Tensor
    """[T, K]"""
    sin: Tensor
    """[T, K]"""
    dropout_keys: Tensor | None = None
    """int64 [T], or None outside training."""
    ranks: Ranks = ALONE
    """The ranks that share the model."""

    def segments(self, name: str) -> Iterable[tuple[slice, Factor | FactorStack]]:
        """Row ranges that have adapters with the factor `name` in the present layer, with that factor."""
        return ()

    def slot_factors(self, names: tuple[str, ...]) -> SlotFactors | None:
        """Several sites' factors in the present layer with each row's slot, for kernels that take them. None where there are no
        such kernels, and `segments` says which rows have which factor."""
        return None

    def dropout_site(self, name: str) -> int:
        """Key of a dropout site in the present layer."""
        raise AssertionError("rows of requests have no dropout")

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Attention of the batch's query rows over all tokens of their sequences."""
        raise NotImplementedError

    def rotary_attention(
        self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, rotated: Sequence[Tensor], scale: float
    ) -> None:
        """Rotates q and k in place, multiplies them by `scale`, then `attention`. rotated: q and k once more, as one tensor
        where they lie side by side."""
        for heads in rotated:
            library.rope(heads, heads, self.cos, self.sin, scale=scale)
        self.attention(out, lse, q, k, v)

    def attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Its gradients; on return d_k and d_v hold the window's final rows."""
        raise AssertionError("rows of requests have no backward")

    def rotary_attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor,
        rotated: Sequence[Tensor], scale: float,
    ) -> None:
        """`attention_dgrad`, then turns d_q and d_k back in place: gradients of `rotary_attention`. rotated: d_q and d_k once
        more, as one tensor where they lie side by side."""
        self.attention_dgrad(d_q, d_k, d_v, grad, q, out, lse)
        for heads in rotated:
            library.rope(heads, heads, self.cos, self.sin, inverse=True, scale=scale)


_SUM_ROWS = 256
"""Rows whose element-wise products are in memory at once while they are summed."""

Attrs = Mapping[str, Any]
Runner = Callable[[RowContext, Any, Attrs, bool, Sequence[Tensor], Sequence[Tensor]], None]


def _rmsnorm(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.rmsnorm(outs[0], ins[0], weight, attrs["eps"])


def _rmsnorm_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.rmsnorm_dgrad(outs[0], ins[0], ins[1], weight, attrs["eps"], accumulate)


def _add_rmsnorm(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    """outs: the sum, and its norm."""
    library.add_rmsnorm(outs[0], outs[1], ins[0], ins[1], weight, attrs["eps"])


def _linear(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    weight.forward(outs[0], ins[0], accumulate)


def _linear_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    weight.input_grad(outs[0], ins[0], accumulate)


def _written(rows: RowContext, weight: Any, accumulate: bool, out: Tensor) -> Iterator[tuple[slice, Factor | FactorStack]]:
    """The segments of a factor. Rows in no segment get 0, unless the kernel adds to its output."""
    done = 0
    for part, factor in rows.segments(weight):
        start, end, _ = part.indices(out.shape[0])
        if not accumulate and done < start:
            out[done:start].zero_()
        yield part, factor
        done = end
    if not accumulate and done < out.shape[0]:
        out[done:].zero_()


def _segment_linear(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    factors = rows.slot_factors((weight,))
    if factors is not None:
        segments.segment_linear(outs, ins[0], factors, accumulate=accumulate)
    else:
        _each_segment(rows, weight, accumulate, outs[0], ins[0])


def _segment_pairs(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    """outs: each site's product with its first factor; then each site's output, to which that times the second is added."""
    down, up = attrs["down"], attrs["up"]
    inner, written = outs[: len(down)], outs[len(down) :]
    first, second = rows.slot_factors(down), rows.slot_factors(up)
    if first is not None and second is not None:
        kept = inner if ins[0].shape[0] > rows.num_serving else None  # only training rows' products are read again
        segments.segment_pairs(written, kept, ins[0], first, second, accumulate=accumulate)
        return
    for name, out in zip(down, inner, strict=True):
        _each_segment(rows, name, False, out, ins[0])
    for name, out, x in zip(up, written, inner, strict=True):
        _each_segment(rows, name, accumulate, out, x)


def _each_segment(rows: RowContext, name: str, accumulate: bool, whole_out: Tensor, whole_x: Tensor) -> None:
    """out or x may be wider than the factor: the largest rank of the batch sets their width."""
    for part, factor in _written(rows, name, accumulate, whole_out):
        out, x = whole_out[part], whole_x[part]
        if isinstance(factor, FactorStack):
            _, num_in, num_out = factor.matrices.shape
            out, x = out[:, :num_out], x[:, :num_in]
            library.grouped_matmul_into(out, x, factor.matrices, factor.ends, accumulate=accumulate)
        else:
            num_out, num_in = factor.matrix.shape
            out, x = out[:, :num_out], x[:, :num_in]
            library.matmul_into(out, x, factor.matrix.T, alpha=factor.scale, accumulate=accumulate)


def _segment_linear_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    for part, factor in rows.segments(weight):
        assert isinstance(factor, Factor)
        library.matmul_into(outs[0][part], ins[0][part], factor.matrix, alpha=factor.scale, accumulate=accumulate)


def _segment_linear_wgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    for part, factor in rows.segments(weight):
        assert isinstance(factor, Factor) and factor.grad is not None
        grad, x = ins[0][part], ins[1][part]
        library.add_product(factor.grad, grad.T, x, alpha=factor.scale)


def _segment_scale(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    """out (+)= (x - center) * vector, where out may be x itself."""
    factors = rows.slot_factors((weight,))
    if factors is not None:
        segments.segment_scale(outs[0], ins[0], factors, accumulate=accumulate)
        return
    for part, factor in _written(rows, weight, accumulate, outs[0]):
        out, x = outs[0][part], ins[0][part]
        if isinstance(factor, FactorStack):
            counts = torch.diff(factor.ends, prepend=factor.ends.new_zeros(1))
            vector = factor.matrices[:, 0].repeat_interleave(counts, dim=0, output_size=out.shape[0])
        else:
            vector = factor.matrix[:, 0]
        width = vector.shape[-1]  # of a rank, out and x may be wider: the batch's largest rank sets their width
        out, x = out[:, :width], x[:, :width]
        if accumulate:
            out.addcmul_(x, vector)
        else:
            torch.mul(x, vector, out=out)
        if factor.center is not None:
            out.sub_(vector * factor.center)


def _segment_scale_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    for part, factor in rows.segments(weight):
        assert isinstance(factor, Factor)
        out, grad, vector = outs[0][part], ins[0][part], factor.matrix[:, 0]
        if accumulate:
            out.addcmul_(grad, vector)
        else:
            torch.mul(grad, vector, out=out)


def _segment_scale_wgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    for part, factor in rows.segments(weight):
        assert isinstance(factor, Factor) and factor.grad is not None
        total = factor.grad.new_zeros(factor.grad.shape[0])
        for grad, x in zip(ins[0][part].split(_SUM_ROWS), ins[1][part].split(_SUM_ROWS), strict=True):
            total += (grad.to(total.dtype) * (x if factor.center is None else x - factor.center)).sum(0)
        factor.grad[:, 0].add_(total if factor.slope is None else total * factor.slope)


def _relu(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    torch.clamp(ins[0], min=0, out=outs[0])


def _relu_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    torch.ops.aten.threshold_backward.grad_input(ins[0], ins[1], 0, grad_input=outs[0])


def _gelu(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    torch.ops.aten.gelu.out(ins[0], out=outs[0])


def _gelu_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    torch.ops.aten.gelu_backward.grad_input(ins[0], ins[1], grad_input=outs[0])


def _rope(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.rope(outs[0], ins[0], rows.cos, rows.sin, scale=attrs["scale"])


def _rope_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.rope(outs[0], ins[0], rows.cos, rows.sin, inverse=True, scale=attrs["scale"])


def _attention(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    rows.attention(outs[0], outs[1], *ins)


def _rotary_attention(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    """ins: q, k, v, then what is rotated."""
    q, k, v, *rotated = ins
    rows.rotary_attention(outs[0], outs[1], q, k, v, rotated, attrs["scale"])


def _attention_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    d_q, d_k, d_v = outs
    grad, q, _, _, out, lse = ins
    rows.attention_dgrad(d_q, d_k, d_v, grad, q, out, lse)


def _rotary_attention_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    """outs: d_q, d_k, d_v, then what is rotated."""
    d_q, d_k, d_v, *rotated = outs
    grad, q, _, _, out, lse = ins
    rows.rotary_attention_dgrad(d_q, d_k, d_v, grad, q, out, lse, rotated, attrs["scale"])


def _silu_mul(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.silu_mul(outs[0], *ins)


def _silu_mul_dgrad(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.silu_mul_dgrad(*outs, *ins)


def _add(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.add(outs[0], *ins)


def _dropout(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    assert rows.dropout_keys is not None
    serving, training = slice(None, rows.num_serving), slice(rows.num_serving, None)
    out, x = outs[0], ins[0]
    if rows.num_serving:
        out[serving].add_(x[serving]) if accumulate else out[serving].copy_(x[serving])
    key = rows.dropout_site(attrs["site"])
    first = rows.ranks.rank * x.shape[-1] if attrs.get("split") else 0
    library.dropout(out[training], x[training], rows.dropout_keys, key, attrs["p"], accumulate, first_feature=first)


def _sign_bits(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.sign_bits(outs[0], ins[0])


def _sign_values(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.sign_values(outs[0], ins[0])


def _fp8_encode(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.fp8_encode(outs[0], outs[1], ins[0])


def _fp8_decode(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    library.fp8_decode(outs[0], ins[0], ins[1])


def _enter(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    if outs[0].data_ptr() != ins[0].data_ptr():
        outs[0].copy_(ins[0])


def _reduce(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    rows.ranks.reduce(outs[0], ins[0])


def _gather(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    rows.ranks.gather(outs[0], ins[0])


def _scatter(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    rows.ranks.scatter(outs[0], ins[0])


def _slice(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    outs[0].copy_(rows.ranks.mine(ins[0]))


def _spread(rows: RowContext, weight: Any, attrs: Attrs, accumulate: bool, outs: Any, ins: Any) -> None:
    """out is 0 but for this rank's features; or has them added to it."""
    own = rows.ranks.mine(outs[0])
    if accumulate:
        own.add_(ins[0])
    else:
        outs[0].zero_()
        own.copy_(ins[0])


PAIRS = _segment_pairs
"""Runs the products of several sites with both of their factors (`compiler/factors.py`)."""

RUNNERS: dict[str, Runner] = {
    "rmsnorm": _rmsnorm,
    "rmsnorm_dgrad": _rmsnorm_dgrad,
    "linear": _linear,
    "linear_dgrad": _linear_dgrad,
    "segment_linear": _segment_linear,
    "segment_linear_dgrad": _segment_linear_dgrad,
    "segment_linear_wgrad": _segment_linear_wgrad,
    "segment_scale": _segment_scale,
    "segment_scale_dgrad": _segment_scale_dgrad,
    "segment_scale_wgrad": _segment_scale_wgrad,
    "relu": _relu,
    "relu_dgrad": _relu_dgrad,
    "gelu": _gelu,
    "gelu_dgrad": _gelu_dgrad,
    "rope": _rope,
    "rope_dgrad": _rope_dgrad,
    "attention": _attention,
    "attention_dgrad": _attention_dgrad,
    "silu_mul": _silu_mul,
    "silu_mul_dgrad": _silu_mul_dgrad,
    "add": _add,
    "dropout": _dropout,
    "dropout_dgrad": _dropout,
    "enter": _enter,
    "reduce": _reduce,
    "gather": _gather,
    "gather_entered": _gather,
    "scatter": _scatter,
    "slice": _slice,
    "slice_entered": _slice,
    "spread": _spread,
    "sign_bits": _sign_bits,
    "sign_values": _sign_values,
    "fp8_encode": _fp8_encode,
    "fp8_decode": _fp8_decode,
}

JOINED: dict[tuple[str, str], Runner] = {
    ("rope", "attention"): _rotary_attention,
    ("attention_dgrad", "rope_dgrad"): _rotary_attention_dgrad,
    ("add", "rmsnorm"): _add_rmsnorm,
}
"""What runs an operator together with the one right before it, by the names of the two (compiler/lower.py)."""
