"""Plots for people: the loss curve of a job, tokens per second of both workloads, latencies against an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import mean

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from coserve.finetune.job import StepRow

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#8a8f98"


def _styled() -> AbstractContextManager[None]:
    return mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})


def loss_curve(
    rows: Sequence[StepRow], path: Path, *, title: str, unit: str = "cross-entropy per label token (nats)"
) -> None:
    """Writes a PNG of training loss, its running mean, and validation loss where there is one; `unit` labels the axis."""
    steps = [row.step for row in rows]
    losses = [row.train_loss for row in rows]
    with _styled():
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        span = max(1, len(rows) // 12)
        means = [mean(losses[max(0, i - span + 1) : i + 1]) for i in range(len(rows))]
        axes.plot(steps, losses, color=_BLUE, alpha=0.35, linewidth=1, label="training loss of a step")
        axes.plot(steps, means, color=_BLUE, linewidth=2.2, label=f"mean of the last {span} steps")
        valid = [(row.step, row.valid_loss) for row in rows if row.valid_loss is not None]
        if valid:
            axes.plot(*zip(*valid, strict=True), color=_ORANGE, marker="o", markersize=4, label="validation loss")
        axes.set(xlabel="optimizer step", ylabel=unit, title=title, ylim=(0, None))
        axes.grid(axis="y", color=_GREY, alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path)


def throughput_chart(
    times_s: Sequence[float], totals: Mapping[str, Sequence[float]], path: Path, *, span_s: float,
    shaded: tuple[float, float], shaded_label: str, title: str,
) -> None:
    """Writes a PNG of tokens per second over time, as means of the last span_s seconds. totals: counters read at `times_s`."""
    times = np.asarray(times_s, dtype=float)
    with _styled():
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.axvspan(*shaded, color=_GREY, alpha=0.15, linewidth=0, label=shaded_label)
        for (name, values), color in zip(totals.items(), (_BLUE, _ORANGE), strict=False):
            before = np.interp(times - span_s, times, values)
            spans = np.minimum(span_s, times - times[0]) if len(times) else times
            rates = np.divide(np.asarray(values) - before, spans, out=np.zeros(len(times)), where=spans > 0)
            axes.plot(times, rates, color=color, linewidth=2, label=name)
        axes.set(xlabel="seconds", ylabel=f"tokens per second (mean of {span_s:g} s)", title=title, ylim=(0, None))
        axes.grid(axis="y", color=_GREY, alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path)


def latency_curve(values_ms: Sequence[float], objective_ms: float, path: Path, *, label: str, title: str) -> None:
    """Writes a PNG of the share of requests that took at most so long, with the objective."""
    with _styled():
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        if values_ms:
            axes.ecdf(values_ms, color=_BLUE, linewidth=2.2, label=f"{len(values_ms)} requests")
        axes.axvline(objective_ms, color=_ORANGE, linewidth=1.6, linestyle="--", label=f"objective, {objective_ms:g} ms")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel=label, ylabel="share of requests", title=title, xlim=(0, None), ylim=(0, 1.02))
        axes.grid(axis="y", color=_GREY, alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path)
