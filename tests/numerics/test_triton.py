"""The Triton kernels against plain PyTorch, on CPU tensors through Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, and would spoil a process that uses a device. So one test runs
this file again in a process of its own; the others skip anywhere else. float32 only: the interpreter's bfloat16 products are
wrong. Memory that a kernel may not read or write holds NaN.

B requests, N blocks, H query heads, G key-value heads, K head width (or input features), T rows, S segments.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.kernels import triton as kernels
from coserve.kernels.triton import paged_decode, segments
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


@pytest.mark.skipif(INTERPRETED, reason="has nothing to interpret")
def test_modules_import_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from coserve.kernels import triton as kernels\n"
        "from coserve.kernels.triton import paged_decode, segments\n"
        "assert not kernels.available()"
    )
    source = Path(kernels.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(source)},
                          capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_splits_cover_the_context_and_stay_fixed_up_to_a_length() -> None:
    for context in (1, 255, 256, 257, 5000, paged_decode.MAX_SPLITS * paged_decode.SPLIT_TOKENS, 100_000, 131_072):
        count, length = paged_decode.split_sizes(context, None)
        assert count <= paged_decode.MAX_SPLITS and (count - 1) * length < context <= count * length
        assert length % paged_decode.TILE_TOKENS == 0
        if context <= paged_decode.MAX_SPLITS * paged_decode.SPLIT_TOKENS:
            assert length == paged_decode.SPLIT_TOKENS
        assert paged_decode.split_sizes(context, 100)[0] == 1
    assert paged_decode.split_sizes(0, None)[0] == 1


# --- paged decode attention -----------------------------------------------------------------------------------------------


KERNEL = paged_decode.paged_decode_attention


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits so short that small contexts need several."""
    monkeypatch.setattr(paged_decode, "SPLIT_TOKENS", 32)
    monkeypatch.setattr(paged_decode, "TILE_TOKENS", 16)


