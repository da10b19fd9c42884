"""Triton's kernel that gathers contexts from the paged cache, in Triton's interpreter and for devices that are not here.

The interpreter has to be chosen before Triton is first imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from coserve.kernels.triton.gather import gather_context
from tests.paged_cache import PagedCache
from tests.triton_interpreter import compiled, interpreted, needs_triton, run_in_the_interpreter


@pytest.mark.full
@needs_triton
@compiled
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


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
