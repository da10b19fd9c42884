"""What a replica has on its own disk of the jobs that it runs.

    SCRATCH/JOB-eEPOCH/request.json, start/, output/     as in a single server's jobs/ID/ (jobs/outputs.py)
    SCRATCH/JOB-eEPOCH/data/training_file, ...           the job's files
    SCRATCH/JOB-eEPOCH/boxes/HEX/                        what is on its way to the artifact store (parcels.py)

A run's directory goes with the run. Threads may still be writing into it then, which nobody can stop: the last of them removes
it.

Owns: that layout, what is brought here before a run begins, rows of what a run has made. Does not own: what goes to the store
(parcels.py), when (deliveries.py). Synchronous; called by the journal's thread and others.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from coserve.core import InvalidRequest, NotFound
from coserve.durable import write_directory
from coserve.finetune.checkpoints import checkpoint_name
from coserve.finetune.job import MetricsTable
from coserve.server.index.disk import storage_errors
from coserve.server.jobs.data import DataFile
from coserve.server.jobs.hosting import JobFiles, JobModels
from coserve.server.jobs.intake import find_data
from coserve.server.jobs.outputs import JobOutputs
from coserve.server.records import AdapterRecord, JobRecord, now
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.fenced import Fenced, FencedStore
from coserve.server.replicas.parcels import METRICS, RECORD, SentResult, link_tree, start_key, state_key
from coserve.server.replicas.runs import run_name


class _NamedFile(NamedTuple):
    """A file that a field of a job's body names."""

    id: str
    param: str


