"""The numbers of a roofline, measured on a model's own matrices: how fast they are read, how fast they are multiplied, and how
much of one is hidden behind the other.

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
    """This machine as a device for `device_law`. Its numbers are as achieved, so that its efficiency is 1.

    bandwidth: bytes of all layers' matrices per second of one row's products with them. peak_flops: of products of MANY_ROWS
    rows, in the dtype of the weights. overlap: from products of as many rows as the ridge has. All other numbers are those that
    a Device has by default, which are assumed for a GPU.
    The fastest of a few repeats counts, since other work on the machine only adds time.
    """
    layer = sum(map(math.prod, linear_shapes(weights.architecture).values()))
    layers = weights.architecture.num_layers
    read = _fastest(weights, rows=1, layers=layers) / layers
    used = max(1, min(layers, int(_LONG_S / _fastest(weights, rows=MANY_ROWS, layers=1))))
    multiplied = _fastest(weights, rows=MANY_ROWS, layers=used) / used
    ridge = max(1, min(MANY_ROWS, round(MANY_ROWS * read / multiplied)))
    both = _fastest(weights, rows=ridge, layers=layers) / layers
    shorter, longer = sorted((read, ridge * multiplied / MANY_ROWS))
    return Device(
        name=device_name(weights.device), memory_bytes=device_bytes(weights.device),
        bandwidth=layer * weights.dtype.itemsize / read, peak_flops=2 * MANY_ROWS * layer / multiplied, efficiency=1.0,
        overlap=max(0.0, min(1.0, 1 - (both - longer) / shorter)),
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
