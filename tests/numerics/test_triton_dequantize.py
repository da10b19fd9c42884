"""The Triton kernel that decodes 8-bit floats against PyTorch, on CPU tensors through Triton's interpreter.

The interpreter has to be chosen before Triton is first imported. So one test runs this file again in a process of its own; the
others skip anywhere else. Memory that the kernel may not read or write holds NaN.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from coserve.kernels.triton import dequantize
from tests.triton_interpreter import compiled, interpreted, needs_triton, run_in_the_interpreter


@pytest.mark.full
@needs_triton
@compiled
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@needs_triton
@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_devices_that_are_not_here(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-3.1-8B's gate_up_proj in bfloat16; bytes are read sixteen at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler, backends = (pytest.importorskip(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    kernel = dequantize._decode_kernel
    signature = {"out": "*bf16", "bits": "*i8", "scales": "*fp32", "width": "i32", "out_stride": "i32", "bits_stride": "i32",
                 "tile": "constexpr"}
    aligned = {(number,): [["tt.divisibility", 16]] for number in range(6)}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs={"tile": 4096}, attrs=aligned)
    built = compiler.compile(source, target=backends.GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert "ftz" not in built.asm["ptx"], "small elements would become 0"
    assert "ld.global.v4.b32" in built.asm["ptx"] and "st.global.v4.b32" in built.asm["ptx"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 272), (5, 4096), (2, 4112), (4, 9600)])
def test_decode(dtype: torch.dtype, rows: int, width: int) -> None:
    codes = torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN, which is not encoded
    stored = torch.full((rows, width + 32), 0x7F, dtype=torch.uint8)
    stored[:, 16:-16] = codes
    out = torch.full((rows, width + 16), math.nan, dtype=dtype)
    scales = torch.exp2(-torch.arange(rows, dtype=torch.float32))[:, None].clamp(min=2.0**-3)
    dequantize.decode_rows(out[:, 8:-8], stored[:, 16:-16], scales)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.float64) * scales.double()
    assert torch.equal(out[:, 8:-8].double(), wanted)
    assert out[:, :8].isnan().all() and out[:, -8:].isnan().all(), "wrote beside its columns"


@interpreted
def test_a_row_whose_scale_is_nan_becomes_nan() -> None:
    codes, out = torch.full((2, 32), 0x38, dtype=torch.uint8), torch.zeros(2, 32)
    dequantize.decode_rows(out, codes, torch.tensor([[math.nan], [2.0]]))
    assert out[0].isnan().all() and (out[1] == 2).all()


def test_what_the_kernel_can_read() -> None:
    bits, out = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 64, dtype=torch.bfloat16)
    assert dequantize.can_decode(out, bits)
    assert not dequantize.can_decode(out[:, :40], bits[:, :40]), "reads would not be of 16 elements"
    assert not dequantize.can_decode(out, torch.zeros(4, 72, dtype=torch.uint8)[:, :64])
    assert not dequantize.can_decode(out.double(), bits)
