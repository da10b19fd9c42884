"""Tokens from logits: the filters top_k, top_p and min_p without a sort, and the largest score with keyed noise.

B rows (requests), V vocabulary. Three launches at most, whatever B is:

    cut    one program per row          the least score that the filters leave (only where a row has filters)
    peaks  one program per row and tile each tile's largest score, with noise to float32's precision: close, and cheap
    pick   one program per row          the token, by exact scores of the tiles whose peak is near the largest one

The exact noise takes two float64 logarithms per token, but pick computes it for about one tile per row: a tile can hold the
best score only if its peak is within twice the error of the cheap noise. The tokens are those of `runtime/sampler.py` in
PyTorch, with two exceptions, both of one part in 2^27 or less: noise whose float64 value lies within a rounding of the middle
between two float32 numbers may be the other one of them, as logarithms of two libraries differ in their last bit, and this
decides only between scores that are equal to within that bit; and a share of top_p's mass may be off by one unit of 2^-40 for
the same reason.

A row's search for its cut goes over the order-preserving integers of its logits: with each pass the interval of what the
threshold may be is halved and drawn together to values that occur. Masses are summed in float32, and once more exactly where
that doesn't decide. Every pass reads the row again, from the cache of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coserve.kernels.triton import jit, next_power

try:
    import triton.language as tl
except ImportError:
    tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PEAK_TILE = 1024
"""Tokens of a tile with one peak: the exact noise is computed for so many at a time."""

CUT_TILE = 4096
"""Tokens that the search for a cut holds at a time."""


class Draw(NamedTuple):
    """How one row's token is drawn.

    key: the hash of the row's seed and position, in [0, 2^32). temperature: 0 for the largest logit without noise or filters.
    top_k: 0 or at least V for none. top_p: 1 for none. log_min_p: the logarithm of min_p, minus infinity for none.
    """

    key: int
    temperature: float
    top_k: int
    top_p: float
    log_min_p: float

    @property
    def filtered(self) -> bool:
        """Whether anything may exclude tokens."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.log_min_p > float("-inf"))


_SETTINGS = len(Draw._fields)


# --- numbers --------------------------------------------------------------------------------------------------------------


@jit()
def _mix32(x: tl.tensor) -> tl.tensor:
    """`reference.mix32` on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit()
def _noise_bits(ids: tl.tensor, key: tl.tensor) -> tl.tensor:
    """The 32 random bits of each token in a row."""
    return _mix32(_mix32(ids.to(tl.uint32)) ^ key)


@jit()
def _exact_noise(bits: tl.tensor) -> tl.tensor:
    """Standard Gumbel noise as `gumbel_noise` has it: -log(-log(u)) in float64 for u = (bits + 1/2) / 2^32, then float32."""
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(uniform)).to(tl.float32)


@jit()
def _near_noise(bits: tl.tensor) -> tl.tensor:
    """The same within 2^-16. Near u = 1, where float32 has too few digits, -log(u) is a series in 1 - u."""
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = rest * (1.0 + rest * (0.5 + rest * (0.33333334 + rest * (0.25 + rest * (0.2 + rest * 0.16666667)))))
    return -tl.log(tl.where(rest < 0.0625, series, -tl.log(uniform)))


@jit()
def _order(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 numbers; both zeros are equal, and NaN is above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit()
def _number(order: tl.tensor) -> tl.tensor:
    """The float32 number that `_order` made an integer of."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit()
def _share(score: tl.tensor, best: tl.tensor) -> tl.tensor:
    """int64: the probability in units of 2^-40 of the best token's."""
    return (tl.exp(score.to(tl.float64) - best.to(tl.float64)) * 1099511627776.0).to(tl.int64)


@jit()
def _logits(logits: tl.tensor, ids: tl.tensor, size: tl.tensor) -> tl.tensor:
    """float32 of some tokens of a row; minus infinity outside the vocabulary."""
    return tl.load(logits + ids, mask=ids < size, other=float("-inf")).to(tl.float32)


# --- peaks and pick -------------------------------------------------------------------------------------------------------


