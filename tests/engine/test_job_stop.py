"""An engine that ends keeps every step that its jobs have finished, wherever in a step they are."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.core import OptimizerSlice
from coserve.engine import jobs as engine_jobs
from coserve.engine.engine import Engine
from coserve.engine.jobs import LiveJob
from coserve.engine.verbs import BatchRun, OptimizerRun
from coserve.finetune import job as job_module
from coserve.finetune.checkpoints import latest_checkpoint
from coserve.finetune.job import JobEvent
from coserve.runtime.loaded import LoadedModel
from tests.outcome import rows_of
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import MakeEngine, drive, make_engine

SFT = FinetuneConfig(
    max_steps=8, batch_size=4, max_microbatch_tokens=512, lora=LoraConfig(r=4, dropout=0.1), checkpoint_steps=100,
    deterministic=True, optimizer=OptimizerConfig(learning_rate=1e-3), validation_steps=3,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_lines(directory / "train.jsonl", chat_lines(20))
    write_lines(directory / "valid.jsonl", chat_lines(26)[20:])
    return directory


@pytest.fixture(scope="module")
def whole(model: LoadedModel, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job that nobody stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    engine = make_engine(model)
    start(engine, directory, output)
    drive(engine)
    engine.close()
    return output


def start(
    engine: Engine, directory: Path, output: Path, events: list[JobEvent] | None = None, config: FinetuneConfig = SFT,
    **options: Any,
) -> Any:
    listen = (lambda event: None) if events is None else events.append
    return engine.finetune(
        directory / "train.jsonl", output, config, validation=directory / "valid.jsonl", listen=listen, **options
    )


def saved_step(output: Path) -> int:
    found = latest_checkpoint(output / "checkpoints", lambda message: pytest.fail(message))
    return 0 if found is None else int(found[1]["step"])


def in_optimizer(job: LiveJob) -> bool:
    """Some elements are updated, and some not."""
    return isinstance(job._run, OptimizerRun) and 0 < job._run.updated < job._run.num_elements


def validating(job: LiveJob) -> bool:
    return isinstance(job._run, BatchRun) and not job._run.train


def in_batch(job: LiveJob) -> bool:
    return isinstance(job._run, BatchRun) and job._run.train and bool(job._run._in_flight)


def stop_in_optimizer(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From `step` on, slices of the optimizer update half of their elements, so that a step's update never ends by itself."""
    optimize = LiveJob.optimize

    def half(job: LiveJob, part: OptimizerSlice) -> None:
        optimize(job, part._replace(end=part.end // 2) if job.job.cursor.step >= step else part)

    monkeypatch.setattr(LiveJob, "optimize", half)


@pytest.mark.parametrize("place", [in_optimizer, validating, in_batch])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_stopped_job_goes_on_without_running_a_step_again(
    engines: MakeEngine, directory: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, step: int
) -> None:
    output, engine = tmp_path / "out", engines()
    if place is in_optimizer:
        stop_in_optimizer(monkeypatch, step)
    start(engine, directory, output)
    (live,) = (engine.step(), *engine.jobs.jobs.values())[1:]
    drive(engine, lambda: live.job.cursor.step >= step and place(live))
    # An optimizer step that has begun is ended: its gradients can't be had again. A validated step counts, its row comes later.
    done = live.job.cursor.step + (place is in_optimizer)
    monkeypatch.undo()
    engine.close()
    assert saved_step(output) == done
    other, events = engines(), list[JobEvent]()
    job = start(other, directory, output, events, resume=True)
    drive(other)
    assert job.status == "succeeded"
    if done:
        assert [event.message for event in events if event.resumed_step == done] == [
            f"resumed after step {done} from step-{done:08d}"]
    assert rows_of(output) == rows_of(whole)
    assert (output / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [0, 1])
def test_a_checkpoint_that_is_due_at_the_stop_is_written(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The stop ends the optimizer's step, after which the job asks for a checkpoint, be it the first or a later one."""
    output, engine = tmp_path / "out", engines()
    stop_in_optimizer(monkeypatch, step)
    start(engine, directory, output, config=replace(SFT, checkpoint_steps=1))
    (live,) = (engine.step(), *engine.jobs.jobs.values())[1:]
    drive(engine, lambda: live.job.cursor.step >= step and in_optimizer(live))
    monkeypatch.undo()
    monkeypatch.setattr(engine_jobs, "_SHORT_WRITE_S", 60.0)  # rows are written while the stop waits, as on a quiet machine
    engine.close()
    assert saved_step(output) == step + 1


def test_every_iteration_is_a_good_moment_to_stop(engines: MakeEngine, directory: Path, whole: Path, tmp_path: Path) -> None:
    """Stopped and gone on with after a few iterations, again and again: no step runs twice, and the bits are the same."""
    output, told = tmp_path / "out", list[JobEvent]()
    for turn in range(200):
        engine = engines()
        job = start(engine, directory, output, told, resume=(output / "job.json").exists())
        for _ in range(17 + turn):
            engine.step()
            time.sleep(1e-4)
        finished = job.finished
        engine.close()
        if finished:
            break
    assert turn >= 2, "it was stopped"
    assert [event.row.step for event in told if event.row is not None] == list(range(1, 9))
    assert not [event.message for event in told if "run again:" in event.message or "runs again" in event.message]
    assert rows_of(output) == rows_of(whole)


def test_a_cancelled_job_writes_no_more(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine = engines()
    job = start(engine, directory, tmp_path / "out")
    drive(engine, lambda: job.step == 2)
    job.cancel()
    drive(engine)
    engine.close()
    assert saved_step(tmp_path / "out") == 0


def test_a_disk_that_is_full_at_the_stop_keeps_the_checkpoint_before(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, engine, events = tmp_path / "out", engines(), list[JobEvent]()
    job = start(engine, directory, output, events)
    drive(engine, lambda: job.step == 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job_module, "save_checkpoint", full)
    engine.close()
    assert events[-1].level == "warn" and events[-1].message.startswith("no checkpoint at the end: the disk is full")
    assert saved_step(output) == 0


def test_an_engine_that_failed_writes_no_checkpoint_of_a_broken_state(
    engines: MakeEngine, directory: Path, tmp_path: Path
) -> None:
    engine = engines()
    job = start(engine, directory, tmp_path / "out")
    drive(engine, lambda: job.step == 2)
    (live,) = engine.jobs.jobs.values()
    live.fail(ZeroDivisionError("a slice of the optimizer failed"))
    engine.close()
    assert saved_step(tmp_path / "out") == 0


def test_a_resume_says_which_steps_run_again(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    """After a kill, which leaves no time to write a checkpoint."""
    output, engine = tmp_path / "out", engines()
    job = start(engine, directory, output)
    drive(engine, lambda: job.step == 3)
    job.cancel()
    drive(engine)
    other, events = engines(), list[JobEvent]()
    start(other, directory, output, events, resume=True)
    (event,) = [event for event in events if event.resumed_step is not None]
    assert event.message == "there is no checkpoint to go on from: the job begins again at step 1; 3 steps run again: 1 to 3"
    assert (event.resumed_step, event.num_steps) == (0, 8)
