"""A finetuning job as it was asked for (JobRequest), and with its files read and settings fixed (ResolvedJob).

    JobRequest --read_start--> with the adapter that it continues --resolve--> ResolvedJob: examples, no 'auto' settings

Owns: these steps and their checks; they write nothing. Does not own: the plan (planning/budget.py), the job's files and run
(finetuning.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve.compiler.parallelize import TensorParallel
from coserve.config.settings import PAIRED, AdapterConfig, FinetuneConfig
from coserve.config.values import settled
from coserve.core import ConfigError, InvalidRequest
from coserve.finetune.datasets import Dataset, load_training
from coserve.finetune.defaults import given_settings, keep_numbers, not_used, resolve_settings, unused_settings
from coserve.finetune.job import JobEvent
from coserve.model.architecture import Architecture
from coserve.peft.gate import PassedAdapter, read_adapter
from coserve.planning.budget import JobPlans, Workload, shape_adapter
from coserve.runtime.loaded import FoundModel, LoadedModel, adapter_base
from coserve.training.group import make_group

Model = FoundModel | LoadedModel
"""A model whose files have been found. Its weights need not be in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What was asked for.

    data, validation: JSON Lines files. directory: for the job's files. config: the settings as given, and the date for chat
    templates. start: directory of the adapter to continue. resume: whether to continue the job in `directory`. listen: called
    with every event. passed: the adapter in `start`, once it has been read. follows: whether another engine holds the job, so
    that nothing is written here.
    """

    data: Path
    directory: Path
    config: FinetuneConfig
    validation: Path | None
    start: Path | None
    resume: bool
    listen: Callable[[JobEvent], None]
    passed: PassedAdapter | None = None
    follows: bool = False

    @classmethod
    def of(
        cls, data: str | os.PathLike[str], output: str | os.PathLike[str], config: FinetuneConfig | None, *,
        validation: str | os.PathLike[str] | None, start: str | os.PathLike[str] | None, resume: bool,
        listen: Callable[[JobEvent], None],
    ) -> JobRequest:
        """A request with its paths checked. Raises InvalidRequest if `output` isn't empty, or holds no job if `resume`."""
        directory, config = Path(output), config or FinetuneConfig()
        _check_output(directory, resume)
        return cls(
            data=Path(data), directory=directory, config=_dated(config, directory, resume),
            validation=Path(validation) if validation else None, start=None if start is None else Path(start), resume=resume,
            listen=listen,
        )

    @property
    def adapter(self) -> AdapterConfig:
        """The settings of the adapter to train: those of the continued adapter, or else the given ones."""
        return self.config.adapter if self.passed is None else self.passed.config

    def read_start(self, model: Model) -> JobRequest:
        """The same request with the adapter in `start` read and checked. Raises NotFound, InvalidRequest."""
        if self.start is None:
            return self
        return dataclasses.replace(self, passed=read_adapter(self.start, adapter_base(model)))

    def resolve(
        self, model: Model, *, size: int = 1, adapter_sharding: str = "", group: TensorParallel | None = None
    ) -> ResolvedJob:
        """Reads the data and replaces every 'auto' setting. A resumed job keeps the numbers that it began with.

        size: how many ranks will share the model. adapter_sharding: where the adapter's parameters must lie on them, as for
        `adapter_group`. group: those that share it already, and have a place for every adapter. Events tell what the data
        holds. Raises NotFound, InvalidRequest, ConfigError.
        """
        arch = model.architecture
        limit = max_example_tokens(self.config, arch)
        train, held_out = load_training(self.data, model.tokenizer, self.config, max_length=limit), None
        _check_vocabulary(train, model)
        if self.validation is not None:
            held_out = load_training(
                self.validation, model.tokenizer, self.config, max_length=limit, param="validation_file"
            )
            _check_vocabulary(held_out, model)
        self._describe(train)
        config = self.config
        if self.resume:
            recorded = read_record(self.directory).get("settings")
            config = keep_numbers(config, recorded if isinstance(recorded, dict) else {})
        settings = resolve_settings(config.with_adapter(self.adapter), len(train.groups), hidden_size=arch.hidden_size)
        workload = Workload.of(train.groups, settled(settings.batch_size), settings.max_microbatch_tokens)
        itemsize = model.dtype.itemsize
        if size > 1:
            step_tokens = workload.num_tokens * workload.microbatches
            group = make_group(arch, settings, size, model.device, itemsize, step_tokens, adapter_sharding)
        plans = JobPlans(
            arch, shape_adapter(arch, self.adapter), workload, itemsize=itemsize,
            compression=settings.activation_compression, ranks=group,
        )
        return ResolvedJob(
            request=self, train=train, held_out=held_out, settings=settings, max_length=limit, plans=plans, group=group
        )

    def _describe(self, train: Dataset) -> None:
        report = train.report
        self.inform(f"{len(train.groups)} examples, {report.num_tokens} tokens, {report.num_label_tokens} of them trained, "
                    f"longest {report.longest}")
        for count, what in ((report.num_dropped, "dropped"), (report.num_truncated, "truncated")):
            if count:
                self.warn(f"{count} too long examples were {what}")
        for warning in report.warnings:
            self.warn(warning)
        given = self.config.given_adapter
        if self.passed is not None and given is not None and (left := unused_settings(given_settings(given), self.adapter)):
            self.warn(not_used(str(self.start), left))

    def inform(self, message: str) -> None:
        """Sends an event of level info."""
        self.listen(JobEvent(level="info", message=message))

    def warn(self, message: str) -> None:
        """Sends an event of level warn."""
        self.listen(JobEvent(level="warn", message=message))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedJob:
    """A request whose files have been read.

    settings: without 'auto', and with the settings of the adapter to train. max_length: of an example, in tokens. plans: the
    plans to choose from. group: the ranks that share the model, where there are several.
    """

    request: JobRequest
    train: Dataset
    held_out: Dataset | None
    settings: FinetuneConfig
    max_length: int
    plans: JobPlans
    group: TensorParallel | None


