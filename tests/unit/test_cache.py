"""The paged cache: where tokens lie, and attention through any table equals attention over the tokens in a row.

T rows, S context tokens, G key-value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.kernels import reference
from coserve.model.architecture import Architecture
from coserve.ops.run import Factor
from coserve.runtime.cache import PagedCache, PagedRows, RequestRows

CPU, F64 = torch.device("cpu"), torch.float64
KV_HEADS, SHARE, WIDTH, LAYERS = 2, 2, 4, 2


def make_arch() -> Architecture:
    return Architecture(
        model_type="llama", vocab_size=11, hidden_size=12, intermediate_size=20, num_layers=LAYERS,
        num_heads=KV_HEADS * SHARE, num_kv_heads=KV_HEADS, head_dim=WIDTH, rms_norm_eps=1e-5, max_position_embeddings=64,
        tie_word_embeddings=True, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
        sliding_windows=(None,) * LAYERS, rope_inv_freq=(1.0, 0.1), rope_scaling=1.0, eos_token_ids=(),
    )


def make_cache(num_blocks: int, block_tokens: int) -> PagedCache:
    """Unwritten memory is NaN: nothing may read it."""
    cache = PagedCache(make_arch(), num_blocks, block_tokens, F64, CPU)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def expected(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last rows of one request over all its tokens."""
    heads = [t.unflatten(-1, (-1, WIDTH)) for t in (q, k, v)]
    return reference.attention(*heads, window=window)[0].flatten(1)


def test_slots_follow_the_table() -> None:
    cache = make_cache(8, 4)
    assert cache.slots([5, 0, 7], 0, 10).tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 28, 29]
    assert cache.slots([5, 0, 7], 3, 5).tolist() == [23, 0]
    assert cache.keys.shape == cache.values.shape == (LAYERS, 32, KV_HEADS, WIDTH)


def test_gather_is_a_view_only_where_blocks_lie_in_a_row() -> None:
    cache = make_cache(8, 4)
    cache.keys.copy_(noise(*cache.keys.shape, seed=0))
    cache.values.copy_(noise(*cache.values.shape, seed=1))
    for table, num_tokens, view in (([2, 3, 4], 11, True), ([2, 3, 7], 8, True), ([2, 3, 7], 9, False), ([3, 2], 6, False)):
        keys, values = cache.gather(1, table, num_tokens)
        rows = cache.slots(table, 0, num_tokens)
        assert torch.equal(keys, cache.keys[1][rows])
        assert torch.equal(values, cache.values[1][rows])
        assert (keys.data_ptr() == cache.keys[1][rows[0]].data_ptr()) == view, table


@settings(max_examples=50, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 13), min_size=1, max_size=3), block_tokens=st.integers(1, 5), order=st.randoms(),
    chunk=st.integers(1, 13), windows=st.tuples(*[st.sampled_from([None, 1, 4])] * LAYERS), seed=st.integers(0, 10**6),
)
def test_scattered_and_contiguous_tables_give_the_same_attention(
    contexts: list[int], block_tokens: int, order: Any, chunk: int, windows: tuple[int | None, ...], seed: int
) -> None:
    """Requests fed in chunks, side by side, into scattered blocks and into blocks in a row."""
    counts = [-(-context // block_tokens) for context in contexts]
    total = sum(counts)
    in_a_row = [list(range(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(len(counts))]
    shuffled = list(range(total + 2))
    order.shuffle(shuffled)
    scattered = [[shuffled[block] for block in table] for table in in_a_row]
    width = KV_HEADS * WIDTH
    q = [noise(context, SHARE * width, seed=seed + i) for i, context in enumerate(contexts)]
    k = [noise(context, width, seed=seed + 10 + i) for i, context in enumerate(contexts)]
    v = [noise(context, width, seed=seed + 20 + i) for i, context in enumerate(contexts)]
    results: list[list[Tensor]] = []
    for tables in (in_a_row, scattered):
        cache = make_cache(total + 2, block_tokens)
        outputs: list[list[Tensor]] = [[] for _ in contexts]
        for start in range(0, max(contexts), chunk):
            running = [(i, start, min(start + chunk, context)) for i, context in enumerate(contexts) if start < context]
            requests, first = [], 0
            for i, begin, end in running:
                requests.append(RequestRows(first, first + end - begin, end, tables[i], None))
                first += end - begin
            rows = PagedRows(requests, cache, torch.zeros(first, WIDTH), torch.zeros(first, WIDTH), windows)
            rows.layer = 1
            packed = [torch.cat([t[i][begin:end] for i, begin, end in running]) for t in (q, k, v)]
            out = torch.full_like(packed[0], math.nan)
            rows.attention(out, None, *packed)
            for request, (i, _, _) in zip(requests, running, strict=True):
                outputs[i].append(out[request.start : request.end])
        assert cache.keys[0].isnan().all(), "another layer's cache was written"
        used = torch.cat([cache.slots(table, 0, context) for table, context in zip(tables, contexts, strict=True)])
        untouched = torch.ones(cache.keys.shape[1], dtype=torch.bool)
        untouched[used] = False
        assert cache.keys[1][untouched].isnan().all()
        results.append([torch.cat(parts) for parts in outputs])
    for i in range(len(contexts)):
        assert torch.allclose(results[0][i], results[1][i], rtol=0, atol=1e-13)
        assert torch.allclose(results[0][i], expected(q[i], k[i], v[i], windows[1]), rtol=0, atol=1e-12)


class OneFactor:
    """An adapter with one factor, in layer 1."""

    def __init__(self) -> None:
        self.own = Factor(torch.ones(1, 1), 1.0, None)

    def factor(self, layer: int, name: str) -> Factor | None:
        return self.own if (layer, name) == (1, "q_proj.lora_A") else None


def test_segments_join_neighbours_of_one_adapter_only() -> None:
    """Four requests: adapter a twice in a row, none, then b, then a again."""
    a, b = OneFactor(), OneFactor()
    owners: list[Any] = [a, a, None, b, a]
    edges = [0, 2, 3, 5, 6, 9]
    requests = [RequestRows(edges[i], edges[i + 1], edges[i + 1] - edges[i], [i], owner) for i, owner in enumerate(owners)]
    rows = PagedRows(requests, make_cache(5, 4), torch.zeros(9, WIDTH), torch.zeros(9, WIDTH), (None, None))
    assert list(rows.segments("q_proj.lora_A")) == []
    rows.layer = 1
    found = [(part.start, part.stop, factor) for part, factor in rows.segments("q_proj.lora_A")]
    assert [(start, stop) for start, stop, _ in found] == [(0, 3), (5, 6), (6, 9)]
    assert [factor is owner.own for (_, _, factor), owner in zip(found, (a, b, a), strict=True)] == [True] * 3
    assert list(rows.segments("o_proj.lora_A")) == []
