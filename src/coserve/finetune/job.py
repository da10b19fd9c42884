"""A supervised or preference job: a driver that asks for one verb after another (forward_backward, score, optim_step,
checkpoint, write, publish).

Owns: the cursor, the schedule of steps, validations and checkpoints, the table of metrics. Does not own: carrying out the verbs
(training/trainer.py, engine/), progress display (callers listen to events). Steps that run again replace their rows of metrics.
Every write is a verb too, so that the runner of the job decides how it waits while the disk refuses a write.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from coserve.config.data import finetune_config_from_dict, to_dict
from coserve.config.settings import FinetuneConfig
from coserve.config.values import settled
from coserve.core import ConfigError, Group, InvalidRequest, JobFailed
from coserve.durable import sync, write_file
from coserve.finetune.batches import BatchOrder
from coserve.finetune.checkpoints import Cursor, latest_checkpoint, load_optimizer, remove_old, save_checkpoint
from coserve.finetune.disk import insist
from coserve.finetune.optimizer import learning_rate


class StepLoss(NamedTuple):
    """Result of an optimizer batch or a validation. accuracy: share of label tokens that are the arg max. num_tokens: of the
    batch's examples. extra: the objective's own metrics."""

    loss: float
    accuracy: float
    num_tokens: int
    extra: Mapping[str, float]


class Verbs(Protocol):
    """The verbs of one job on one model."""

    def forward_backward(self, groups: Sequence[Group], step: int) -> StepLoss:
        """Adds the gradients of one optimizer batch to the adapter's gradient. step: from 0; keys the dropout masks."""

    def score(self, groups: Sequence[Group]) -> StepLoss:
        """The loss of `groups`, without gradients."""

    def optim_step(self, rate: float) -> float:
        """One optimizer update with this learning rate. Returns the gradient's norm before clipping."""

    def save(self, directory: Path) -> None:
        """Writes the adapter into a directory in PEFT's format."""

    def publish(self) -> None:
        """Makes the present weights a version that requests can use."""

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        """The optimizer's tensors by name, and the number of updates so far."""

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Restores what `optimizer_state` returned."""


class ForwardBackward(NamedTuple):
    """Asks for Verbs.forward_backward. Answered with a StepLoss."""

    groups: Sequence[Group]
    step: int

    def perform(self, verbs: Verbs) -> StepLoss:
        return verbs.forward_backward(self.groups, self.step)


class Score(NamedTuple):
    """Asks for a validation. Answered with a StepLoss."""

    groups: Sequence[Group]

    def perform(self, verbs: Verbs) -> StepLoss:
        return verbs.score(self.groups)


class OptimStep(NamedTuple):
    """Asks for an optimizer step with learning rate `rate`. Answered with the gradient's norm."""

    rate: float

    def perform(self, verbs: Verbs) -> float:
        return verbs.optim_step(self.rate)


class SaveCheckpoint(NamedTuple):
    """Asks for a checkpoint of the present weights and optimizer state, written by `Job.write_checkpoint`. An engine also
    publishes the weights. Answered with None."""

    job: Job

    def perform(self, verbs: Verbs) -> None:
        state, _ = verbs.optimizer_state()
        self.job.insist(lambda: self.job.write_checkpoint(self.job.cursor, state, verbs.save))


class Write(NamedTuple):
    """Asks for a short write into the job's directory. Answered with None when it is done."""

    job: Job
    action: Callable[[], object]

    def perform(self, verbs: Verbs) -> None:
        self.job.insist(self.action)


class Publish(NamedTuple):
    """Asks for the present weights as a version for requests. Answered with None."""

    def perform(self, verbs: Verbs) -> None:
        verbs.publish()


