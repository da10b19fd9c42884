r"""Products of many adapters at once: every row with its own adapter's factors, for up to three sites in one launch.

T rows, S slots, K input features, R rank, N output features, P parts of the sum over K, W columns of a partial sum.

      slots [T]:   3  3  7  -1 | 0  0  ...        a program takes a tile of consecutive rows and goes through the slots that
                  \_________/                     occur there, each with one product; other slots' rows keep what they have
      down:  x [T, K] -> partials [sites, P, T, W]       per tile of rows, part of K and site
      up:    the partials' sum, in order -> out [T, N]   per tile of rows, columns and site

Rows need no order. Rows of one adapter that lie together read its factors once. Nothing about the slots is known to the host:
grids follow from T and the factors' shapes alone, so that a captured launch serves any batch of T rows. Nothing is summed in an
order that depends on timing. The slots' own address is one that no kernel is compiled for: it is somewhere in what was sent to
the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coserve.kernels.triton import jit, next_power, require_aligned

try:
    import triton.language as tl
except ImportError:
    tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_SLOT = -1
TRAINING = 1 << 30
"""The slot of a training window's rows, whose factors lie outside the stacks."""

_NONE = tl.constexpr(2**31 - 1) if tl is not None else None
_TRAINING = tl.constexpr(TRAINING) if tl is not None else None
_SITES = 3
_PROGRAMS = 512
"""A sum over K is cut until there are so many programs: enough to fill a device."""
_MOST_UP = 256
"""The longest sum that one program computes."""
_MOST_INNER = 1024
"""Input features of a part at most: programs that wait for memory must be many."""
_LARGE_BATCH = 512
"""Rows from which on tiles are larger."""


class SlotFactors(NamedTuple):
    """Factors of one kind for several sites, of all adapters in slots and of a training window's adapter.

    slots: int32 [T], each row's slot, NO_SLOT or TRAINING. stacks: per site [S, out, in], contiguous; None where no slot's
    adapter has the factor. training: per site [out, in], contiguous, or None. scales: per site, of products with `training`.
    centers: of scalings, per site [out] or None. Rows without a factor count as rows without a slot.
    """

    slots: Tensor
    stacks: Sequence[Tensor | None]
    training: Sequence[Tensor | None]
    scales: Sequence[float]
    centers: Sequence[Tensor | None]


class _Ranks(NamedTuple):
    """What the sites of a launch have in common: their factors' rank, in the stacks and for training, 0 where there are none;
    and what products with those for training are multiplied by."""

    stack: int
    train: int
    scale: float

    @property
    def most(self) -> int:
        return max(self.stack, self.train)


@jit()
def _own_slots(
    slots: tl.tensor, rows: tl.tensor, num_rows: tl.tensor, stacked: tl.constexpr, training: tl.constexpr
) -> tl.tensor:
    """The slots of a tile's rows; those whose adapters have no such factor have none."""
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1)
    if not training:
        slot = tl.where(slot == _TRAINING, -1, slot)
    if not stacked:
        slot = tl.where(slot == _TRAINING, slot, -1)
    return slot


@jit()
def _next_slot(slot: tl.tensor, after: tl.tensor) -> tl.tensor:
    """The least slot above `after` in a tile."""
    return tl.min(tl.where(slot > after, slot, _NONE), 0)


