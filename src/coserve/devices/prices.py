"""What the compiler weighs parallel choices by (compiler/parallelize.py), from a device's data."""

from __future__ import annotations

import torch

from coserve.compiler.parallelize import Prices
from coserve.core import ConfigError
from coserve.devices.table import DEVICES, Device, Link, find_device

_CPU = Device(
    name="CPU", memory_bytes=16e9, bandwidth=20e9, peak_flops=2e11,
    link=Link(name="gloo", bandwidth=2e9, latency_s=1e-4),
)
"""A processor and gloo between its processes. Source: assumed."""
_UNKNOWN = "H100"
"""What a GPU that the table does not have is taken for."""


def machine_device(device: torch.device) -> Device:
    """This machine's device as the table has it, or the nearest there is. It only decides how an adapter is shared."""
    if device.type != "cuda":
        return _CPU
    try:
        return find_device(torch.cuda.get_device_name(device).split(",")[0])
    except ConfigError:
        return DEVICES[_UNKNOWN]


def parallel_prices(device: Device, *, itemsize: int, window_tokens: int, step_tokens: int) -> Prices:
    """Prices on equal devices that `device.link` connects. itemsize: bytes per element. window_tokens: rows that run together.
    step_tokens: rows of an optimizer step."""
    return Prices(
        flops=device.flops, bandwidth=device.bandwidth, link_bandwidth=device.link.bandwidth,
        link_latency_s=device.link.latency_s, itemsize=itemsize, window_tokens=window_tokens, step_tokens=step_tokens,
        update_bytes=device.update_bytes,
    )
