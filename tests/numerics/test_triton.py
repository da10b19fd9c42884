"""The Triton kernels against plain PyTorch, on CPU tensors through Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, and would spoil a process that uses a device. So one test runs
this file again in a process of its own; the others skip anywhere else. float32 only: the interpreter's bfloat16 products are
wrong. Memory that a kernel may not read or write holds NaN.

B requests, N blocks, H query heads, G key-value heads, K head width (or input features), T rows, S segments.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.kernels.triton import paged_decode, segments
from tests.paged_cache import PagedCache
from tests.triton_interpreter import compiled, import_without_triton, interpreted, needs_triton, run_in_the_interpreter


@pytest.mark.full
@needs_triton
@compiled
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@compiled
def test_modules_import_without_triton() -> None:
    import_without_triton("paged_decode", "segments")


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


# --- products of many adapters --------------------------------------------------------------------------------------------


class Rows:
    """Rows of requests with slots, and of a training window behind them; factors of several sites. All else is NaN: slots that
    no row has, and memory beside inputs and outputs.

    slots: per row of a request, -1 for none. rank: of the stacks, 0 for none. trained: rank per site of the training adapter, 0
    for a site that it lacks. widths: output features per site.
    """

    def __init__(
        self, slots: list[int], num_slots: int, num_in: int, rank: int, widths: list[int], *, seed: int = 0,
        trained: list[int] | None = None, window: int = 0, dtype: torch.dtype = torch.float32,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.owners, self.widths = dtype, [*slots, *[segments.TRAINING] * window], widths
        self.slots = torch.tensor(self.owners, dtype=torch.int32)
        self.num_slots, self.trained = num_slots, trained or [0] * len(widths)
        self.rank, self.most = rank, max(rank, *self.trained)
        self.x = self.beside(self.noise(len(self.owners), num_in))
        self.scales = [0.5 + site for site in range(len(widths))]
        self.down = [self.stack(rank, num_in) for _ in widths]
        self.up = [self.stack(width, rank) for width in widths]
        self.train_down = [self.noise(own, num_in) for own in self.trained]
        self.train_up = [self.noise(width, own) for width, own in zip(widths, self.trained, strict=True)]

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def beside(self, rows: Tensor) -> Tensor:
        """The same rows as columns of wider ones."""
        wide = torch.full((rows.shape[0], rows.shape[1] + 12), math.nan, dtype=self.dtype)
        wide[:, 4:-8] = rows
        return wide[:, 4:-8]

    def stack(self, num_out: int, num_in: int) -> Tensor:
        stack = torch.full((self.num_slots, num_out, num_in), math.nan, dtype=self.dtype)
        for slot in {*self.owners} - {segments.NO_SLOT, segments.TRAINING}:
            stack[slot] = self.noise(num_out, num_in)
        return stack

    def factors(self, *, up: bool) -> segments.SlotFactors:
        stacks, trained = (self.up, self.train_up) if up else (self.down, self.train_down)
        none = [None] * len(stacks)
        own = [factor if rank else None for factor, rank in zip(trained, self.trained, strict=True)]
        scales = self.scales if up else [1.0] * len(stacks)
        return segments.SlotFactors(self.slots, stacks if self.rank else none, own, scales, none)

    def product(self, x: Tensor, row: int, site: int, *, up: bool) -> Tensor | None:
        """One row's product in float64, or None."""
        stacks, trained = (self.up, self.train_up) if up else (self.down, self.train_down)
        if (slot := self.owners[row]) == segments.TRAINING:
            scale = self.scales[site] if up else 1.0
            return (x.double() @ trained[site].double().T) * scale if self.trained[site] else None
        return x.double() @ stacks[site][slot].double().T if slot >= 0 and self.rank else None

    def expected(self, outs: list[Tensor], *, accumulate: bool) -> list[Tensor]:
        """What `segment_pairs` is to give."""
        wanted = [out.double() if accumulate else torch.zeros(out.shape, dtype=torch.float64) for out in outs]
        for site, want in enumerate(wanted):
            for row in range(len(self.owners)):
                inner = self.product(self.x[row], row, site, up=False)
                if inner is not None:
                    product = self.product(inner, row, site, up=True)
                    assert product is not None
                    want[row] += product
        return wanted


def check_pairs(rows: Rows, *, accumulate: bool = True, keep: bool = False) -> None:
    """`segment_pairs`, and one after the other what it joins."""
    num_rows = len(rows.owners)
    start = [rows.noise(num_rows, width) if accumulate else torch.full((num_rows, width), math.nan) for width in rows.widths]
    wanted = rows.expected(start, accumulate=accumulate)
    down, up = rows.factors(up=False), rows.factors(up=True)
    inners: list[list[Tensor]] = []
    for joined in (True, False):
        outs = [rows.beside(out) for out in start]
        inner = [rows.beside(torch.full((num_rows, rows.most + 8), math.nan)) for _ in rows.widths]
        if joined:
            segments.segment_pairs(outs, inner if keep else None, rows.x, down, up, accumulate=accumulate)
        else:
            segments.segment_linear(inner, rows.x, down, accumulate=False)
            for site, out in enumerate(outs):
                one = segments.SlotFactors(*(up[0], *([part[site]] for part in up[1:])))
                segments.segment_linear([out], inner[site], one, accumulate=accumulate)
        inners.append(inner)
        for site, (out, want, wide) in enumerate(zip(outs, wanted, (out._base for out in outs), strict=True)):
            assert wide is not None and wide[:, :4].isnan().all() and wide[:, -8:].isnan().all(), "wrote outside its columns"
            if not accumulate and not (rows.rank or rows.trained[site]):
                continue
            torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-4)
    if keep:
        for site, kept in enumerate(zip(*inners, strict=True)):
            if own := max(rows.rank, rows.trained[site]):
                torch.testing.assert_close(kept[0][:, :own], kept[1][:, :own], rtol=2e-5, atol=1e-4)
                assert kept[0][:, own:].isnan().all(), "wrote beyond the largest rank"


