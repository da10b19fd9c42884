"""Integrations: a job's metrics for TensorBoard or Weights & Biases, written offline into the job's directory when it ends.

    jobs/ID/tensorboard/events.out...      tensorboard --logdir jobs
    jobs/ID/wandb/offline-run-...          wandb sync jobs/ID/wandb/offline-run-...

`export_metrics` runs this module as a process of its own, for each integration: such packages start threads, processes and
hooks that a server must not have. It reads the job's record from its standard input, as a replica's directory of a run has no
manifest of the job's name. Both packages are optional.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from coserve.finetune.job import MetricsTable
from coserve.server.records import JobRecord

TIMEOUT_S = 120.0


def export_metrics(directory: Path, record: JobRecord) -> list[str]:
    """Writes the metrics of the job in `directory` for each of its integrations. Returns a line for each that failed."""
    problems = []
    for number, item in enumerate(record.integrations):
        command = [sys.executable, "-P", "-m", "coserve.server.jobs.trackers", str(directory), str(number)]
        environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        try:
            done = subprocess.run(
                command, input=msgspec.json.encode(record), capture_output=True, timeout=TIMEOUT_S, check=False,
                env=environment, cwd=directory,
            )
            last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1][:300]
            problem = last if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = type(error).__name__
        if problem is not None:
            problems.append(f"integration {item['type']}: metrics could not be written ({problem})")
    return problems


def _steps(directory: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for row in MetricsTable(directory / "output" / "metrics.csv").rows():
        values = {name: getattr(row, name) for name in row.__dataclass_fields__ if name != "step"}
        yield row.step, {name: value for name, value in values.items() if value is not None}


def _write_tensorboard(directory: Path) -> None:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(directory / "tensorboard"))
    for step, values in _steps(directory):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()


def _write_wandb(directory: Path, record: JobRecord, settings: Mapping[str, Any]) -> None:
    run = importlib.import_module("wandb").init(
        mode="offline", dir=str(directory), project=settings["project"], name=settings.get("name") or record.id,
        entity=settings.get("entity"), tags=settings.get("tags"), config={**record.config, "model": record.base},
    )
    for step, values in _steps(directory):
        run.log(values, step=step)
    run.finish()


def main(directory: Path, number: int, record: JobRecord) -> None:
    """Writes the metrics for one integration, given by its number. directory: the job's."""
    item = record.integrations[number]
    if item["type"] == "tensorboard":
        _write_tensorboard(directory)
    else:
        _write_wandb(directory, record, item["wandb"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), msgspec.json.decode(sys.stdin.buffer.read(), type=JobRecord))
