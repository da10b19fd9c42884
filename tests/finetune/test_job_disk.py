"""A job whose files the disk refuses: it waits and says so once, goes on when there is room, and nobody else notices."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from coserve.config.settings import FinetuneConfig, LoraConfig, SamplingConfig
from coserve.engine import diskwrite
from coserve.engine.engine import Engine
from coserve.finetune import checkpoints, disk
from coserve.finetune import job as job_module
from coserve.finetune.disk import refusal_of
from coserve.finetune.job import JobEvent, MetricsTable, StepRow
from coserve.runtime.loaded import LoadedModel
from coserve.training.finetuning import finetune
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import MakeEngine, drive, prompt

SFT = FinetuneConfig(max_steps=6, batch_size=4, max_microbatch_tokens=512, lora=LoraConfig(r=4), checkpoint_steps=2)
GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)
ROW = StepRow(
    step=1, train_loss=1.0, train_mean_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, tokens=10, seconds=0.1
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "train.jsonl", chat_lines(20))


class Disk:
    """A disk that is full while `full` is true. tries: writes it has refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.full, self.tries, self.code = False, 0, code
        monkeypatch.setattr(disk, "RETRY_S", 0.01)
        monkeypatch.setattr(diskwrite, "RETRY_S", 0.01)
        self._guard(monkeypatch, MetricsTable, "append")
        self._guard(monkeypatch, job_module, "save_checkpoint")
        self._guard(monkeypatch, checkpoints, "write_directory")

    def _guard(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
        write: Callable[..., Any] = getattr(place, name)

        def guarded(*arguments: Any, **options: Any) -> Any:
            if self.full:
                self.tries += 1
                raise OSError(self.code, os.strerror(self.code))
            return write(*arguments, **options)

        monkeypatch.setattr(place, name, guarded)


def messages(events: list[JobEvent], part: str) -> list[str]:
    return [event.message for event in events if part in event.message]


# --- which refusals pass ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_what_the_disk_refuses_for_now(code: int) -> None:
    reason = refusal_of(OSError(code, os.strerror(code)))
    assert reason is not None
    assert ("full" in reason) == (code in (errno.ENOSPC, errno.EDQUOT))


def test_safetensors_errors_carry_the_systems_number() -> None:
    full = 'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
    assert refusal_of(SafetensorError(full)) == "the disk is full"
    assert refusal_of(SafetensorError("I/O error: No space left on device (os error 28)")) == "the disk is full"
    assert refusal_of(SafetensorError("invalid header")) is None


@pytest.mark.parametrize("error", [OSError("no number"), FileNotFoundError(errno.ENOENT, "gone"), ValueError("28")])
def test_what_does_not_pass(error: Exception) -> None:
    assert refusal_of(error) is None


def test_a_row_that_a_full_disk_took_half_of_leaves_no_trace(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    table = MetricsTable(tmp_path / "metrics.csv")
    table.keep(0)
    table.append(ROW)
    before = table.path.read_bytes()

    class Torn(MetricsTable):
        """Half of the row reaches the disk, then it is full."""

    with pytest.MonkeyPatch.context() as patch:
        def half(values: StepRow) -> list[str]:
            with table.path.open("ab") as file:
                file.write(b"2,0.5,")
            raise OSError(errno.ENOSPC, "full")

        patch.setattr(job_module, "_cells", half)
        with pytest.raises(OSError, match="full"):
            Torn(table.path).append(replace(ROW, step=2))
    assert table.path.read_bytes() == before
    table.append(replace(ROW, step=2))
    assert [row.step for row in table.rows()] == [1, 2]


def test_a_table_that_a_full_disk_refuses_leaves_the_old_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.keep(0)
    table.append(ROW)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        table.keep(0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"] and len(table.rows()) == 1


# --- a job that waits ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_job_waits_and_ends_as_if_nothing_had_been(
    engines: MakeEngine, model: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    finetune(data, tmp_path / "reference", model=model, config=SFT)
    place, engine, events = Disk(monkeypatch, code), engines(), list[JobEvent]()
    job = engine.finetune(data, tmp_path / "out", SFT, listen=events.append)
    drive(engine, lambda: job.step == 3)
    place.full = True
    drive(engine, lambda: place.tries > 5)
    told = messages(events, "the job waits")
    assert len(told) == 1 and (code != errno.ENOSPC or "the disk is full" in told[0]), "once, however often it is tried"
    assert not job.finished
    expected = engine.generate([prompt(9)], GREEDY)  # the engine's thread is free
    assert len(expected[0].token_ids) == 24
    other_tries = place.tries
    drive(engine, lambda: place.tries > other_tries)
    assert job.status == "running" and not messages(events, "goes on;")
    place.full = False
    drive(engine)
    assert job.status == "succeeded", job.error
    assert len(messages(events, "the job goes on")) == 1
    rows, wanted = (MetricsTable(tmp_path / name / "metrics.csv").rows() for name in ("out", "reference"))
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.train_loss for row in rows] == pytest.approx([row.train_loss for row in wanted], rel=1e-4)
    assert [event.row.step for event in events if event.row is not None] == [1, 2, 3, 4, 5, 6], "told once, when written"


def test_other_jobs_go_on_while_one_waits(
    engines: MakeEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diskwrite, "RETRY_S", 0.01)
    append = MetricsTable.append

    def refuse(table: MetricsTable, row: StepRow) -> None:
        if "first" in str(table.path):
            raise OSError(errno.ENOSPC, "full")
        append(table, row)

    monkeypatch.setattr(MetricsTable, "append", refuse)
    engine = engines()
    first, second = (engine.finetune(data, tmp_path / name, SFT) for name in ("first", "second"))
    drive(engine, lambda: second.finished)
    assert (first.status, second.status, first.step) == ("running", "succeeded", 0)
    first.cancel()
    drive(engine)
    assert first.status == "cancelled"


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_cancel_and_pause_work_while_a_job_waits(
    engines: MakeEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    place, engine = Disk(monkeypatch, errno.ENOSPC), engines()
    job = engine.finetune(data, tmp_path / "out", SFT)
    drive(engine, lambda: job.step == 1)
    place.full = True
    drive(engine, lambda: place.tries > 2)
    getattr(job, action)()
    engine.step()
    assert job.status == {"cancel": "cancelled", "pause": "paused"}[action]
    place.full = False
    if action == "pause":
        drive(engine, lambda: job.step == 2)  # the step that was done is recorded
        for _ in range(20):
            engine.step()
        assert (job.status, job.step) == ("paused", 2)
        job.resume()
        drive(engine)
        assert job.status == "succeeded"


def test_a_full_disk_at_the_very_end_delays_the_end(
    engines: MakeEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, engine, events = Disk(monkeypatch, errno.ENOSPC), engines(), list[JobEvent]()
    job = engine.finetune(data, tmp_path / "out", replace(SFT, checkpoint_steps=6), listen=events.append)
    drive(engine, lambda: job.step == 5)

    def fill(event: JobEvent) -> None:
        place.full = place.full or (event.row is not None and event.row.step == 6)

    job.listen, listen = (lambda event: (listen(event), fill(event))[0]), job.listen  # type: ignore[func-returns-value,method-assign]
    drive(engine, lambda: place.tries > 2)
    assert (job.status, job.step) == ("running", 6)
    place.full = False
    drive(engine)
    assert job.status == "succeeded" and (tmp_path / "out" / "adapter_config.json").is_file()


def test_without_an_engine_a_job_waits_too(
    model: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, events = Disk(monkeypatch, errno.ENOSPC), list[JobEvent]()

    def listen(event: JobEvent) -> None:
        events.append(event)
        place.full = event.row is not None and event.row.step == 2 and place.tries == 0

    def sleep(_: float) -> None:
        place.full = place.tries < 3

    monkeypatch.setattr(time, "sleep", sleep)
    finetune(data, tmp_path / "out", model=model, config=SFT, listen=listen)
    assert place.tries >= 3
    assert len(messages(events, "the job waits")) == len(messages(events, "the job goes on")) == 1
    assert [row.step for row in MetricsTable(tmp_path / "out" / "metrics.csv").rows()] == [1, 2, 3, 4, 5, 6]


def test_an_error_that_does_not_pass_still_fails_the_job(
    engines: MakeEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "the directory is gone")

    monkeypatch.setattr(job_module, "save_checkpoint", gone)
    engine: Engine = engines()
    job = engine.finetune(data, tmp_path / "out", SFT)
    drive(engine)
    assert job.status == "failed" and "the directory is gone" in str(job.error)
