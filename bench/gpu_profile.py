"""Where a device's time goes in an action: the share of time that it is busy, launches per layer, the longest kernels."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from gpu_clock import synchronize
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""Beginnings of the names of calls that give the device something to do."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
TOP = 8
NAME_CHARS = 70


class Span(NamedTuple):
    """Something that the device or the host did. Nanoseconds."""

    name: str
    start: int
    duration: int


def summarize(device: Iterable[Span], host: Iterable[Span], *, wall_s: float, runs: int, layers: int) -> dict[str, Any]:
    """What `runs` runs of an action on so many layers came to, per run. busy_share: of the wall's time, in which at least one
    kernel or copy ran; gaps are what the host is too slow for. busy_share is None where the device was not seen at all."""
    spans = sorted(device, key=lambda span: span.start)
    busy, end = 0, 0
    for span in spans:
        stop = span.start + span.duration
        busy += max(0, stop - max(end, span.start))
        end = max(end, stop)
    times: defaultdict[str, int] = defaultdict(int)
    counts: Counter[str] = Counter()
    for span in spans:
        times[span.name[:NAME_CHARS]] += span.duration
        counts[span.name[:NAME_CHARS]] += 1
    calls = Counter(span.name for span in host)
    longest = sorted(times, key=times.__getitem__, reverse=True)[:TOP]
    return {
        "busy_share": busy * 1e-9 / wall_s if spans else None, "device_s": busy * 1e-9 / runs, "wall_s": wall_s / runs,
        "kernels_per_layer": len(spans) / runs / layers, "kernels": len(spans) / runs,
        "launches": sum(count for name, count in calls.items() if name.startswith(LAUNCHES)) / runs,
        "waits": sum(count for name, count in calls.items() if name.startswith(WAITS) and not name.startswith(LAUNCHES)) / runs,
        "top": [
            {"name": name, "share": times[name] / max(1, sum(times.values())), "count": counts[name] / runs} for name in longest
        ],
    }


def profiled(action: Callable[[], object], device: torch.device, *, of: str, layers: int, runs: int = 1) -> dict[str, Any]:
    """A row with the summary of an action that has run before. On a CPU its operators stand in for
    kernels, which shows only that this runs. Profiling itself costs the host a microsecond or two per launch."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(runs):
            action()
        synchronize(device)
        wall_s = time.perf_counter() - begin
    results: Any = found.profiler
    on_device, on_host = [], []
    for event in results.kineto_results.events():
        span = Span(event.name(), event.start_ns(), event.duration_ns())
        is_device = event.device_type() == torch.autograd.DeviceType.CUDA if cuda else span.name.startswith("aten::")
        if not is_device:
            on_host.append(span)
        elif span.duration > 0 and not span.name.startswith(("Activity Buffer", "ProfilerStep")):
            on_device.append(span)
    return {"kind": "profile", "of": of, **summarize(on_device, on_host, wall_s=wall_s, runs=runs, layers=layers)}
