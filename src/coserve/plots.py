"""Plots for people: the loss curve of a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.figure import Figure

from coserve.finetune.job import StepRow

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#8a8f98"


def loss_curve(
    rows: Sequence[StepRow], path: Path, *, title: str, unit: str = "cross-entropy per label token (nats)"
) -> None:
    """Writes a PNG of training loss, its running mean, and validation loss where there is one; `unit` labels the axis."""
    steps = [row.step for row in rows]
    losses = [row.train_loss for row in rows]
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
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
