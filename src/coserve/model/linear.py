"""Frozen linears as objects with two products, x W^T and dy W, in a layout of their own.

`FrozenLinear` computes with the plain matrix. `PackedLinear` keeps oneDNN's blocked copies instead, one per product, each
made at its first use: faster on the CPU at any number of rows, most at few. A quantized layout is
another class with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HEAD_BLOCK = 8192
"""Vocabulary rows per packed block of the output head: a block's logits are still in cache when they are copied out."""


class FrozenLinear:
    """y = x W^T (+ bias), and its input gradient dy W. weight: [out, in]; bias: [out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self.bias = weight, bias

    @property
    def weight(self) -> Tensor:
        """The plain matrix [out, in]; a copy where the layout is another."""
        return self._weight

    def forward(self, out: Tensor, x: Tensor, accumulate: bool = False) -> None:
        """out [T, out] (+)= x [T, in] W^T + bias."""
        if accumulate:
            out.addmm_(x, self._weight.T)
            if self.bias is not None:
                out.add_(self.bias)
        elif self.bias is not None:
            torch.addmm(self.bias, x, self._weight.T, out=out)
        else:
            torch.mm(x, self._weight.T, out=out)

    def input_grad(self, out: Tensor, grad: Tensor, accumulate: bool = False) -> None:
        """out [T, in] (+)= grad [T, out] W."""
        if accumulate:
            out.addmm_(grad, self._weight)
        else:
            torch.mm(grad, self._weight, out=out)

    def prepare(self, *, backward: bool) -> None:
        """Makes what the product's first use would make: nothing here."""

    def rows(self, start: int, end: int) -> FrozenLinear:
        """The linear of output features [start, end), sharing memory."""
        return FrozenLinear(self._weight[start:end], None if self.bias is None else self.bias[start:end])


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layouts exist for this dtype and device."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedLinear(FrozenLinear):
    """The same products from packed copies; the plain matrix is made again from them where someone asks."""

    def __init__(self, dense: Callable[[], Tensor], bias: Tensor | None) -> None:
        self.bias = bias
        self._dense = dense
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Packs a matrix, which the caller may then drop."""
        packed = _pack(weight)
        linear = cls(packed.to_dense, bias)
        linear._forward = packed
        return linear

    @property
    def weight(self) -> Tensor:
        return self._dense()

    def prepare(self, *, backward: bool) -> None:
        """Packs the matrix for one product, which takes far longer than the product."""
        if backward and self._backward is None:
            self._backward = _pack(self._dense().T)
        elif not backward and self._forward is None:
            self._forward = _pack(self._dense())

    def forward(self, out: Tensor, x: Tensor, accumulate: bool = False) -> None:
        self.prepare(backward=False)
        assert self._forward is not None
        y = _product(x, self._forward, self.bias)
        out.add_(y) if accumulate else out.copy_(y)

    def input_grad(self, out: Tensor, grad: Tensor, accumulate: bool = False) -> None:
        self.prepare(backward=True)
        assert self._backward is not None
        dx = _product(grad, self._backward)
        out.add_(dx) if accumulate else out.copy_(dx)

    def rows(self, start: int, end: int) -> PackedLinear:
        return PackedLinear(lambda: self.weight[start:end], None if self.bias is None else self.bias[start:end])


class OutputHead:
    """Logits of the vocabulary, and what the loss needs of the head. table: [V, D], the embedding's when tied."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def logits(self, out: Tensor, x: Tensor) -> None:
        """out [T, V] = x [T, D] table^T."""
        torch.mm(x, self.table.T, out=out)

    def input_grad(self, grad: Tensor) -> Tensor:
        """grad [T, V] table: a new [T, D]."""
        return grad @ self.table

    def rows(self, ids: Tensor) -> Tensor:
        """The table's rows of some tokens: a new [T, D]."""
        return self.table[ids]

    def prepare(self) -> None:
        """Makes what the first use in training would make: nothing here."""


class PackedHead(OutputHead):
    """The head in packed blocks of the vocabulary, made at first use."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        self._blocks: list[Tensor] = []
        self._backward: Tensor | None = None

    def logits(self, out: Tensor, x: Tensor) -> None:
        if not self._blocks:
            self._blocks = [_pack(block) for block in self.table.split(HEAD_BLOCK)]
        start = 0
        for block in self._blocks:
            end = start + block.shape[0]
            out[:, start:end].copy_(_product(x, block))
            start = end

    def prepare(self) -> None:
        if self._backward is None:
            self._backward = _pack(self.table.T)

    def input_grad(self, grad: Tensor) -> Tensor:
        self.prepare()
        assert self._backward is not None
        return _product(grad, self._backward)


def make_linear(weight: Tensor, bias: Tensor | None, *, packed: bool) -> FrozenLinear:
    """A linear in the layout asked for."""
    return PackedLinear.of(weight, bias) if packed else FrozenLinear(weight, bias)


def make_head(table: Tensor, *, packed: bool) -> OutputHead:
    """An output head in the layout asked for."""
    return PackedHead(table) if packed else OutputHead(table)