Verb = ForwardBackward | Score | OptimStep | SaveCheckpoint | Write | Publish


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One row of metrics.csv. valid_*: None unless a validation ran after the step. seconds: the duration of the step."""

    step: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """level: info, warn or error. row: a step's metrics, with the job's number of steps. checkpoint: directory of a checkpoint
    that was written, of step `checkpoint_step`. resumed_step: the last step that a resumed job doesn't run again."""

    level: str
    message: str
    row: StepRow | None = None
    num_steps: int = 0
    checkpoint: Path | None = None
    checkpoint_step: int = 0
    resumed_step: int | None = None


_COLUMNS = tuple(StepRow.__dataclass_fields__)


class MetricsTable:
    """metrics.csv: one row per optimizer step, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[StepRow]:
        """All rows before the first damaged line. A crash may have cut the last line."""
        if not self.path.exists():
            return []
        result = []
        whole, _, _ = self.path.read_text(errors="replace").rpartition("\n")
        for record in csv.DictReader(whole.splitlines()):
            try:
                result.append(_row(record))
            except (KeyError, TypeError, ValueError):
                break
        return result

    def keep(self, last_step: int) -> None:
        """Drops rows after `last_step`. Their steps will run again. Raises OSError."""
        rows = [row for row in self.rows() if row.step <= last_step]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([_COLUMNS, *(_cells(row) for row in rows)])
        write_file(self.path, text.getvalue().encode())

    def sync(self) -> None:
        """Flushes the appended rows to the disk, so that they survive a loss of power. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            sync(self.path)

    def append(self, row: StepRow) -> None:
        """Appends a row. If the disk takes only a part of it, that part is cut off again. Raises OSError."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow(_cells(row))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise


def _cells(row: StepRow) -> list[str]:
    return ["" if (value := getattr(row, name)) is None else repr(value) for name in _COLUMNS]


def _row(record: Mapping[str, str]) -> StepRow:
    whole = {"step", "tokens"}
    values = {name: int(record[name]) if name in whole else float(record[name]) for name in _COLUMNS if record[name] != ""}
    return StepRow(**values)  # type: ignore[arg-type]  # the columns are StepRow's fields


_LATER_FACTS = (
    "validation_digest", "start_digest", "weights_layout", "kernels", "tensor_parallel_size", "adapter_sharding",
    "quantization",
)
"""Facts that jobs begun by earlier versions didn't record."""


def refuse_changes(facts: Mapping[str, object], recorded: Mapping[str, object], where: str) -> None:
    """Raises InvalidRequest, naming the first field that differs, if a resumed job's facts are not the recorded ones. The
    adapter that the job continues may lie elsewhere, since its digest tells whether it is the same."""
    moved = facts.get("start_digest") is not None and recorded.get("start_digest") is not None
    for name, value in facts.items():
        if (name in _LATER_FACTS and name not in recorded) or (name == "start" and moved):
            continue
        found = recorded.get(name)
        if name == "settings" and isinstance(found, Mapping):
            found = _with_defaults(found)
        changed = _first_difference(name, value, found)
        if changed is not None:
            raise InvalidRequest(
                f"resume: {changed} has changed since {where} was written; use the same model, data and settings, or another "
                "output directory", param=changed,
            )


def _with_defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Recorded settings with defaults for those added since. Unchanged if they can't be read."""
    try:
        return to_dict(finetune_config_from_dict(settings))
    except (ConfigError, TypeError):
        return settings


def _first_difference(name: str, value: object, recorded: object) -> str | None:
    """The dotted path of the first field that differs, or None. Mappings are compared field by field, two levels deep."""
    if value == recorded:
        return None
    if name.count(".") < 2 and isinstance(value, Mapping) and isinstance(recorded, Mapping):
        for key in (*value, *recorded):
            found = _first_difference(f"{name}.{key}", value.get(key), recorded.get(key))
            if found is not None:
                return found
    return name


def _again(done: int, ran: int) -> str:
    """The steps that a resumed job runs again, as the end of a sentence. done: steps in the checkpoint. ran: steps that ran."""
    count = max(0, ran - done)
    if count == 0:
        return ""
    return f"; step {ran} runs again" if count == 1 else f"; {count} steps run again: {done + 1} to {ran}"