@jit(unspecialized=("slots", "num_rows", "parts"))
def _down_kernel(
    partial: tl.tensor, x: tl.tensor, slots: tl.tensor,
    w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, t0: tl.tensor, t1: tl.tensor, t2: tl.tensor,
    num_rows: tl.tensor, num_in: tl.tensor, part_in: tl.tensor, parts: tl.tensor, x_stride: tl.tensor,
    stack_out: tl.constexpr, train_out: tl.constexpr, width: tl.constexpr,
    t_tile: tl.constexpr, k_tile: tl.constexpr, n_tile: tl.constexpr,
) -> None:
    """A part of the sum over K for a tile of rows: partial[site, part, rows, columns] = x[rows, part] @ factor.T. A tile whose
    rows have no slots writes nothing."""
    tile, site = tl.program_id(0), tl.program_id(2)
    part, column = tl.program_id(1) // (width // n_tile), tl.program_id(1) % (width // n_tile)
    rows = tile * t_tile + tl.arange(0, t_tile)
    slot = _own_slots(slots, rows, num_rows, stack_out > 0, train_out > 0)
    if tl.max(slot, 0) < 0:
        return
    stack = tl.where(site == 0, w0, tl.where(site == 1, w1, w2))
    trained = tl.where(site == 0, t0, tl.where(site == 1, t1, t2))
    real_rows, columns = rows < num_rows, column * n_tile + tl.arange(0, n_tile)
    slot_size = num_in.to(tl.int64) * stack_out
    acc = tl.zeros([t_tile, n_tile], tl.float32)
    first = part * part_in
    for start in range(first, tl.minimum(first + part_in, num_in), k_tile):
        k = start + tl.arange(0, k_tile)
        real_k = k < num_in
        tile_x = tl.load(
            x + rows.to(tl.int64)[:, None] * x_stride + k[None, :], mask=real_rows[:, None] & real_k[None, :], other=0.0
        )
        current = _next_slot(slot, -1)
        while current < _NONE:
            factor, limit = stack + current.to(tl.int64) * slot_size, stack_out
            if train_out > 0:
                factor = tl.where(current == _TRAINING, trained, factor)
                limit = tl.where(current == _TRAINING, train_out, stack_out)
            weight = tl.load(
                factor + columns[None, :] * num_in + k[:, None], mask=(columns < limit)[None, :] & real_k[:, None], other=0.0
            )
            product = tl.dot(tile_x, weight, input_precision="ieee")
            acc = tl.where((slot == current)[:, None], acc + product, acc)
            current = _next_slot(slot, current)
    place = ((site * parts + part).to(tl.int64) * num_rows + rows)[:, None] * width + columns[None, :]
    tl.store(partial + place, acc, mask=real_rows[:, None])


@jit(unspecialized=("slots", "num_rows", "parts", "stride0", "stride1", "stride2"))
def _sum_kernel(
    o0: tl.tensor, o1: tl.tensor, o2: tl.tensor, partial: tl.tensor, slots: tl.tensor,
    stride0: tl.tensor, stride1: tl.tensor, stride2: tl.tensor, num_rows: tl.tensor, parts: tl.tensor, scale: tl.tensor,
    stacked: tl.constexpr, training: tl.constexpr, num_out: tl.constexpr, width: tl.constexpr, accumulate: tl.constexpr,
    t_tile: tl.constexpr, n_tile: tl.constexpr,
) -> None:
    """out (+)= the parts' sum, for a tile of rows; rows without a slot get 0, or stay."""
    tile, column, site = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * t_tile + tl.arange(0, t_tile)
    slot = _own_slots(slots, rows, num_rows, stacked, training)
    out = tl.where(site == 0, o0, tl.where(site == 1, o1, o2))
    stride = tl.where(site == 0, stride0, tl.where(site == 1, stride1, stride2))
    columns = column * n_tile + tl.arange(0, n_tile)
    own = (slot >= 0)[:, None] & (columns < num_out)[None, :]
    acc = tl.zeros([t_tile, n_tile], tl.float32)
    for part in range(parts):
        place = ((site * parts + part).to(tl.int64) * num_rows + rows)[:, None] * width + columns[None, :]
        acc += tl.load(partial + place, mask=own, other=0.0)
    if training:
        acc = tl.where((slot == _TRAINING)[:, None], acc * scale, acc)
    target = out + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if accumulate:
        tl.store(target, (acc + tl.load(target, mask=own, other=0.0)).to(out.dtype.element_ty), mask=own)
    else:
        tl.store(target, acc.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (columns < num_out)[None, :])


