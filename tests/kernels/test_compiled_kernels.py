"""Every Triton kernel, compiled for devices that are not here: no spills, wide loads, matrix units, memory that a device has.

The table is bench/kernel_launches.py. That the check can fail is shown on kernels of this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_figures import Bounds, Figures, Launch, all_figures, faults, figures, missing_tool
from kernel_launches import EXAMPLES, empty, example_launches, package_kernels

from coserve.kernels.triton import jit

try:
    import triton.language as tl
except ImportError:
    tl: Any = None  # type: ignore[no-redef]

REASON = missing_tool()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
LAUNCHES = {name: example_launches(name) for name in EXAMPLES} if REASON is None else {}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_every_kernel_has_an_example_and_bounds() -> None:
    launched = {launch.name for each in LAUNCHES.values() for launch in each}
    assert launched == package_kernels().keys(), "bench/kernel_launches.py needs an example of each kernel"
    for name, each in LAUNCHES.items():
        assert {launch.name for launch in each} == EXAMPLES[name].bounds.keys(), name


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.full) for other in (80, 100))]
)
def test_kernels_keep_to_their_bounds(capability: int) -> None:
    wanted = [(name, launch) for name, each in LAUNCHES.items() for launch in each]
    found = all_figures([(launch, capability) for _, launch in wanted])
    bounds = [EXAMPLES[name].bounds[launch.name] for name, launch in wanted]
    assert not [fault for each, bound in zip(found, bounds, strict=True) for fault in faults(each, bound)]


# --- the check can fail ---------------------------------------------------------------------------------------------------


@jit()
def _copy_rows(out: tl.tensor, x: tl.tensor, stride: tl.tensor, width: tl.constexpr) -> None:
    """A row of `width` elements."""
    row, column = tl.program_id(0), tl.arange(0, width)
    tl.store(out + row * stride + column, tl.load(x + row * stride + column))


@jit(unspecialized=("stride",))
def _copy_rows_at_any_stride(out: tl.tensor, x: tl.tensor, stride: tl.tensor, width: tl.constexpr) -> None:
    """The same, without knowing that rows are aligned."""
    row, column = tl.program_id(0), tl.arange(0, width)
    tl.store(out + row * stride + column, tl.load(x + row * stride + column))


@jit()
def _square(out: tl.tensor, x: tl.tensor, size: tl.constexpr) -> None:
    """A [size, size] product with itself."""
    index = tl.arange(0, size)
    place = index[:, None] * size + index[None, :]
    tile = tl.load(x + place)
    tl.store(out + place, tl.dot(tile, tile).to(out.dtype.element_ty))


def found_at_90(kernel: Any, *args: Any, **constants: Any) -> Figures:
    return figures(Launch(kernel, args, constants), 90)


def test_loads_are_wide_only_where_alignment_is_known() -> None:
    x, memory = empty(64, 1024), torch.empty(64 * 1024 + 1, dtype=torch.bfloat16)
    good = found_at_90(_copy_rows, x, x, 1024, width=1024)
    assert good.load_bytes == 16 and faults(good, Bounds()) == []
    for bad in (
        found_at_90(_copy_rows_at_any_stride, x, x, 1024, width=1024), found_at_90(_copy_rows, x, x, 1023, width=1024),
        found_at_90(_copy_rows, x, memory[1:], 1024, width=1024),
    ):
        assert bad.load_bytes == 2 and bad.narrow_loads > 0
        assert len(faults(bad, Bounds())) == 2
        assert not faults(bad, Bounds(load_bytes=2, narrow_loads=bad.narrow_loads))
    assert faults(good, Bounds(products=True)) and faults(good, Bounds(registers=8))


@pytest.mark.full
def test_a_tile_that_is_too_large_is_refused() -> None:
    small = found_at_90(_square, empty(64, 64), empty(64, 64), size=64)
    assert small.products > 0 and faults(small, Bounds(products=True)) == []
    large = found_at_90(_square, empty(256, 256), empty(256, 256), size=256)
    assert large.spilled_bytes > 0 or large.shared_bytes > 227 << 10
    assert any("spills" in fault or "shared" in fault for fault in faults(large, Bounds(products=True)))
    assert faults(Figures(**{**vars(small), "capability": 80, "shared_bytes": 164 << 10}), Bounds()), "an A100 has 163 KiB"
