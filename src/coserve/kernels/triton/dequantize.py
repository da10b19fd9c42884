"""Matrices in 8-bit floats with a scale per row, decoded in one launch.

T rows, D elements of a row. The conversion is arithmetic on bits, since devices before compute capability 8.9 have no
instruction for it: sign, exponent and fraction of e4m3 are moved to where float32 has them, and a factor of 2**120 makes up for
the exponent's other bias. A program decodes a piece of one row; a thread reads 16 bytes at a time.
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
ALIGNMENT = 16
"""Bytes. Of elements as many: rows begin at multiples of it in `bits`, so that reads are as wide."""
_MOST_ELEMENTS = 4096
"""That a program decodes."""


@jit()
def _decode_kernel(
    out: tl.tensor, bits: tl.tensor, scales: tl.tensor, width: tl.tensor, out_stride: tl.tensor, bits_stride: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """One [tile] piece of a row. bits: as int8."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile
    columns = column + tl.arange(0, tile)
    real = columns < width
    packed = tl.load(bits + row * bits_stride + columns, mask=real, other=0).to(tl.int32)
    moved = (packed << 20) & -0x78000001  # clears what the sign has filled between itself and the exponent
    scale = tl.load(scales + row)
    value = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36 * scale  # 2**120; the scale apart, lest both overflow
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=real)


def can_decode(out: Tensor, bits: Tensor) -> bool:
    """Whether tensors lie as the kernel reads them: in steps of 16 elements, at addresses of 16 bytes (as memory begins)."""
    size = out.element_size()
    places = (
        out.storage_offset() * size, bits.storage_offset(), bits.stride(0), out.stride(0) * size, bits.shape[1],
    )
    return out.dtype in DTYPES and all(place % ALIGNMENT == 0 for place in places)


def decode_rows(out_TD: Tensor, bits_TD: Tensor, scales_T1: Tensor) -> None:
    """out = e4m3 * the row's scale. bits_TD: uint8; scales_T1: float32. `can_decode` holds."""
    rows, width = out_TD.shape
    assert bits_TD.shape == out_TD.shape and scales_T1.shape == (rows, 1) and scales_T1.is_contiguous()
    assert can_decode(out_TD, bits_TD) and out_TD.stride(1) == bits_TD.stride(1) == 1
    if rows == 0:
        return
    tile = min(_MOST_ELEMENTS, next_power(width))
    launch: Any = _decode_kernel[(rows, -(-width // tile))]
    launch(
        out_TD, bits_TD.view(torch.int8), scales_T1, width, out_TD.stride(0), bits_TD.stride(0), tile=tile,
        num_warps=max(1, min(8, tile // 512)),
    )
