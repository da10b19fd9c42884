"""One finetuning job from files to files: what `coserve finetune` and `coserve.finetune` run.

    OUTPUT/  adapter_config.json, adapter_model.safetensors, coserve.json   the tuned adapter, in PEFT's format, at the end
             generation_config.json                                         the tokens that end its answers, if any were taught
             metrics.csv                                                    one row per optimizer step
             job.json                                                       model, data and settings
             checkpoints/step-NNNNNNNN/                                     to resume from

Everything that can be refused is refused before the output directory is made.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coserve.compiler.plan import ModelPlan
from coserve.config.data import to_dict
from coserve.config.settings import FinetuneConfig
from coserve.config.values import settled
from coserve.core import ConfigError, InvalidRequest
from coserve.durable import write_directory
from coserve.finetune.datasets import Dataset, load_training
from coserve.finetune.defaults import (
    describe_settings,
    given_settings,
    keep_numbers,
    not_used,
    resolve_settings,
    unused_settings,
)
from coserve.finetune.job import Job, JobEvent, StepRow, refuse_changes
from coserve.finetune.taught import taught_end_tokens
from coserve.kernels.native import kernels_identity
from coserve.model.architecture import Architecture, read_architecture
from coserve.model.linear import can_pack
from coserve.model.locate import locate_model
from coserve.model.memory import SLOWER, available_bytes
from coserve.model.weights import ModelWeights
from coserve.peft.adapter import Adapter
from coserve.peft.described import described_adapter
from coserve.peft.format import WEIGHTS_FILE
from coserve.planning.budget import (
    FittedPlan,
    Workload,
    asked_plan,
    fit_plan,
    require_memory,
    shape_adapter,
    training_bytes,
)
from coserve.runtime.loaded import DTYPES, LoadedModel, dtype_name, load_model, resolve_device, resolve_dtype
from coserve.text.tokenizer import ChatTokenizer
from coserve.training.trainer import AdapterTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """directory: where the adapter lies. rows: metrics of every step, earlier runs included."""

    directory: Path
    model: LoadedModel
    adapter: Adapter
    rows: tuple[StepRow, ...]


def _max_length(config: FinetuneConfig, arch: Architecture) -> int:
    """The longest example, in tokens: a group has to fit into a micro-batch."""
    share = config.max_microbatch_tokens // (2 if config.objective == "dpo" else 1)
    limit = min(share, arch.max_position_embeddings)
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length: {config.max_length} is more than {limit}: an example must fit into the model's "
            f"{arch.max_position_embeddings} positions and into {'half of ' if config.objective == 'dpo' else ''}"
            f"max_microbatch_tokens={config.max_microbatch_tokens}; lower max_length, or raise max_microbatch_tokens",
            param="max_length",
        )
    return config.max_length or limit


def _check_output(directory: Path, resume: bool) -> None:
    if resume and not (directory / "job.json").is_file():
        raise InvalidRequest(f"output: {directory} holds no job to resume; start it without resume", param="output")
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidRequest(
            f"output: {directory} exists; name a new directory, or resume the job in it with --resume", param="output"
        )


class _Chosen(NamedTuple):
    """one_copy: whether there is memory for one copy of each weight matrix only."""

    fitted: FittedPlan
    one_copy: bool


def _choose_plan(
    arch: Architecture, config: FinetuneConfig, dataset: Dataset, device: torch.device, dtype: torch.dtype,
    loaded: ModelWeights | None,
) -> _Chosen:
    """The plan with the fewest FLOPs for which there is memory; packed copies of weights go before activations do. A
    deterministic job's plan depends on its settings only. loaded: the weights, if they are in memory already."""
    adapter, available, itemsize = shape_adapter(arch, config.adapter), available_bytes(device), dtype.itemsize
    if available is not None and loaded is not None:
        available += loaded.copied_bytes  # which are counted below, and can be dropped
    workload = Workload.of(dataset.groups, settled(config.batch_size), config.max_microbatch_tokens)
    chosen = asked_plan(arch, adapter, workload, config, itemsize=itemsize)
    packed = can_pack(dtype, device)

    def needs(plan: ModelPlan, one_copy: bool) -> dict[str, int]:
        needed = training_bytes(
            arch, plan, adapter.flat.numel(), microbatch_tokens=workload.num_tokens, window_tokens=config.window_tokens,
            itemsize=itemsize, packed=packed, one_copy=one_copy,
        )
        if loaded is not None:
            needed.pop("weights")
        return needed

    one_copy = packed and available is not None and sum(needs(chosen.plan, False).values()) > available
    while available is not None and not config.deterministic and chosen.fits:
        over = sum(needs(chosen.plan, one_copy).values()) - available
        if over <= 0:
            break
        # once more where the smaller plan's workspace is larger
        chosen = fit_plan(
            arch, adapter, chosen.num_bytes - over, workload, itemsize=itemsize, compression=config.activation_compression
        )
    require_memory(needs(chosen.plan, one_copy), available)
    return _Chosen(chosen, one_copy)