def read_record(directory: Path) -> dict[str, Any]:
    """A job's job.json: the model, data and settings with which it began. Raises InvalidRequest if it can't be read."""
    try:
        return dict(json.loads((directory / "job.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequest(f"output: {directory / 'job.json'} can't be read ({error})", param="output") from error


def _check_output(directory: Path, resume: bool) -> None:
    if resume and not (directory / "job.json").is_file():
        raise InvalidRequest(f"output: {directory} holds no job to resume; start it without resume", param="output")
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidRequest(
            f"output: {directory} exists; name a new directory, or resume the job in it with --resume", param="output"
        )


def _dated(config: FinetuneConfig, directory: Path, resume: bool) -> FinetuneConfig:
    """The settings with a date for chat templates: the given one, or else a resumed job's recorded one, or else today's."""
    if config.template_date is not None:
        return config
    date: Any = datetime.date.today().isoformat()
    if resume:
        settings = read_record(directory).get("settings")
        date = settings.get("template_date") if isinstance(settings, dict) else None
    return dataclasses.replace(config, template_date=date)


def max_example_tokens(config: FinetuneConfig, arch: Architecture) -> int:
    """The most tokens of an example, whose group must fit into a micro-batch. Raises ConfigError if `max_length` is more."""
    share = config.max_microbatch_tokens // (2 if config.objective in PAIRED else 1)
    limit = min(share, arch.max_position_embeddings)
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length: {config.max_length} is more than {limit}: an example must fit into the model's "
            f"{arch.max_position_embeddings} positions and into {'half of ' if config.objective in PAIRED else ''}"
            f"max_microbatch_tokens={config.max_microbatch_tokens}; lower max_length, or raise max_microbatch_tokens",
            param="max_length",
        )
    return config.max_length or limit


def _check_vocabulary(dataset: Dataset, model: Model) -> None:
    largest = max(int(example.token_ids.max()) for group in dataset.groups for example in group.examples)
    if largest >= model.architecture.vocab_size:
        raise InvalidRequest(
            f"model: the tokenizer in {model.directory} gives token {largest}, but the model has only "
            f"{model.architecture.vocab_size} embeddings; put the model's own tokenizer there", param="model",
        )