class ScratchOutputs(JobOutputs):
    """The directories of a replica's jobs, one for each run."""

    def __init__(
        self, root: Path, store: FencedStore, files: JobFiles, models: JobModels, artifacts: ArtifactStore, *,
        epochs: Callable[[str], int | None], warn: Callable[[str, str], None],
    ) -> None:
        """Removes what an earlier process has left: its runs have ended with it.

        epochs: tells under which epoch this replica has a job. warn: takes a job and a line for its events, in any thread.
        """
        shutil.rmtree(root, ignore_errors=True)
        super().__init__(root, store, files, models)
        self._fenced, self._artifacts, self._epochs, self._warn = store, artifacts, epochs, warn
        self.start_sha256: dict[str, str] = {}
        """Digests of the adapters that jobs continue."""
        self.results: dict[str, SentResult] = {}
        """What jobs have made that are about to end, by job."""
        self._lock = threading.Lock()
        self._writers: Counter[str] = Counter()  # by run
        self._closed: set[str] = set()

    def directory(self, job: str) -> Path:
        """Of the job's present run. Raises Fenced."""
        epoch = self._epochs(job)
        if epoch is None:
            raise Fenced(f"job {job} isn't this replica's any more")
        return self.root / run_name(job, epoch)

    def open(self, job: str) -> Path:
        """Makes the directory of a job's present run. Raises StorageRefused."""
        with self.writing(job) as directory, storage_errors():
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    @contextmanager
    def writing(self, job: str) -> Iterator[Path]:
        """The directory of the job's present run. It stays as long as the context is open, also if the run ends. Raises
        Fenced."""
        with self._lock:
            directory = self.directory(job)
            self._writers[directory.name] += 1
        try:
            yield directory
        finally:
            self._stop_writing(directory.name)

    def _stop_writing(self, run: str) -> None:
        with self._lock:
            self._writers[run] -= 1
            if self._writers[run]:
                return
            del self._writers[run]
            if run not in self._closed:
                return
            self._closed.remove(run)
        shutil.rmtree(self.root / run, ignore_errors=True)

    def close(self, run: str) -> None:
        """Removes the directory of a run that has ended, now or when nobody writes into it any more. Its job must have another
        epoch by now, or none."""
        with self._lock:
            if run in self._writers:
                self._closed.add(run)
                return
        shutil.rmtree(self.root / run, ignore_errors=True)

    def new_box(self, job: str) -> Path:
        """Where a box of the job's present run may be made. Raises Fenced."""
        return self.directory(job) / "boxes" / secrets.token_hex(8)

    # --- what comes here ---

    def prepare(self, record: JobRecord) -> None:
        """Brings here what the present run needs, unless it is here: the job's files, the adapter that it continues, and the
        newest checkpoint that is whole. Raises StorageRefused, InvalidRequest if a file is gone, Fenced."""
        with self.writing(record.id) as directory, storage_errors():
            directory.mkdir(parents=True, exist_ok=True)
            for file in self._named_files(record):
                target = directory / "data" / file.param
                if not target.exists():
                    self._fetch_file(record.tenant, file, target)
            if record.start is not None and not (directory / "start").exists():
                self._fetch_start(record, directory)
            if record.status == "running" and not (directory / "output").exists():
                self._fetch_checkpoint(record.id, directory)

    def data_files(self, record: JobRecord) -> tuple[DataFile, DataFile | None]:
        """As JobOutputs': copies in the run's directory, which `prepare` has made."""
        data = self.directory(record.id) / "data"
        found = [
            DataFile(data / file.param, find_data(self._store, record.tenant, file.id, file.param).filename, file.param)
            for file in self._named_files(record)
        ]
        return found[0], found[1] if len(found) > 1 else None

    def _named_files(self, record: JobRecord) -> list[_NamedFile]:
        training = _NamedFile(record.training_file, "training_file")
        return [training] if record.validation_file is None else [
            training, _NamedFile(record.validation_file, "validation_file")
        ]

    def _fetch_file(self, tenant: str, file: _NamedFile, target: Path) -> None:
        try:
            link_tree(self._files.path(find_data(self._store, tenant, file.id, file.param)), target)
        except NotFound as error:
            raise InvalidRequest(f"{file.param}: {error}", param=file.param) from error

    def _fetch_start(self, record: JobRecord, directory: Path) -> None:
        try:
            with self._artifacts.hold(start_key(record.id), self.start_sha256.get(record.id, "")) as found:
                write_directory(directory / "start", lambda place: link_tree(found, place))
        except NotFound as error:
            raise InvalidRequest(
                f"model: the files of {record.start}, which the job continues, are gone or damaged", param="model"
            ) from error

    def _fetch_checkpoint(self, job: str, directory: Path) -> None:
        """The newest checkpoint that is whole in the store, as the engine had it. Nothing if there is none."""
        for checkpoint in self.checkpoints(job):
            try:
                with (
                    self._artifacts.hold(checkpoint.directory, checkpoint.sha256) as adapter,
                    self._artifacts.hold(state_key(checkpoint.directory), checkpoint.state_sha256) as state,
                ):
                    write_directory(directory / "output", partial(_unpack, checkpoint.step, adapter, state))
                return
            except NotFound as error:
                self._warn(job, f"checkpoint of step {checkpoint.step}: {error}; using the one before")

    # --- what a run has made ---

    def local_checkpoints(self, job: str) -> list[tuple[int, Path]]:
        """(step, directory) of those that the engine has written, by step."""
        found = sorted((self.output(job) / "checkpoints").glob("step-*"))
        return [(int(path.name.removeprefix("step-")), path) for path in found if path.name.removeprefix("step-").isdigit()]

    def committed_steps(self, job: str) -> set[int]:
        """Steps of the checkpoints that the index has."""
        return {checkpoint.step for checkpoint in self.checkpoints(job)}

    def trained_tokens(self, job: str, step: int) -> int:
        """Tokens of the job's examples in the steps up to one."""
        return sum(row.tokens for row in MetricsTable(self.output(job) / METRICS).rows() if row.step <= step)

    def put_tuned(self, record: JobRecord, tuned: str) -> AdapterRecord:
        """What was sent to the store. It is listed with the job's end (fenced.py)."""
        sent = self.results[record.id].adapter
        return AdapterRecord(
            name=tuned, tenant=record.tenant, directory=sent.key, created_at=now(), job=record.id, sha256=sent.sha256,
            bytes=sent.bytes,
        )

    def save_result(self, record: JobRecord) -> str:
        """The id of what was sent to the store. It is listed with the job's end (fenced.py)."""
        return self.results[record.id].file.id


def _unpack(step: int, adapter: Path, state: Path, place: Path) -> None:
    """Makes a job's output directory from the two parts of a checkpoint."""
    target = place / "checkpoints" / checkpoint_name(step)
    for source in (adapter, state):
        link_tree(source, target)
    (target / RECORD).rename(place / RECORD)
    metrics = target / METRICS
    if metrics.exists():
        shutil.copyfile(metrics, place / METRICS)  # the engine appends to it, and the copy here is shared
        metrics.unlink()
