"""A job that is handed over leaves its engine at the end of a step, with a checkpoint that another engine goes on from."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from coserve.core import JobFailed
from coserve.finetune import job as job_module
from coserve.finetune.job import JobEvent
from tests.engine.test_job_stop import (
    SFT,
    directory,
    in_batch,
    in_optimizer,
    saved_step,
    start,
    stop_in_optimizer,
    validating,
    whole,
)
from tests.outcome import rows_of
from tests.tiny_engine import MakeEngine, drive

__all__ = ["directory", "whole"]  # fixtures


@pytest.mark.parametrize(("place", "step", "paused"), [
    (in_batch, 2, False), (in_optimizer, 4, True),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (in_batch, 0, False), (in_batch, 0, True), (in_batch, 2, True), (validating, 3, False), (validating, 3, True),
    )),
])
def test_a_job_leaves_at_the_end_of_its_step_and_goes_on_elsewhere(
    engines: MakeEngine, directory: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, step: int,
    paused: bool,
) -> None:
    output, engine, told = tmp_path / "out", engines(), list[JobEvent]()
    if place is in_optimizer:
        stop_in_optimizer(monkeypatch, step)
    handle = start(engine, directory, output, told)
    (live,) = (engine.step(), *engine.jobs.jobs.values())[1:]
    drive(engine, lambda: live.job.cursor.step >= step and place(live))
    monkeypatch.undo()
    if paused:
        handle.pause()
        engine.step()
    before = live.job.cursor.step
    handle.hand_over()
    drive(engine, lambda: handle.finished)
    assert handle.status == "handed_over" and not engine.jobs.jobs and engine.idle
    done = live.job.cursor.step
    assert saved_step(output) == done
    assert done - before == (place is in_optimizer or (place is in_batch and not paused)), "a step that has begun its update"
    with pytest.raises(JobFailed, match="was handed over"):
        handle.result()
    other = engines()
    resumed = start(other, directory, output, told, resume=True)
    drive(other)
    assert resumed.status == "succeeded"
    assert [event.row.step for event in told if event.row is not None] == list(range(1, SFT.max_steps + 1))
    assert rows_of(output) == rows_of(whole)
    assert (output / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_job_that_has_done_its_last_step_succeeds(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine = engines()
    handle = start(engine, directory, tmp_path / "out")
    drive(engine, lambda: handle.step == SFT.max_steps)
    handle.hand_over()
    drive(engine)
    assert handle.status == "succeeded"


def test_what_is_said_to_a_job_that_leaves(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    """It may still be cancelled; pause and resume change nothing once its last step is done."""
    engine = engines()
    handle = start(engine, directory, tmp_path / "out")
    (live,) = (engine.step(), *engine.jobs.jobs.values())[1:]
    handle.hand_over()
    drive(engine, lambda: live.left)
    handle.pause()
    handle.resume()
    handle.hand_over()
    handle.cancel()
    drive(engine)
    assert handle.status in ("cancelled", "handed_over")


def test_a_full_disk_makes_the_job_wait_and_a_broken_one_keeps_the_checkpoint_before(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, engine, told = tmp_path / "out", engines(), list[JobEvent]()
    handle = start(engine, directory, output, told)
    drive(engine, lambda: handle.step == 2)
    tries: list[int] = []

    def refuse(*_: object, **__: object) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC if len(tries) < 2 else errno.ENAMETOOLONG, "refused")

    monkeypatch.setattr(job_module, "save_checkpoint", refuse)
    monkeypatch.setattr("coserve.engine.diskwrite.RETRY_S", 0.05)
    handle.hand_over()
    drive(engine, lambda: handle.finished)
    assert handle.status == "handed_over" and len(tries) == 2 and saved_step(output) == 0
    messages = [event.message for event in told if event.level == "warn"]
    assert "the job waits" in messages[0] and messages[-1].startswith("no checkpoint at the end: OSError")