class Job:
    """One finetuning job in a directory. facts: a resumed job must have the same ones. listen: called with every event."""

    def __init__(
        self, config: FinetuneConfig, groups: Sequence[Group], validation: Sequence[Group], verbs: Verbs, directory: Path,
        *, facts: Mapping[str, object], listen: Callable[[JobEvent], None],
    ) -> None:
        self.config, self.groups, self.validation, self.verbs = config, groups, validation, verbs
        self.directory, self.facts, self.listen = directory, facts, listen
        self.order = BatchOrder(
            num_groups=len(groups), batch_size=settled(config.batch_size), seed=config.seed, shuffle=config.shuffle
        )
        self.num_steps = self.order.num_steps(config)
        self.table = MetricsTable(directory / "metrics.csv")
        self.cursor = Cursor(step=0, trained_tokens=0)
        self.saved_step = 0
        """The step of the latest checkpoint that was asked for. It may not be on the disk yet."""
        self.written_step = 0
        """The step of the newest checkpoint that this run wrote, or that it was resumed from."""
        self.unrecorded: StepRow | None = None
        """The row of the step at the cursor, until it is in the table."""

    @property
    def checkpoint_root(self) -> Path:
        return self.directory / "checkpoints"

    def resume(self) -> bool:
        """Restores the newest undamaged checkpoint; False if there is none. An event tells which steps run again. Raises
        InvalidRequest if the job's facts have changed."""
        found = latest_checkpoint(self.checkpoint_root, lambda message: self.listen(JobEvent(level="warn", message=message)))
        ran = max((row.step for row in self.table.rows()), default=0)
        if found is None:
            begins = f"there is no checkpoint to go on from: the job begins again at step 1{_again(0, ran)}"
            self.listen(JobEvent(level="info", message=begins, resumed_step=0, num_steps=self.num_steps))
            return False
        directory, manifest = found
        refuse_changes(self.facts, manifest, directory.name)
        self.verbs.restore(load_optimizer(directory), manifest["step"])
        self.cursor = Cursor(step=manifest["step"], trained_tokens=manifest["trained_tokens"])
        self.saved_step = self.written_step = self.cursor.step
        unrecorded = manifest.get("unrecorded")
        self.unrecorded = None if unrecorded is None else StepRow(**unrecorded)
        message = f"resumed after step {self.cursor.step} from {directory.name}{_again(self.cursor.step, ran)}"
        self.listen(JobEvent(level="info", message=message, resumed_step=self.cursor.step, num_steps=self.num_steps))
        return True

    def insist(self, action: Callable[[], object]) -> None:
        """Repeats a write until it succeeds; events tell of the wait. Raises errors that trying again can't fix."""
        insist(action, lambda level, message: self.listen(JobEvent(level=level, message=message)))

    def run(self) -> None:
        """Runs the remaining steps with `self.verbs`. Raises JobFailed."""
        driver, answer = self.work(), None
        while True:
            try:
                verb = driver.send(answer)
            except StopIteration:
                return
            answer = verb.perform(self.verbs)

    def work(self) -> Generator[Verb, Any, None]:
        """The job's driver: yields verbs and must be sent each answer. A checkpoint and Publish come last. Raises JobFailed."""
        recorded = self.cursor.step - (self.unrecorded is not None)
        yield Write(self, lambda: self.table.keep(recorded))
        if self.unrecorded is not None:
            yield from self._record(self.unrecorded)
        while self.cursor.step < self.num_steps:
            yield from self._step()
        if self.saved_step != self.cursor.step:
            yield self._checkpoint()
        yield Publish()

    def follow(self) -> Generator[Verb, Any, None]:
        """The driver where another member of the job writes its files, validates and publishes: the remaining steps alone.
        Raises JobFailed."""
        while self.cursor.step < self.num_steps:
            row, _ = yield from self._update()
            message = f"step {row.step}: loss {row.train_loss:.4f}"
            self.listen(JobEvent(level="info", message=message, row=row, num_steps=self.num_steps))

    def _step(self) -> Generator[Verb, Any, None]:
        self.unrecorded, extra = yield from self._update()
        yield from self._record(self.unrecorded, extra)
        every = settled(self.config.checkpoint_steps)
        if every and self.cursor.step % every == 0:
            yield self._checkpoint()

    def _update(self) -> Generator[Verb, Any, tuple[StepRow, Mapping[str, float]]]:
        """One optimizer step: its row, and the objective's own metrics. The cursor stands behind it then."""
        step, started = self.cursor.step, time.perf_counter()
        groups = [self.groups[index] for index in self.order.indices(step)]
        result: StepLoss = yield ForwardBackward(groups, step)
        if not math.isfinite(result.loss):
            message = f"the loss is {result.loss} at step {step + 1}; a lower learning rate may help"
            raise JobFailed(message, param="learning_rate")
        rate = learning_rate(self.config.optimizer, step, self.num_steps)
        norm: float = yield OptimStep(rate)
        if not math.isfinite(norm):
            message = f"the gradient's norm is {norm} at step {step + 1}; a lower learning rate may help"
            raise JobFailed(message, param="learning_rate")
        seconds = time.perf_counter() - started
        self.cursor = Cursor(step=step + 1, trained_tokens=self.cursor.trained_tokens + result.num_tokens)
        row = StepRow(
            step=step + 1, train_loss=result.loss, train_mean_token_accuracy=result.accuracy, learning_rate=rate,
            grad_norm=norm, tokens=result.num_tokens, seconds=seconds,
        )
        return row, result.extra

    def _record(self, row: StepRow, extra: Mapping[str, float] | None = None) -> Generator[Verb, Any, None]:
        """Validates after the step at the cursor, if one is due, then appends its row to the table and sends its event."""
        if self._validates():
            valid: StepLoss = yield Score(self.validation)
            row = replace(row, valid_loss=valid.loss, valid_mean_token_accuracy=valid.accuracy)
        yield Write(self, partial(self.table.append, row))
        self.unrecorded = None
        shown = "".join(f", {name} {value:.4f}" for name, value in (extra or {}).items())
        message = f"step {row.step}: loss {row.train_loss:.4f}{shown}"
        self.listen(JobEvent(level="info", message=message, row=row, num_steps=self.num_steps))

    def _checkpoint(self) -> SaveCheckpoint:
        self.saved_step = self.cursor.step
        return SaveCheckpoint(self)

    def _validates(self) -> bool:
        every = self.config.validation_steps or self.order.steps_per_epoch
        return bool(self.validation) and (self.cursor.step % every == 0 or self.cursor.step == self.num_steps)

    def write_checkpoint(
        self, cursor: Cursor, state: Mapping[str, Tensor], save: Callable[[Path], None], *, unrecorded: StepRow | None = None,
    ) -> Path:
        """Writes a checkpoint of the step at `cursor` and deletes all but the last `keep_checkpoints`. There may be a newer one
        already, if the disk refused this one at first. That one stays.

        state: the optimizer's tensors. save: writes that step's adapter into a directory. unrecorded: the step's row, if it is
        not in the table yet.
        """
        facts = dict(self.facts) if unrecorded is None else {**self.facts, "unrecorded": asdict(unrecorded)}
        self.table.sync()  # so that no checkpoint is ahead of the table on the disk
        path = save_checkpoint(self.checkpoint_root, cursor, save_adapter=save, optimizer=dict(state), facts=facts)
        self.written_step = max(self.written_step, cursor.step)
        remove_old(self.checkpoint_root, self.config.keep_checkpoints, newest=self.written_step)
        self.listen(JobEvent(
            level="info", message=f"checkpoint {path.name}", checkpoint=path, checkpoint_step=cursor.step,
        ))
        return path
