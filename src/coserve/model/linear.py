"""Frozen linears as objects with two products, x W^T and dy W, in a layout of their own.

`FrozenLinear` computes with the plain matrix. `PackedLinear` keeps copies in oneDNN's blocked layout instead, one per product,
each made at its first use. That is faster on the CPU at any number of rows, and most at few. If memory is short
(`hold_one_copy`) it holds one copy for all products. In bfloat16 that is the plain matrix, which is almost as fast where
matrices are large. In float32 it is forward's packed copy, which is unpacked for any other product. 8-bit floats are another
class with the same methods (fp8.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coserve.kernels.processor import bfloat16_products

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

    def product(self, x: Tensor) -> Tensor | None:
        """x [T, in] W^T + bias as a new tensor [T, out]; None if `forward`, which writes to the caller's memory, is faster."""
        return None

    def input_grad(self, out: Tensor, grad: Tensor, accumulate: bool = False) -> None:
        """out [T, in] (+)= grad [T, out] W."""
        if accumulate:
            out.addmm_(grad, self._weight)
        else:
            torch.mm(grad, self._weight, out=out)

    def prepare(self, *, backward: bool) -> None:
        """Makes what the product's first use would make: nothing here."""

    def hold_one_copy(self, wanted: bool) -> None:
        """Whether the matrix may be held only once from now on; copies beyond that are dropped. Here there are none."""

    @property
    def copied_bytes(self) -> int:
        """Bytes of copies beyond one of each matrix."""
        return 0

    def rows(self, start: int, end: int) -> FrozenLinear:
        """The linear of output features [start, end), sharing memory."""
        return FrozenLinear(self._weight[start:end], None if self.bias is None else self.bias[start:end])


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layouts pay for this dtype on this device: float32 on a CPU, bfloat16 on one that multiplies it."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16:
        return bfloat16_products().supported
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


@functools.cache
def _linear_pointwise() -> Any:
    """oneDNN's product with a packed matrix, looked up once; not every build of PyTorch has it."""
    return torch.ops.mkldnn._linear_pointwise.default


def _product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return _linear_pointwise()(x, packed, bias, "none", [], "")


_PLAIN_ONCE = torch.bfloat16
"""The dtype whose one copy is plain."""


def _num_bytes(packed: Tensor | None) -> int:
    """A packed tensor has no storage that could be asked."""
    return 0 if packed is None else packed.numel() * packed.element_size()


class PackedLinear(FrozenLinear):
    """The same products from packed copies; the plain matrix is made again from them where someone asks."""

    def __init__(self, whole: Callable[[], Tensor] | None, bias: Tensor | None) -> None:
        """whole: gives the plain matrix of a linear that is part of another."""
        self.bias = bias
        self._whole = whole
        self._one_copy = False
        self._plain: Tensor | None = None
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, *, one_copy: bool = False) -> PackedLinear:
        """Packs a matrix, which the caller may then drop, or takes it as the one copy where that is plain."""
        linear = cls(None, bias)
        linear._one_copy = one_copy
        if one_copy and weight.dtype == _PLAIN_ONCE:
            linear._plain = weight
        else:
            linear._forward = _pack(weight)
        return linear

    @property
    def weight(self) -> Tensor:
        if self._whole is not None:
            return self._whole()
        if self._plain is not None:
            return self._plain
        assert self._forward is not None
        return self._forward.to_dense()

    def prepare(self, *, backward: bool) -> None:
        """Packs the matrix for one product, which takes far longer than the product. Does nothing where one copy is all."""
        if self._one_copy:
            return
        if backward and self._backward is None:
            self._backward = _pack(self.weight.T)
        elif not backward and self._forward is None:
            self._forward, self._plain = _pack(self.weight), None

    def hold_one_copy(self, wanted: bool) -> None:
        self._one_copy = wanted
        if not wanted:
            return
        self._backward = None
        if self._whole is not None:
            self._forward = None
        elif self._forward is not None and self._forward.dtype == _PLAIN_ONCE:
            self._plain, self._forward = self._forward.to_dense(), None

    @property
    def copied_bytes(self) -> int:
        return _num_bytes(self._backward) + (0 if self._whole is None else _num_bytes(self._forward))

    def forward(self, out: Tensor, x: Tensor, accumulate: bool = False) -> None:
        y = self.product(x)
        if y is None:
            FrozenLinear(self.weight, self.bias).forward(out, x, accumulate)
        else:
            out.add_(y) if accumulate else out.copy_(y)

    def product(self, x: Tensor) -> Tensor | None:
        self.prepare(backward=False)
        return None if self._forward is None else _product(x, self._forward, self.bias)

    def input_grad(self, out: Tensor, grad: Tensor, accumulate: bool = False) -> None:
        self.prepare(backward=True)
        if self._backward is None:
            FrozenLinear(self.weight).input_grad(out, grad, accumulate)
            return
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

    def hold_one_copy(self, wanted: bool) -> None:
        """As a linear's."""

    @property
    def layout(self) -> str:
        """'plain', 'packed', or 'held once' for one copy where there could be packed ones; all of a model's have the same."""
        return "plain"

    @property
    def copied_bytes(self) -> int:
        """As a linear's."""
        return 0


class PackedHead(OutputHead):
    """The head in packed blocks of the vocabulary, which are made at first use. The table stays beside them, because embedding
    lookups read it. With `hold_one_copy` there is the table alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        self._one_copy = False
        self._blocks: list[Tensor] = []
        self._backward: Tensor | None = None

    def hold_one_copy(self, wanted: bool) -> None:
        self._one_copy = wanted
        if wanted:
            self._blocks, self._backward = [], None

    @property
    def layout(self) -> str:
        return "held once" if self._one_copy else "packed"

    @property
    def copied_bytes(self) -> int:
        return sum(map(_num_bytes, (*self._blocks, self._backward)))

    def logits(self, out: Tensor, x: Tensor) -> None:
        if self._one_copy:
            super().logits(out, x)
            return
        if not self._blocks:
            self._blocks = [_pack(block) for block in self.table.split(HEAD_BLOCK)]
        start = 0
        for block in self._blocks:
            end = start + block.shape[0]
            out[:, start:end].copy_(_product(x, block))
            start = end

    def prepare(self) -> None:
        if self._backward is None and not self._one_copy:
            self._backward = _pack(self.table.T)

    def input_grad(self, grad: Tensor) -> Tensor:
        self.prepare()
        return super().input_grad(grad) if self._backward is None else _product(grad, self._backward)


def make_linear(weight: Tensor, bias: Tensor | None, *, packed: bool, one_copy: bool = False) -> FrozenLinear:
    """A linear in the layout asked for, which may keep the matrix itself."""
    return PackedLinear.of(weight, bias, one_copy=one_copy) if packed else FrozenLinear(weight, bias)


def make_head(table: Tensor, *, packed: bool, one_copy: bool = False) -> OutputHead:
    """An output head in the layout asked for."""
    if not packed:
        return OutputHead(table)
    head = PackedHead(table)
    head.hold_one_copy(one_copy)
    return head
