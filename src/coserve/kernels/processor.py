"""What the processor multiplies in hardware, as far as oneDNN, which does the CPU's products, may use it.

Owns: the question whether bfloat16 pays on this CPU. Does not own: what follows from it (runtime/loaded.py, model/linear.py).
`torch.ops.mkldnn._is_mkldnn_bf16_supported` does not answer it: it is also true where oneDNN multiplies bfloat16 through
float32, which takes several times as long as float32 itself.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit oneDNN to an instruction set; the first that isn't empty counts."""
_ISAS_WITHOUT = frozenset({"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"})
"""oneDNN's names of instruction sets that don't multiply bfloat16. It ignores names that it doesn't know."""


class Bfloat16Products(NamedTuple):
    """supported: whether the CPU multiplies bfloat16 faster than float32; reason: the same as a clause of a sentence."""

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
