"""What the checks of kernels share: sizes, random values, the check of a kernel that works row by row.

An error is ||out - ref|| / ||ref||, of fresh random values; outputs hold NaN before. Times are at full size, errors at a size
that the reference can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_clock import checked, kernel_seconds
from torch import Tensor

from coserve.model.architecture import Architecture

BLOCK_TOKENS = 16
CHECKED_ROWS = 64
"""Rows of which a row-wise kernel's result is compared."""
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5}


class Shapes(NamedTuple):
    """rows: of row-wise kernels, enough to be larger than a device's cache; attention: (length, window, checked length);
    decode: (requests, context); adapters: (rows, adapters); loss_rows; sampled: requests."""

    rows: int
    attention: tuple[int, int, int]
    decode: tuple[tuple[int, int], ...]
    adapters: tuple[tuple[int, int], ...]
    loss_rows: int
    sampled: int
    repeats: int


FULL = Shapes(
    rows=8192, attention=(8192, 2048, 1024), decode=((1, 1024), (64, 1024), (256, 512), (16, 8192)),
    adapters=((64, 1), (64, 16), (256, 64), (2048, 16)), loss_rows=1024, sampled=256, repeats=5,
)
QUICK = Shapes(
    rows=48, attention=(128, 64, 48), decode=((2, 40),), adapters=((8, 2),), loss_rows=8, sampled=4, repeats=1,
)


def relative_error(have: Tensor, want: Tensor) -> float:
    """NaN where something was not written."""
    return float((have.double() - want.double()).norm() / want.double().norm())


@dataclass(slots=True)
class KernelChecks:
    """What checks of kernels share: random values for a model's shapes, and the check of a row-wise kernel."""

    arch: Architecture
    dtype: torch.dtype
    device: torch.device
    shapes: Shapes
    generator: torch.Generator

    def noise(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(self.dtype)

    def empty(self, *shape: int) -> Tensor:
        """Not yet written."""
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def time(self, action: Callable[[], object]) -> float:
        return kernel_seconds(action, self.device, repeats=self.shapes.repeats)

    def row_wise(
        self, name: str, run: Callable[..., None], want: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
    ) -> Iterator[dict[str, Any]]:
        """run(*outputs, *inputs) writes the outputs, which depend on the same rows of the inputs; want: the same in float64."""
        run(*outputs, *inputs)
        few = [t[:CHECKED_ROWS].double() if t.shape[0] == self.shapes.rows else t.double() for t in inputs]
        wanted = want(*few)
        error = max(relative_error(out[:CHECKED_ROWS], exact) for out, exact in zip(outputs, wanted, strict=True))
        unwritten = sum(int(out.isnan().sum()) for out in outputs)
        taken = self.time(lambda: run(*outputs, *inputs))
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        row = {"kernel": name, "rows": self.shapes.rows, "seconds": taken, "bytes_per_s": moved / taken}
        yield checked(row, math.nan if unwritten else error, TOLERANCE[self.dtype])
