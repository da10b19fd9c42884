"""One finetuning job, from data files to the adapter's files. `coserve finetune` and `coserve.finetune` run this.

    OUTPUT/  adapter_config.json, adapter_model.safetensors, coserve.json   the tuned adapter, in PEFT's format, at the end
             generation_config.json                                         the tokens that end its answers, if any were taught
             metrics.csv                                                    one row per optimizer step
             job.json                                                       model, data and settings
             checkpoints/step-NNNNNNNN/                                     to resume from

All checks come before the output directory is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coserve.compiler.plan import ModelPlan
from coserve.config.data import to_dict
from coserve.config.settings import FinetuneConfig
from coserve.config.values import require
from coserve.durable import write_directory
from coserve.finetune.datasets import Dataset
from coserve.finetune.defaults import describe_settings
from coserve.finetune.job import Job, JobEvent, StepRow, refuse_changes
from coserve.finetune.taught import taught_end_tokens
from coserve.kernels.library import fused_head
from coserve.kernels.native import kernels_identity
from coserve.model.decoder import rank_architecture
from coserve.model.linear import can_pack
from coserve.model.memory import SLOWER, available_bytes, available_to_each
from coserve.peft.adapter import Adapter
from coserve.peft.format import WEIGHTS_FILE, bind_adapter
from coserve.peft.share import num_on_rank
from coserve.planning.budget import FittedPlan, require_memory, shape_adapter, training_bytes
from coserve.runtime.loaded import (
    DTYPES,
    LoadedModel,
    check_ranks,
    dtype_name,
    find_model,
    resolve_device,
    start_ranks,
)
from coserve.training.group import describe_sharding, require_ranks
from coserve.training.ranks import JobSetup, TrainerOnRanks
from coserve.training.request import JobRequest, Model, ResolvedJob, read_record
from coserve.training.trainer import AdapterTrainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """directory: of the adapter. model: the base model, with weights in memory unless several ranks shared it. adapter: as it
    was tuned; None where several ranks shared it. rows: metrics of every step, also of runs before a resume."""

    directory: Path
    model: Model
    adapter: Adapter | None
    rows: tuple[StepRow, ...]


_STATE_TENSORS = 3
"""Tensors in the optimizer's state, each as long as the adapter."""


def planned_bytes(job: ResolvedJob, model: Model, plan: ModelPlan, *, one_copy: bool) -> dict[str, int]:
    """Bytes by purpose that a job takes beside what is in memory already, on each rank if several share the model. one_copy:
    whether each weight matrix is held once."""
    settings, arch = job.settings, model.architecture
    adapter = shape_adapter(arch, settings.adapter)
    num_parameters = adapter.flat.numel()
    gathered: dict[str, int] = {}
    if job.group is not None:
        wide = max(4, model.dtype.itemsize)
        gathered["whole state of the optimizer, for a checkpoint"] = num_parameters * _STATE_TENSORS * wide
        arch, num_parameters = rank_architecture(arch, job.group.size), num_on_rank(adapter.parameters, job.group.fixed)
    needed = training_bytes(
        arch, plan, num_parameters, microbatch_tokens=job.plans.num_tokens, window_tokens=settings.window_tokens,
        itemsize=model.dtype.itemsize, packed=can_pack(model.dtype, model.device), one_copy=one_copy,
        fused_head=job.group is None and fused_head(model.device, model.dtype),
        quantization=model.quantization,
    )
    if isinstance(model, LoadedModel):
        needed.pop("weights")
    return needed | gathered