@jit()
def _kept_scores(
    logits: tl.tensor, ids: tl.tensor, size: tl.tensor, temperature: tl.tensor, cut: tl.tensor, limit: tl.tensor,
) -> tl.tensor:
    """Logits over the temperature, of what the row's filters leave: above the cut, or on it with an id below the limit."""
    score = tl.div_rn(_logits(logits, ids, size), temperature)
    excluded = (score < cut) | ((score == cut) & (ids >= limit))
    return tl.where(excluded, float("-inf"), score)


@jit()
def _peaks_kernel(
    peaks: tl.tensor, logits: tl.tensor, settings: tl.tensor, cuts: tl.tensor, limits: tl.tensor, size: tl.tensor,
    stride: tl.tensor, num_settings: tl.constexpr, filtered: tl.constexpr, tile: tl.constexpr,
) -> None:
    """A tile's largest score; infinity if the tile has NaN."""
    row, part = tl.program_id(0), tl.program_id(1)
    key = tl.load(settings + row * num_settings).to(tl.int64).to(tl.uint32)
    temperature = tl.load(settings + row * num_settings + 1).to(tl.float32)
    noisy = temperature > 0.0
    cut, limit = float("-inf"), size
    if filtered:
        cut, limit = tl.load(cuts + row), tl.load(limits + row)
    ids = part * tile + tl.arange(0, tile)
    logits += row.to(tl.int64) * stride
    if filtered:
        score = _kept_scores(logits, ids, size, tl.where(noisy, temperature, 1.0), cut, limit)
    else:  # no score has to be exact but those without noise, whose factor is 1
        score = _logits(logits, ids, size) * tl.where(noisy, 1.0 / temperature, 1.0)
    if noisy:
        score += _near_noise(_noise_bits(ids, key))
    tl.store(peaks + row * tl.num_programs(1) + part, tl.max(tl.where(score != score, float("inf"), score), 0))


@jit()
def _pick_kernel(
    tokens: tl.tensor, peaks: tl.tensor, logits: tl.tensor, settings: tl.tensor, cuts: tl.tensor, limits: tl.tensor,
    size: tl.tensor, stride: tl.tensor, num_tiles: tl.tensor,
    num_settings: tl.constexpr, filtered: tl.constexpr, tile: tl.constexpr, tiles_tile: tl.constexpr,
) -> None:
    """The token with the largest exact score, the first of equal ones; the first NaN, if there is one."""
    row = tl.program_id(0)
    key = tl.load(settings + row * num_settings).to(tl.int64).to(tl.uint32)
    temperature = tl.load(settings + row * num_settings + 1).to(tl.float32)
    noisy = temperature > 0.0
    divisor = tl.where(noisy, temperature, 1.0)
    cut, limit = float("-inf"), size
    if filtered:
        cut, limit = tl.load(cuts + row), tl.load(limits + row)
    numbers = tl.arange(0, tiles_tile)
    peak_of = tl.load(peaks + row * num_tiles + numbers, mask=numbers < num_tiles, other=float("-inf"))
    peak = tl.max(peak_of, 0)
    # Two errors of the noise of 2^-16, and the roundings of two scores and sums, several times over: a tile more costs little.
    error = tl.where(noisy & (tl.abs(peak) < float("inf")), 2.44140625e-4 + tl.abs(peak) * 1.9073486328125e-6, 0.0)
    near = (peak_of >= peak - error) & (numbers < num_tiles)
    best, token = tl.full([], -0x7FFFFFFF, tl.int32), tl.full([], 0, tl.int32)
    part = tl.min(tl.where(near, numbers, num_tiles), 0)
    while part < num_tiles:
        ids = part * tile + tl.arange(0, tile)
        score = _kept_scores(logits + row.to(tl.int64) * stride, ids, size, divisor, cut, limit)
        if noisy:
            score += _exact_noise(_noise_bits(ids, key))
        order = tl.where(ids < size, _order(score), -0x7FFFFFFF)
        highest = tl.max(order, 0)
        first = tl.min(tl.where(order == highest, ids, size), 0)
        token = tl.where(highest > best, first, token)
        best = tl.maximum(best, highest)
        part = tl.min(tl.where(near & (numbers > part), numbers, num_tiles), 0)
    tl.store(tokens + row, token.to(tl.int64))


# --- the cut --------------------------------------------------------------------------------------------------------------


