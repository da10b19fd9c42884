"""What a finetuning job has computed, without how long it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coserve.finetune.job import MetricsTable, StepRow

Result = tuple[list[StepRow], bytes]


def rows_of(output: Path) -> list[StepRow]:
    """The rows of a job's directory, their seconds set to 0."""
    return [replace(row, seconds=0.0) for row in MetricsTable(output / "metrics.csv").rows()]


def result(output: Path) -> Result:
    """Its rows, and the bytes of its adapter's weights."""
    return rows_of(output), (output / "adapter_model.safetensors").read_bytes()