def choose_plan(job: ResolvedJob, model: Model) -> tuple[FittedPlan, bool]:
    """The plan with the fewest FLOPs for which the device has memory, and whether each weight matrix is held only once, since
    there is no memory for packed copies: these are given up first, and kept activations only then. Raises CapacityError if no
    plan fits."""
    available = available_bytes(model.device) if job.group is None else available_to_each(model.device, job.group.size)
    if available is not None and isinstance(model, LoadedModel):
        available += model.weights.copied_bytes  # they are counted in the job's bytes, and can be freed
    needs = partial(planned_bytes, job, model)
    asked = job.plans.asked(job.settings)
    packed = can_pack(model.dtype, model.device)
    one_copy = packed and available is not None and sum(needs(asked.plan, one_copy=False).values()) > available
    fitted = job.plans.for_job(job.settings, asked, available, lambda plan: sum(needs(plan, one_copy=one_copy).values()))
    require_memory(needs(fitted.plan, one_copy=one_copy), available)
    return fitted, one_copy


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job that is ready to run: all checks have passed, and its directory exists."""

    job: Job
    trainer: AdapterTrainer
    directory: Path
    dataset: Dataset

    def finish(self) -> None:
        """Writes the tuned adapter to a directory beside, then renames each file into the job's directory, the configuration
        last."""
        staged = self.directory / "adapter"
        write_directory(staged, self.trainer.save)
        for path in sorted(staged.iterdir(), key=lambda p: p.name == "adapter_config.json"):
            os.replace(path, self.directory / path.name)
        staged.rmdir()


def prepare(job: ResolvedJob, loaded: LoadedModel, fitted: FittedPlan) -> PreparedJob:
    """Makes the job's trainer and directory. A resumed job goes back to its newest checkpoint. Raises InvalidRequest if its
    data, settings or model have changed since it began."""
    job.request.inform(str(fitted))
    passed, ends = job.request.passed, _end_tokens(job, loaded)
    for warning in () if passed is None else passed.warnings:
        _log.warning(warning)
    if job.group is None:
        adapter = None if passed is None else bind_adapter(passed, loaded.weights)
        trainer = AdapterTrainer(
            loaded, job.settings, start=adapter, plan=fitted.plan, in_flight=fitted.in_flight, end_token_ids=ends,
            warn=_warner(job),
        )
    else:
        setup = JobSetup(settings=job.settings, group=job.group, fitted=fitted, passed=passed, end_token_ids=ends)
        trainer = TrainerOnRanks(loaded, setup, _warner(job))
    return _begin(job, loaded, trainer)


def _warner(job: ResolvedJob) -> Callable[[str], None]:
    listen = job.request.listen  # not the request, which holds the tensors of the adapter that is continued
    return lambda message: listen(JobEvent(level="warn", message=message))


def _end_tokens(job: ResolvedJob, loaded: LoadedModel) -> Sequence[int]:
    """The tokens that end the adapter's answers, if its data or the adapter that it continues teach others than the model's."""
    passed = job.request.passed
    taught = {
        *taught_end_tokens(job.train.groups, loaded.tokenizer, max_length=job.max_length),
        *(() if passed is None else passed.end_tokens),
    }
    return () if taught <= loaded.end_token_ids else sorted(taught | loaded.end_token_ids)


def _begin(job: ResolvedJob, loaded: LoadedModel, trainer: AdapterTrainer) -> PreparedJob:
    """Makes or resumes the job's directory, unless another engine holds the job."""
    request, config = job.request, job.settings
    facts = {
        "base_fingerprint": loaded.fingerprint, "quantization": loaded.quantization, "data_digest": job.train.report.digest,
        "validation_digest": None if job.held_out is None else job.held_out.report.digest,
        "start": None if request.start is None else str(request.start),
        "start_digest": None if request.start is None else _digest(request.start),
        "settings": to_dict(config),
        "threads": torch.get_num_threads() if config.deterministic else None,
        "tensor_parallel_size": loaded.tensor_parallel_size if config.deterministic else None,
        "adapter_sharding": describe_sharding(trainer.adapter, job.group) if config.deterministic and job.group else None,
        "weights_layout": f"{dtype_name(loaded.dtype)} {loaded.weights.layout}" if config.deterministic else None,
        "kernels": kernels_identity(loaded.weights.norm) if config.deterministic else None,
    }
    run = Job(
        config, job.train.groups, job.held_out.groups if job.held_out else (), trainer, request.directory, facts=facts,
        listen=request.listen,
    )
    request.inform(describe_settings(request.config, config, run.num_steps))
    if request.follows:
        pass  # its state comes from the engine that holds the job
    elif request.resume:
        refuse_changes(facts, read_record(request.directory), "job.json")
        run.resume()
    else:
        _open_job(request, loaded.name, {"dtype": dtype_name(loaded.dtype), **facts})
    return PreparedJob(job=run, trainer=trainer, directory=request.directory, dataset=job.train)


def _digest(start: Path) -> str:
    """SHA-256 (hex) of an adapter's weights file."""
    return hashlib.sha256((start / WEIGHTS_FILE).read_bytes()).hexdigest()