@interpreted
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("num_in", "rank", "widths"), [
    (48, 8, [32, 16, 16]), (300, 16, [200]), (40, 24, [130, 20]), (64, 40, [16, 16, 16, 16]), (257, 80, [33, 144]),
])
@pytest.mark.parametrize("slots", [[5, 0, 0, 3, -1, 3, 5], [-1] * 20 + [2], [-1], [1] * 40, [7, 6, 5, 4, 3, 2, 1, 0] * 3])
def test_pairs_of_factors(slots: list[int], num_in: int, rank: int, widths: list[int], accumulate: bool) -> None:
    check_pairs(Rows(slots, 8, num_in, rank, widths, seed=num_in), accumulate=accumulate, keep=rank == 16)


@interpreted
@pytest.mark.parametrize(
    ("rank", "trained"), [(16, [8, 8]), (8, [20, 20]), (8, [4, 12]), (0, [8, 8]), (8, [0, 8]), (0, [0, 8])]
)
@pytest.mark.parametrize("window", [0, 3, 40])
def test_a_training_windows_rows_are_among_them(rank: int, trained: list[int], window: int) -> None:
    check_pairs(Rows([2, -1, 0, 2], 3, 96, rank, [48, 32], trained=trained, window=window), keep=True)


@interpreted
@pytest.mark.parametrize("seed", range(10))
def test_random_adapters(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    num_slots = rng.randint(1, 12)
    owners = [rng.randint(-1, num_slots - 1) for _ in range(rng.randint(1, 60))]
    if rng.random() < 0.3:
        monkeypatch.setattr(segments, "_LARGE_BATCH", 8)
    rows = Rows(
        owners, num_slots, rng.randint(1, 200), 8 * rng.randint(1, 5), [rng.randint(1, 150) for _ in range(rng.randint(1, 4))],
        seed=seed, window=rng.choice([0, 0, 9]), trained=None,
    )
    check_pairs(rows, accumulate=rng.random() < 0.7, keep=rng.random() < 0.5)


@interpreted
def test_a_row_has_the_same_bits_wherever_it_stands_and_whoever_is_beside_it() -> None:
    """As far as its tile is cut alike: the number of rows decides that, not their slots."""
    rows = Rows([0, 1, 2, 3] * 5, 4, 128, 8, [64])
    down, up = rows.factors(up=False), rows.factors(up=True)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    found = []
    for index in (torch.arange(20), order, torch.where(torch.arange(20) % 3 == 0, order, order[0])):
        out = torch.zeros(20, 64)
        own = rows.slots[index].contiguous()
        x = rows.x[index].contiguous()
        segments.segment_pairs([out], None, x, down._replace(slots=own), up._replace(slots=own), accumulate=True)
        found.append(dict(zip(index.tolist(), out, strict=True)))
    for other in found[1:]:
        assert all(torch.equal(row, found[0][number]) for number, row in other.items())


@interpreted
def test_nan_in_an_adapter_or_a_row_spoils_no_other() -> None:
    rows = Rows([0, 1, 2, 1, -1, 2, 0], 3, 64, 8, [32, 16], trained=[8, 8], window=3)
    start = [torch.zeros(10, width) for width in rows.widths]
    clean = rows.expected(start, accumulate=True)
    rows.down[0][1, 3] = rows.up[1][1, 2] = math.nan
    rows.x[2, 5] = math.nan
    outs = [out.clone() for out in start]
    segments.segment_pairs(outs, None, rows.x, rows.factors(up=False), rows.factors(up=True), accumulate=True)
    for out, want in zip(outs, clean, strict=True):
        kept = [0, 4, 5, 6, 7, 8, 9]
        torch.testing.assert_close(out[kept].double(), want[kept], rtol=2e-5, atol=2e-4)
        assert out[[1, 2, 3]].isnan().any(1).all()


@interpreted
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("trained", "window", "centered"), [(None, 0, False), (40, 3, True), (32, 2, False)])
def test_scalings(trained: int | None, window: int, centered: bool, accumulate: bool) -> None:
    rows = Rows([1, -1, 0, 1, -1], 3, 40, 8, [40], window=window)
    stack, center = rows.stack(40, 1), rows.noise(40) if centered else None
    vector = None if trained is None else rows.noise(trained, 1)
    own = segments.SlotFactors(rows.slots, [stack], [vector], [1.0], [center])
    out = rows.x.clone() if accumulate else torch.full((len(rows.owners), 40), math.nan)
    want, x = out.double() if accumulate else torch.zeros(out.shape).double(), rows.x.double()
    for row, slot in enumerate(rows.owners):
        found = vector if slot == segments.TRAINING else stack[slot] if slot >= 0 else None
        if found is not None:
            width = found.shape[0]
            want[row, :width] += (x[row, :width] - (0 if center is None else center[:width].double())) * found[:, 0].double()
    segments.segment_scale(out, out if accumulate else rows.x, own, accumulate=accumulate)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
