"""What top_k, top_p and min_p leave of each row of logits, found without a sort.

B rows (requests), V vocabulary. The filters act on scores, the logits over the temperature, and leave a row's best ones: those
above a cut, and of those on it the first by their ids. Meaning, ties and rounding are those of `_filter` in runtime/sampler.py.

One program searches one row's cut over the order-preserving integers of its logits ("orders" below). Each pass over the row
halves the interval of what the cut may be, and draws it together to values that occur. Masses are summed in float32, and again
exactly, in whole multiples of 2^-40 of the best token's probability, where that doesn't decide. Passes read the row from the
device's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coserve.kernels.triton import jit

try:
    import triton.language as tl
except ImportError:
    tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CUT_TILE = 4096
"""Tokens that a program holds at a time."""

NUM_SETTINGS = 5
"""Numbers that say how a row's token is drawn: the fields of `sampling.Draw`."""


@jit()
def order_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 numbers; both zeros are equal, and NaN is above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit()
def _number(order: tl.tensor) -> tl.tensor:
    """The float32 number that `order_of` made an integer of."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit()
def _share(score: tl.tensor, best: tl.tensor) -> tl.tensor:
    """int64: the probability in units of 2^-40 of the best token's."""
    return (tl.exp(score.to(tl.float64) - best.to(tl.float64)) * 1099511627776.0).to(tl.int64)


@jit()
def load_setting(setting: tl.tensor) -> tl.tensor:
    """float64, of the int64 with the same bits."""
    return tl.load(setting).to(tl.float64, bitcast=True)


@jit()
def load_logits(logits: tl.tensor, ids: tl.tensor, size: tl.tensor) -> tl.tensor:
    """float32 of some tokens of a row; minus infinity outside the vocabulary."""
    return tl.load(logits + ids, mask=ids < size, other=float("-inf")).to(tl.float32)


