"""The loss head's rows over the vocabulary in one launch: log p(label), whether the label is the arg max, probabilities.

C rows (a chunk of label rows), V vocabulary. A program takes one row and reads it twice: largest logit and sum of exponentials
in one pass, each lane of the tile with a maximum of its own; then the probabilities, which take the logits' place, since
nothing else reads them. The second reading comes from the device's cache. Everything is computed in float32.
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

TILE = 4096
"""Tokens of the vocabulary that a program holds at a time."""

_LOWEST = -3.4028234663852886e38
"""The least finite float32. With minus infinity as a lane's first maximum, differences could be NaN."""


@jit(unspecialized=("logprobs", "correct", "labels"))  # read and written by single numbers, at any place
def _cross_entropy_kernel(
    logprobs: tl.tensor, correct: tl.tensor, logits: tl.tensor, labels: tl.tensor, size: tl.tensor, stride: tl.tensor,
    lowest: tl.constexpr, write: tl.constexpr, tile: tl.constexpr,
) -> None:
    """One row. write: whether the probabilities are wanted."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    label = tl.load(logits + tl.load(labels + row)).to(tl.float32)
    most, total = tl.full([tile], lowest, tl.float32), tl.zeros([tile], tl.float32)
    for start in range(0, size, tile):
        ids = start + tl.arange(0, tile)
        x = tl.load(logits + ids, mask=ids < size, other=lowest).to(tl.float32)
        above = x - most  # the smaller one's exponential relative to the larger one is the only one needed
        smaller = tl.exp(-tl.abs(above))
        total = tl.where(above > 0.0, total * smaller + 1.0, total + smaller)
        most = tl.maximum(most, x)
    best = tl.max(most, 0)
    total_mass = tl.sum(total * tl.exp(most - best), 0)
    tl.store(logprobs + row, label - best - tl.log(total_mass))
    tl.store(correct + row, (label == best) & (total_mass == total_mass))
    if write:
        factor = 1.0 / total_mass
        for start in range(0, size, tile):
            ids = start + tl.arange(0, tile)
            x = tl.load(logits + ids, mask=ids < size, other=lowest).to(tl.float32)
            tl.store(logits + ids, (tl.exp(x - best) * factor).to(logits.dtype.element_ty), mask=ids < size)


def label_logprobs(logprob_C: Tensor, correct_C: Tensor, logits_CV: Tensor, labels_C: Tensor, *, probabilities: bool) -> None:
    """Writes log p(label) to logprob_C (float32) and whether the label's logit is the largest to correct_C (bool).

    logits_CV: rows may be slices of wider ones. probabilities: whether softmax(logits) takes the logits' place, in their dtype;
    otherwise they stay. labels_C: int64, in [0, V). A row with NaN gives NaN, and is not correct.
    """
    rows, size = logits_CV.shape
    assert logits_CV.dtype in DTYPES and logits_CV.stride(1) == 1 and labels_C.dtype == torch.int64
    assert logprob_C.shape == correct_C.shape == labels_C.shape == (rows,)
    assert logprob_C.dtype == torch.float32 and correct_C.dtype == torch.bool
    assert logprob_C.is_contiguous() and correct_C.is_contiguous() and labels_C.is_contiguous()
    if rows == 0:
        return
    launch: Any = _cross_entropy_kernel[(rows,)]
    launch(
        logprob_C, correct_C, logits_CV, labels_C, size, logits_CV.stride(0),
        lowest=_LOWEST, write=probabilities, tile=TILE, num_warps=8,
    )
