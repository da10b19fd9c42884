"""Integrations: metrics written by a process of their own, with a package of the test's making."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from coserve.finetune.job import MetricsTable, StepRow
from coserve.server.jobs.trackers import export_metrics
from coserve.server.records import JobRecord

WANDB = """
import json, os, pathlib
class Run:
    def __init__(self, **settings):
        self.path = pathlib.Path(settings["dir"]) / "wandb.json"
        self.said = {"mode": [settings["mode"], os.environ["WANDB_MODE"]], "project": settings["project"], "steps": []}
    def log(self, values, step): self.said["steps"].append([step, values])
    def finish(self): self.path.write_text(json.dumps(self.said))
def init(**settings): return Run(**settings)
"""


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, JobRecord]:
    record = JobRecord(
        id="ftjob-" + "0" * 24, tenant="me", created_at=1, base="b", training_file="f", config={}, method={},
        integrations=({"type": "wandb", "wandb": {"project": "facts"}},),
    )
    directory = tmp_path / f"{record.id}-e2"  # as a replica's run
    (directory / "output").mkdir(parents=True)
    table = MetricsTable(directory / "output" / "metrics.csv")
    table.keep(0)
    for step in (1, 2):
        table.append(StepRow(
            step=step, train_loss=4 / step, train_mean_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, tokens=9,
            seconds=1.0,
        ))
    return directory, record


def test_weights_and_biases(job: tuple[Path, JobRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, record = job
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert export_metrics(directory, record) == []
    said = json.loads((directory / "wandb.json").read_text())
    assert (said["mode"], said["project"]) == (["offline", "offline"], "facts")
    assert [(step, values["train_loss"]) for step, values in said["steps"]] == [(1, 4.0), (2, 2.0)]


def test_a_package_that_fails_is_said(job: tuple[Path, JobRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, record = job
    (tmp_path / "wandb.py").write_text("raise RuntimeError('no room for a run')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (problem,) = export_metrics(directory, record)
    assert "wandb" in problem and "no room for a run" in problem


@pytest.mark.full
def test_a_record_travels_under_any_locale(job: tuple[Path, JobRecord], tmp_path: Path) -> None:
    """As UTF-8, where the system's encoding has no such letters."""
    directory, record = job
    record = dataclasses.replace(record, metadata={"note": "\u65e5\u672c"})
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "record.json").write_bytes(msgspec.json.encode(record))
    program = (
        "import msgspec, pathlib, sys\nfrom coserve.server.jobs.trackers import export_metrics\n"
        "from coserve.server.records import JobRecord\n"
        "record = msgspec.json.decode(pathlib.Path(sys.argv[1]).read_bytes(), type=JobRecord)\n"
        "print(export_metrics(pathlib.Path(sys.argv[2]), record))\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": path}
    command = [sys.executable, "-c", program, str(tmp_path / "record.json"), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\n", done.stderr