def _load_data(
    path: Path, validation: str | os.PathLike[str] | None, tokenizer: ChatTokenizer, config: FinetuneConfig,
    arch: Architecture, base: Path,
) -> tuple[Dataset, Dataset | None]:
    """Training and validation data, whose tokens the model has. base: the model's directory, for messages."""
    max_length = _max_length(config, arch)
    train, held_out = load_training(path, tokenizer, config, max_length=max_length), None
    _check_vocabulary(train, arch, base)
    if validation:
        held_out = load_training(Path(validation), tokenizer, config, max_length=max_length, param="validation_file")
        _check_vocabulary(held_out, arch, base)
    return train, held_out


def _dated(config: FinetuneConfig, directory: Path, resume: bool) -> FinetuneConfig:
    """The settings with the date for chat templates: the given one, for a resumed job the one it began with, or today's."""
    if config.template_date is not None:
        return config
    date: Any = datetime.date.today().isoformat()
    if resume:
        settings = _read_job(directory).get("settings")
        date = settings.get("template_date") if isinstance(settings, dict) else None
    return dataclasses.replace(config, template_date=date)


def _resolve(
    config: FinetuneConfig, dataset: Dataset, arch: Architecture, directory: Path, start: str | os.PathLike[str] | None,
    resume: bool,
) -> FinetuneConfig:
    """The job's settings as numbers. A resumed job's are those that it began with."""
    if resume:
        recorded = _read_job(directory).get("settings")
        config = keep_numbers(config, recorded if isinstance(recorded, dict) else {})
    continued = None if start is None else described_adapter(Path(start))
    return resolve_settings(config, len(dataset.groups), continued=continued, hidden_size=arch.hidden_size)


def _check_vocabulary(dataset: Dataset, arch: Architecture, base: Path) -> None:
    largest = max(int(example.token_ids.max()) for group in dataset.groups for example in group.examples)
    if largest >= arch.vocab_size:
        raise InvalidRequest(
            f"model: the tokenizer in {base} gives token {largest}, but the model has only {arch.vocab_size} embeddings; put "
            "the model's own tokenizer there", param="model",
        )


