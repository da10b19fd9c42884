"""What the processor multiplies in hardware, as far as oneDNN, which does the CPU's products, may use it, and how fast.

Owns: the question whether bfloat16 pays on this CPU. Does not own: what follows from it (runtime/loaded.py, model/linear.py).
Units for bfloat16 do not mean that it is fast. On some processors its products take half of float32's time, on others twice as
long. So they are timed.
`torch.ops.mkldnn._is_mkldnn_bf16_supported` does not answer it: it is also true where oneDNN multiplies bfloat16 through
float32, which takes several times as long as float32 itself.
"""

from __future__ import annotations

import functools
import os
import time
from typing import NamedTuple

import torch

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit oneDNN to an instruction set; the first that isn't empty counts."""
_ISAS_WITHOUT = frozenset({"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"})
"""oneDNN's names of instruction sets that don't multiply bfloat16. It ignores names that it doesn't know."""


_ROWS, _WIDTH, _TRIES = 256, 1024, 5
"""Of the product that is timed: rows of x, inputs and outputs of the matrix, how often."""


class Bfloat16Products(NamedTuple):
    """supported: whether the CPU multiplies bfloat16 in hardware; reason: the same as a clause of a sentence."""

    supported: bool
    reason: str


def bfloat16_products() -> Bfloat16Products:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX) and oneDNN may use that."""
    if not torch.backends.mkldnn.is_available():
        return Bfloat16Products(False, "this PyTorch has no oneDNN, which multiplies bfloat16")
    units = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    found = ", ".join(name for name, there in units.items() if there)
    if not found:
        return Bfloat16Products(False, "this processor does not multiply bfloat16 (no AVX512-BF16, no AMX)")
    cap = next((name for name in CAPS if os.environ.get(name)), None)
    if cap is not None and os.environ[cap].lower() in _ISAS_WITHOUT:
        return Bfloat16Products(False, f"{cap}={os.environ[cap]} keeps oneDNN from multiplying bfloat16")
    return Bfloat16Products(True, f"this processor multiplies it ({found})")


@functools.cache
def bfloat16_speed() -> float:
    """How many times as fast as in float32 a product with a packed matrix is in bfloat16, by the present number of threads.

    It is timed once per process, in about a twentieth of a second. Needs a CPU and a PyTorch that multiply bfloat16.
    """
    pack, product = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise.default
    rows, matrix = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    factors = {dtype: (rows.to(dtype), pack(matrix.to(dtype), None)) for dtype in (torch.float32, torch.bfloat16)}
    times = dict.fromkeys(factors, float("inf"))
    for _ in range(_TRIES):  # in turn, so that other work on the machine slows both
        for dtype, (x, packed) in factors.items():
            started = time.perf_counter()
            product(x, packed, None, "none", [], "")
            times[dtype] = min(times[dtype], time.perf_counter() - started)
    return times[torch.float32] / times[torch.bfloat16]