@jit()
def _range(logits: tl.tensor, size: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """The orders of a row's smallest and largest logit. NaN counts as the largest."""
    least = tl.full([tile], 0x7FFFFFFF, tl.int32)
    most = tl.full([tile], -0x7FFFFFFF, tl.int32)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        order = _order(_logits(logits, ids, size))
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
        x = _logits(logits, ids, size)
        order = _order(x)
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
        x = _logits(logits, ids, size)
        least = tl.where((tl.div_rn(x, temperature) >= score) & (ids < size), tl.minimum(least, _order(x)), least)
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
        x = _logits(logits, ids, size)
        order = _order(x)
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
        x = _logits(logits, ids, size)
        mine = tl.div_rn(x, temperature)
        count += ((mine == score) & (ids < size)).to(tl.int32)
        above = tl.where(mine > score, tl.minimum(above, _order(x)), above)
    return tl.sum(count, 0), tl.min(above, 0)


@jit()
def _id_after(
    logits: tl.tensor, size: tl.tensor, temperature: tl.tensor, score: tl.tensor, number: tl.tensor, tile: tl.constexpr,
) -> tl.tensor:
    """One more than the id of the `number`-th token with this score, counted from 1 in order of the ids."""
    before, found = tl.full([], 0, tl.int32), size
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        tied = ((tl.div_rn(_logits(logits, ids, size), temperature) == score) & (ids < size)).to(tl.int32)
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
    high = _order(best) + 1
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
    low, high = floor, _order(best) + 1
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
    low, high = _order(tl.full([], float("-inf"), tl.float32)), _order(best_score)
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
    temperature = tl.load(settings + row * num_settings + 1).to(tl.float32)
    top_k = tl.load(settings + row * num_settings + 2).to(tl.int32)
    top_p = tl.load(settings + row * num_settings + 3)
    log_min_p = tl.load(settings + row * num_settings + 4)
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


# --- launches -------------------------------------------------------------------------------------------------------------


def settings_table(draws: Sequence[Draw]) -> Tensor:
    """float64 [B, 5] on the host, which holds every number of `draws` exactly, but the temperature: the kernels round that to
    float32."""
    return torch.tensor(draws, dtype=torch.float64).view(len(draws), _SETTINGS)


def row_cuts(logits_BV: Tensor, settings_B5: Tensor) -> tuple[Tensor, Tensor]:
    """(cuts, limits), float32 and int32 [B]: the filters leave the tokens whose logit over the temperature is above the row's
    cut, and those on it whose ids are below its limit. Arguments as `draw_tokens` has them."""
    rows, size = logits_BV.shape
    cuts = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    limits = torch.empty(rows, dtype=torch.int32, device=logits_BV.device)
    launch: Any = _cut_kernel[(rows,)]
    launch(cuts, limits, logits_BV, settings_B5, size, logits_BV.stride(0), num_settings=_SETTINGS, tile=CUT_TILE, num_warps=16)
    return cuts, limits


def draw_tokens(logits_BV: Tensor, settings_B5: Tensor, *, filtered: bool) -> Tensor:
    """int64 [B]: the token of each row. Waits for nothing.

    logits_BV: float32, bfloat16 or float16; rows may be slices of wider ones. settings_B5: `settings_table` on the device of the
    logits. filtered: whether any row is.
    """
    rows, size = logits_BV.shape
    assert logits_BV.dtype in DTYPES and logits_BV.stride(1) == 1 and size > 0
    assert settings_B5.shape == (rows, _SETTINGS) and settings_B5.dtype == torch.float64 and settings_B5.is_contiguous()
    device, num_tiles = logits_BV.device, -(-size // PEAK_TILE)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return tokens
    stride = logits_BV.stride(0)
    peaks = torch.empty(rows, num_tiles, dtype=torch.float32, device=device)
    cuts, limits = row_cuts(logits_BV, settings_B5) if filtered else (peaks, tokens)  # which are not read then
    common = {"num_settings": _SETTINGS, "filtered": filtered, "tile": PEAK_TILE, "num_warps": 4}
    launch: Any = _peaks_kernel[(rows, num_tiles)]
    launch(peaks, logits_BV, settings_B5, cuts, limits, size, stride, **common)
    launch = _pick_kernel[(rows,)]
    launch(tokens, peaks, logits_BV, settings_B5, cuts, limits, size, stride, num_tiles, tiles_tile=next_power(num_tiles), **common)
    return tokens
