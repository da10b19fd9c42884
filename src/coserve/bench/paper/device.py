"""The devices of the simulated evaluation: the paper's by its law, the same at the paper's measured speed, and halves of them.

Owns: the constants that differ from the table's device and why. Does not own: the law (devices/law.py), the fit
(devices/refit.py), the measured points (figures.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from coserve.bench.paper.figures import (
    SURFACE_BACKWARD_MS,
    SURFACE_BACKWARD_TOKENS,
    SURFACE_DECODE_ROWS,
    SURFACE_ROWS_MS,
)
from coserve.bench.paper.models import LARGE, LARGE_RANKS, read_shape
from coserve.bench.simulated import ITEMSIZE
from coserve.core import Contents, PassCost, UnitCost
from coserve.devices.law import device_law
from coserve.devices.refit import refit
from coserve.devices.table import Device, find_device

DEVICE = "A100-80GB"
BY_LAW, BY_SURFACE = "law", "paper-speed"
LAWS = (BY_LAW, BY_SURFACE)
"""The law as it stands, and the law that was fitted to the paper's measured points."""
FITTED = ("peak_flops", "overlap", "launch_s", "backward_rows")
"""What the paper's points can tell. Reading weights and launching kernels can't be told apart by one model, so that the
bandwidth stays, and what is left over is launches."""
SPATIAL_SHARE = 0.5
"""The part of a device that each of two processes has under `spatial`."""
_CONTEXT = 512
"""Tokens behind each decode row of the paper's points. Assumed; it matters little."""
_LAYERS = (1, 2, 4, 8)
"""Layers of the backward units that stand for the paper's line."""
_START_OVERLAP = 0.5
"""Where the fit of that share begins: at its limit, 1, it would have no slope."""


class Fit(NamedTuple):
    """The device that meets the paper's points best, for a model of so many layers, and each point: what it is, the paper's ms,
    the law's ms before the fit and after."""

    device: Device
    num_layers: int
    points: tuple[tuple[str, float, float, float], ...]


def surface_points() -> dict[str, tuple[Contents, float]]:
    """{name: (iteration, seconds)} of the paper's latency surface."""
    decode, tokens = SURFACE_DECODE_ROWS, SURFACE_BACKWARD_TOKENS
    found = {}
    for rows, ms in SURFACE_ROWS_MS.items():
        cost = PassCost(
            rows=decode + rows, head_rows=decode, decode_rows=decode, decode_context=decode * _CONTEXT, prefill_pairs=0,
            fused_rows=rows, fused_pairs=rows * (rows + 1) // 2, fused_labels=rows, adapter_segments=0, prefill_spans=0,
        )
        found[f"{decode} decode rows, {rows} forward rows"] = Contents(cost, (), 0), ms / 1e3
    alone = next(iter(found.values()))[0]
    constant, each = SURFACE_BACKWARD_MS
    for layers in _LAYERS:
        unit = UnitCost(True, tokens, layers, tokens * (tokens + 1) // 2, 0)
        contents = alone._replace(units=(unit,))
        name = f"{decode} decode rows, backward of {tokens} tokens, layers: {layers}"
        found[name] = contents, (constant + layers * each) / 1e3
    return found


def fit_surface() -> Fit:
    """Fits the named constants of the device to the paper's latency surface."""
    arch, device = read_shape(LARGE), find_device(DEVICE)
    points = surface_points()
    found = refit(
        dict(points.values()), arch, replace(device, overlap=_START_OVERLAP), itemsize=ITEMSIZE,
        tensor_parallel_size=LARGE_RANKS, names=FITTED,
    )
    fitted = replace(found, peak_flops=device.peak_flops, efficiency=found.flops / device.peak_flops)
    before, after = (
        device_law(arch, each, itemsize=ITEMSIZE, tensor_parallel_size=LARGE_RANKS) for each in (device, fitted)
    )
    return Fit(fitted, arch.num_layers, tuple(
        (name, seconds * 1e3, before.seconds(contents) * 1e3, after.seconds(contents) * 1e3)
        for name, (contents, seconds) in points.items()
    ))


def make_device(law: str, num_layers: int, fit: Fit) -> Device:
    """The device of one of LAWS for a model of so many layers. The paper's launches are in proportion to layers."""
    if law == BY_LAW:
        return find_device(DEVICE)
    return replace(fit.device, launch_s=fit.device.launch_s * num_layers / fit.num_layers)


def part_of(device: Device, share: float) -> Device:
    """What a process has of a device that others use at the same time: the same share of bandwidth, FLOP/s, link and memory, as
    MIG gives. Launches and other constants take as long as ever."""
    link = replace(device.link, bandwidth=device.link.bandwidth * share)
    return replace(
        device, bandwidth=device.bandwidth * share, peak_flops=device.peak_flops * share,
        memory_bytes=device.memory_bytes * share, link=link,
    )
