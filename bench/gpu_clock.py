"""Timing on any device, what a machine is, and what it can do at most."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_rows import Item, read_rows

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16, by the vendor's data sheets."""
BURST_S = 2e-3
"""Short actions are timed several together, for so many seconds."""


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, ready for bfloat16 and deterministic jobs as the engine wants it."""
    from coserve.runtime.loaded import resolve_device

    return resolve_device(options.device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 1) -> float:
    """The median of so many runs, each to its end on the device. Never of the first: kernels are compiled in it."""
    for _ in range(max(1, warmup)):
        action()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times)


def kernel_seconds(action: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """The time of one run among many that are queued together: the wait for the device is not in it, launches are where they
    take longer than the work."""
    once = seconds(action, device, repeats=2, warmup=2)
    count = max(1, min(50, int(BURST_S / max(once, 1e-7))))

    def burst() -> None:
        for _ in range(count):
            action()

    return seconds(burst, device, repeats=repeats) / count


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that tensors took since the item began; nothing where that can't be told."""
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def environment_items(options: argparse.Namespace) -> list[Item]:
    """What the machine is, and its ceilings. Nothing of coserve is needed."""
    is_there = options.device != "cpu" and torch.cuda.is_available()
    if options.device == "cuda" and not is_there:
        raise RuntimeError("there is no CUDA device")
    device = torch.device("cuda" if is_there else "cpu")
    return [Item("machine", lambda: [machine(device)]), Item("ceilings", lambda: [ceilings(device, options.quick)])]


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions and memory."""
    row: dict[str, Any] = {
        "device": platform.processor() or platform.machine(), "versions": versions(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        row |= {
            "device": found.name, "multiprocessors": found.multi_processor_count, "free_bytes": free, "total_bytes": total,
            "capability": f"{found.major}.{found.minor}", "nvidia_smi": nvidia_smi(),
        }
    return row


def nvidia_smi() -> str:
    """Driver, clocks, power and temperature as the driver's tool reads them; nothing is set."""
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3).stdout.strip()
    return ""


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "peft", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def ceilings(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measured: a large product, a large copy (bytes read and written), the host's time per launch. By the data sheet:
    peak_flops, where known."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 512 if quick else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = seconds(lambda: torch.mm(a, b, out=out), device, repeats=10, warmup=3)
    source = torch.empty(1 << (22 if quick else 30), dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device, repeats=10, warmup=3)
    few = torch.zeros(16, device=device)
    launch = seconds(lambda: [few.add_(1) for _ in range(1000)], device, repeats=3) / 1000
    found: dict[str, Any] = {
        "matmul_flops": 2 * size**3 / product, "copy_bytes_per_s": 2 * source.numel() / copy, "launch_s": launch,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return found if peak is None else {**found, "peak_flops": peak}


def known_ceilings(options: argparse.Namespace) -> dict[str, Any]:
    """What `ceilings` found in an earlier part of the same run; nothing if it was not among them."""
    return next((row for row in read_rows(options.rows) if "matmul_flops" in row), {})


def checked(row: dict[str, Any], error: float, tolerance: float) -> dict[str, Any]:
    """A row with its relative error, and as failed where that is over the tolerance or no number."""
    row = {**row, "relative_error": error, "tolerance": tolerance}
    wrong = f"{row.get('kernel', '')}: relative error {error:.2e}, over {tolerance:g}"
    return row if error <= tolerance else {**row, "failed": wrong}

