"""The paged key-value cache's tensors, and request rows over it.

S context tokens, G key-value heads, K head width, L layers. A request's token t lies in block table[t // B] at offset t % B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coserve.kernels.attention import gathered_attention
from coserve.model.architecture import Architecture
from coserve.ops.run import Factor
from coserve.peft.lora import LoraAdapter


class PagedCache:
    """keys, values: [L, blocks * block_tokens, G, K]."""

    def __init__(
        self, arch: Architecture, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_tokens = block_tokens
        shape = (arch.num_layers, num_blocks * block_tokens, arch.num_kv_heads, arch.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def slots(self, table: Sequence[int], start: int, end: int) -> Tensor:
        """int64 rows of the cache of a request's tokens [start, end)."""
        positions = torch.arange(start, end)
        blocks = torch.tensor(table, dtype=torch.int64)
        return (blocks[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens).to(self.keys.device)

    def gather(self, layer: int, table: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """K and V [S, G, K] of a request's first `num_tokens` tokens; a view when its blocks lie in a row."""
        used = table[: -(-num_tokens // self.block_tokens)]
        if used == list(range(used[0], used[0] + len(used))):
            first = used[0] * self.block_tokens
            return self.keys[layer, first : first + num_tokens], self.values[layer, first : first + num_tokens]
        rows = self.slots(table, 0, num_tokens)
        return self.keys[layer].index_select(0, rows), self.values[layer].index_select(0, rows)


class RequestRows(NamedTuple):
    """One request's rows in a batch: rows [start, end) hold its tokens [context - (end - start), context)."""

    start: int
    end: int
    context: int
    table: Sequence[int]
    adapter: LoraAdapter | None


class PagedRows:
    """Rows of several requests. cos, sin: [T, K]; `layer` is set before each program."""

    dropout_keys: Tensor | None = None

    def __init__(
        self, requests: Sequence[RequestRows], cache: PagedCache, cos: Tensor, sin: Tensor, windows: Sequence[int | None]
    ) -> None:
        self.requests, self.cache, self.cos, self.sin, self.windows = requests, cache, cos, sin, windows
        self.layer = 0
        self._slots = torch.cat(
            [cache.slots(r.table, r.context - (r.end - r.start), r.context) for r in requests]
        )
        self._runs = _adapter_runs(requests)

    def segments(self, name: str) -> Iterable[tuple[slice, Factor]]:
        for part, adapter in self._runs:
            factor = adapter.factor(self.layer, name)
            if factor is not None:
                yield part, factor

    def dropout_site(self, name: str) -> int:
        raise AssertionError("requests have no dropout")

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        width = self.cos.shape[-1]
        self.cache.keys[self.layer][self._slots] = k.unflatten(-1, (-1, width))
        self.cache.values[self.layer][self._slots] = v.unflatten(-1, (-1, width))
        for request in self.requests:
            rows = slice(request.start, request.end)
            keys, values = self.cache.gather(self.layer, request.table, request.context)
            gathered_attention(out[rows], q[rows], keys, values, window=self.windows[self.layer])

    def attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        raise AssertionError("requests have no backward pass")


def _adapter_runs(requests: Sequence[RequestRows]) -> list[tuple[slice, LoraAdapter]]:
    """Neighbouring rows of one adapter as one slice."""
    runs: list[tuple[slice, LoraAdapter]] = []
    for request in requests:
        if request.adapter is None:
            continue
        if runs and runs[-1][1] is request.adapter and runs[-1][0].stop == request.start:
            runs[-1] = (slice(runs[-1][0].start, request.end), request.adapter)
        else:
            runs.append((slice(request.start, request.end), request.adapter))
    return runs
