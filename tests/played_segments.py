"""The kernels that take each row's adapter slot (`kernels/triton/segments.py`), played by plain products on the CPU.

T rows, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from coserve.kernels.triton import segments
from coserve.kernels.triton.segments import NO_SLOT, TRAINING, SlotFactors
from coserve.runtime import adapters


def play_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on adapters lie in memory as on a device with Triton's kernels, and rows are served by their slots."""
    monkeypatch.setattr(adapters, "runs_triton", lambda device: True)
    for kernel in (segment_linear, segment_pairs, segment_scale):
        monkeypatch.setattr(segments, kernel.__name__, kernel)


def _parts(factors: SlotFactors, site: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(rows as a mask, factor [out, in], scale) of each slot that has one."""
    stack, trained = factors.stacks[site], factors.training[site]
    assert stack is None or stack.is_contiguous()
    assert factors.slots.dtype == torch.int32
    for slot in factors.slots.unique().tolist():
        if slot == TRAINING and trained is not None:
            yield factors.slots == slot, trained, factors.scales[site]
        elif slot not in (NO_SLOT, TRAINING) and stack is not None:
            yield factors.slots == slot, stack[slot], 1.0


def segment_linear(outs: Sequence[Tensor], x: Tensor, factors: SlotFactors, *, accumulate: bool) -> None:
    for site, out in enumerate(outs):
        assert factors.slots.shape == x.shape[:1] == out.shape[:1]
        if not accumulate:
            out.zero_()
        for rows, factor, scale in _parts(factors, site):
            num_out, num_in = factor.shape
            out[rows, :num_out] += scale * (x[rows, :num_in] @ factor.T)


def segment_pairs(
    outs: Sequence[Tensor], inner: Sequence[Tensor] | None, x: Tensor, down: SlotFactors, up: SlotFactors, *, accumulate: bool
) -> None:
    for site, out in enumerate(outs):
        each = [SlotFactors(part.slots, *([field[site]] for field in part[1:])) for part in (down, up)]
        widest = max(part.shape[-2] for part in (down.stacks[site], down.training[site]) if part is not None)
        middle = x.new_zeros(x.shape[0], widest) if inner is None else inner[site]
        segment_linear([middle], x, each[0], accumulate=False)
        segment_linear([out], middle, each[1], accumulate=accumulate)


def segment_scale(out: Tensor, x: Tensor, factors: SlotFactors, *, accumulate: bool) -> None:
    x, center = x.clone(), factors.centers[0]
    if not accumulate:
        out.zero_()
    for rows, factor, _ in _parts(factors, 0):
        width = factor.shape[0]
        out[rows, :width] += (x[rows, :width] - (0 if center is None else center)) * factor[:, 0]
