"""Triton's kernel that gathers contexts from the paged cache, in Triton's interpreter and for devices that are not here.

The interpreter has to be chosen before Triton is first imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coserve.kernels import triton as kernels
from coserve.kernels.triton.gather import _gather_kernel, gather_context
from tests.paged_cache import PagedCache

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not kernels.available(), reason="needs triton")
interpreted = pytest.mark.skipif(not (INTERPRETED and kernels.available()), reason="run by test_all_in_the_interpreter")


@pytest.mark.full
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="already there")
def test_all_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).relative_to(root))],
                          cwd=root, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiles, where the interpreter doesn't")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_with_wide_loads(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, shapes of Llama-3.1-8B, arguments as the launch finds them: aligned but the layer's number."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler, backends = (pytest.importorskip(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    constants = {"kv_heads": 8, "width": 128, "block_tokens": 16, "s_tile": 64, "k_tile": 128}
    kinds = {"keys": "*bf16", "values": "*bf16", "cache": "*bf16", "tables": "*i32", "firsts": "*i32", "ends": "*i32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in _gather_kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(_gather_kernel.arg_names)
               if name in ("keys", "values", "cache", "tables", "firsts", "ends", "num_layers", "cache_stride", "table_stride")}
    source = compiler.ASTSource(fn=_gather_kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = compiler.compile(source, target=backends.GPUTarget("cuda", capability, 32))
    assert "ld.global.v4.b32" in built.asm["ptx"] and "st.global.v4.b32" in built.asm["ptx"]
    assert "ld.global.b16" not in built.asm["ptx"] and "st.global.b16" not in built.asm["ptx"]


def gathered(paged: PagedCache, layer: int, firsts: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """What the kernel finds, in the middle of memory that it may not touch, and the ends."""
    contexts = paged.contexts.tolist()
    lengths = [context - first for context, first in zip(contexts, firsts, strict=True)]
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    wide = torch.full((2, ends[-1] + 5, paged.kv_heads * paged.width), math.nan, dtype=paged.rows.dtype)
    gather_context(
        wide[0, 2:-3], wide[1, 2:-3], paged.rows, layer=layer, num_layers=paged.layers, kv_heads=paged.kv_heads,
        block_tokens=paged.block_tokens, tables_BN=paged.tables, firsts_B=torch.tensor(firsts, dtype=torch.int32),
        ends=torch.tensor(ends, dtype=torch.int32), max_tokens=max(lengths),
    )
    assert wide[:, :2].isnan().all() and wide[:, -3:].isnan().all(), "wrote outside its rows"
    return wide[0, 2:-3], wide[1, 2:-3], ends


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_it_copies_what_each_request_sees(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    contexts = [rng.choice([1, 15, 16, 17, 64, rng.randint(1, 200)]) for _ in range(rng.randint(1, 5))]
    paged = PagedCache(
        seed, contexts, heads=4, kv_heads=rng.choice([1, 2, 4]), width=rng.choice([16, 24, 64]),
        block_tokens=rng.choice([1, 3, 16]), dtype=dtype,
    )
    firsts = [rng.choice([0, 0, context - 1, rng.randrange(context)]) for context in contexts]
    for layer in range(paged.layers):
        *found, ends = gathered(paged, layer, firsts)
        for request, first in enumerate(firsts):
            for kv, part in enumerate(found):
                want = paged.kv[layer][request][kv, first:].flatten(1)
                assert torch.equal(part[ends[request] : ends[request + 1]], want)
