"""Matrices in 8-bit floats (e4m3) with a scale per row, as the numbers that they stand for.

Owns: the conversion, by the fastest kernel that a device has. Does not own: how scales are chosen (`library.fp8_encode`), where
matrices lie (model/fp8.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coserve.kernels.choose import runs_triton
from coserve.kernels.native import kernels_for
from coserve.kernels.triton import dequantize

E4M3 = torch.float8_e4m3fn


class _Layout(NamedTuple):
    """How e4m3's bits become those of a wider float: as an integer of its size they are shifted left; the copies of the sign
    that this leaves between the sign and the exponent are cleared; a power of two makes up for the exponent's other bias."""

    integer: torch.dtype
    shift: int
    cleared: int
    power: int


_LAYOUTS = {
    torch.float16: _Layout(torch.int16, 7, 0x4000, 8), torch.bfloat16: _Layout(torch.int16, 4, 0x7800, 120),
    torch.float32: _Layout(torch.int32, 20, 0x78000000, 120), torch.float64: _Layout(torch.int64, 49, 0x7F << 56, 1016),
}


def e4m3_values(out: Tensor, bits: Tensor) -> None:
    """out [T, D] = the numbers whose e4m3 bits are bits [T, D], uint8, on a CPU. Several times as fast as PyTorch's conversion.
    The bits of NaN are not converted."""
    layout = _LAYOUTS[out.dtype]
    whole = out.view(layout.integer)
    whole.copy_(bits.view(torch.int8))
    whole.bitwise_left_shift_(layout.shift).bitwise_and_(~layout.cleared)
    out.mul_(2.0**layout.power)


def decode_rows(out: Tensor, bits: Tensor, scales_T1: Tensor) -> None:
    """out [T, D] = e4m3 * the row's scale, rounded once to out's dtype. bits: uint8 [T, D]; scales_T1: float32 [T, 1]. Rows lie
    at any distance, their elements side by side. A row whose scale is NaN becomes NaN."""
    if (compiled := kernels_for(out)) is not None:
        compiled.decode_e4m3(out, bits, scales_T1)
    elif runs_triton(out.device) and dequantize.can_decode(out, bits):
        dequantize.decode_rows(out, bits, scales_T1)
    elif out.device.type == "cpu":
        e4m3_values(out, bits)
        out.mul_(scales_T1.to(out.dtype))
    else:
        out.copy_(bits.view(E4M3))
        out.mul_(scales_T1)
