"""Requests' rows: where tokens lie in the pool, attention through any table, and which rows have which adapter.

T rows, S context tokens, G key-value heads, K head width, L layers, R rank. All memory is NaN before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.config.settings import LINEAR_SITES, AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.core import BlockMove, CapacityError
from coserve.kernels import reference
from coserve.model.architecture import Architecture
from coserve.ops.run import RUNNERS, Factor, FactorStack
from coserve.peft.adapter import Kind
from coserve.peft.kinds import empty_adapter
from coserve.peft.lora import LoraAdapter
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool, block_bytes
from coserve.runtime.spans import NO_ADAPTER, RowSpan, SpanRows

CPU, F64 = torch.device("cpu"), torch.float64
KV_HEADS, SHARE, WIDTH, LAYERS = 2, 2, 4, 2


def make_arch(windows: tuple[int | None, ...] = (None,) * LAYERS) -> Architecture:
    return Architecture(
        model_type="llama", vocab_size=11, hidden_size=12, intermediate_size=20, num_layers=LAYERS,
        num_heads=KV_HEADS * SHARE, num_kv_heads=KV_HEADS, head_dim=WIDTH, rms_norm_eps=1e-5, max_position_embeddings=64,
        tie_word_embeddings=True, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
        sliding_windows=windows, rope_inv_freq=(1.0, 0.1), rope_scaling=1.0, eos_token_ids=(),
    )


def make_pool(num_blocks: int, block_tokens: int, dtype: torch.dtype = F64) -> KeyValuePool:
    pool = KeyValuePool(make_arch(), num_blocks, block_tokens, dtype, CPU)
    pool.buffer.fill_(255)
    assert pool.rows.isnan().all()
    return pool


def make_slots(max_slots: int = 4, max_rank: int = 16, dtype: torch.dtype = F64) -> AdapterSlots:
    return AdapterSlots(make_arch(), dtype, CPU, max_slots=max_slots, max_rank=max_rank)


def make_adapter(seed: int, dtype: torch.dtype = F64, **settings: Any) -> LoraAdapter:
    adapter = LoraAdapter.create(make_arch(), LoraConfig(**settings), dtype=dtype, device=CPU, seed=seed)
    adapter.flat.copy_(noise(adapter.flat.numel(), seed=seed))
    return adapter


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- the pool ---


@settings(max_examples=50, deadline=None)
@given(block_tokens=st.integers(1, 5), num_blocks=st.integers(1, 6), data=st.data())
def test_tokens_lie_where_the_layout_says(block_tokens: int, num_blocks: int, data: st.DataObject) -> None:
    """Writes at random places against a plain model: [block, layer, K or V, head, offset, width]."""
    pool = make_pool(num_blocks, block_tokens)
    plain = torch.full((num_blocks, LAYERS, 2, KV_HEADS, block_tokens, WIDTH), math.nan, dtype=F64)
    places = st.tuples(st.integers(0, num_blocks - 1), st.integers(0, block_tokens - 1))
    for round_number in range(data.draw(st.integers(1, 3))):
        layer = data.draw(st.integers(0, LAYERS - 1))
        chosen = data.draw(st.lists(places, min_size=1, max_size=6, unique=True))
        blocks, offsets = (torch.tensor(column) for column in zip(*chosen, strict=True))
        k, v = (noise(len(chosen), KV_HEADS * WIDTH, seed=2 * round_number + i) for i in range(2))
        pool.write(layer, pool.token_rows(blocks, offsets), k, v)
        for row, (block, offset) in enumerate(chosen):
            plain[block, layer, 0, :, offset] = k[row].view(KV_HEADS, WIDTH)
            plain[block, layer, 1, :, offset] = v[row].view(KV_HEADS, WIDTH)
    assert torch.equal(pool.rows.view(plain.shape).nan_to_num(7), plain.nan_to_num(7))
    tables = torch.tensor(data.draw(st.lists(
        st.lists(st.integers(0, num_blocks - 1), min_size=3, max_size=3), min_size=1, max_size=3
    )))
    for layer in range(LAYERS):
        for kv, found in enumerate(pool.gather(layer, pool.block_rows(tables))):
            for row, table in enumerate(tables.tolist()):
                want = torch.cat([plain[block, layer, kv] for block in table], dim=1)
                assert torch.equal(found[row].nan_to_num(7), want.nan_to_num(7))


def test_blocks_are_runs_of_bytes() -> None:
    pool = make_pool(5, 3)
    assert pool.block_bytes == block_bytes(make_arch(), 3, 8) == LAYERS * 2 * KV_HEADS * 3 * WIDTH * 8
    pool.arena(1, 3).fill_(1)
    size = pool.block_bytes
    assert (pool.buffer[size : 3 * size] == 1).all()
    assert (pool.buffer[:size] == 255).all()
    assert (pool.buffer[3 * size : 5 * size] == 255).all()
    pool.clear([])
    pool.clear([2, 4])
    assert [int(pool.arena(b, b + 1).max()) for b in range(5)] == [255, 1, 0, 255, 0]
    pool.move([BlockMove(1, 0), BlockMove(0, 4)])
    assert [int(pool.arena(b, b + 1).max()) for b in range(5)] == [1, 1, 0, 255, 1], "moves follow each other"


# --- attention ---


def expected(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last rows of one request over all its tokens."""
    heads = [t.unflatten(-1, (-1, WIDTH)) for t in (q, k, v)]
    return reference.attention(*heads, window=window)[0].flatten(1)