@interpreted
@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [None, 1, 40, 500])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 64), (3, 1, 128), (2, 1, 24)])
def test_paged_decode(heads: int, kv_heads: int, width: int, window: int | None) -> None:
    paged = PagedCache(heads + width, [1, 16, 37, 200, 161], heads=heads, kv_heads=kv_heads, width=width)
    torch.testing.assert_close(paged.run(KERNEL, 2, window).double(), paged.reference(2, window), rtol=2e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize("seed", range(8))
def test_paged_decode_at_its_own_sizes(seed: int) -> None:
    rng = random.Random(seed)
    contexts = [rng.randint(1, 200) for _ in range(rng.randint(1, 4))] + [300] * (seed % 2)
    kv_heads = rng.choice([1, 2, 3])
    paged = PagedCache(seed, contexts, heads=kv_heads * rng.choice([1, 2, 5]), kv_heads=kv_heads, width=rng.choice([16, 64]),
                  block_tokens=rng.choice([16, 16, 5]))
    layer, window = rng.randrange(3), rng.choice([None, rng.randint(1, 200)])
    torch.testing.assert_close(paged.run(KERNEL, layer, window).double(), paged.reference(layer, window), rtol=2e-5, atol=2e-5)


@interpreted
@pytest.mark.usefixtures("short_splits")
def test_a_request_has_the_same_bits_in_any_batch() -> None:
    paged = PagedCache(5, [50, 3, 199], heads=4, kv_heads=2, width=16)
    together = paged.run(KERNEL, 1, None)
    longer = paged.run(KERNEL, 1, None, max_context=1000)
    assert torch.equal(together, longer), "more splits, all of them empty"
    for request in range(3):
        alone = slice(request, request + 1)
        paged.contexts, paged.tables, paged.q, kept = (
            paged.contexts[alone], paged.tables[alone], paged.q[alone], (paged.contexts, paged.tables, paged.q)
        )
        assert torch.equal(paged.run(KERNEL, 1, None), together[alone])
        paged.contexts, paged.tables, paged.q = kept


@interpreted
@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [None, 20, 90])
def test_splits_that_do_not_exist_are_neither_written_nor_read(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partials begin as NaN; those beyond a request's own splits stay so."""
    partials: list[Tensor] = []

    def spoiled(*shape: int, **options: Any) -> Tensor:
        partials.append(torch.full(shape, math.nan, **options))
        return partials[-1]

    paged = PagedCache(7, [1, 33, 199, 64], heads=4, kv_heads=2, width=16)
    monkeypatch.setattr(torch, "empty", spoiled)
    found = paged.run(KERNEL, 1, window, max_context=250)
    monkeypatch.undo()
    torch.testing.assert_close(found.double(), paged.reference(1, window), rtol=2e-5, atol=2e-5)
    for context, partial, lse in zip(paged.contexts.tolist(), *partials, strict=True):
        used = -(-min(context, window or context) // 32)
        for part in (partial.isnan().all(-1), lse.isnan()):
            assert not part[:, :used].any() and part[:, used:].all(), context


@interpreted
@pytest.mark.usefixtures("short_splits")
def test_a_request_with_nan_spoils_no_other_and_an_empty_one_gives_zeros() -> None:
    paged = PagedCache(6, [50, 3, 99], heads=4, kv_heads=2, width=16)
    want = paged.run(KERNEL, 0, None).clone()
    paged.rows.view(-1, 3, 2, 2, 16, 16)[paged.tables[0, 1], 0, 1] = math.nan
    paged.contexts[1] = 0
    found = paged.run(KERNEL, 0, None)
    assert found[0].isnan().all() and (found[1] == 0).all() and torch.equal(found[2], want[2])


# --- segments -------------------------------------------------------------------------------------------------------------


def run_segments(
    lengths: list[int], tail: int, num_in: int, num_out: int, *, alpha: float, accumulate: bool, transposed: bool, seed: int,
    spoil: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """(found, expected) [T, N] of random segments; `tail` rows belong to none; weights and rows of `spoil` hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths) + tail
    wide_x, wide_out = torch.full((rows, num_in + 5), math.nan), torch.full((rows, num_out + 7), math.nan)
    x, out = wide_x[:, 2:-3], wide_out[:, 3:-4]
    x.copy_(torch.randn(rows, num_in, generator=generator))
    if accumulate or tail:
        out.copy_(torch.randn(rows, num_out, generator=generator))
    weight = torch.randn(len(lengths), num_in, num_out, generator=generator)
    offsets = torch.tensor(lengths).cumsum(0).to(torch.int32)
    expected, start = out.double(), 0
    for segment, length in enumerate(lengths):
        part = slice(start, start + length)
        if segment in spoil:
            weight[segment, 0] = math.nan
            x[part, -1] = math.nan
        product = alpha * (x[part].double() @ weight[segment].double())
        expected[part] = expected[part] + product if accumulate else product
        start += length
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    segments.segment_linear(out, x, weight, offsets, alpha=alpha, accumulate=accumulate)
    assert wide_out[:, :3].isnan().all() and wide_out[:, -4:].isnan().all(), "wrote outside its columns"
    return out, expected


@interpreted
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(40, 8), (16, 200), (100, 16), (64, 64), (8, 16)])
@pytest.mark.parametrize("lengths", [[5, 0, 1, 17, 0], [0, 0, 3], [16, 32], [100, 1], [0], [1] * 20])
def test_segments(lengths: list[int], num_in: int, num_out: int, accumulate: bool) -> None:
    tail = len(lengths) % 3
    found, expected = run_segments(
        lengths, tail, num_in, num_out, alpha=-0.5, accumulate=accumulate, transposed=num_in > num_out, seed=num_in,
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    if tail and not accumulate:
        assert torch.equal(found[-tail:].double(), expected[-tail:]), "rows of no segment changed"


@interpreted
@pytest.mark.parametrize("seed", range(10))
def test_random_segments(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 0, 1, 2, rng.randint(1, 90)]) for _ in range(rng.randint(1, 9))]
    found, expected = run_segments(
        lengths, rng.choice([0, 0, 4]), rng.randint(1, 150), rng.randint(1, 150), alpha=rng.choice([1, 2.0, 0.25]),
        accumulate=rng.random() < 0.5, transposed=rng.random() < 0.5, seed=seed,
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=5e-5)


@interpreted
def test_a_segment_with_nan_spoils_no_other() -> None:
    lengths = [3, 5, 0, 40, 2]
    found, expected = run_segments(
        lengths, 2, 24, 20, alpha=1.0, accumulate=True, transposed=False, seed=0, spoil=(1, 2, 4),
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    spoiled = torch.tensor([False] * 3 + [True] * 5 + [False] * 40 + [True] * 2 + [False] * 2)
    assert torch.equal(found.isnan().all(1), spoiled) and torch.equal(found.isnan().any(1), spoiled)
