"""The compiled kernels of a CPU against plain PyTorch, and what happens where they can't be compiled.

T rows, H query heads, G key-value heads, K head width. Rows are column slices of wider ones, whose other columns hold NaN.
"""

from __future__ import annotations

import copy
import math
import os
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve import SamplingConfig
from coserve.engine.generation import Generator
from coserve.kernels import library, native, reference
from coserve.kernels.native import build
from coserve.runtime.loaded import load_model
from tests.paged_cache import PagedCache
from tests.tiny_directory import build_tiny_directory

F32, BF16 = torch.float32, torch.bfloat16
needs_compiler = pytest.mark.skipif(not native.compiled_kernels().kernels, reason=native.compiled_kernels().note)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
ROWS = pytest.mark.parametrize("rows", [0, 1, 3, 40])
"""40 rows are shared among threads where rows are wide."""


def wide(rows: int, features: int, dtype: torch.dtype, seed: int | None = None, scale: float = 1.0) -> Tensor:
    """Rows within wider ones: random, or NaN."""
    around = torch.full((rows, features + 7), math.nan, dtype=dtype)
    inner = around[:, 3:-4]
    if seed is not None:
        inner.copy_(torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) * scale)
    return inner


def assert_near(found: Tensor, want: Tensor, roundings: int) -> None:
    """want: float64. roundings: how often a value may have been rounded to the dtype on its way."""
    around = found._base
    assert around is None or (around[:, :3].isnan().all() and around[:, -4:].isnan().all()), "wrote outside its columns"
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), want, rtol=roundings * unit, atol=roundings * unit)


@needs_compiler
@DTYPES
@ROWS
@pytest.mark.parametrize(("width", "groups"), [(1700, 1), (64, 27), (5, 2), (1, 1)])
def test_rmsnorm(rows: int, width: int, groups: int, dtype: torch.dtype) -> None:
    x, out, weight = wide(rows, width * groups, dtype, 1, 3), wide(rows, width * groups, dtype), wide(1, width, dtype, 2)[0]
    library.rmsnorm(out, x, weight, 1e-5)
    assert_near(out, reference.rmsnorm(x.double(), weight.double(), 1e-5), 2)


@needs_compiler
@DTYPES
@ROWS
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("width", "heads"), [(64, 27), (128, 3), (6, 2)])
def test_rope_and_back(rows: int, width: int, heads: int, in_place: bool, dtype: torch.dtype) -> None:
    x = wide(rows, width * heads, dtype, 1)
    cos, sin = (wide(rows, width // 2, dtype, seed).repeat(1, 2) for seed in (2, 3))
    turned = torch.cat((-sin[:, : width // 2], sin[:, width // 2 :]), 1)
    want, back = (reference.rope(x.double(), cos.double(), sign * sin.double()) for sign in (1, -1))
    for inverse, expected in ((False, want), (True, back)):
        source = wide(rows, width * heads, dtype)
        source.copy_(x)
        out = source if in_place else wide(rows, width * heads, dtype)
        library.rope(out, source, cos, turned, inverse=inverse)
        assert_near(out, expected, 2)


@needs_compiler
@DTYPES
@ROWS
@pytest.mark.parametrize("width", [1800, 13])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate, up, out = wide(rows, width, dtype, 1, 20), wide(rows, width, dtype, 2), wide(rows, width, dtype)
    library.silu_mul(out, gate, up)
    assert_near(out, reference.silu_mul(gate.double(), up.double()), 3)


@needs_compiler
@DTYPES
@ROWS
@pytest.mark.parametrize("width", [1800, 13])
def test_add(rows: int, width: int, dtype: torch.dtype) -> None:
    x, y, out = wide(rows, width, dtype, 1), wide(rows, width, dtype, 2), wide(rows, width, dtype)
    library.add(out, x, y)
    assert torch.equal(out, x + y)


@needs_compiler
@DTYPES
def test_silu_of_what_is_very_large_or_not_a_number(dtype: torch.dtype) -> None:
    gate = torch.tensor([[0.0, -0.0, 1e4, -1e4, 3e38, -3e38, math.inf, math.nan, 88.5, -88.5]], dtype=dtype)
    out = torch.empty_like(gate)
    library.silu_mul(out, gate, torch.ones_like(gate))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-2)


@needs_compiler
def test_bfloat16_is_rounded_as_the_library_rounds() -> None:
    """Every product of 100 and a bfloat16: ties to even, subnormal numbers, overflow, NaN. silu(100) is 100."""
    up = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)[:, None]
    out, gate = torch.empty_like(up), torch.full_like(up, 100)
    library.silu_mul(out, gate, up)
    torch.testing.assert_close(out, gate * up, rtol=0, atol=0, equal_nan=True)


def one_row_each(out: Tensor, q: Tensor, cache: Tensor, **sizes: Any) -> None:
    """The kernel for a row per sequence, called as the paged kernel of Triton is."""
    del sizes["max_context"]
    kernel = native.paged_attention_for(cache, sizes["block_tokens"])
    assert kernel is not None
    kernel(out, q, cache, starts=torch.arange(q.shape[0] + 1, dtype=torch.int32), **sizes)


def assert_attends(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-5 if dtype == F32 else 2 * torch.finfo(BF16).eps)


SIZES = pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 64), (9, 3, 64), (3, 1, 128), (7, 1, 24), (2, 1, 512), (50, 1, 64)]
)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 40, 500])