@jit(unspecialized=("slots", "num_rows", "parts", "tiles0", "tiles1"))
def _up_kernel(
    o0: tl.tensor, o1: tl.tensor, o2: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, slots: tl.tensor,
    w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, t0: tl.tensor, t1: tl.tensor, t2: tl.tensor,
    n0: tl.tensor, n1: tl.tensor, n2: tl.tensor, stride0: tl.tensor, stride1: tl.tensor, stride2: tl.tensor,
    i0: tl.tensor, i1: tl.tensor, i2: tl.tensor, i_stride0: tl.tensor, i_stride1: tl.tensor, i_stride2: tl.tensor,
    tiles0: tl.tensor, tiles1: tl.tensor, num_rows: tl.tensor, parts: tl.tensor, x_stride: tl.tensor, scale: tl.tensor,
    stack_in: tl.constexpr, train_in: tl.constexpr, accumulate: tl.constexpr, keep: tl.constexpr,
    t_tile: tl.constexpr, r_tile: tl.constexpr, n_tile: tl.constexpr,
) -> None:
    """A tile of out (+)= x @ factor.T, where x is the sum of `parts` tensors, one behind the other. keep: the first tile of a
    site's columns writes the sum to the site's i."""
    tile, column = tl.program_id(0), tl.program_id(1)
    rows = tile * t_tile + tl.arange(0, t_tile)
    slot = _own_slots(slots, rows, num_rows, stack_in > 0, train_in > 0)
    if accumulate and not keep and tl.max(slot, 0) < 0:
        return
    first, second = column < tiles0, column < tiles0 + tiles1
    stack, trained = tl.where(first, w0, tl.where(second, w1, w2)), tl.where(first, t0, tl.where(second, t1, t2))
    out, x = tl.where(first, o0, tl.where(second, o1, o2)), tl.where(first, x0, tl.where(second, x1, x2))
    num_out = tl.where(first, n0, tl.where(second, n1, n2))
    stride = tl.where(first, stride0, tl.where(second, stride1, stride2))
    inner = tl.where(first, i0, tl.where(second, i1, i2))
    inner_stride = tl.where(first, i_stride0, tl.where(second, i_stride1, i_stride2))
    column -= tl.where(first, 0, tl.where(second, tiles0, tiles0 + tiles1))
    columns = column * n_tile + tl.arange(0, n_tile)
    real_rows, real_columns = rows < num_rows, columns < num_out
    most: tl.constexpr = stack_in if stack_in > train_in else train_in
    part_size = num_rows.to(tl.int64) * x_stride
    slot_size = num_out.to(tl.int64) * stack_in
    acc = tl.zeros([t_tile, n_tile], tl.float32)
    for start in tl.static_range(0, most, r_tile):
        r = start + tl.arange(0, r_tile)
        place = rows.to(tl.int64)[:, None] * x_stride + r[None, :]
        wanted = (slot >= 0)[:, None] & (r < most)[None, :]
        total = tl.load(x + place, mask=wanted, other=0.0).to(tl.float32)
        for part in range(1, parts):
            total += tl.load(x + part * part_size + place, mask=wanted, other=0.0).to(tl.float32)
        if keep and column == 0:
            kept = inner + rows.to(tl.int64)[:, None] * inner_stride + r[None, :]
            tl.store(kept, total.to(inner.dtype.element_ty), mask=real_rows[:, None] & (r < most)[None, :])
        tile_x = total.to(stack.dtype.element_ty)
        current = _next_slot(slot, -1)
        while current < _NONE:
            own_x, factor, own_in = tile_x, stack + current.to(tl.int64) * slot_size, stack_in
            if train_in > 0:
                factor = tl.where(current == _TRAINING, trained, factor)
                own_in = tl.where(current == _TRAINING, train_in, stack_in)
            weight = tl.load(
                factor + columns[None, :] * own_in + r[:, None], mask=real_columns[None, :] & (r < own_in)[:, None], other=0.0
            )
            if train_in != stack_in:  # beyond its own rank a row may hold anything
                own_x = tl.where((r < own_in)[None, :], own_x, 0.0)
            product = tl.dot(own_x.to(stack.dtype.element_ty), weight, input_precision="ieee")
            if train_in > 0:
                product *= tl.where(current == _TRAINING, scale, 1.0)
            acc = tl.where((slot == current)[:, None], acc + product, acc)
            current = _next_slot(slot, current)
    target = out + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    own = (slot >= 0)[:, None] & real_columns[None, :]
    if accumulate:
        acc += tl.load(target, mask=own, other=0.0).to(tl.float32)
        tl.store(target, acc.to(out.dtype.element_ty), mask=own)
    else:
        tl.store(target, acc.to(out.dtype.element_ty), mask=real_rows[:, None] & real_columns[None, :])