@jit()
def _range(logits: tl.tensor, size: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """The orders of a row's smallest and largest logit. NaN counts as the largest."""
    least = tl.full([tile], 0x7FFFFFFF, tl.int32)
    most = tl.full([tile], -0x7FFFFFFF, tl.int32)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        order = order_of(load_logits(logits, ids, size))
        least, most = tl.where(ids < size, tl.minimum(least, order), least), tl.maximum(most, order)
    return tl.min(least, 0), tl.max(most, 0)


@jit()
def _above(
    logits: tl.tensor, size: tl.tensor, middle: tl.tensor, best: tl.tensor, inverse: tl.tensor, tile: tl.constexpr,
) -> tl.tensor:
    """Of the logits at or above `middle` (an order): how many there are, their mass in float32 relative to the best one's, the
    smallest of them; and the largest logit below. Smallest and largest are orders."""
    count, mass = tl.zeros([tile], tl.int32), tl.zeros([tile], tl.float32)
    up, down = tl.full([tile], 0x7FFFFFFF, tl.int32), tl.full([tile], -0x7FFFFFFF, tl.int32)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        x = load_logits(logits, ids, size)
        order = order_of(x)
        inside = (order >= middle) & (ids < size)
        count += inside.to(tl.int32)
        mass += tl.where(inside, tl.exp((x - best) * inverse), 0.0)
        up = tl.where(inside, tl.minimum(up, order), up)
        down = tl.where(inside, down, tl.maximum(down, order))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.min(up, 0), tl.max(down, 0)


@jit()
def _least_order(logits: tl.tensor, size: tl.tensor, temperature: tl.tensor, score: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """The smallest logit whose score is at least `score`, as an order."""
    least = tl.full([tile], 0x7FFFFFFF, tl.int32)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        x = load_logits(logits, ids, size)
        least = tl.where((tl.div_rn(x, temperature) >= score) & (ids < size), tl.minimum(least, order_of(x)), least)
    return tl.min(least, 0)


@jit()
def _exact_mass(
    logits: tl.tensor, size: tl.tensor, temperature: tl.tensor, best_score: tl.tensor, floor: tl.tensor, middle: tl.tensor,
    tile: tl.constexpr,
) -> tl.tensor:
    """int64, in units of 2^-40 of the best token's probability: the mass at or above `middle`, and the mass at or above
    `floor`; both are orders of logits."""
    mass, total = tl.zeros([tile], tl.int64), tl.zeros([tile], tl.int64)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        x = load_logits(logits, ids, size)
        order = order_of(x)
        share = tl.where(order >= floor, _share(tl.div_rn(x, temperature), best_score), 0)
        total += share
        mass += tl.where(order >= middle, share, 0)
    return tl.sum(mass, 0), tl.sum(total, 0)


@jit()
def _ties(logits: tl.tensor, size: tl.tensor, temperature: tl.tensor, score: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """How many tokens have this score, and the smallest logit above them, as an order."""
    count, above = tl.zeros([tile], tl.int32), tl.full([tile], 0x7FFFFFFF, tl.int32)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        x = load_logits(logits, ids, size)
        mine = tl.div_rn(x, temperature)
        count += ((mine == score) & (ids < size)).to(tl.int32)
        above = tl.where(mine > score, tl.minimum(above, order_of(x)), above)
    return tl.sum(count, 0), tl.min(above, 0)


@jit()
def _id_after(
    logits: tl.tensor, size: tl.tensor, temperature: tl.tensor, score: tl.tensor, number: tl.tensor, tile: tl.constexpr,
) -> tl.tensor:
    """One more than the id of the `number`-th token with this score, counted from 1 in order of the ids."""
    before, found = tl.full([], 0, tl.int32), size
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        tied = ((tl.div_rn(load_logits(logits, ids, size), temperature) == score) & (ids < size)).to(tl.int32)
        count = tl.sum(tied, 0)
        if (before < number) & (before + count >= number):
            found = tl.min(tl.where(before + tl.cumsum(tied, 0) >= number, ids + 1, size), 0)
        before += count
    return found


@jit()
def _middle(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The middle of two orders, above the lower one; their difference may need 33 bits."""
    return ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)


@jit()
def _kth_order(
    logits: tl.tensor, size: tl.tensor, low: tl.tensor, best: tl.tensor, top_k: tl.tensor, tile: tl.constexpr
) -> tl.tensor:
    """The order of the k-th largest logit. low: the order of the smallest; best: the largest logit."""
    high = order_of(best) + 1
    while low.to(tl.int64) + 1 < high.to(tl.int64):
        middle = _middle(low, high - 1)
        count, _, up, down = _above(logits, size, middle, best, 0.0, tile)
        enough = count >= top_k
        low, high = tl.where(enough, up, low), tl.where(enough, high, down + 1)
    return low


@jit()
def _mass_order(
    logits: tl.tensor, size: tl.tensor, temperature: tl.tensor, best: tl.tensor, floor: tl.tensor, top_p: tl.tensor,
    tile: tl.constexpr,
) -> tl.tensor:
    """The order of the largest logit at or above which lies at least `top_p` of the mass at or above `floor`."""
    best_score = tl.div_rn(best, temperature)
    # Roundings of scores, of exponents up to 28, and of sums, as a share of the mass; three times, as two masses are compared.
    slack = 3.0 * (3.0517578125e-5 + tl.abs(best_score) * 2.384185791015625e-7)
    inverse = 1.0 / temperature
    _, total, _, _ = _above(logits, size, floor, best, inverse, tile)
    wanted = total * top_p.to(tl.float32)
    low, high = floor, order_of(best) + 1
    while low.to(tl.int64) + 1 < high.to(tl.int64):
        middle = _middle(low, high - 1)
        _, mass, up, down = _above(logits, size, middle, best, inverse, tile)
        enough = mass >= wanted
        if (tl.abs(mass - wanted) <= slack * wanted) & (up < high):
            exact, whole = _exact_mass(logits, size, temperature, best_score, floor, middle, tile)
            enough = exact.to(tl.float64) >= top_p * whole.to(tl.float64)
        enough &= up < high
        low, high = tl.where(enough, up, low), tl.where(enough, high, down + 1)
    return low


@jit()
def _number_kept(
    above: tl.tensor, share: tl.tensor, enough: tl.tensor, tied: tl.tensor
) -> tl.tensor:
    """How many of `tied` tokens with equal shares stay: those before which less than `enough` lies; at least one."""
    low, high = tl.full([], 1, tl.int32), tied
    while low < high:
        middle = (low + high) // 2
        reached = (above + middle.to(tl.int64) * share).to(tl.float64) >= enough
        low, high = tl.where(reached, low, middle + 1), tl.where(reached, middle, high)
    return low


@jit()
def _min_p_cut(best_score: tl.tensor, log_min_p: tl.tensor) -> tl.tensor:
    """The least float32 score whose difference to the best one, in float64, is not below `log_min_p`."""
    low, high = order_of(tl.full([], float("-inf"), tl.float32)), order_of(best_score)
    while low < high:
        middle = _middle(low, high) - 1
        middle = tl.maximum(middle, low)
        stays = _number(middle).to(tl.float64) - best_score.to(tl.float64) >= log_min_p
        low, high = tl.where(stays, low, middle + 1), tl.where(stays, middle, high)
    return _number(low)


@jit()
def _cut_kernel(
    cuts: tl.tensor, limits: tl.tensor, logits: tl.tensor, settings: tl.tensor, size: tl.tensor, stride: tl.tensor,
    num_settings: tl.constexpr, tile: tl.constexpr,
) -> None:
    """A row's cut, and the id below which tokens on the cut stay.

    A row whose best logit is NaN or infinite is not cut: its token is the first of these anyway.
    """
    row = tl.program_id(0)
    settings += row * num_settings
    temperature, top_k = load_setting(settings + 1).to(tl.float32), load_setting(settings + 2).to(tl.int32)
    top_p, log_min_p = load_setting(settings + 3), load_setting(settings + 4)
    by_k, by_p, by_min = (top_k > 0) & (top_k < size), top_p < 1.0, log_min_p > float("-inf")
    cut, limit = tl.full([], float("-inf"), tl.float32), size
    if (temperature > 0.0) & (by_k | by_p | by_min):
        logits += row.to(tl.int64) * stride
        floor, most = _range(logits, size, tile)
        best = _number(most)
        best_score = tl.div_rn(best, temperature)
        if tl.abs(best_score) < float("inf"):
            if by_k:
                cut = tl.div_rn(_number(_kth_order(logits, size, floor, best, top_k, tile)), temperature)
                floor = _least_order(logits, size, temperature, cut, tile)
            if by_p:
                cut = tl.div_rn(_number(_mass_order(logits, size, temperature, best, floor, top_p, tile)), temperature)
                tied, next_order = _ties(logits, size, temperature, cut, tile)
                if tied > 1:
                    above, total = _exact_mass(logits, size, temperature, best_score, floor, next_order, tile)
                    kept = _number_kept(above, _share(cut, best_score), top_p * total.to(tl.float64), tied)
                    if kept < tied:
                        limit = _id_after(logits, size, temperature, cut, kept, tile)
            if by_min:
                least = _min_p_cut(best_score, log_min_p)
                limit = tl.where(least > cut, size, limit)
                cut = tl.maximum(cut, least)
    tl.store(cuts + row, cut)
    tl.store(limits + row, limit)


def row_cuts(logits_BV: Tensor, settings_B5: Tensor) -> tuple[Tensor, Tensor]:
    """(cuts, limits), float32 and int32 [B]: the filters leave the tokens whose logit over the temperature is above the row's
    cut, and those on it whose ids are below its limit. Arguments as `sampling.draw_tokens` has them."""
    rows, size = logits_BV.shape
    cuts = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    limits = torch.empty(rows, dtype=torch.int32, device=logits_BV.device)
    stride = logits_BV.stride(0)
    launch: Any = _cut_kernel[(rows,)]
    launch(cuts, limits, logits_BV, settings_B5, size, stride, num_settings=NUM_SETTINGS, tile=CUT_TILE, num_warps=16)
    return cuts, limits