@needs_compiler
@DTYPES
@WINDOWS
@SIZES
def test_attention_of_a_row_each(heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype) -> None:
    paged = PagedCache(heads + width, [1, 16, 37, 200, 161], heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    assert_attends(paged.run(one_row_each, 2, window), paged.reference(2, window), dtype)


@needs_compiler
@DTYPES
@WINDOWS
@SIZES
def test_attention_of_many_rows(heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype) -> None:
    """Prompts whole, their last chunks, and single rows, in one batch."""
    contexts, rows, block_tokens = [70, 33, 200, 5], [70, 17, 1, 5], {1: 40, 40: 5}.get(window or 0, 16)
    paged = PagedCache(heads + width, contexts, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype,
                       block_tokens=block_tokens)
    kernel = native.paged_attention_for(paged.rows, block_tokens)
    assert kernel is not None
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    q, out = wide(sum(rows), heads * width, dtype, 3, 3), wide(sum(rows), heads * width, dtype)
    kernel(out, q, paged.rows, layer=1, num_layers=3, kv_heads=kv_heads, block_tokens=block_tokens, tables_BN=paged.tables,
           context_B=paged.contexts, starts=starts, window=window, scale=width**-0.5)
    for first, end, kv in zip(starts, starts[1:], paged.kv[1], strict=False):
        want, _ = reference.attention(q[first:end].double().unflatten(1, (heads, width)), *kv.double(), window=window)
        assert_attends(out[first:end], want.flatten(1), dtype)


@needs_compiler
@pytest.mark.parametrize("seed", range(8))
def test_attention_with_other_blocks(seed: int) -> None:
    rng = random.Random(seed)
    contexts = [rng.randint(1, 200) for _ in range(rng.randint(1, 12))]
    kv_heads, block_tokens = rng.choice([1, 2, 3]), rng.choice([1, 5, 16, 64, 256])
    paged = PagedCache(seed, contexts, heads=kv_heads * rng.choice([1, 2, 5]), kv_heads=kv_heads, width=rng.choice([16, 64]),
                       block_tokens=block_tokens)
    layer, window = rng.randrange(3), rng.choice([None, rng.randint(1, 200)])
    assert_attends(paged.run(one_row_each, layer, window), paged.reference(layer, window), F32)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("window", [None, 40, 100])
def test_a_row_has_the_same_bits_in_any_batch(window: int | None, dtype: torch.dtype) -> None:
    """Alone, with rows of other requests, and with earlier rows of its own."""
    paged = PagedCache(5, [50, 3, 199, 16, 17], heads=9, kv_heads=3, width=64, dtype=dtype)
    together = paged.run(one_row_each, 1, window)
    for request in range(5):
        alone = slice(request, request + 1)
        part = copy.copy(paged)
        part.contexts, part.tables, part.q = (whole[alone] for whole in (paged.contexts, paged.tables, paged.q))
        assert torch.equal(part.run(one_row_each, 1, window), together[alone])
        rows = min(30, int(paged.contexts[request]))
        q = torch.cat((torch.randn(rows - 1, q_width := paged.q.shape[1]).to(dtype), paged.q[alone]))
        out, kernel = torch.empty(rows, q_width, dtype=dtype), native.paged_attention_for(paged.rows, 16)
        assert kernel is not None
        kernel(out, q, paged.rows, layer=1, num_layers=3, kv_heads=3, block_tokens=16, tables_BN=part.tables,
               context_B=part.contexts, starts=torch.tensor([0, rows], dtype=torch.int32), window=window, scale=64**-0.5)
        assert torch.equal(out[-1:], together[alone])


@needs_compiler
@DTYPES
@pytest.mark.parametrize("width", [16, 64])
def test_a_request_with_nan_spoils_no_other_and_an_empty_one_gives_zeros(width: int, dtype: torch.dtype) -> None:
    paged = PagedCache(6, [50, 3, 99], heads=4, kv_heads=2, width=width, dtype=dtype)
    want = paged.run(one_row_each, 0, None).clone()
    paged.rows.view(-1, 3, 2, 2, 16, width)[int(paged.tables[0, 1]), 0, 1] = math.nan
    paged.contexts[1] = 0
    found = paged.run(one_row_each, 0, None)
    assert found[0].isnan().all() and (found[1] == 0).all() and torch.equal(found[2], want[2])


@needs_compiler
def test_scores_far_apart() -> None:
    """The largest score is met last, and exceeds the others by far more than an exponential can hold."""
    paged = PagedCache(7, [100], heads=2, kv_heads=2, width=16)
    paged.q *= 300
    assert_attends(paged.run(one_row_each, 0, None), paged.reference(0, None), F32)


def test_what_the_kernels_have_no_room_for_is_left_to_the_library() -> None:
    assert native.paged_attention_for(torch.empty(2, 16 * 513), 16) is None
    assert native.paged_attention_for(torch.empty(2, 64, dtype=torch.float64), 16) is None
    assert native.kernels_for(torch.empty(1, device="meta")) is None


@needs_compiler
@DTYPES
def test_outputs_are_those_without_compiled_kernels(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a chunked prompt and of decoded rows, once with the kernels and once by library calls."""
    build_tiny_directory(tmp_path / "m")
    prompts = [[5, 6, 7, 8, 9] * n for n in (1, 4, 9)]

    def run() -> tuple[Tensor, list[list[int]]]:
        model = load_model(str(tmp_path / "m"), device="cpu", dtype=str(dtype).removeprefix("torch."))
        generator = Generator(model)
        return generator.logits(prompts[2]).float(), generator.generate(prompts, SamplingConfig(max_tokens=8, temperature=0))

    logits, tokens = run()
    with monkeypatch.context() as patch:
        patch.setattr(native, "compiled_kernels", lambda: native.Compiled({}, "off"))
        plain_logits, plain_tokens = run()
    assert float((logits - plain_logits).norm() / plain_logits.norm()) <= (1e-5 if dtype == F32 else 0.03)
    if dtype == F32:
        assert tokens == plain_tokens


# --- building -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def note_of() -> str:
    """What a first call would say."""
    found = native.compiled_kernels.__wrapped__()
    assert not found.kernels and found.identity is None
    return found.note


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSERVE_NATIVE", "0")
    assert note_of() == "compiled kernels are off (COSERVE_NATIVE=0): decoding takes longer"


def test_without_a_compiler(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(fresh_cache / "none"))
    assert note_of().endswith("there is no C++ compiler; install g++, or set CXX to its path")


@pytest.mark.full
def test_with_another_compiler(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would bring another OpenMP library into the process."""
    monkeypatch.setenv("CXX", script(tmp_path / "clang++", "echo clang version 19"))
    assert note_of().endswith(f"the C++ compiler is {tmp_path / 'clang++'}, and only g++ is used; set CXX to it")


@pytest.mark.full
def test_with_a_compiler_that_fails(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[ "$1" = --version ] && echo "g++ 12" && exit; echo "rows.cpp:1: error: no room" >&2; exit 1'
    monkeypatch.setenv("CXX", script(tmp_path / "g++", text))
    assert note_of().endswith("the compiler failed: rows.cpp:1: error: no room")
    assert not list((fresh_cache / "kernels").iterdir())


@pytest.mark.parametrize("missing", ["torch._inductor.cpp_builder", "torch._inductor.exc"])
def test_with_another_pytorch(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder is a private part of it."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(build.BuildError, match="can't compile them"):
        build.compile_library(tmp_path)


@pytest.mark.full
@needs_compiler
def test_a_library_is_made_once_and_again_when_it_is_damaged_or_made_of_something_else(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.built_library()
    assert first.parent == fresh_cache / "kernels" and list(first.parent.iterdir()) == [first]
    assert stat.S_IMODE(first.stat().st_mode) == 0o755, "others may share the directory"
    changed = first.stat().st_mtime_ns
    assert build.built_library() == first and first.stat().st_mtime_ns == changed
    first.write_bytes(first.read_bytes()[:1000])
    second = build.built_library()
    assert native._load(second)
    name = build.library_name()
    monkeypatch.setenv("TORCHINDUCTOR_CPP_MARCH", "x86-64-v3")
    assert build.library_name() != name


def test_a_library_of_another_system_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(path: Path) -> dict[torch.dtype, native.RowKernels]:
        if len(asked) == 1:
            raise OSError("version `GLIBC_2.99' not found")
        return {}

    monkeypatch.setattr(native, "_load", load)
    monkeypatch.setattr(native, "built_library", lambda anew=False: asked.append(anew) or Path("rows.so"))
    assert native.compiled_kernels.__wrapped__().note.startswith("compiled kernels, ready") and asked == [False, True]


@pytest.mark.full
@needs_compiler
def test_a_cache_that_can_not_be_written_to(fresh_cache: Path) -> None:
    fresh_cache.write_text("a file where the directory would be")
    made = build.built_library()
    assert made.is_file() and fresh_cache not in made.parents


@needs_compiler
def test_the_process_has_one_openmp_library() -> None:
    """PyTorch's: a second one would have a second team of threads."""
    program = (
        "import torch\n"
        "from coserve.kernels import native\n"
        "assert native.compiled_kernels().kernels\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}\n"
        "assert len(names) == 1, names\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ), timeout=120)


def test_with_a_second_openmp_library(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = ["7f-8f r--p 0 0:0 1  /somewhere/libgomp.so.1", "7f-8f r--p 0 0:0 1  /elsewhere/libiomp5.so"]
    monkeypatch.setattr(native, "_mapped", lambda: mapped)
    monkeypatch.setattr(native, "RowKernels", lambda path, name: None)
    monkeypatch.setattr(native, "built_library", lambda: Path("rows.so"))
    assert note_of().endswith("would need another OpenMP library than g++ (libgomp.so.1 and libiomp5.so)")
