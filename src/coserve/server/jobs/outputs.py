"""What a job leaves on disk, and the models it stands for: checkpoints, the tuned adapter, the result file.

    jobs/ID/request.json       the manifest (index/manifest.py)
    jobs/ID/start/             the adapter that the job continues, copied at its creation
    jobs/ID/output/            the engine's: job.json, metrics.csv, checkpoints/step-NNNNNNNN/, the tuned adapter
    jobs/ID/tensorboard, wandb runs of integrations (trackers.py)

Owns: that layout, rows of adapters and checkpoints as directories come and go. Synchronous; called by the journal's thread.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coserve.config.settings import AdapterConfig
from coserve.core import CoserveError, NotFound
from coserve.finetune.checkpoints import MANIFEST_FILE as CHECKPOINT_MANIFEST
from coserve.finetune.job import MetricsTable, StepRow
from coserve.peft.described import described_adapter
from coserve.peft.format import CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE
from coserve.peft.remarks import GENERATION_FILE
from coserve.server.index.disk import storage_errors
from coserve.server.index.store import Store
from coserve.server.jobs.data import DataFile
from coserve.server.jobs.hosting import JobFiles, JobModels
from coserve.server.jobs.intake import find_data
from coserve.server.jobs.objects import result_csv, step_metrics
from coserve.server.records import AdapterRecord, CheckpointRecord, JobRecord, new_id, now

_STEP = re.compile(r"step-(\d{8,})")
_PAGE = 1000


class JobOutputs:
    """Directories and models of all jobs. Each job has a directory below `root`."""

    def __init__(self, root: Path, store: Store, files: JobFiles, models: JobModels) -> None:
        self.root, self._store, self._files, self._models = root, store, files, models
        with storage_errors():
            root.mkdir(parents=True, exist_ok=True)

    def directory(self, job: str) -> Path:
        """The directory of a job."""
        return self.root / job

    def output(self, job: str) -> Path:
        """The engine's directory of the job."""
        return self.directory(job) / "output"

    def started(self, job: str) -> bool:
        """Whether the engine has begun the job, which is then to be resumed."""
        return (self.output(job) / "job.json").is_file()

    def start_directory(self, record: JobRecord) -> Path | None:
        """The adapter that the job continues."""
        return None if record.start is None else self.directory(record.id) / "start"

    def prepare(self, record: JobRecord) -> None:
        """Brings here what the job goes on from, which is here already. Raises StorageRefused."""

    def continued(self, directory: Path) -> AdapterConfig:
        """Settings of an adapter that is to be continued. Raises NotFound."""
        try:
            return described_adapter(directory)
        except CoserveError as error:
            raise NotFound("model: the files of this adapter are gone or damaged", param="model") from error

    def copy_start(self, job: str, source: Path) -> None:
        """Copies the adapter to continue into the job's directory: the original may be deleted. Raises NotFound, OSError."""
        target = self.directory(job) / "start"
        target.mkdir(parents=True)
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(source / name, target / name)
        except FileNotFoundError as error:
            raise NotFound("model: the files of this adapter are gone", param="model") from error
        for name in (ORIGIN_FILE, GENERATION_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)

    def data_files(self, record: JobRecord) -> tuple[DataFile, DataFile | None]:
        """The training file and the validation file, if there is one. Raises InvalidRequest naming the field."""
        return self.tenant_files(record.tenant, record.training_file, record.validation_file)

    def tenant_files(self, tenant: str, training: str, validation: str | None) -> tuple[DataFile, DataFile | None]:
        """The same by the files' ids."""
        found = self._data_file(tenant, training, "training_file")
        return found, None if validation is None else self._data_file(tenant, validation, "validation_file")

    def _data_file(self, tenant: str, id: str, param: str) -> DataFile:
        record = find_data(self._store, tenant, id, param)
        return DataFile(self._files.path(record), record.filename, param)

    def rows(self, job: str) -> list[StepRow]:
        """Metrics of the steps so far."""
        return MetricsTable(self.output(job) / "metrics.csv").rows()

    # --- models ---

    def put_checkpoint(self, record: JobRecord, tuned: str, step: int, directory: Path, metrics: Mapping[str, Any]) -> str:
        """Lists a checkpoint that is whole on disk as a model to be served. Returns the model's name."""
        model = f"{tuned}:ckpt-step-{step}"
        self._store.put_checkpoint(CheckpointRecord(
            id=new_id("ftckpt").replace("-", "_", 1), job=record.id, created_at=now(), step=step, model=model,
            directory=str(directory), metrics=dict(metrics),
        ))
        self._models.add(self._adapter(record, model, directory))
        return model

    def put_tuned(self, record: JobRecord, tuned: str) -> AdapterRecord:
        """Lists the job's result as a model to be served."""
        adapter = self._adapter(record, tuned, self.output(record.id))
        self._models.add(adapter)
        return adapter

    def prune(self, record: JobRecord) -> list[str]:
        """Removes checkpoints whose directories are gone. Returns their models' names."""
        gone = []
        for checkpoint in self.checkpoints(record.id):
            directory = Path(checkpoint.directory)
            if not (directory / CHECKPOINT_MANIFEST).is_file():
                self._store.delete_checkpoint(checkpoint.id)
                self._models.remove(self._adapter(record, checkpoint.model, directory))
                gone.append(checkpoint.model)
        return gone

    def restore(self, record: JobRecord, tuned: str) -> None:
        """Makes rows of checkpoints and of the tuned model agree with the job's directory."""
        self.prune(record)
        known = {checkpoint.step for checkpoint in self.checkpoints(record.id)}
        found = {}
        for directory in sorted((self.output(record.id) / "checkpoints").glob("step-*")):
            match = _STEP.fullmatch(directory.name)
            if match and int(match[1]) not in known and (directory / CHECKPOINT_MANIFEST).is_file():
                found[int(match[1])] = directory
        rows = {row.step: row for row in self.rows(record.id)} if found else {}
        for step, directory in found.items():
            row = rows.get(step)
            metrics = {"step": step} if row is None else step_metrics(dataclasses.asdict(row))
            self.put_checkpoint(record, tuned, step, directory, metrics)
        if record.fine_tuned_model is not None and (self.output(record.id) / CONFIG_FILE).is_file():
            self.put_tuned(record, record.fine_tuned_model)

    def delete_model(self, adapter: AdapterRecord, last_step: int) -> list[str]:
        """Takes a job's model out of the index and its files off the disk, so that no rebuild brings it back. With the job's
        result goes the checkpoint of its last step, which has the same weights. Returns the names that are gone."""
        assert adapter.job is not None
        checkpoints = self.checkpoints(adapter.job)
        own = [checkpoint for checkpoint in checkpoints if checkpoint.model == adapter.name]
        gone = own or [checkpoint for checkpoint in checkpoints if checkpoint.step == last_step]
        self._models.remove(adapter)
        for checkpoint in gone:
            twin = self._store.find_adapter(adapter.tenant, checkpoint.model)
            if twin is not None:
                self._models.remove(twin)
            self._store.delete_checkpoint(checkpoint.id)
            shutil.rmtree(checkpoint.directory, ignore_errors=True)
        names = list(dict.fromkeys([adapter.name, *(checkpoint.model for checkpoint in gone)]))
        if not own:
            with storage_errors():
                for name in (CONFIG_FILE, WEIGHTS_FILE):
                    (Path(adapter.directory) / name).unlink(missing_ok=True)
        return names

    def save_result(self, record: JobRecord) -> str:
        """Saves the metrics as the result file: CSV in base64, as OpenAI's clients expect it. Returns its id."""
        content = base64.b64encode(result_csv(self.rows(record.id)))
        id = record.id.replace("ftjob-", "file-", 1)
        return self._files.save_result(record.tenant, "step_metrics.csv", content, id=id).id

    def checkpoints(self, job: str) -> list[CheckpointRecord]:
        """Those that the index has, the one of the last step first."""
        found, more = self._store.list_checkpoints(job, limit=_PAGE)
        while more:
            page, more = self._store.list_checkpoints(job, after=found[-1].id, limit=_PAGE)
            found += page
        return found

    def _adapter(self, record: JobRecord, model: str, directory: Path) -> AdapterRecord:
        return AdapterRecord(name=model, tenant=record.tenant, directory=str(directory), created_at=now(), job=record.id)