def finetune(
    data: str | os.PathLike[str], output: str | os.PathLike[str], *, model: str | LoadedModel | None = None,
    config: FinetuneConfig | None = None, validation: str | os.PathLike[str] | None = None,
    start: str | os.PathLike[str] | None = None, resume: bool = False, device: str = "auto", dtype: str = "auto",
    quantization: str | None = None, tensor_parallel_size: int = 1, adapter_sharding: str = "",
    listen: Callable[[JobEvent], None] = lambda event: None,
) -> FinetuneResult:
    """Finetunes an adapter (LoRA unless the settings name another kind) on a JSON Lines file and writes it to a directory.

    model: a name as for `load_model`, or a loaded model. config: settings; those that are 'auto' are chosen from the data, and
    an event tells them. validation: a JSON Lines file of held-out data. start: directory of an adapter to continue. resume:
    continue the job in `output` from its newest whole checkpoint. quantization: as for `load_model`; None: that of a resumed
    job, else none. tensor_parallel_size: how many processes share the model,
    each on a GPU of its own or on its share of the cores; a resumed job may have another number, unless it is deterministic.
    adapter_sharding: where parameters must lie on them, as q_proj.lora_A=whole,q_proj.lora_B=out; the others lie where it is
    cheapest. listen: called with every event. Raises InvalidRequest, NotFound, ConfigError, CapacityError before anything is
    written; JobFailed, CapacityError, RankFailed during the run.
    """
    request = JobRequest.of(data, output, config, validation=validation, start=start, resume=resume, listen=listen)
    require(not isinstance(model, LoadedModel) or model.tensor_parallel_size == tensor_parallel_size == 1,
            "tensor_parallel_size", "a job on several ranks loads the model itself; give the model's name")
    require(not isinstance(model, LoadedModel) or quantization in (None, model.quantization), "quantization",
            "a loaded model has its own; give it to load_model")
    base: Model
    if isinstance(model, LoadedModel):
        base = model
    else:
        if resume and dtype == "auto":
            dtype = _recorded_dtype(request.directory, resolve_device(device))
        if quantization is None:
            quantization = str(read_record(request.directory).get("quantization", "none")) if resume else "none"
        base = find_model(model, device=device, dtype=dtype, report=request.inform, quantization=quantization)
    check_ranks(base.architecture, tensor_parallel_size, base.device)
    require_ranks(adapter_sharding, tensor_parallel_size)
    job = request.read_start(base).resolve(base, size=tensor_parallel_size, adapter_sharding=adapter_sharding)
    fitted, one_copy = choose_plan(job, base)
    if one_copy:
        request.inform(f"each weight matrix is held once: there is no memory for packed copies; {SLOWER}")
    with contextlib.ExitStack() as stack:
        if isinstance(base, LoadedModel):
            loaded = base
        else:
            processes = start_ranks(base, tensor_parallel_size, request.inform)
            if processes is not None:
                stack.enter_context(processes)
            loaded = base.load(one_copy, processes)
        loaded.weights.hold_one_copy(one_copy)
        prepared = prepare(job, loaded, fitted)
        prepared.trainer.prepare_weights()
        stack.enter_context(_deterministic(job.settings.deterministic, loaded))
        del job  # with the tensors of the adapter that is continued
        prepared.job.run()
        prepared.job.insist(prepared.finish)
    return FinetuneResult(
        directory=request.directory, model=base if tensor_parallel_size > 1 else loaded, adapter=prepared.trainer.published,
        rows=tuple(prepared.job.table.rows()),
    )


@contextlib.contextmanager
def _deterministic(wanted: bool, loaded: LoadedModel) -> Iterator[None]:
    """Within it all ranks use deterministic algorithms if that is `wanted`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        if loaded.processes is not None and wanted:
            loaded.processes.call(torch.use_deterministic_algorithms, True)
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _open_job(request: JobRequest, model: str, facts: Mapping[str, Any]) -> None:
    """Makes the output directory and its job.json in one atomic step."""
    validation = None if request.validation is None else str(request.validation)
    record = {"model": model, "training_file": str(request.data), "validation_file": validation, **facts}

    def fill(temporary: Path) -> None:
        (temporary / "job.json").write_text(json.dumps(record, indent=2) + "\n")

    request.directory.parent.mkdir(parents=True, exist_ok=True)
    write_directory(request.directory, fill)


def _recorded_dtype(directory: Path, device: torch.device) -> str:
    """The dtype that 'auto' means for a resumed job: the one in which it began. Earlier versions didn't record it; theirs was
    float32 on the CPU."""
    found = read_record(directory).get("dtype")
    return found if found in DTYPES else "float32" if device.type == "cpu" else "auto"
