"""What a replica sends to the artifact store for its jobs.

    jobs/JOB/start                                  the adapter that the job continues
    jobs/JOB/eEPOCH/step-NNNNNNNN/adapter, state    a checkpoint: as a model, and what another replica goes on from
    jobs/JOB/eEPOCH/model                           the tuned adapter
    jobs/JOB/eEPOCH/tensorboard, wandb              what integrations wrote

Artifacts never change, and count only through rows of the index that name them. So nobody sees what a replica sends that has
lost its job. What no row names is deleted when the job has ended (sweeping.py).

What is to be sent is first linked into a box, as the engine may delete its own files meanwhile. A box is a directory that
nothing else uses, and goes once it is sent. Owns: that layout, what is in a box. Does not own: rows (fenced.py), where boxes
are (scratch.py), when something is sent, and again (deliveries.py).
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from coserve.finetune.checkpoints import MANIFEST_FILE, OPTIMIZER_FILE, checkpoint_name
from coserve.finetune.job import StepRow
from coserve.server.errors import Conflict
from coserve.server.index.disk import storage_errors
from coserve.server.index.files import RESULTS
from coserve.server.jobs.objects import result_csv
from coserve.server.records import FileRecord, JobRecord, now
from coserve.server.replicas.artifacts import ArtifactStore, Stored
from coserve.server.replicas.files import file_key

RECORD, METRICS = "job.json", "metrics.csv"
"""Files of a job beside its checkpoints, which it can't go on without."""
_STATE = (OPTIMIZER_FILE, MANIFEST_FILE)
_ADAPTER = "adapter"
_MODEL = "model"
_RESULT = "step_metrics"
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


def job_key(job: str) -> str:
    """Where the store has all of a job."""
    return f"jobs/{job}"


def start_key(job: str) -> str:
    """Where the store has the adapter that a job continues."""
    return f"{job_key(job)}/start"


def epoch_key(job: str, epoch: int) -> str:
    """Where the store has what a job made under an epoch."""
    return f"{job_key(job)}/e{epoch}"


def export_keys(job: str, epoch: int) -> list[str]:
    """Where the store has what integrations wrote for a job that ended under an epoch. No row names it."""
    return [f"{epoch_key(job, epoch)}/{name}" for name in _EXPORTS]


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


def pack_checkpoint(output: Path, directory: Path, box: Path) -> bool:
    """Puts a checkpoint that the engine has written into a box, with what else belongs to it. False if the engine has deleted
    it by now, since there are newer ones. output: the engine's directory of the job. Raises StorageRefused."""
    drop_box(box)
    try:
        with storage_errors():
            for path in directory.iterdir():
                link_tree(path, box / ("state" if path.name in _STATE else _ADAPTER) / path.name)
            for name in (RECORD, METRICS):
                source = output / name
                if source.exists():
                    shutil.copyfile(source, box / "state" / name)  # the engine goes on writing to it
    except FileNotFoundError:
        return False
    return (box / "state" / MANIFEST_FILE).is_file()


def send_checkpoint(artifacts: ArtifactStore, job: str, epoch: int, step: int, box: Path) -> SentCheckpoint:
    """Sends a checkpoint's box. Raises StorageRefused."""
    def send(key: str) -> SentCheckpoint:
        return SentCheckpoint(
            artifacts.put_directory(f"{key}/{_ADAPTER}", box / _ADAPTER),
            artifacts.put_directory(f"{key}/state", box / "state"),
        )

    return _send(send, f"{epoch_key(job, epoch)}/{checkpoint_name(step)}")


def pack_result(output: Path, rows: Sequence[StepRow], box: Path) -> None:
    """Puts the adapter that a job has made into a box, and the result file: the metrics, in base64, as OpenAI's clients expect
    them. output: the engine's directory of the job. rows: its steps. Raises StorageRefused."""
    drop_box(box)
    with storage_errors():
        for path in output.iterdir():
            if path.is_file() and path.name not in (RECORD, METRICS):
                link_tree(path, box / _MODEL / path.name)
        (box / _RESULT).write_bytes(base64.b64encode(result_csv(rows)))


def send_result(artifacts: ArtifactStore, record: JobRecord, epoch: int, box: Path) -> SentResult:
    """Sends the box of a job's result. Raises StorageRefused."""
    with storage_errors():
        content = (box / _RESULT).read_bytes()
    file = FileRecord(
        id=record.id.replace("ftjob-", "file-", 1), tenant=record.tenant, filename="step_metrics.csv",
        purpose=RESULTS, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), created_at=now(),
    )
    artifacts.put_file(file_key(file), box / _RESULT)
    model = _send(lambda key: artifacts.put_directory(key, box / _MODEL), f"{epoch_key(record.id, epoch)}/{_MODEL}")
    return SentResult(model, file)


def pack_exports(directory: Path, box: Path) -> None:
    """Puts what integrations have written below a run's directory into a box. Raises StorageRefused."""
    drop_box(box)
    with storage_errors():
        for name in _EXPORTS:
            if (directory / name).is_dir():
                link_tree(directory / name, box / name)


def send_exports(artifacts: ArtifactStore, job: str, epoch: int, box: Path) -> None:
    """Sends the box of what integrations have written. Raises StorageRefused."""
    for name in _EXPORTS:
        if (box / name).is_dir():
            artifacts.put_directory(f"{epoch_key(job, epoch)}/{name}", box / name)


def drop_box(box: Path) -> None:
    """Removes a box, if there is one."""
    shutil.rmtree(box, ignore_errors=True)


def _send(send: Callable[[str], SentT], key: str) -> SentT:
    """Sends something under a key; under another one if the key is taken: a step that ran again under this epoch, after a death
    of the engine, took other seconds at least."""
    try:
        return send(key)
    except Conflict:
        return send(f"{key}.{secrets.token_hex(4)}")
