"""Frozen linears whose matrices are stored in 8-bit floats: half the bytes of bfloat16, in memory and to read.

Each row has a scale, a power of two, so a decoded element is exact in every dtype: the model is the same in float32 and in
bfloat16, and its gradients are those of the decoded matrix. Both products decode the matrix into one buffer per model and then
multiply as any other linear. On CUDA the buffer holds the largest matrix, and one kernel decodes it. On a CPU it holds a tile
that stays in cache: some rows for x W^T, some columns for dy W, so that every sum is made in one product.

Owns: the stored form and its products. Does not own: the conversion (kernels/float8.py), loading (weights.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from coserve.config.values import Quantization
from coserve.kernels import library
from coserve.kernels.float8 import E4M3, decode_rows
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, linear_shapes
from coserve.model.linear import FrozenLinear

TILE_ELEMENTS = 1 << 21
"""Elements that are decoded at once on a CPU."""
_STEP = 64
"""Rows and columns of a tile are multiples of it, where there are as many."""
SCALE_BYTES = 4


def largest_elements(arch: Architecture) -> int:
    """Elements of the largest matrix of a decoder layer, with those that are merged as one."""
    shapes = linear_shapes(arch)
    whole = [sum(math.prod(shapes[site]) for site in sites) for sites in MERGED.values()]
    return max(*whole, *(math.prod(shape) for shape in shapes.values()))


def linear_bytes(arch: Architecture, itemsize: int, quantization: Quantization) -> int:
    """Bytes of the matrices of all decoder layers, with what their products decode them into."""
    shapes = linear_shapes(arch).values()
    elements = arch.num_layers * sum(math.prod(shape) for shape in shapes)
    if quantization == "none":
        return itemsize * elements
    rows = arch.num_layers * sum(shape[0] for shape in shapes)
    return elements + SCALE_BYTES * rows + itemsize * largest_elements(arch)


class DecodeBuffer:
    """The memory that a model's matrices are decoded into, one after the other. largest: elements of the largest matrix."""

    def __init__(self, largest: int, dtype: torch.dtype, device: torch.device) -> None:
        self.is_whole = device.type != "cpu" or largest <= TILE_ELEMENTS
        self._memory = torch.empty(largest if self.is_whole else 0, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self._memory.dtype

    def steps(self, count: int, length: int) -> Iterator[slice]:
        """Parts of `count` rows or columns, each `length` elements long, that the buffer has room for at once."""
        step = count
        if not self.is_whole and count * length > TILE_ELEMENTS:
            step = max(1, TILE_ELEMENTS // length)
            step = step // _STEP * _STEP or min(_STEP, count)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def decode(self, bits: Tensor, scales: Tensor) -> Tensor:
        """The matrix [rows, columns] of `decode_rows`, until the next call."""
        if self._memory.numel() < bits.numel():
            self._memory = torch.empty(bits.numel(), dtype=self._memory.dtype, device=self._memory.device)
        out = self._memory[: bits.numel()].view(bits.shape)
        decode_rows(out, bits, scales)
        return out


class Fp8Linear(FrozenLinear):
    """y = x W^T (+ bias) and dy W, where W = e4m3 * its row's scale. elements: float8_e4m3fn [out, in]; scales: float32
    [out, 1]; bias: [out] or None; buffer: the model's."""

    def __init__(self, elements: Tensor, scales: Tensor, bias: Tensor | None, buffer: DecodeBuffer) -> None:
        self.elements, self.scales, self.bias, self._buffer = elements, scales, bias, buffer
        self._bits = elements.view(torch.uint8)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix [out, in] in the model's dtype: a copy."""
        out = torch.empty(self._bits.shape, dtype=self._buffer.dtype, device=self._bits.device)
        decode_rows(out, self._bits, self.scales)
        return out

    def forward(self, out: Tensor, x: Tensor, accumulate: bool = False) -> None:
        for rows in self._buffer.steps(*self._bits.shape):
            part = FrozenLinear(
                self._buffer.decode(self._bits[rows], self.scales[rows]), None if self.bias is None else self.bias[rows]
            )
            part.forward(out[:, rows], x, accumulate)

    def input_grad(self, out: Tensor, grad: Tensor, accumulate: bool = False) -> None:
        num_out, num_in = self._bits.shape
        for columns in self._buffer.steps(num_in, num_out):
            part = FrozenLinear(self._buffer.decode(self._bits[:, columns], self.scales))
            part.input_grad(out[:, columns], grad, accumulate)

    def rows(self, start: int, end: int) -> Fp8Linear:
        bias = None if self.bias is None else self.bias[start:end]
        return Fp8Linear(self.elements[start:end], self.scales[start:end], bias, self._buffer)


class Fp8Rows:
    """Matrices of several sites in one, encoded part by part. bias: [out] or None."""

    def __init__(self, num_out: int, num_in: int, bias: Tensor | None, buffer: DecodeBuffer, device: torch.device) -> None:
        self._elements = torch.empty(num_out, num_in, dtype=E4M3, device=device)
        self._scales = torch.empty(num_out, 1, device=device)
        self._bias, self._buffer = bias, buffer

    def encode(self, rows: slice, weight: Tensor, largest_N1: Tensor | None) -> None:
        """Stores a matrix as these rows. weight: float32 [N, in]; largest_N1: the magnitudes that scales are chosen for, if the
        rows are part of wider ones. A row that isn't finite becomes NaN."""
        exponent = torch.empty(weight.shape[0], 1, dtype=torch.uint8, device=weight.device)
        library.fp8_encode(self._elements[rows].view(torch.uint8), exponent, weight, largest_N1)
        self._scales[rows] = library.fp8_scales(exponent, torch.float32)

    def linear(self) -> Fp8Linear:
        """The linear of all rows."""
        return Fp8Linear(self._elements, self._scales, self._bias, self._buffer)

