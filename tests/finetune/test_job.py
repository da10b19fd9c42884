"""The job's driver over a small honest engine: one weight, AdamW-like state that a wrong resume would not reproduce."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from coserve.config.data import to_dict
from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.core import Example, Group, InvalidRequest, JobFailed
from coserve.finetune import checkpoints
from coserve.finetune.checkpoints import Cursor, latest_checkpoint, read_manifest, save_checkpoint
from coserve.finetune.job import Job, JobEvent, MetricsTable, StepLoss, StepRow, refuse_changes

COLUMNS = [
    "step", "train_loss", "train_mean_token_accuracy", "learning_rate", "grad_norm", "tokens", "seconds", "valid_loss",
    "valid_mean_token_accuracy",
]
FACTS = {"base_fingerprint": "abc", "data_digest": "def", "settings": to_dict(FinetuneConfig(lora=LoraConfig())), "start": None}


class Crash(RuntimeError):
    """Stands for a killed process."""


class FakeVerbs:
    """An engine with one weight w and momentum: the loss of a batch is (w - its mean index)^2.

    `calls` records every verb in order. fail_at: forward_backward of this step (from 0) raises Crash. losses, norms: values
    that take the place of the true ones, by step.
    """

    def __init__(
        self, *, fail_at: int | None = None, losses: dict[int, float] | None = None, norms: dict[int, float] | None = None
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail_at, self.losses, self.norms = fail_at, losses or {}, norms or {}
        self.state = {"master": torch.ones(4), "momentum": torch.zeros(4)}
        self.num_updates = 0
        self.gradient = 0.0
        self.step = 0
        self.save_error: BaseException | None = None

    def forward_backward(self, groups: Sequence[Group], step: int) -> StepLoss:
        indices = [group.index for group in groups]
        self.calls.append(("forward_backward", step, indices))
        if step == self.fail_at:
            raise Crash(f"killed in step {step}")
        self.step = step
        weight, target = float(self.state["master"][0]), sum(indices) / len(indices)
        self.gradient += 2 * (weight - target)
        loss = self.losses.get(step, (weight - target) ** 2)
        return StepLoss(loss, 1 / (1 + len(indices)), sum(group.num_tokens for group in groups), {})

    def score(self, groups: Sequence[Group]) -> StepLoss:
        self.calls.append(("score", [group.index for group in groups]))
        return StepLoss(float(self.state["master"][0]), 0.75, sum(group.num_tokens for group in groups), {})

    def optim_step(self, rate: float) -> float:
        self.calls.append(("optim_step", rate))
        norm, self.gradient = abs(self.gradient), 0.0
        self.state["momentum"].mul_(0.9).add_(norm)
        self.state["master"].sub_(rate * self.state["momentum"])
        self.num_updates += 1
        return self.norms.get(self.step, norm)

    def save(self, directory: Path) -> None:
        self.calls.append(("save", directory.name))
        (directory / "adapter_config.json").write_text("{}")
        if self.save_error is not None:
            raise self.save_error
        (directory / "adapter_model.safetensors").write_bytes(b"w" * 64)

    def publish(self) -> None:
        self.calls.append(("publish",))

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        return self.state, self.num_updates

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        self.calls.append(("restore", num_updates))
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.num_updates = num_updates

    def named(self, verb: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == verb]


def some_groups(count: int) -> list[Group]:
    """Group i holds one example of 2 + i tokens."""
    return [
        Group(index=i, examples=(Example(index=i, token_ids=np.arange(2 + i), weights=np.ones(2 + i, np.float32)),))
        for i in range(count)
    ]


def settings(**changes: Any) -> FinetuneConfig:
    """Two epochs of five groups, two a step: steps of 2, 2, 1, 2, 2, 1 groups."""
    fixed: dict[str, Any] = {"checkpoint_steps": 0, "optimizer": OptimizerConfig(learning_rate=2e-4)}
    given: dict[str, Any] = {"batch_size": 2, "epochs": 2, "shuffle": False, **fixed, **changes}
    return FinetuneConfig(**given)


def make_job(
    directory: Path, config: FinetuneConfig, verbs: FakeVerbs, *, validation: int = 0, facts: dict[str, Any] | None = None,
    groups: int = 5, events: list[JobEvent] | None = None,
) -> Job:
    directory.mkdir(exist_ok=True)
    listen: Callable[[JobEvent], None] = (lambda event: None) if events is None else events.append
    return Job(
        config, some_groups(groups), some_groups(validation), verbs, directory, facts=FACTS if facts is None else facts,
        listen=listen,
    )


def checkpoint_names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def without_time(rows: Sequence[StepRow]) -> list[StepRow]:
    return [replace(row, seconds=0.0) for row in rows]


def interrupted(directory: Path, config: FinetuneConfig, fail_at: int) -> None:
    """Runs a job until it dies in step `fail_at`."""
    with pytest.raises(Crash):
        make_job(directory, config, FakeVerbs(fail_at=fail_at)).run()


def run_step(job: Job) -> None:
    """The verbs of one step."""
    driver, answer = job._step(), None
    while True:
        try:
            verb = driver.send(answer)
        except StopIteration:
            return
        answer = verb.perform(job.verbs)


# --- the schedule of verbs ---


def test_every_epoch_sees_every_group_once_in_batches(tmp_path: Path) -> None:
    verbs = FakeVerbs()
    make_job(tmp_path, settings(), verbs).run()
    batches = [[0, 1], [2, 3], [4]]
    assert verbs.named("forward_backward") == [(step, batches[step % 3]) for step in range(6)]
    verb_names = [call[0] for call in verbs.calls]
    assert verb_names == ["forward_backward", "optim_step"] * 6 + ["save", "publish"]


def test_shuffled_epochs_are_different_permutations_that_the_seed_fixes(tmp_path: Path) -> None:
    def epochs(seed: int, name: str) -> list[list[int]]:
        verbs = FakeVerbs()
        make_job(tmp_path / name, settings(shuffle=True, seed=seed, epochs=3, batch_size=3), verbs, groups=10).run()
        seen = [index for _, indices in verbs.named("forward_backward") for index in indices]
        return [seen[i : i + 10] for i in range(0, 30, 10)]

    first = epochs(1, "a")
    assert all(sorted(epoch) == list(range(10)) for epoch in first)
    assert len({tuple(epoch) for epoch in first}) == 3
    assert epochs(1, "b") == first
    assert epochs(2, "c") != first


@pytest.mark.parametrize(("changes", "num_steps"), [
    ({"max_steps": 4}, 4), ({"max_steps": 1, "epochs": 50}, 1), ({"epochs": 0.5}, 2), ({"epochs": 1.5}, 5),
    ({"batch_size": 100, "epochs": 3}, 3), ({"batch_size": 1, "epochs": 0.01}, 1),
])
def test_number_of_steps(tmp_path: Path, changes: dict[str, Any], num_steps: int) -> None:
    verbs = FakeVerbs()
    events: list[JobEvent] = []
    make_job(tmp_path, settings(**changes), verbs, events=events).run()
    assert [step for step, _ in verbs.named("forward_backward")] == list(range(num_steps))
    assert [event.num_steps for event in events if event.row is not None] == [num_steps] * num_steps


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(tmp_path: Path, schedule: Any, warmup: int) -> None:
    verbs = FakeVerbs()
    optimizer = OptimizerConfig(learning_rate=0.003, schedule=schedule, warmup_steps=warmup)
    make_job(tmp_path, settings(max_steps=9, optimizer=optimizer), verbs).run()

    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, reference, num_warmup_steps=warmup, num_training_steps=9)
    expected = []
    for _ in range(9):
        expected.append(scheduler.get_last_lr()[0])
        reference.step()
        scheduler.step()
    assert [rate for (rate,) in verbs.named("optim_step")] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert [row.learning_rate for row in MetricsTable(tmp_path / "metrics.csv").rows()] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("changes", "after"), [
    ({}, [3, 6]), ({"validation_steps": 2}, [2, 4, 6]), ({"validation_steps": 4}, [4, 6]), ({"max_steps": 5}, [3, 5]),
])
def test_validation_runs_at_epoch_ends_or_every_so_many_steps_and_at_the_end(
    tmp_path: Path, changes: dict[str, Any], after: list[int]
) -> None:
    verbs = FakeVerbs()
    job = make_job(tmp_path, settings(**changes), verbs, validation=3)
    job.run()
    rows = job.table.rows()
    assert [row.step for row in rows if row.valid_loss is not None] == after
    assert [row.step for row in rows if row.valid_mean_token_accuracy == 0.75] == after
    assert verbs.named("score") == [([0, 1, 2],)] * len(after)
    before = [verbs.calls[i - 1][0] for i, call in enumerate(verbs.calls) if call[0] == "score"]
    assert set(before) == {"optim_step"}, "validation measures the weights after the step"


def test_no_validation_data_no_scoring(tmp_path: Path) -> None:
    verbs = FakeVerbs()
    make_job(tmp_path, settings(validation_steps=1), verbs).run()
    assert not verbs.named("score")


@pytest.mark.parametrize(("changes", "kept"), [
    ({"checkpoint_steps": 0}, [6]),
    ({"checkpoint_steps": 2, "keep_checkpoints": 9}, [2, 4, 6]),
    ({"checkpoint_steps": 4, "keep_checkpoints": 9}, [4, 6]),
    ({"checkpoint_steps": 1, "keep_checkpoints": 2}, [5, 6]),
    ({"checkpoint_steps": 5, "keep_checkpoints": 1}, [6]),
])
def test_checkpoints_every_so_many_steps_and_at_the_end(tmp_path: Path, changes: dict[str, Any], kept: list[int]) -> None:
    verbs = FakeVerbs()
    make_job(tmp_path, settings(**changes), verbs).run()
    assert checkpoint_names(tmp_path) == [f"step-{step:08d}" for step in kept]
    every = changes["checkpoint_steps"]
    written = [step for step in range(1, 7) if step == 6 or (every and step % every == 0)]
    assert verbs.named("save") == [(f".step-{step:08d}.tmp",) for step in written], "each is written once"


def test_a_checkpoint_holds_the_cursor_the_facts_and_the_optimizer(tmp_path: Path) -> None:
    verbs = FakeVerbs()
    make_job(tmp_path, settings(), verbs).run()
    directory = tmp_path / "checkpoints" / "step-00000006"
    manifest = read_manifest(directory)
    assert manifest["step"] == 6
    assert manifest["trained_tokens"] == 2 * sum(range(2, 7))
    assert {name: manifest[name] for name in FACTS} == FACTS
    assert sorted(manifest["files"]) == ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"]
    fresh = FakeVerbs()
    make_job(tmp_path, settings(), fresh).resume()
    assert torch.equal(fresh.state["master"], verbs.state["master"])
    assert torch.equal(fresh.state["momentum"], verbs.state["momentum"])
    assert fresh.named("restore") == [(6,)]


# --- metrics.csv ---


def test_metrics_rows_are_the_steps_exactly(tmp_path: Path) -> None:
    verbs = FakeVerbs()
    events: list[JobEvent] = []
    make_job(tmp_path, settings(optimizer=OptimizerConfig(learning_rate=0.1)), verbs, validation=1, events=events).run()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == COLUMNS
    assert [line[0] for line in lines[1:]] == ["1", "2", "3", "4", "5", "6"]
    assert [line[5] for line in lines[1:]] == ["5", "9", "6", "5", "9", "6"]
    assert [line[3] for line in lines[1:]] == [repr(rate) for (rate,) in verbs.named("optim_step")]
    assert [line[7] == "" for line in lines[1:]] == [True, True, False, True, True, False]
    rows = [event.row for event in events if event.row is not None]
    assert MetricsTable(tmp_path / "metrics.csv").rows() == rows, "floats survive the file to the last bit"
    assert all(row.seconds > 0 for row in rows)


@pytest.mark.parametrize("cut_validated", [False, True])
def test_a_line_cut_by_a_crash_ends_the_table(tmp_path: Path, cut_validated: bool) -> None:
    make_job(tmp_path, settings(validation_steps=2 if cut_validated else 5), FakeVerbs(), validation=1).run()
    path = tmp_path / "metrics.csv"
    whole, rows = path.read_bytes(), MetricsTable(path).rows()
    last = len(whole.rstrip().rpartition(b"\n")[2])
    for cut in range(1, last + 2):
        path.write_bytes(whole[:-cut])
        found = MetricsTable(path).rows()
        assert found in (rows, rows[:-1]), f"a line without its last {cut} bytes was read as {found[-1]}"
    path.write_bytes(whole[: -last // 2] + b"\xff\x00")
    assert MetricsTable(path).rows() == rows[:-1]


def test_replayed_steps_overwrite_their_rows(tmp_path: Path) -> None:
    config = settings(checkpoint_steps=2, optimizer=OptimizerConfig(learning_rate=0.05))
    make_job(tmp_path / "whole", config, FakeVerbs(), validation=2).run()
    expected = without_time(MetricsTable(tmp_path / "whole" / "metrics.csv").rows())

    directory = tmp_path / "broken"
    with pytest.raises(Crash):
        make_job(directory, config, FakeVerbs(fail_at=5), validation=2).run()
    path = directory / "metrics.csv"
    assert [row.step for row in MetricsTable(path).rows()] == [1, 2, 3, 4, 5], "step 5 ran after the checkpoint of step 4"
    path.write_bytes(path.read_bytes().replace(b"\r\n5,", b"\r\n5,9") + b"6,0.12")  # a different row and a cut one
    verbs = FakeVerbs()
    job = make_job(directory, config, verbs, validation=2)
    assert job.resume()
    job.run()
    assert [step for step, _ in verbs.named("forward_backward")] == [4, 5]
    assert without_time(job.table.rows()) == expected
    assert not list(directory.glob("*.tmp"))
    final = [read_manifest(tmp_path / name / "checkpoints" / "step-00000006") for name in ("whole", "broken")]
    assert final[0] == final[1]


# --- failures ---


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails_the_job_before_the_update(tmp_path: Path, loss: float) -> None:
    verbs = FakeVerbs(losses={4: loss})
    with pytest.raises(JobFailed, match=rf"loss is {loss} at step 5") as caught:
        make_job(tmp_path, settings(checkpoint_steps=2), verbs).run()
    assert caught.value.param == "learning_rate"
    assert len(verbs.named("optim_step")) == 4
    assert not verbs.named("publish")
    assert checkpoint_names(tmp_path) == ["step-00000002", "step-00000004"]
    assert [row.step for row in MetricsTable(tmp_path / "metrics.csv").rows()] == [1, 2, 3, 4]


@pytest.mark.parametrize(("norm", "step"), [(math.nan, 3), (math.inf, 3), (math.nan, 5)])
def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(tmp_path: Path, norm: float, step: int) -> None:
    verbs = FakeVerbs(norms={step: norm})
    with pytest.raises(JobFailed, match=rf"gradient.* {norm} at step {step + 1}"):
        make_job(tmp_path, settings(checkpoint_steps=1, keep_checkpoints=99), verbs).run()
    assert checkpoint_names(tmp_path) == [f"step-{done:08d}" for done in range(1, step + 1)]
    assert not verbs.named("publish")


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_nothing_is_half_written_when_saving_fails(tmp_path: Path, error: BaseException) -> None:
    verbs = FakeVerbs()
    job = make_job(tmp_path, settings(checkpoint_steps=2), verbs)
    for _ in range(3):
        run_step(job)
    verbs.save_error = error
    with pytest.raises(type(error)):
        run_step(job)
    assert checkpoint_names(tmp_path) == ["step-00000002"], "no directory under the real or a temporary name"
    read_manifest(tmp_path / "checkpoints" / "step-00000002")
    assert not verbs.named("publish")


def test_a_failed_job_can_be_resumed(tmp_path: Path) -> None:
    config = settings(checkpoint_steps=2)
    interrupted(tmp_path, config, fail_at=5)
    verbs = FakeVerbs()
    events: list[JobEvent] = []
    job = make_job(tmp_path, config, verbs, events=events)
    assert job.resume()
    assert (events[0].level, events[0].message) == ("info", "resumed after step 4 from step-00000004; step 5 runs again")
    job.run()
    assert verbs.named("restore") == [(4,)]
    assert [call[0] for call in verbs.calls].count("publish") == 1


def test_resuming_a_finished_job_only_publishes(tmp_path: Path) -> None:
    make_job(tmp_path, settings(), FakeVerbs()).run()
    rows = MetricsTable(tmp_path / "metrics.csv").rows()
    verbs = FakeVerbs()
    job = make_job(tmp_path, settings(), verbs)
    assert job.resume()
    job.run()
    assert [call[0] for call in verbs.calls] == ["restore", "publish"]
    assert job.table.rows() == rows


def test_resuming_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    interrupted(tmp_path, settings(), fail_at=2)
    verbs = FakeVerbs()
    job = make_job(tmp_path, settings(), verbs)
    assert not job.resume()
    job.run()
    assert [row.step for row in job.table.rows()] == [1, 2, 3, 4, 5, 6]
    assert not verbs.named("restore")


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"base_fingerprint": "other"}, "base_fingerprint"),
    ({"data_digest": "other"}, "data_digest"),
    ({"start": "adapters/a"}, "start"),
    ({"settings": to_dict(FinetuneConfig(lora=LoraConfig(), batch_size=3))}, "settings.batch_size"),
    ({"settings": to_dict(FinetuneConfig(lora=LoraConfig(), optimizer=OptimizerConfig(learning_rate=1.0)))},
     "settings.optimizer.learning_rate"),
    ({"settings": to_dict(FinetuneConfig(lora=LoraConfig(rank_pattern={"q_proj": 4})))}, "settings.lora.rank_pattern"),
]


@pytest.mark.parametrize(("change", "field"), CHANGED, ids=[field for _, field in CHANGED])
def test_resume_refuses_a_changed_job_and_names_what_changed(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    make_job(tmp_path, settings(), FakeVerbs()).run()
    verbs = FakeVerbs()
    job = make_job(tmp_path, settings(), verbs, facts={**FACTS, **change})
    with pytest.raises(InvalidRequest, match=rf"^resume: {field} has changed") as caught:
        job.resume()
    assert caught.value.param == field
    assert not verbs.calls
    assert checkpoint_names(tmp_path) == ["step-00000006"]


# --- damaged checkpoints ---


def truncate(directory: Path) -> None:
    path = directory / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def flip(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(bytes(data))

    return change


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    """None takes a key away."""

    def change(directory: Path) -> None:
        manifest = {**json.loads((directory / "manifest.json").read_text()), **changes}
        kept = {key: value for key, value in manifest.items() if value is not None}
        (directory / "manifest.json").write_text(json.dumps(kept))

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated file": truncate,
    "flipped bit of the adapter": flip("adapter_model.safetensors"),
    "flipped bit of the optimizer": flip("optimizer.safetensors"),
    "missing file": lambda directory: (directory / "adapter_model.safetensors").unlink(),
    "missing manifest": lambda directory: (directory / "manifest.json").unlink(),
    "empty manifest": lambda directory: (directory / "manifest.json").write_text(""),
    "half a manifest": lambda directory: (directory / "manifest.json").write_text('{"schema_version": 1, "st'),
    "manifest that is a list": lambda directory: (directory / "manifest.json").write_text("[]"),
    "other schema": edit_manifest(schema_version=99),
    "no schema": edit_manifest(schema_version=None),
    "another step": edit_manifest(step=5),
    "no step": edit_manifest(step=None),
    "no trained_tokens": edit_manifest(trained_tokens=None),
    "files that are no table": edit_manifest(files=[]),
    "no files": edit_manifest(files={}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    config = settings(checkpoint_steps=2, optimizer=OptimizerConfig(learning_rate=0.05))
    make_job(tmp_path / "whole", config, FakeVerbs()).run()
    make_job(tmp_path / "job", config, FakeVerbs()).run()
    damage(tmp_path / "job" / "checkpoints" / "step-00000006")
    events: list[JobEvent] = []
    verbs = FakeVerbs()
    job = make_job(tmp_path / "job", config, verbs, events=events)
    assert job.resume()
    assert [event.level for event in events] == ["warn", "info"]
    assert "step-00000006" in events[0].message
    assert "\n" not in events[0].message
    assert verbs.named("restore") == [(4,)]
    job.run()
    expected = MetricsTable(tmp_path / "whole" / "metrics.csv").rows()
    assert without_time(job.table.rows()) == without_time(expected)
    assert read_manifest(tmp_path / "job" / "checkpoints" / "step-00000006")["step"] == 6, "the damaged one was replaced"


def test_all_checkpoints_damaged_starts_over_and_mends_them(tmp_path: Path) -> None:
    make_job(tmp_path, settings(), FakeVerbs()).run()
    truncate(tmp_path / "checkpoints" / "step-00000006")
    events: list[JobEvent] = []
    job = make_job(tmp_path, settings(), FakeVerbs(), events=events)
    assert not job.resume()
    assert [event.level for event in events] == ["warn", "info"]
    assert "begins again at step 1; 6 steps run again: 1 to 6" in events[1].message
    job.run()
    assert read_manifest(tmp_path / "checkpoints" / "step-00000006")["step"] == 6
    assert [row.step for row in job.table.rows()] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_checkpoint_does_not_crowd_out_a_whole_one(tmp_path: Path) -> None:
    config = settings(checkpoint_steps=1, keep_checkpoints=2)
    make_job(tmp_path, config, FakeVerbs()).run()
    truncate(tmp_path / "checkpoints" / "step-00000006")
    verbs = FakeVerbs(fail_at=5)
    job = make_job(tmp_path, settings(checkpoint_steps=1, keep_checkpoints=1), verbs)
    assert job.resume()
    state, _ = verbs.optimizer_state()
    job.write_checkpoint(job.cursor, state, verbs.save)
    with pytest.raises(Crash):
        job.run()
    found = latest_checkpoint(tmp_path / "checkpoints", lambda message: None)
    assert found is not None
    assert found[1]["step"] == 5


@pytest.mark.parametrize(("keep", "left"), [(3, [2, 4]), (1, [4])])
def test_a_checkpoint_that_is_written_late_does_not_delete_a_newer_one(tmp_path: Path, keep: int, left: list[int]) -> None:
    """As when the disk refused the older one at first."""
    verbs = FakeVerbs()
    job = make_job(tmp_path, settings(keep_checkpoints=keep), verbs)
    for step in (4, 2):
        job.write_checkpoint(Cursor(step=step, trained_tokens=step), verbs.state, verbs.save)
    assert checkpoint_names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_a_checkpoint_that_another_process_deletes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server does when a user deletes the checkpoint's model."""
    remove = checkpoints.shutil.rmtree

    def beaten(path: Path, **options: Any) -> None:
        if path.name == "step-00000001":
            remove(path)
        remove(path, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", beaten)
    make_job(tmp_path, settings(checkpoint_steps=1, keep_checkpoints=1), FakeVerbs()).run()
    assert checkpoint_names(tmp_path) == ["step-00000006"]


def test_leftovers_of_an_interrupted_write_are_ignored_and_removed(tmp_path: Path) -> None:
    config = settings(checkpoint_steps=2)
    interrupted(tmp_path, config, fail_at=4)
    leftover = tmp_path / "checkpoints" / ".step-00000005.tmp"
    leftover.mkdir()
    (leftover / "optimizer.safetensors").write_bytes(b"half")
    events: list[JobEvent] = []
    job = make_job(tmp_path, config, FakeVerbs(), events=events)
    assert job.resume()
    assert [event.level for event in events] == ["info"]
    job.run()
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_leftover_under_the_same_name_is_not_mixed_in(tmp_path: Path) -> None:
    stale = tmp_path / ".step-00000001.tmp"
    stale.mkdir()
    (stale / "stranger.bin").write_bytes(b"old")
    verbs = FakeVerbs()
    directory = save_checkpoint(
        tmp_path, Cursor(step=1, trained_tokens=7), save_adapter=verbs.save, optimizer=verbs.state, facts=FACTS
    )
    assert not (directory / "stranger.bin").exists()
    assert not stale.exists()
    assert read_manifest(directory)["trained_tokens"] == 7


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    seen: list[bool] = []

    def save(directory: Path) -> None:
        (directory / "adapter_model.safetensors").write_bytes(b"a")
        seen.append((tmp_path / "step-00000001").exists())

    state = {"master": torch.zeros(2)}
    directory = save_checkpoint(tmp_path, Cursor(step=1, trained_tokens=1), save_adapter=save, optimizer=state, facts={})
    assert seen == [False]
    read_manifest(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_continued_adapter_may_lie_elsewhere_but_must_be_the_same() -> None:
    recorded = {"start": "/one/start", "start_digest": "d1"}
    refuse_changes({"start": "/two/start", "start_digest": "d1"}, recorded, "job.json")
    for facts, param in (
        ({"start": "/two/start", "start_digest": "d2"}, "start_digest"), ({"start": None, "start_digest": None}, "start"),
    ):
        with pytest.raises(InvalidRequest) as error:
            refuse_changes(facts, recorded, "job.json")
        assert error.value.param == param
    with pytest.raises(InvalidRequest):
        refuse_changes({"start": "/two/start", "start_digest": "d1"}, {"start": "/one/start"}, "job.json")
