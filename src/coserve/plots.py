"""Plots for people: the loss curve of a job, tokens per second of both workloads, latencies against an objective, the memory of
a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coserve.finetune.job import StepRow

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#8a8f98"
_SHADES = (_BLUE, "#6fa3db", "#9b6fb5", "#e0b04c")
"""Of the purposes of a plan's memory."""


_STYLE: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


@contextmanager
def _chart(path: Path) -> Iterator[Axes]:
    """Axes to draw on; written as a PNG, with a legend, when the block ends."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        yield axes
        axes.grid(axis="y", color=_GREY, alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path)


def loss_curve(
    rows: Sequence[StepRow], path: Path, *, title: str, unit: str = "cross-entropy per label token (nats)"
) -> None:
    """Writes a PNG of training loss, its running mean, and validation loss where there is one; `unit` labels the axis."""
    steps = [row.step for row in rows]
    losses = [row.train_loss for row in rows]
    span = max(1, len(rows) // 12)
    means = [mean(losses[max(0, i - span + 1) : i + 1]) for i in range(len(rows))]
    with _chart(path) as axes:
        axes.plot(steps, losses, color=_BLUE, alpha=0.35, linewidth=1, label="training loss of a step")
        axes.plot(steps, means, color=_BLUE, linewidth=2.2, label=f"mean of the last {span} steps")
        valid = [(row.step, row.valid_loss) for row in rows if row.valid_loss is not None]
        if valid:
            axes.plot(*zip(*valid, strict=True), color=_ORANGE, marker="o", markersize=4, label="validation loss")
        axes.set(xlabel="optimizer step", ylabel=unit, title=title, ylim=(0, None))


def throughput_chart(
    times_s: Sequence[float], totals: Mapping[str, Sequence[float]], path: Path, *, span_s: float,
    shaded: tuple[float, float], shaded_label: str, title: str,
) -> None:
    """Writes a PNG of tokens per second over time, as means of the last span_s seconds. totals: counters read at `times_s`."""
    times = np.asarray(times_s, dtype=float)
    with _chart(path) as axes:
        axes.axvspan(*shaded, color=_GREY, alpha=0.15, linewidth=0, label=shaded_label)
        for (name, values), color in zip(totals.items(), (_BLUE, _ORANGE), strict=False):
            before = np.interp(times - span_s, times, values)
            spans = np.minimum(span_s, times - times[0]) if len(times) else times
            rates = np.divide(np.asarray(values) - before, spans, out=np.zeros(len(times)), where=spans > 0)
            axes.plot(times, rates, color=color, linewidth=2, label=name)
        axes.set(xlabel="seconds", ylabel=f"tokens per second (mean of {span_s:g} s)", title=title, ylim=(0, None))


def latency_curve(values_ms: Sequence[float], objective_ms: float, path: Path, *, label: str, title: str) -> None:
    """Writes a PNG of the share of requests that took at most so long, with the objective."""
    with _chart(path) as axes:
        if values_ms:
            axes.ecdf(values_ms, color=_BLUE, linewidth=2.2, label=f"{len(values_ms)} requests")
        axes.axvline(objective_ms, color=_ORANGE, linewidth=1.6, linestyle="--", label=f"objective, {objective_ms:g} ms")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel=label, ylabel="share of requests", title=title, xlim=(0, None), ylim=(0, 1.02))


def memory_plan(
    stages: Sequence[tuple[str, Mapping[str, int]]], curve: Sequence[tuple[int, float]],
    baselines: Mapping[str, tuple[int, float]], path: Path, *, title: str,
) -> None:
    """Writes a PNG: bars of stages, stacked by purpose, and baselines under them; the curve of memory against extra FLOPs.

    stages: (name, {purpose: bytes}). curve, baselines: (bytes, share of forward and backward's FLOPs).
    """
    unit, name = (1e9, "GB") if curve[0][0] >= 1e9 else (1e6, "MB")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        labels = [*(stage for stage, _ in stages), *baselines]
        ends = np.zeros(len(stages))
        for (purpose, color) in zip(stages[0][1], _SHADES, strict=True):
            sizes = np.array([parts[purpose] for _, parts in stages]) / unit
            left.barh(range(len(stages)), sizes, left=ends, color=color, label=purpose)
            ends = ends + sizes
        theirs = [size / unit for size, _ in baselines.values()]
        left.barh(range(len(stages), len(labels)), theirs, color=_ORANGE, label="saved by PyTorch" if theirs else None)
        for place, value in enumerate([*ends, *theirs]):
            left.text(value, place, f" {value:.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=10)
        left.set_yticks(range(len(labels)), labels)
        left.invert_yaxis()
        left.set(xlabel=f"{name} at the peak", xlim=(0, 1.12 * max(*ends, *theirs)))
        left.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=5, columnspacing=1.0)
        right.plot([size / unit for size, _ in curve], [ratio for _, ratio in curve], color=_BLUE, marker="o", markersize=3.5,
                   linewidth=2, label="plans")
        for (label, (size, ratio)), marker in zip(baselines.items(), ("s", "D"), strict=False):
            right.plot([size / unit], [ratio], color=_ORANGE, marker=marker, markersize=8, linestyle="", label=label)
        right.yaxis.set_major_formatter("{x:.0%}")
        right.set(xlabel=f"{name} at the peak", ylabel="matrix FLOPs run again, of forward + backward", ylim=(-0.01, None),
                  xlim=(0, 1.05 * max(*(size for size, _ in (*curve, *baselines.values())), 0) / unit))
        right.grid(color=_GREY, alpha=0.25)
        right.legend(frameon=False)
        figure.suptitle(title, fontsize=11)
        figure.savefig(path)
