"""The two numbers of a roofline, measured on a model's own matrices: how fast they are read, and how fast they are multiplied.

Owns: that measurement. Does not own: the law that it gives (devices/law.py), the profile (measure.py).
"""

from __future__ import annotations

import math
import time

import torch

from coserve.devices.table import Device
from coserve.machine import device_name
from coserve.model.decoder import MERGED, linear_shapes
from coserve.model.memory import device_bytes
from coserve.model.weights import ModelWeights

MANY_ROWS = 1024
"""Rows of the products that measure FLOP/s: far beyond the ridge of most devices."""
_LONG_S = 0.2
"""A product's measurement takes as many layers as run in about this time, but at least one."""
_REPEATS = 3

_MATRICES = (*MERGED, "o_proj", "down_proj")
"""The frozen matrices of a layer, as forward multiplies by them."""


@torch.no_grad()
def measured_device(weights: ModelWeights) -> Device:
    """This machine as a device for `device_law`. Both numbers are as achieved, so that its efficiency is 1.

    bandwidth: bytes of all layers' matrices per second of one row's products with them. peak_flops: of products of MANY_ROWS
    rows, in the dtype of the weights. All other numbers are those that a Device has by default, which are assumed for a GPU.
    The fastest of a few repeats counts, since other work on the machine only adds time.
    """
    layer = sum(map(math.prod, linear_shapes(weights.architecture).values()))
    layers = weights.architecture.num_layers
    few = _fastest(weights, rows=1, layers=layers)
    one = _fastest(weights, rows=MANY_ROWS, layers=1)
    used = max(1, min(layers, int(_LONG_S / one)))
    many = _fastest(weights, rows=MANY_ROWS, layers=used)
    return Device(
        name=device_name(weights.device), memory_bytes=device_bytes(weights.device),
        bandwidth=layers * layer * weights.dtype.itemsize / few, peak_flops=2 * MANY_ROWS * used * layer / many, efficiency=1.0,
    )


def _fastest(weights: ModelWeights, *, rows: int, layers: int) -> float:
    """Seconds of products of `rows` rows with all matrices of the first `layers` layers. Once before that counts for nothing:
    matrices may be packed at their first use."""
    shapes = linear_shapes(weights.architecture)
    merged = {name: (sum(shapes[site][0] for site in sites), shapes[sites[0]][1]) for name, sites in MERGED.items()}
    sizes = {name: (shapes | merged)[name] for name in _MATRICES}
    widths = {width for _, width in sizes.values()}
    inputs = {width: torch.randn(rows, width, device=weights.device).to(weights.dtype) for width in widths}
    times = []
    for _ in range(1 + _REPEATS):
        _wait(weights.device)
        started = time.perf_counter()
        for layer in weights.layers[:layers]:
            for name, (wide, width) in sizes.items():
                linear = layer.linears[name]
                if linear.product(inputs[width]) is None:
                    linear.forward(torch.empty(rows, wide, dtype=weights.dtype, device=weights.device), inputs[width])
        _wait(weights.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