class Texts:
    """Queries, keys and values of whole requests, and each one's table and rows so far."""

    def __init__(self, contexts: Sequence[int], tables: Sequence[Sequence[int]], seed: int) -> None:
        self.contexts, self.tables, self.done = contexts, tables, [0] * len(contexts)
        width = KV_HEADS * WIDTH
        self.q = [noise(n, SHARE * width, seed=seed + i) for i, n in enumerate(contexts)]
        self.k, self.v = ([noise(n, width, seed=seed + s + i) for i, n in enumerate(contexts)] for s in (100, 200))
        self.out: list[list[Tensor]] = [[] for _ in contexts]

    def run(self, pool: KeyValuePool, arch: Architecture, decode: Sequence[int], prefill: dict[int, int]) -> None:
        """One batch over layer 1: one token of each request in `decode`, some of those in `prefill`."""
        parts = [(i, self.done[i], self.done[i] + 1) for i in decode]
        parts += [(i, self.done[i], self.done[i] + count) for i, count in prefill.items()]
        spans = [RowSpan(start, end, self.tables[i], NO_ADAPTER) for i, start, end in parts]
        rows = SpanRows(spans[: len(decode)], spans[len(decode) :], pool, arch, make_slots())
        rows.clear_fresh()
        rows.layer = 1
        assert rows.num_rows == sum(end - start for _, start, end in parts)
        assert rows.positions.tolist() == [p for _, start, end in parts for p in range(start, end)]
        q, k, v = (torch.cat([t[i][start:end] for i, start, end in parts]) for t in (self.q, self.k, self.v))
        out = torch.full_like(q, math.nan)
        rows.attention(out, q, k, v)
        for (i, _, end), part in zip(parts, out.split([end - start for _, start, end in parts]), strict=True):
            self.out[i].append(part)
            self.done[i] = end

    def compare(self, window: int | None) -> None:
        for q, k, v, done, out in zip(self.q, self.k, self.v, self.done, self.out, strict=True):
            if done:
                assert torch.allclose(torch.cat(out), expected(q[:done], k[:done], v[:done], window), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    contexts=st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 40]), min_size=1, max_size=4), block_tokens=st.integers(1, 5),
    order=st.randoms(use_true_random=False), window=st.sampled_from([None, 1, 4, 9]), other=st.sampled_from([None, 3]),
    seed=st.integers(0, 10**6),
)
def test_attention_through_any_table_is_attention_over_the_text(
    contexts: list[int], block_tokens: int, order: Any, window: int | None, other: int | None, seed: int
) -> None:
    """Requests fed in random chunks side by side into scattered blocks, decode and prefill in one batch, contexts far apart."""
    counts = [-(-context // block_tokens) for context in contexts]
    shuffled = list(range(sum(counts) + 2))
    order.shuffle(shuffled)
    tables = [[shuffled.pop() for _ in range(count)] for count in counts]
    pool, arch = make_pool(sum(counts) + 2, block_tokens), make_arch((other, window))
    texts = Texts(contexts, tables, seed)
    while any(done < context for done, context in zip(texts.done, contexts, strict=True)):
        open_ = [i for i, context in enumerate(contexts) if texts.done[i] < context]
        chosen = order.sample(open_, order.randint(1, len(open_)))
        decode = [i for i in chosen if texts.done[i] and order.random() < 0.5]
        prefill = {i: order.randint(1, contexts[i] - texts.done[i]) for i in chosen if i not in decode}
        texts.run(pool, arch, decode, prefill)
    texts.compare(window)
    memory = pool.rows.view(-1, LAYERS, 2, KV_HEADS, block_tokens, WIDTH)
    assert memory[shuffled].isnan().all(), "another's block was written"
    used = memory[[block for table in tables for block in table]]
    assert (used[:, 0] == 0).all(), "another layer was written"


@pytest.mark.parametrize("window", [None, 4])
def test_decode_rows_of_very_different_contexts(window: int | None) -> None:
    """They are cut into groups: one text of 150 tokens does not make 1-token texts read 150; results don't depend on it."""
    contexts = [2, 150, 3, 40, 2, 151]
    starts = [sum(contexts[:i]) for i in range(len(contexts))]
    tables = [list(range(start, start + context)) for start, context in zip(starts, contexts, strict=True)]
    pool, arch = make_pool(sum(contexts), 1), make_arch((None, window))
    texts = Texts(contexts, tables, 3)
    texts.run(pool, arch, [], {i: context - 1 for i, context in enumerate(contexts)})
    texts.run(pool, arch, range(len(contexts)), {})
    texts.compare(window)
    spans = [RowSpan(c - 1, c, table, NO_ADAPTER) for c, table in zip(contexts, tables, strict=True)]
    groups = SpanRows(spans, [], pool, arch, make_slots())._reader.groups[window]
    read = sum(group.bias.shape[0] * group.bias.shape[2] for group in groups)
    assert len(groups) > 1
    assert sum(group.bias.shape[0] for group in groups) == len(contexts)
    assert read <= sum(2 * context + 4 for context in contexts)


def test_nan_of_a_former_owner_reaches_nobody() -> None:
    """A half-filled block holds what its former owner left behind the last token; 0 times NaN is NaN."""
    arch, table = make_arch(), [2, 0]
    for cleared in (True, False):
        pool = make_pool(3, 4)
        texts = Texts([6], [table], 1)
        if not cleared:  # the fault that clearing prevents
            pool.clear = lambda blocks: None  # type: ignore[method-assign]
        for prefill, decode in (({0: 3}, []), ({0: 1}, []), ({}, [0]), ({}, [0])):
            texts.run(pool, arch, decode, prefill)
        assert bool(torch.cat(texts.out[0]).isfinite().all()) is cleared


def test_only_blocks_that_get_their_first_token_are_cleared() -> None:
    pool, spans = make_pool(8, 4), [RowSpan(7, 8, [0, 1], NO_ADAPTER), RowSpan(8, 9, [2, 3, 4], NO_ADAPTER)]
    prefill = [RowSpan(3, 9, [5, 6, 7], NO_ADAPTER)]
    pool.buffer.fill_(1)
    SpanRows(spans, prefill, pool, make_arch(), make_slots()).clear_fresh()
    assert [block for block in range(8) if not pool.arena(block, block + 1).any()] == [4, 6, 7]


# --- adapters ---


CONFIGS = st.builds(
    lambda r, alpha, names, layer: LoraConfig(
        r=r, alpha=alpha, target_modules=tuple(f"layers.{layer}.{name}" if layer is not None else name for name in names)
    ),
    st.integers(1, 12), st.sampled_from([1.0, 4.0, 7.0]),
    st.lists(st.sampled_from(["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]), min_size=1, unique=True),
    st.sampled_from([None, 0, 1]),
)


@settings(max_examples=80, deadline=None)
@given(
    configs=st.lists(CONFIGS, min_size=1, max_size=3), parts=st.tuples(*[st.lists(st.integers(0, 3), max_size=5)] * 2),
    lengths=st.lists(st.integers(1, 4), min_size=5, max_size=5), extra=st.sampled_from([0, 8]), layer=st.integers(0, 1),
    dtype=st.sampled_from([F64, torch.float32]),
)
def test_every_row_gets_its_own_adapter(
    configs: list[LoraConfig], parts: tuple[list[int], list[int]], lengths: list[int], extra: int, layer: int,
    dtype: torch.dtype,
) -> None:
    """Adapters of several ranks, scales and sites; `extra`: a training adapter beside them makes the rank-sized value wider.
    Rows without an adapter are left alone."""
    slots = make_slots(dtype=dtype)
    adapters = [make_adapter(i, dtype, **_fields(config)) for i, config in enumerate(configs)]
    owners = {slots.place(i, adapter): adapter for i, adapter in enumerate(adapters)}
    order = [sorted(number - 1 if number <= len(adapters) else NO_ADAPTER for number in part) for part in parts]
    decode = [RowSpan(0, 1, [0], slot) for slot in order[0]]
    prefill = [RowSpan(0, n, [0], slot) for slot, n in zip(order[1], lengths, strict=False)]
    spans = [*decode, *prefill]
    rows = SpanRows(decode, prefill, make_pool(1, 4, dtype), make_arch(), slots)
    rows.layer = layer
    for site in LINEAR_SITES:
        a, b = (slots.factor(layer, f"{site}.lora_{part}") for part in "AB")
        if a is None or b is None:
            continue
        x = noise(rows.num_rows, a.shape[1], seed=5).to(dtype)
        inner = torch.full((rows.num_rows, a.shape[2] + extra), math.nan, dtype=dtype)
        out = noise(rows.num_rows, b.shape[2], seed=6).to(dtype)
        want = out.double()
        run = RUNNERS["segment_linear"]
        run(rows, f"{site}.lora_A", {}, False, [inner], [x])  # type: ignore[arg-type]  # a batch has more
        run(rows, f"{site}.lora_B", {}, True, [out], [inner])  # type: ignore[arg-type]
        first = 0
        for span in spans:
            part = slice(first, first := first + span.end - span.start)
            down, up = (owners[span.slot].factor(layer, f"{site}.lora_{p}") if span.slot != NO_ADAPTER else None for p in "AB")
            if down is not None and up is not None:
                want[part] += (x[part].double() @ down.matrix.T.double()) @ up.matrix.T.double() * up.scale
        assert torch.allclose(out.double(), want, rtol=0, atol=1e-11 if dtype == F64 else 1e-3)


def _fields(config: LoraConfig) -> dict[str, Any]:
    return {"r": config.r, "alpha": config.alpha, "target_modules": config.target_modules}


def test_one_adapter_is_a_plain_product_and_several_are_grouped() -> None:
    slots = make_slots()
    first, second = (slots.place(i, make_adapter(i, r=4, alpha=alpha)) for i, alpha in enumerate((4.0, 8.0)))
    decode = [RowSpan(0, 1, [0], slot) for slot in (NO_ADAPTER, first, first)]
    prefill = [RowSpan(0, 3, [0], first), RowSpan(0, 2, [0], second)]
    rows = SpanRows(decode, prefill, make_pool(1, 4), make_arch(), slots)
    (plain_rows, plain), (grouped_rows, grouped) = rows.segments("q_proj.lora_B")
    assert (plain_rows, grouped_rows) == (slice(1, 3), slice(3, 8))
    assert isinstance(plain, Factor)
    assert plain.scale == 1.0
    assert isinstance(grouped, FactorStack)
    assert grouped.ends.tolist()[:2] == [3, 5]
    base = SpanRows(decode[:1], [], make_pool(1, 4), make_arch(), slots)
    assert list(base.segments("q_proj.lora_B")) == []


def test_a_slot_is_zeroed_before_another_adapter_has_it() -> None:
    """Sites and columns that the next one lacks must not be the former's."""
    slots = make_slots(max_slots=2)
    slots.place("other", make_adapter(3, r=12))
    wide, narrow = make_adapter(1, r=12), make_adapter(2, r=2, target_modules=("q_proj",))
    wide.flat.fill_(math.nan)
    slot = slots.place("wide", wide)
    slots.remove("wide")
    assert slots.place("narrow", narrow) == slots.place("narrow", narrow) == slot
    assert slots.keys == ("other", "narrow")
    for layer in range(LAYERS):
        for name in slots.widths(layer):
            stack, own = slots.factor(layer, name), narrow.factor(layer, name)
            assert stack is not None
            assert not stack.isnan().any()
            if own is None:
                assert not stack[slot].any()
            else:
                rank_part = stack[slot][:, :2] if name.endswith("A") else stack[slot][:2]
                assert torch.equal(rank_part, own.matrix.T * own.scale)
                assert stack[slot].count_nonzero() == own.matrix.count_nonzero()


def test_passes_run_the_operators_of_the_adapters_that_are_present() -> None:
    """In whatever order adapters come and go, those present are all that counts: a plan that was made once is found again."""
    slots, arch = make_slots(), make_arch()
    configs: dict[str, AdapterConfig] = {
        "lora": LoraConfig(r=4, target_modules=("q_proj",)), "ia3": IA3Config(),
        "relu": BottleneckConfig(size=8, placement="houlsby"), "gelu": BottleneckConfig(size=8, activation="gelu"),
    }
    adapters = {name: empty_adapter(arch, config, dtype=F64, device=CPU).start(0) for name, config in configs.items()}

    def seen() -> tuple[tuple[Kind, ...], list[dict[str, int]]]:
        widths = [slots.widths(layer) for layer in range(LAYERS)]
        assert slots.layout == (slots.kinds, tuple(tuple(sorted(layer.items())) for layer in widths))
        return slots.kinds, widths

    for name in ("lora", "ia3", "relu"):
        slots.place(name, adapters[name])
    together = seen()
    assert slots.kinds == tuple(adapters[name].kind for name in ("lora", "ia3", "relu"))
    for name in ("ia3", "relu"):
        slots.remove(name)
    assert seen() == ((adapters["lora"].kind,), [{"q_proj.lora_A": 8, "q_proj.lora_B": 16}] * LAYERS)
    assert slots.factor(0, "v_proj.ia3_out") is None
    slots.place("gelu", adapters["gelu"])
    assert [name for name in slots.widths(0) if "relu" in name] == []
    slots.remove("gelu")
    slots.remove("lora")
    assert seen() == ((), [{}] * LAYERS)
    for name in ("relu", "lora", "ia3"):
        slots.place(name, adapters[name])
    assert seen() == together
    slots.place("second", adapters["ia3"])
    slots.remove("ia3")
    assert seen() == together, "one of two has gone"
    stack, factor = slots.factor(1, "v_proj.ia3_out"), adapters["ia3"].factor(1, "v_proj.ia3_out")
    assert stack is not None and factor is not None
    assert torch.equal(stack[slots.place("second", adapters["ia3"])], factor.matrix.T)


def test_adapters_that_do_not_fit_are_refused() -> None:
    slots = make_slots(max_slots=2, max_rank=8)
    with pytest.raises(CapacityError, match="rank 9 is over max_lora_rank=8") as caught:
        slots.place("big", make_adapter(0, r=9))
    assert caught.value.param == "max_lora_rank"
    placed = {slots.place(i, make_adapter(i, r=4)) for i in range(2)}
    assert placed == {0, 1}
    with pytest.raises(CapacityError, match="all 2 places are in use") as caught:
        slots.place(2, make_adapter(2, r=4))
    assert caught.value.param == "max_adapters"
    slots.remove(0)
    assert slots.place(2, make_adapter(2, r=4)) == 0