@jit(unspecialized=("slots",))
def _scale_kernel(
    out: tl.tensor, x: tl.tensor, slots: tl.tensor, stack: tl.tensor, trained: tl.tensor, center: tl.tensor,
    out_stride: tl.tensor, x_stride: tl.tensor, stack_out: tl.constexpr, train_out: tl.constexpr, centered: tl.constexpr,
    accumulate: tl.constexpr, tile: tl.constexpr,
) -> None:
    """One row of out (+)= (x - center) * vector, where out may be x itself."""
    row, columns = tl.program_id(0), tl.program_id(1) * tile + tl.arange(0, tile)
    slot = tl.load(slots + row)
    limit, vector = stack_out, stack + slot.to(tl.int64) * stack_out
    if slot == _TRAINING:
        limit, vector = train_out, trained + tl.zeros([], tl.int64)
    if (slot < 0) | (limit == 0):
        if accumulate:
            return
        limit = 0
    most: tl.constexpr = stack_out if stack_out > train_out else train_out
    wanted = columns < limit
    value = tl.load(x + row.to(tl.int64) * x_stride + columns, mask=wanted, other=0.0).to(tl.float32)
    if centered:
        value -= tl.load(center + columns, mask=wanted, other=0.0).to(tl.float32)
    value *= tl.load(vector + columns, mask=wanted, other=0.0).to(tl.float32)
    target = out + row.to(tl.int64) * out_stride + columns
    if accumulate:
        value += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
        tl.store(target, value.to(out.dtype.element_ty), mask=wanted)
    else:
        tl.store(target, value.to(out.dtype.element_ty), mask=columns < most)


