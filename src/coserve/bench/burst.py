"""What a burst of requests does to finetuning: the time series and its reading.

Owns: bins over time, and when finetuning yielded and came back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coserve.bench.driver import Run
from coserve.bench.metrics import RequestRecord

BIN_S = 0.25
SMOOTH_BINS = 4
"""Finetuning advances in units of many tokens, so a rate is judged over this many bins (one second)."""
BACK_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Per bin of BIN_S seconds: its start, rates in tokens per second, requests waiting for their first token at its end."""

    time_s: tuple[float, ...]
    inference_tokens_per_s: tuple[float, ...]
    finetune_tokens_per_s: tuple[float, ...]
    queue: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstReading:
    """Seconds from the window's start, rates in finetuning tokens per second; None: it did not happen in the window."""

    base_rate: float
    """Mean before the burst."""
    lowest_rate: float
    """Least over a second, from the burst's start until the queue was empty."""
    queue_empty_s: float | None
    """First time after the burst's end with no request waiting for its first token."""
    recovery_s: float | None
    """From then until a second begins in which finetuning runs at BACK_SHARE of its base rate; 0: it was never away."""


def bin_series(run: Run) -> Series:
    """The run's window in bins. Between two samples finetuning is taken to advance evenly."""
    count = math.ceil(run.window_s / BIN_S - 1e-9)
    edges = np.arange(count + 1) * BIN_S
    tokens = np.array([t for record in run.records for t in record.token_times])
    done = np.interp(edges, [s.time_s for s in run.samples], [s.finetune_tokens for s in run.samples])
    return Series(
        time_s=tuple(float(t) for t in edges[:-1]),
        inference_tokens_per_s=tuple(float(n) / BIN_S for n in np.histogram(tokens, edges)[0]),
        finetune_tokens_per_s=tuple(float(n) / BIN_S for n in np.diff(done)),
        queue=tuple(queue_at(run.records, float(t)) for t in edges[1:]),
    )


def queue_at(records: Sequence[RequestRecord], time_s: float) -> int:
    """Requests that were due and had no token yet."""
    return sum(r.due_s <= time_s and (not r.token_times or r.token_times[0] > time_s) for r in records)


def read_burst(series: Series, records: Sequence[RequestRecord], burst_start_s: float, burst_end_s: float) -> BurstReading:
    """Reads yielding and return off a series."""
    rates = np.array(series.finetune_tokens_per_s)
    times = np.array(series.time_s)
    base = float(rates[times + BIN_S <= burst_start_s].mean())
    width = min(SMOOTH_BINS, len(rates))
    smooth = np.convolve(rates, np.full(width, 1 / width), mode="valid")  # smooth[i]: the second that starts with bin i
    # The queue can only become empty at the burst's end or when a request gets its first token.
    moments = [burst_end_s, *sorted(r.token_times[0] for r in records if r.token_times and r.token_times[0] > burst_end_s)]
    last = times[-1] + BIN_S
    empty = next((t for t in moments if t <= last and queue_at(records, t) == 0), None)
    until = last if empty is None else empty
    affected = [rate for t, rate in zip(times, smooth, strict=False) if burst_start_s <= t <= until]
    recovery = None
    if empty is not None:
        back = (float(t) for t, rate in zip(times, smooth, strict=False) if t + BIN_S > empty and rate >= BACK_SHARE * base)
        first = next(back, None)
        recovery = None if first is None else max(0.0, first - empty)
    return BurstReading(
        base_rate=base, lowest_rate=float(min(affected, default=base)), queue_empty_s=empty, recovery_s=recovery
    )