def _tell(dataset: Dataset, listen: Callable[[JobEvent], None]) -> None:
    report = dataset.report
    listen(JobEvent(level="info", message=f"{len(dataset.groups)} examples, {report.num_tokens} tokens, "
                                          f"{report.num_label_tokens} of them trained, longest {report.longest}"))
    for count, what in ((report.num_dropped, "dropped"), (report.num_truncated, "truncated")):
        if count:
            listen(JobEvent(level="warn", message=f"{count} too long examples were {what}"))
    for warning in report.warnings:
        listen(JobEvent(level="warn", message=warning))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job that may begin: everything that could be refused has been looked at, and its directory is there."""

    job: Job
    trainer: AdapterTrainer
    directory: Path
    dataset: Dataset

    def finish(self) -> Adapter:
        """Writes the tuned adapter into the directory; returns it."""
        _write_adapter(self.directory, self.trainer)
        assert self.trainer.published is not None
        return self.trainer.published


def prepare(
    loaded: LoadedModel, data: Path, directory: Path, asked: FinetuneConfig, config: FinetuneConfig, *, train: Dataset,
    held_out: Dataset | None, validation: str | os.PathLike[str] | None, start: str | os.PathLike[str] | None, resume: bool,
    listen: Callable[[JobEvent], None], fitted: FittedPlan,
) -> PreparedJob:
    """A job on a loaded model, in its directory; gone back to its newest checkpoint with `resume`. asked: the settings as they
    were given; config: the same as numbers."""
    listen(JobEvent(level="info", message=str(fitted)))
    adapter = loaded.load_adapter(Path(start)) if start is not None else None
    if adapter is not None:
        assert adapter.config is not None, "what a file holds has settings"
        unused = unused_settings(given_settings(config.given_adapter), adapter.config) if config.given_adapter else []
        if unused:
            listen(JobEvent(level="warn", message=not_used(str(start), unused)))
    config = config.with_adapter(config.adapter if adapter is None or adapter.config is None else adapter.config)
    taught = {
        *taught_end_tokens(train.groups, loaded.tokenizer, max_length=_max_length(config, loaded.architecture)),
        *(() if adapter is None else adapter.end_token_ids),
    }
    ends = () if taught <= loaded.end_token_ids else sorted(taught | loaded.end_token_ids)
    trainer = AdapterTrainer(
        loaded, config, start=adapter, plan=fitted.plan, end_token_ids=ends,
        warn=lambda m: listen(JobEvent(level="warn", message=m)),
    )
    facts = {
        "base_fingerprint": loaded.fingerprint, "data_digest": train.report.digest,
        "validation_digest": None if held_out is None else held_out.report.digest,
        "start": None if start is None else str(start), "start_digest": None if start is None else _digest(Path(start)),
        "settings": to_dict(config),
        "threads": torch.get_num_threads() if config.deterministic else None,
        "weights_layout": f"{dtype_name(loaded.weights.dtype)} {loaded.weights.layout}" if config.deterministic else None,
        "kernels": kernels_identity(loaded.weights.norm) if config.deterministic else None,
    }
    job = Job(config, train.groups, held_out.groups if held_out else (), trainer, directory, facts=facts, listen=listen)
    listen(JobEvent(level="info", message=describe_settings(asked, config, job.num_steps)))
    if resume:
        refuse_changes(facts, _read_job(directory), "job.json")
        job.resume()
    else:
        _open_job(directory, loaded.name, data, validation, {"dtype": dtype_name(loaded.weights.dtype), **facts})
    return PreparedJob(job=job, trainer=trainer, directory=directory, dataset=train)


def _digest(start: Path) -> str:
    """Of an adapter's weights."""
    return hashlib.sha256((start / WEIGHTS_FILE).read_bytes()).hexdigest()


def prepare_beside(
    loaded: LoadedModel, data: str | os.PathLike[str], output: str | os.PathLike[str], config: FinetuneConfig, *,
    validation: str | os.PathLike[str] | None, start: str | os.PathLike[str] | None, resume: bool,
    listen: Callable[[JobEvent], None], check: Callable[[Dataset, Dataset | None, FinetuneConfig], FittedPlan],
) -> PreparedJob:
    """A job for an engine, whose pool gives it memory. check(training data, validation data, settings): chooses the plan, or
    refuses the data before anything is written. Raises as `finetune` does."""
    directory, data_path = Path(output), Path(data)
    _check_output(directory, resume)
    config = _dated(config, directory, resume)
    arch = loaded.architecture
    train, held_out = _load_data(data_path, validation, loaded.tokenizer, config, arch, loaded.directory)
    _tell(train, listen)
    settings = _resolve(config, train, arch, directory, start, resume)
    fitted = check(train, held_out, settings)
    return prepare(
        loaded, data_path, directory, config, settings, train=train, held_out=held_out, validation=validation, start=start,
        resume=resume, listen=listen, fitted=fitted,
    )