def segment_scale(out: Tensor, x: Tensor, factors: SlotFactors, *, accumulate: bool) -> None:
    """out (+)= (x - center) * vector, for rows of many adapters. out may be x.

    The factors are of one site, with in = 1. Rows without a slot get 0, or stay with `accumulate`; so do columns beyond a row's
    own vector.
    """
    (stack,), (trained,), center = factors.stacks[:1], factors.training[:1], factors.centers[0]
    held = stack if stack is not None else trained
    if held is None or x.shape[0] == 0:
        return
    outs = [0 if each is None else each.shape[-2] for each in (stack, trained)]
    tile = min(1024, next_power(max(outs)))
    launch: Any = _scale_kernel[(x.shape[0], -(-max(outs) // tile))]
    launch(
        out, x, factors.slots, held, held if trained is None else trained, held if center is None else center, out.stride(0),
        x.stride(0), stack_out=outs[0], train_out=outs[1], centered=center is not None, accumulate=accumulate, tile=tile,
    )


def segment_linear(outs: Sequence[Tensor], x: Tensor, factors: SlotFactors, *, accumulate: bool) -> None:
    """out (+)= x @ factor.T for each site, with the factor of the adapter that each row has.

    x: [T, K], or wider. outs: per site [T, N], or wider; with columns of their own. Rows without a slot get 0, or stay with
    `accumulate`. A row's columns beyond its own factor hold 0 or stay. Sums are float32.
    """
    if x.shape[0] == 0:
        return
    if x.shape[1] <= _MOST_UP and _agree(factors):
        for ranks, sites in _launches(None, factors):
            _up(outs, [x] * len(sites), factors, ranks, sites, accumulate, parts=1, x_stride=x.stride(0))
    else:
        for ranks, sites in _launches(factors, None):
            _sum(outs, _down(x, factors, ranks, sites), factors, ranks, sites, accumulate)


def segment_pairs(
    outs: Sequence[Tensor], inner: Sequence[Tensor] | None, x: Tensor, down: SlotFactors, up: SlotFactors, *, accumulate: bool
) -> None:
    """out (+)= (x @ down.T) @ up.T for each site: two launches. See `segment_linear`.

    inner: per site [T, R] or wider, where x @ down.T is written as well, in its type; None if nobody reads it.
    """
    if x.shape[0] == 0:
        return
    assert all(scale == 1 for scale in down.scales)
    for ranks, sites in _launches(down._replace(scales=up.scales), None):
        partial = _down(x, down, ranks, sites)
        _up(
            outs, list(partial), up, ranks, sites, accumulate, parts=partial.shape[1], x_stride=partial.stride(2), inner=inner
        )


def _launches(down: SlotFactors | None, up: SlotFactors | None) -> Iterator[tuple[_Ranks, list[int]]]:
    """The sites of one launch: at most three, with the same ranks, which are compiled into the kernels. Sites without factors
    are left out."""
    kind, axis = (down, 0) if down is not None else (up, 1)
    assert kind is not None
    found: dict[_Ranks, list[int]] = {}
    for site, (stack, trained) in enumerate(zip(kind.stacks, kind.training, strict=True)):
        sizes = (0 if stack is None else stack.shape[1 + axis], 0 if trained is None else trained.shape[axis])
        ranks = _Ranks(*sizes, kind.scales[site])
        found.setdefault(ranks, []).append(site)
    for ranks, sites in found.items():
        if ranks.most:
            yield from ((ranks, sites[first : first + _SITES]) for first in range(0, len(sites), _SITES))


def _agree(factors: SlotFactors) -> bool:
    """Whether each site's output has one width, whoever's the factor is."""
    pairs = zip(factors.stacks, factors.training, strict=True)
    return all(stack is None or own is None or stack.shape[-2] == own.shape[-2] for stack, own in pairs)


def _three(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None], sites: Sequence[int]) -> list[Tensor]:
    """A pointer for each of a kernel's three sites. One that no row follows is any other."""
    found = [tensors[site] if tensors[site] is not None else others[site] for site in sites]
    return [each for each in (*found, *found[:1] * (_SITES - len(found))) if each is not None]


def _down(x: Tensor, factors: SlotFactors, ranks: _Ranks, sites: Sequence[int]) -> Tensor:
    """x @ factor.T in parts: float32 [sites, P, T, W]."""
    stacks, trained = _three(factors.stacks, factors.training, sites), _three(factors.training, factors.stacks, sites)
    rows, num_in = x.shape[0], stacks[0].shape[-1]
    require_aligned(*((x,) if num_in % 8 == 0 else ()))
    n_tile = min(64, max(16, next_power(ranks.most)))
    width = -(-ranks.most // n_tile) * n_tile
    t_tile, k_tile = 16 if rows <= _LARGE_BATCH else 32, 128 if n_tile < 64 else 64
    tiles, steps = -(-rows // t_tile), -(-num_in // k_tile)
    wanted = max(-(-_PROGRAMS // (tiles * (width // n_tile) * len(sites))), -(-num_in // _MOST_INNER))
    part_in = -(-steps // min(steps, wanted)) * k_tile
    parts = -(-num_in // part_in)
    partial = torch.empty(len(sites), parts, rows, width, dtype=torch.float32, device=x.device)
    launch: Any = _down_kernel[(tiles, parts * (width // n_tile), len(sites))]
    launch(
        partial, x, factors.slots, *stacks, *trained, rows, num_in, part_in, parts, x.stride(0),
        stack_out=ranks.stack, train_out=ranks.train, width=width, t_tile=t_tile, k_tile=k_tile, n_tile=n_tile,
    )
    return partial


def _sum(
    outs: Sequence[Tensor], partial: Tensor, factors: SlotFactors, ranks: _Ranks, sites: Sequence[int], accumulate: bool
) -> None:
    """out (+)= the sum of the parts [sites, P, T, W], in order."""
    _, parts, rows, width = partial.shape
    written, t_tile, n_tile = _three(outs, outs, sites), 16, min(64, width)
    launch: Any = _sum_kernel[(-(-rows // t_tile), width // n_tile, len(sites))]
    launch(
        *written, partial, factors.slots, *(out.stride(0) for out in written), rows, parts, ranks.scale,
        stacked=ranks.stack > 0, training=ranks.train > 0, num_out=ranks.most, width=width, accumulate=accumulate,
        t_tile=t_tile, n_tile=n_tile,
    )


def _up(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], factors: SlotFactors, ranks: _Ranks, sites: Sequence[int],
    accumulate: bool, *, parts: int, x_stride: int, inner: Sequence[Tensor] | None = None,
) -> None:
    """out (+)= x @ factor.T, where each site's x is the sum of `parts` tensors [T, R or wider], one behind the other.

    inner: per site, where that sum is written; None if nobody reads it.
    """
    stacks, trained = _three(factors.stacks, factors.training, sites), _three(factors.training, factors.stacks, sites)
    written, rows = _three(outs, outs, sites), inputs[0].shape[-2]
    widths = [stack.shape[-2] for stack in stacks]
    t_tile, n_tile, r_tile = 16 if rows <= _LARGE_BATCH else 32, 128, min(64, max(16, next_power(ranks.most)))
    tiles = [-(-width // n_tile) for width in widths[: len(sites)]]
    read = [*inputs, *[inputs[0]] * (_SITES - len(inputs))]
    kept = written if inner is None else _three(inner, inner, sites)
    launch: Any = _up_kernel[(-(-rows // t_tile), sum(tiles))]
    launch(
        *written, *read, factors.slots, *stacks, *trained, *widths, *(out.stride(0) for out in written),
        *kept, *(each.stride(0) for each in kept),
        tiles[0], tiles[1] if len(tiles) > 1 else 0, rows, parts, x_stride, ranks.scale,
        stack_in=ranks.stack, train_in=ranks.train, accumulate=accumulate, keep=inner is not None,
        t_tile=t_tile, r_tile=r_tile, n_tile=n_tile,
    )
