"""Starts kernels before serving does, since the first start of a Triton kernel compiles it, which takes seconds.

Owns: which kernels those are, beside the ones that measuring and capturing passes start. Does not own: kernels of adapters,
which depend on the adapters' ranks and compile when the first of a kind runs.
"""

from __future__ import annotations

import torch

from coserve.config.settings import SamplingConfig
from coserve.kernels.choose import runs_triton
from coserve.kernels.triton.paged_decode import MAX_SPLITS, SPLIT_TOKENS
from coserve.runtime import sampler
from coserve.runtime.fused import PassExecutor
from coserve.runtime.sampler import SamplerRow
from coserve.runtime.spans import NO_ADAPTER, PagedDecode, RowSpan

_SAMPLINGS = (SamplingConfig(temperature=0), SamplingConfig(temperature=1), SamplingConfig(temperature=1, top_p=0.5))


@torch.no_grad()
def warm_up(passes: PassExecutor) -> None:
    """Runs, on a device with Triton's kernels, a prompt with context, decode attention of all numbers of splits, and every sort
    of sampling. What is written goes to the pool's scratch block."""
    pool, weights, arch = passes.pool, passes.weights, passes.arch
    if not runs_triton(weights.device) or pool.scratch is None:
        return
    size, scratch = pool.block_tokens, pool.scratch
    ids = torch.zeros(size, dtype=torch.int64, device=weights.device)
    hidden = passes.run(ids, [], [RowSpan(size, 2 * size, (scratch, scratch), NO_ADAPTER)], None)
    if weights.ranks.rank == 0:
        logits = passes.logits(hidden[:1])
        for sampling in _SAMPLINGS:
            sampler.sample_rows(logits, [SamplerRow(sampling, 0, 1, (0,), (), frozenset())])
    q = torch.zeros(1, arch.num_heads * arch.head_dim, dtype=weights.dtype, device=weights.device)
    contexts = torch.zeros(1, dtype=torch.int32, device=weights.device)
    splits = 1
    while splits <= MAX_SPLITS:
        tables = torch.full((1, -(-splits * SPLIT_TOKENS // size)), scratch, dtype=torch.int32, device=weights.device)
        PagedDecode(tables, contexts, splits * SPLIT_TOKENS).attention(torch.empty_like(q), q, pool, 0, arch.sliding_windows[0])
        splits *= 2