def finetune(
    data: str | os.PathLike[str], output: str | os.PathLike[str], *, model: str | LoadedModel | None = None,
    config: FinetuneConfig | None = None, validation: str | os.PathLike[str] | None = None,
    start: str | os.PathLike[str] | None = None, resume: bool = False, device: str = "auto", dtype: str = "auto",
    listen: Callable[[JobEvent], None] = lambda event: None,
) -> FinetuneResult:
    """Finetunes an adapter (LoRA unless the settings name another kind) on a JSON Lines file and writes it to a directory.

    model: a name as for `load_model`, or a loaded one. config: what it leaves 'auto' is chosen from the data, and an event says
    the numbers. start: an adapter directory to continue from. resume: go on with the job in `output` from its newest whole
    checkpoint. listen: called with every event. Raises InvalidRequest, NotFound, ConfigError, CapacityError before anything is
    written, JobFailed during the run.
    """
    directory, data_path = Path(output), Path(data)
    _check_output(directory, resume)
    asked = _dated(config or FinetuneConfig(), directory, resume)

    def report(message: str) -> None:
        listen(JobEvent(level="info", message=message))

    if isinstance(model, LoadedModel):
        base, arch, tokenizer = model.directory, model.architecture, model.tokenizer
        place, kind = model.weights.device, model.weights.dtype
    else:
        place = resolve_device(device)
        kind = resolve_dtype(_recorded_dtype(directory, place) if resume and dtype == "auto" else dtype, place, report)
        base = locate_model(model, report=report)
        arch, tokenizer = read_architecture(base), ChatTokenizer.load(base)
    train, held_out = _load_data(data_path, validation, tokenizer, asked, arch, base)
    _tell(train, listen)
    settings = _resolve(asked, train, arch, directory, start, resume)
    fitted, one_copy = _choose_plan(
        arch, settings, train, place, kind, model.weights if isinstance(model, LoadedModel) else None
    )
    loaded = model if isinstance(model, LoadedModel) else load_model(
        model, device=device, dtype=dtype_name(kind), one_copy=one_copy
    )
    if start is not None:
        continued = loaded.load_adapter(Path(start)).config
        assert continued is not None, "what a file holds has settings"
        fitted, one_copy = _choose_plan(arch, settings.with_adapter(continued), train, place, kind, loaded.weights)
    loaded.weights.hold_one_copy(one_copy)
    if one_copy:
        report(f"each weight matrix is held once: there is no memory for packed copies; {SLOWER}")
    prepared = prepare(
        loaded, data_path, directory, asked, settings, train=train, held_out=held_out, validation=validation, start=start,
        resume=resume, listen=listen, fitted=fitted,
    )
    were_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(were_deterministic or settings.deterministic)
    try:
        prepared.job.run()
    finally:
        torch.use_deterministic_algorithms(were_deterministic)
    prepared.job.insist(prepared.finish)
    adapter = prepared.trainer.published
    assert adapter is not None
    return FinetuneResult(directory=directory, model=loaded, adapter=adapter, rows=tuple(prepared.job.table.rows()))


def _open_job(
    directory: Path, model: str, data: Path, validation: str | os.PathLike[str] | None, facts: dict[str, Any]
) -> None:
    """Makes the output directory with its job.json, at once."""
    record = {"model": model, "training_file": str(data), "validation_file": None if validation is None else str(validation)}

    def fill(temporary: Path) -> None:
        (temporary / "job.json").write_text(json.dumps({**record, **facts}, indent=2) + "\n")

    directory.parent.mkdir(parents=True, exist_ok=True)
    write_directory(directory, fill)


def _read_job(directory: Path) -> dict[str, Any]:
    """The record that `_open_job` wrote."""
    try:
        return dict(json.loads((directory / "job.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequest(f"output: {directory / 'job.json'} can't be read ({error})", param="output") from error


def _recorded_dtype(directory: Path, device: torch.device) -> str:
    """What a job began in, which is what 'auto' means when it is resumed. Jobs that earlier versions began don't say: there
    'auto' was float32 on the CPU."""
    found = _read_job(directory).get("dtype")
    return found if found in DTYPES else "float32" if device.type == "cpu" else "auto"


def _write_adapter(directory: Path, trainer: AdapterTrainer) -> None:
    """Puts the adapter's files into the output directory, each by rename, the configuration last."""
    staged = directory / "adapter"
    write_directory(staged, trainer.save)
    for path in sorted(staged.iterdir(), key=lambda p: p.name == "adapter_config.json"):
        os.replace(path, directory / path.name)
    staged.rmdir()
