"""Many copies of rows in one launch, listed in a table on the device.

A copy is cut into pieces of at most PIECE_BYTES per row; a program copies one piece of one row. The table says where a piece's
rows begin and how far they lie apart, so that one table, sent to the device once, serves any number of launches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.triton import jit

try:
    import triton.language as tl
except ImportError:
    tl = None

PIECE_BYTES = 8192
_UNIT_BYTES = 16
"""What a thread copies at once. Pointers, strides and widths are multiples of it."""
_COLUMNS = 6
"""Of a piece: source, target, their strides, width; one is unused, so that each row of the table begins on 16 bytes."""


@jit()
def _copy_kernel(table: tl.tensor, columns: tl.constexpr, tile: tl.constexpr) -> None:
    """One piece of one row, in int32."""
    row, entry = tl.program_id(0).to(tl.int64), table + tl.program_id(1) * columns
    source = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    target = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.int32)), 16)
    source_stride, target_stride = tl.multiple_of(tl.load(entry + 2), 4), tl.multiple_of(tl.load(entry + 3), 4)
    width = tl.multiple_of(tl.load(entry + 4), 4)
    column = tl.arange(0, tile)
    real = column < width
    values = tl.load(source + row * source_stride + column, mask=real, other=0)
    tl.store(target + row * target_stride + column, values, mask=real)


def pieces(copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The table [pieces, 6] of copies, and how many pieces each copy has.

    copies: int64 [copies, 5]: of the source, the address of the first row, the distance of rows and the width; of the target,
    address and distance. All are in bytes and multiples of 16.
    """
    sources, source_strides, widths, targets, target_strides = copies.T
    counts = -(-widths // PIECE_BYTES)
    which = np.repeat(np.arange(len(widths)), counts)
    offset = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * PIECE_BYTES
    table = np.zeros((len(which), _COLUMNS), np.int64)
    table[:, 0], table[:, 1] = sources[which] + offset, targets[which] + offset
    table[:, 2], table[:, 3] = source_strides[which] // 4, target_strides[which] // 4
    table[:, 4] = np.minimum(widths[which] - offset, PIECE_BYTES) // 4
    return table, counts


def can_copy(*numbers: int) -> bool:
    """Whether addresses, strides and widths in bytes are what the kernel takes."""
    return all(number % _UNIT_BYTES == 0 for number in numbers)


def copy_rows(table: Tensor, num_rows: int) -> None:
    """Copies `num_rows` rows of every piece in `table`: rows of a table made by `pieces`, on the device."""
    assert table.dtype == torch.int64 and table.is_contiguous() and table.shape[1] == _COLUMNS
    launch: Any = _copy_kernel[(num_rows, table.shape[0])]
    launch(table, columns=_COLUMNS, tile=PIECE_BYTES // 4, num_warps=4)
