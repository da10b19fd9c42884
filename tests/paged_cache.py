"""Random requests over a paged key-value cache, for the kernels of decode attention.

B requests, N blocks, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[..., None]
"""With the signature of `triton.paged_decode.paged_decode_attention`."""


class PagedCache:
    """kv: per layer and request, keys and values [2, context, G, K]."""

    def __init__(
        self, seed: int, contexts: list[int], *, heads: int, kv_heads: int, width: int, block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.width, self.block_tokens, self.layers = heads, kv_heads, width, block_tokens, 3
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        needed = [-(-context // block_tokens) for context in contexts]
        free = list(range(sum(needed) + 5))
        rng.shuffle(free)
        # Entries beyond a request's blocks name no block at all: a kernel that follows them leaves the cache.
        self.tables = torch.full((len(contexts), max(needed) + 2), 2**30, dtype=torch.int32)
        cache = torch.full((len(free), self.layers, 2, kv_heads, block_tokens, width), math.nan, dtype=dtype)
        self.rows = cache.view(-1, block_tokens * width)
        self.kv: list[list[Tensor]] = [[] for _ in range(self.layers)]
        for request, (context, blocks) in enumerate(zip(contexts, needed, strict=True)):
            mine = [free.pop() for _ in range(blocks)]
            self.tables[request, :blocks] = torch.tensor(mine, dtype=torch.int32)
            for layer in range(self.layers):
                kv = torch.randn(2, context, kv_heads, width, generator=generator).to(dtype)
                self.kv[layer].append(kv)
                for token in range(context):
                    cache[mine[token // block_tokens], layer, :, :, token % block_tokens] = kv[:, token]
        wide = torch.full((len(contexts), heads * width + 12), math.nan, dtype=dtype)
        self.q = wide[:, 4:-8]
        self.q.copy_(torch.randn(self.q.shape, generator=generator) * 3)

    def run(self, kernel: Kernel, layer: int, window: int | None, max_context: int | None = None) -> Tensor:
        """What a kernel finds. Memory that it may not read or write holds NaN."""
        wide = torch.full((len(self.contexts), self.heads * self.width + 8), math.nan, dtype=self.rows.dtype)
        out = wide[:, 4:-4]
        kernel(
            out, self.q, self.rows, layer=layer, num_layers=self.layers, kv_heads=self.kv_heads,
            block_tokens=self.block_tokens, tables_BN=self.tables, context_B=self.contexts,
            max_context=max_context or int(self.contexts.max()), window=window, scale=self.width**-0.5,
        )
        assert wide[:, :4].isnan().all() and wide[:, -4:].isnan().all(), "wrote outside its columns"
        return out

    def reference(self, layer: int, window: int | None) -> Tensor:
        """The same in float64."""
        rows = []
        for q, kv in zip(self.q, self.kv[layer], strict=True):
            keys, values = kv[:, -window:] if window is not None else kv
            keys, values = (t.repeat_interleave(self.heads // self.kv_heads, 1).double() for t in (keys, values))
            scores = torch.einsum("hk,shk->hs", q.view(self.heads, -1).double(), keys) * self.width**-0.5
            rows.append(torch.einsum("hs,shk->hk", scores.softmax(-1), values).flatten())
        return torch.stack(rows)
