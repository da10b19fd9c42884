"""What a replica sends to the artifact store for its jobs.

    jobs/JOB/start                                  the adapter that the job continues
    jobs/JOB/eEPOCH/step-NNNNNNNN/adapter, state    a checkpoint: as a model, and what another replica goes on from
    jobs/JOB/eEPOCH/model                           the tuned adapter
    jobs/JOB/eEPOCH/tensorboard, wandb              what integrations wrote

Artifacts never change, and count only through rows of the index that name them. So nobody sees what a replica sends that has
lost its job. What is to be sent is first linked into a box, as the engine may delete its own files meanwhile. Owns: that
layout, boxes. Does not own: rows (fenced.py), when something is sent, and again (deliveries.py).
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from coserve.finetune.checkpoints import MANIFEST_FILE, OPTIMIZER_FILE, checkpoint_name
from coserve.server.errors import Conflict
from coserve.server.index.disk import storage_errors
from coserve.server.index.files import RESULTS
from coserve.server.jobs.objects import result_csv
from coserve.server.jobs.outputs import JobOutputs
from coserve.server.records import FileRecord, JobRecord, now
from coserve.server.replicas.artifacts import ArtifactStore, Stored
from coserve.server.replicas.files import file_key

RECORD, METRICS = "job.json", "metrics.csv"
"""Files of a job beside its checkpoints, which it can't go on without."""
_STATE = (OPTIMIZER_FILE, MANIFEST_FILE)
_ADAPTER = "adapter"
_MODEL = "model"
_EXPORTS = ("tensorboard", "wandb")
SentT = TypeVar("SentT")


class SentCheckpoint(NamedTuple):
    """A checkpoint in the store. adapter: its model. state: what else a job needs to go on from it."""

    adapter: Stored
    state: Stored


class SentResult(NamedTuple):
    """What a job has made, in the store. adapter: the tuned one. file: the result file."""

    adapter: Stored
    file: FileRecord


def start_key(job: str) -> str:
    """Where the store has the adapter that a job continues."""
    return f"jobs/{job}/start"


def epoch_key(job: str, epoch: int) -> str:
    """Where the store has what a job made under an epoch."""
    return f"jobs/{job}/e{epoch}"


def state_key(adapter_key: str) -> str:
    """Where the store has a checkpoint's state, by the key of its adapter."""
    return f"{adapter_key.removesuffix(f'/{_ADAPTER}')}/state"


def checkpoint_key(adapter_key: str) -> str:
    """The key that both parts of a checkpoint are below, by the key of its adapter."""
    return adapter_key.removesuffix(f"/{_ADAPTER}")


def link_tree(source: Path, target: Path) -> None:
    """Links a file, or the files of a directory, to where nothing or a directory is; copies them if the disk is another. Other
    things than files and directories are left out. Raises OSError."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not path.is_symlink():
                link_tree(path, target / path.name)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            part = target.with_name(f".{target.name}.part")
            shutil.copyfile(source, part)
            os.replace(part, target)


def pack_checkpoint(outputs: JobOutputs, job: str, step: int, directory: Path) -> Path | None:
    """Puts a checkpoint that the engine has written into a box, with what else belongs to it. None if the engine has deleted it
    by now, since there are newer ones. Raises StorageRefused."""
    box = outputs.directory(job) / "boxes" / checkpoint_name(step)
    shutil.rmtree(box, ignore_errors=True)
    try:
        with storage_errors():
            for path in directory.iterdir():
                link_tree(path, box / ("state" if path.name in _STATE else _ADAPTER) / path.name)
            for name in (RECORD, METRICS):
                source = outputs.output(job) / name
                if source.exists():
                    shutil.copyfile(source, box / "state" / name)  # the engine goes on writing to it
    except FileNotFoundError:
        return None
    return box if (box / "state" / MANIFEST_FILE).is_file() else None


def send_checkpoint(artifacts: ArtifactStore, job: str, epoch: int, box: Path) -> SentCheckpoint:
    """Sends a checkpoint's box. Raises StorageRefused."""
    def send(key: str) -> SentCheckpoint:
        return SentCheckpoint(
            artifacts.put_directory(f"{key}/{_ADAPTER}", box / _ADAPTER), artifacts.put_directory(f"{key}/state", box /
            "state"), )

    return _send(send, f"{epoch_key(job, epoch)}/{box.name}")


def pack_result(outputs: JobOutputs, job: str) -> Path:
    """Puts the adapter that a job has made into a box. Raises StorageRefused."""
    box = outputs.directory(job) / "boxes" / _MODEL
    shutil.rmtree(box, ignore_errors=True)
    with storage_errors():
        for path in outputs.output(job).iterdir():
            if path.is_file() and path.name not in (RECORD, METRICS):
                link_tree(path, box / path.name)
    return box


def send_result(artifacts: ArtifactStore, outputs: JobOutputs, record: JobRecord, epoch: int, box: Path) -> SentResult:
    """Sends the tuned adapter's box, and the result file: the metrics, in base64, as OpenAI's clients expect them. Raises
    StorageRefused."""
    content = base64.b64encode(result_csv(outputs.rows(record.id)))
    path = box.with_name("step_metrics")
    with storage_errors():
        path.write_bytes(content)
    file = FileRecord(
        id=record.id.replace("ftjob-", "file-", 1), tenant=record.tenant, filename="step_metrics.csv",
        purpose=RESULTS, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), created_at=now(),
    )
    artifacts.put_file(file_key(file), path)
    model = _send(lambda key: artifacts.put_directory(key, box), f"{epoch_key(record.id, epoch)}/{_MODEL}")
    return SentResult(model, file)


def send_exports(artifacts: ArtifactStore, directory: Path, job: str, epoch: int) -> None:
    """Sends what integrations have written below a run's directory. Raises StorageRefused."""
    for name in _EXPORTS:
        if (directory / name).is_dir():
            box = directory / "boxes" / name
            with storage_errors():
                link_tree(directory / name, box)
            artifacts.put_directory(f"{epoch_key(job, epoch)}/{name}", box)


def _send(send: Callable[[str], SentT], key: str) -> SentT:
    """Sends something under a key; under another one if the key is taken: a step that ran again under this epoch, after a death
    of the engine, took other seconds at least."""
    try:
        return send(key)
    except Conflict:
        return send(f"{key}.{secrets.token_hex(4)}")
