"""Timing on any device, and what a machine can do at most."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, by the vendor's data sheets."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 1) -> float:
    """The median of so many runs, each to its end on the device."""
    for _ in range(warmup):
        action()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times)


def release(device: torch.device) -> None:
    """Gives back what nobody refers to any more, and restarts the count of peak memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that tensors took since `release`; nothing where that can't be told."""
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def ceilings(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measured: a large product and a large copy (read and written bytes). From the data sheet: peak_flops, where known."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 512 if quick else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = seconds(lambda: torch.mm(a, b, out=out), device, repeats=10, warmup=3)
    source = torch.empty(1 << (22 if quick else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device, repeats=10, warmup=3)
    found: dict[str, Any] = {"matmul_flops": 2 * size**3 / product, "copy_bytes_per_s": 2 * source.numel() / copy}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return found if peak is None else {**found, "peak_flops": peak}
