"""Tokens from logits: the filters top_k, top_p and min_p without a sort, and the largest score with keyed noise.

B rows (requests), V vocabulary. Three launches at most, whatever B is:

    cut    one program per row          the least score that the filters leave (only where a row has filters)
    peaks  one program per row and tile each tile's largest score, with noise to float32's precision: close, and cheap
    pick   one program per row          the token, by exact scores of the tiles whose peak is near the largest one

The exact noise takes two float64 logarithms per token, but pick computes it for about one tile per row: a tile can hold the
best score only if its peak is within twice the error of the cheap noise. The first launch is in cuts.py.

The tokens are those that PyTorch's operators give in runtime/sampler.py, except where two libraries' float64 functions differ
in their last bit and this decides. About one noise value in 2^27 may then be the neighbouring float32 number, which matters if
it is in one of two best scores that differ by no more than that. About one share of top_p's mass in 2^12 may be off by one unit
of 2^-40, which matters if the mass before a token is that close to the mass that top_p asks for. PyTorch's own results on a CPU
and on a GPU differ in the same way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.kernels.triton import jit, next_power
from coserve.kernels.triton.cuts import DTYPES, NUM_SETTINGS, load_logits, load_setting, order_of, row_cuts

try:
    import triton.language as tl
except ImportError:
    tl = None

PEAK_TILE = 1024
"""Tokens of a tile with one peak: the exact noise is computed for so many at a time."""


class Draw(NamedTuple):
    """How one row's token is drawn.

    key: the hash of the row's seed and position, in [0, 2^32). temperature: 0 for the largest logit without noise or filters.
    top_k: 0 or at least V for none. top_p: 1 for none. log_min_p: the logarithm of min_p, minus infinity for none. The kernels
    read a row's fields by their numbers.
    """

    key: int
    temperature: float
    top_k: int
    top_p: float
    log_min_p: float


assert len(Draw._fields) == NUM_SETTINGS


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


# --- peaks and pick -------------------------------------------------------------------------------------------------------


@jit()
def _kept_scores(
    logits: tl.tensor, ids: tl.tensor, size: tl.tensor, temperature: tl.tensor, cut: tl.tensor, limit: tl.tensor,
) -> tl.tensor:
    """Logits over the temperature, of what the row's filters leave: above the cut, or on it with an id below the limit."""
    score = tl.div_rn(load_logits(logits, ids, size), temperature)
    excluded = (score < cut) | ((score == cut) & (ids >= limit))
    return tl.where(excluded, float("-inf"), score)


@jit()
def _peaks_kernel(
    peaks: tl.tensor, logits: tl.tensor, settings: tl.tensor, cuts: tl.tensor, limits: tl.tensor, size: tl.tensor,
    stride: tl.tensor, num_settings: tl.constexpr, filtered: tl.constexpr, tile: tl.constexpr,
) -> None:
    """A tile's largest score; infinity if the tile has NaN."""
    row, part = tl.program_id(0), tl.program_id(1)
    key = load_setting(settings + row * num_settings).to(tl.int64).to(tl.uint32)
    temperature = load_setting(settings + row * num_settings + 1).to(tl.float32)
    noisy = temperature > 0.0
    cut, limit = float("-inf"), size
    if filtered:
        cut, limit = tl.load(cuts + row), tl.load(limits + row)
    ids = part * tile + tl.arange(0, tile)
    logits += row.to(tl.int64) * stride
    if filtered:
        score = _kept_scores(logits, ids, size, tl.where(noisy, temperature, 1.0), cut, limit)
    else:  # no score has to be exact but those without noise, whose factor is 1
        score = load_logits(logits, ids, size) * tl.where(noisy, 1.0 / temperature, 1.0)
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
    key = load_setting(settings + row * num_settings).to(tl.int64).to(tl.uint32)
    temperature = load_setting(settings + row * num_settings + 1).to(tl.float32)
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
        order = tl.where(ids < size, order_of(score), -0x7FFFFFFF)
        highest = tl.max(order, 0)
        first = tl.min(tl.where(order == highest, ids, size), 0)
        token = tl.where(highest > best, first, token)
        best = tl.maximum(best, highest)
        part = tl.min(tl.where(near & (numbers > part), numbers, num_tiles), 0)
    tl.store(tokens + row, token.to(tl.int64))


# --- launches -------------------------------------------------------------------------------------------------------------


def settings_table(draws_B5: np.ndarray) -> Tensor:
    """int64 [B, 5] on the host: the bits of the numbers of Draws in float64, which holds them all exactly. The kernels round
    the temperature to float32. draws_B5: a row per Draw."""
    assert draws_B5.dtype == np.float64 and draws_B5.shape[1] == NUM_SETTINGS
    return torch.from_numpy(draws_B5).view(torch.int64)


def any_filtered(draws_B5: np.ndarray) -> bool:
    """Whether anything may exclude tokens of some row. draws_B5: float64, a row per Draw."""
    _, temperature, top_k, top_p, log_min_p = draws_B5.T
    return bool(((temperature > 0) & ((top_k > 0) | (top_p < 1) | (log_min_p > -np.inf))).any())


def draw_tokens(logits_BV: Tensor, settings_B5: Tensor, *, filtered: bool) -> Tensor:
    """int64 [B]: the token of each row. Waits for nothing.

    logits_BV: float32, bfloat16 or float16; rows may be slices of wider ones. settings_B5: `settings_table` on the device of
    the logits. filtered: whether any row is.
    """
    rows, size = logits_BV.shape
    assert logits_BV.dtype in DTYPES and logits_BV.stride(1) == 1 and size > 0
    assert settings_B5.shape == (rows, NUM_SETTINGS) and settings_B5.dtype == torch.int64 and settings_B5.is_contiguous()
    device, num_tiles = logits_BV.device, -(-size // PEAK_TILE)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return tokens
    stride = logits_BV.stride(0)
    peaks = torch.empty(rows, num_tiles, dtype=torch.float32, device=device)
    cuts, limits = row_cuts(logits_BV, settings_B5) if filtered else (peaks, tokens)  # which are not read then
    common = {"num_settings": NUM_SETTINGS, "filtered": filtered, "tile": PEAK_TILE, "num_warps": 4}
    arguments = peaks, logits_BV, settings_B5, cuts, limits, size, stride
    launch: Any = _peaks_kernel[(rows, num_tiles)]
    launch(*arguments, **common)
    launch = _pick_kernel[(rows,)]
    launch(tokens, *arguments, num_tiles, tiles_tile=next_power(num_tiles), **common)
    return tokens
