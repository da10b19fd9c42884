"""Uploaded and resulting files on disk.

    files/ID/content      the bytes
    files/ID/meta.json    the FileRecord: the truth that the index is rebuilt from
    files/ID.tmp/         one that is being written or deleted; removed at the next start

A file is there whole or not at all. A user's file name is only data: no path is made of it. Owns: that layout, limits of
uploads. Does not own: the index (Store), how JSON Lines are read (finetune/jsonlines.py).
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
from starlette.datastructures import UploadFile

from coserve.core import ConfigError, InvalidRequest, NotFound
from coserve.durable import sync, write_file
from coserve.finetune.jsonlines import UploadCheck
from coserve.server.errors import Conflict, TooLarge
from coserve.server.index.disk import storage_errors
from coserve.server.index.store import Store
from coserve.server.records import FileRecord, new_id, now

FINE_TUNE = "fine-tune"
RESULTS = "fine-tune-results"
_CONTENT = "content"
_META = "meta.json"
_UNFINISHED = ".tmp"
_CHUNK_BYTES = 1 << 20
_MAX_NAME_LENGTH = 255
_UNPRINTABLE = ("Cc", "Cs")
"""Unicode's categories: control characters, halves of pairs."""
_ID = re.compile(r"file-[0-9A-Za-z_-]{1,64}")
_log = logging.getLogger(__name__)


class FileIntake(ABC):
    """What is checked before a file is kept, wherever that is. Any thread may use it."""

    def __init__(
        self, directory: Path, store: Store, max_bytes: int, max_tenant_bytes: int, max_tenant_files: int = 1 << 62
    ) -> None:
        """Makes the directory if there is none. Raises ConfigError where it can't be made.

        max_bytes: of one upload. max_tenant_bytes, max_tenant_files: of all files of a tenant.
        """
        self._directory = directory
        self._store = store
        self._max_bytes, self._max_tenant_bytes, self._max_tenant_files = max_bytes, max_tenant_bytes, max_tenant_files
        self.held_bytes: Callable[[str], int] = store.count_file_bytes
        """How many bytes of a tenant count for max_tenant_bytes. The server counts outputs of jobs and loaded adapters too."""
        self._listing = threading.Lock()
        self._threads: Executor | None = None
        """Where uploads are copied; None: the event loop's own threads."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data_dir: {directory} can't be made ({error.strerror})", param="data_dir") from error

    async def check_room(self, tenant: str, size: int) -> None:
        """Raises TooLarge if an upload of `size` bytes would exceed the tenant's limits. Call it before the upload is read."""
        await asyncio.to_thread(self._check_quota, tenant, size)

    async def save_upload(self, tenant: str, upload: UploadFile, purpose: str) -> FileRecord:
        """Copies an upload to disk, then puts it into the index. Raises TooLarge, InvalidRequest and CapacityError."""
        if purpose != FINE_TUNE:
            raise InvalidRequest(f"purpose: only {FINE_TUNE!r} is supported, got {purpose[:64]!r}", param="purpose")
        filename = clean_filename(upload.filename)
        await self.check_room(tenant, upload.size or 0)  # before it is copied
        # One thread does all of it, since the upload is whole by now, in a temporary file of the form's parser.
        save = functools.partial(
            contextvars.copy_context().run, self._save, tenant, filename, upload.file, purpose, check=True
        )
        return await asyncio.get_running_loop().run_in_executor(self._threads, save)

    def save_result(self, tenant: str, filename: str, content: bytes, *, id: str | None = None) -> FileRecord:
        """Keeps a file that a job has made. Raises CapacityError. id: the new file's; a file with this id stays as it is."""
        if id is not None:
            with suppress(NotFound):
                return self._store.get_file(tenant, id)
        return self._save(tenant, clean_filename(filename), io.BytesIO(content), RESULTS, check=False, id=id)

    @abstractmethod
    def path(self, record: FileRecord) -> Path:
        """Where a file's bytes are on this machine."""

    @abstractmethod
    def _save(
        self, tenant: str, filename: str, source: BinaryIO, purpose: str, *, check: bool, id: str | None = None
    ) -> FileRecord:
        """Keeps a file under an id, or a new one, and lists it. check: whether it is checked as an upload, and counted."""

    def _check_unused(self, id: str) -> None:
        """Raises Conflict while a job that hasn't ended uses a file."""
        users = [job.id for job in self._store.unfinished_jobs() if id in (job.training_file, job.validation_file)]
        if users:
            raise Conflict(f"file {id} is used by the fine-tuning job {users[0]}; cancel it first", param="file_id")

    def _copy(self, source: BinaryIO, target: Path, *, check: bool) -> tuple[int, str]:
        """Copies a file. Returns the number of bytes, and their SHA-256. check: whether the file is checked as an upload."""
        size, digest, judge = 0, hashlib.sha256(), UploadCheck()
        with target.open("xb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                size += len(chunk)
                if check:
                    if size > self._max_bytes:
                        raise TooLarge(f"file: more than {self._max_bytes} bytes, the most that a file may have", param="file")
                    judge.feed(chunk)
                digest.update(chunk)
                file.write(chunk)
            if check:
                judge.finish()
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def _check_quota(self, tenant: str, size: int) -> None:
        """Raises TooLarge for an upload of `size` bytes that would take the tenant's files over their limit."""
        held = self.held_bytes(tenant)
        if held + size > self._max_tenant_bytes:
            raise TooLarge(
                f"file: its {size} bytes beside the {held} of your other files, jobs' outputs and adapters are more than the "
                f"{self._max_tenant_bytes} that they may have together; delete files that you no longer need, or models",
                param="file",
            )
        if self._store.count_files(tenant) >= self._max_tenant_files:
            raise TooLarge(
                f"file: you have {self._max_tenant_files} files, the most that there may be; delete some", param="file"
            )


class FileService(FileIntake):
    """Files in a directory of this machine."""

    def path(self, record: FileRecord) -> Path:
        """Where a file's bytes are."""
        return self._directory / record.id / _CONTENT

    def find(self, tenant: str, id: str) -> tuple[FileRecord, Path]:
        """A file's record and where its bytes are. Raises NotFound, also for another tenant's, and where they have vanished."""
        record = self._store.get_file(tenant, id)
        if not self.path(record).is_file():
            raise NotFound(f"the content of file {id} is no longer on disk", param="file_id")
        return record, self.path(record)

    def delete(self, tenant: str, id: str) -> None:
        """Deletes a file. Raises NotFound, also for another tenant's, and Conflict while a job that hasn't ended uses it."""
        self._store.get_file(tenant, id)
        self._check_unused(id)
        gone = self._directory / f"{id}{_UNFINISHED}"
        with storage_errors(), suppress(FileNotFoundError):
            (self._directory / id).rename(gone)
        # The bytes go first, since the index may need their space. If the index refuses, a second try finds the entry alone.
        shutil.rmtree(gone, ignore_errors=True)
        self._store.delete_file(tenant, id)

    def rebuild(self) -> None:
        """Makes the index agree with the directory, and removes unfinished files; it is called at the start."""
        listed = {record.id: record for record in self._store.all_files()}
        found = []
        for entry in sorted(self._directory.iterdir()):
            if entry.name.endswith(_UNFINISHED):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.is_dir():
                record = _read_meta(entry)
                if record is not None:
                    found.append(record)
        for record in sorted(found, key=lambda record: record.created_at):
            if record.id not in listed:
                self._store.add_file(record)
        for id in listed.keys() - {record.id for record in found}:
            _log.warning("file %s is in the index, but not whole on disk; it is no longer listed", id)
            self._store.delete_file(listed[id].tenant, id)

    def _save(
        self, tenant: str, filename: str, source: BinaryIO, purpose: str, *, check: bool, id: str | None = None
    ) -> FileRecord:
        id = id or new_id("file")
        staged, kept = self._directory / f"{id}{_UNFINISHED}", self._directory / id
        try:
            with storage_errors():
                staged.mkdir()
                size, digest = self._copy(source, staged / _CONTENT, check=check)
                record = FileRecord(
                    id=id, tenant=tenant, filename=filename, purpose=purpose, bytes=size, sha256=digest, created_at=now(),
                )
                write_file(staged / _META, json.dumps(dataclasses.asdict(record), indent=1).encode())
                with self._listing:
                    if check:
                        self._check_quota(tenant, size)  # other uploads may have come first
                    staged.rename(kept)
                    sync(self._directory)
                    self._store.add_file(record)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            shutil.rmtree(kept, ignore_errors=True)
            raise
        return record


def clean_filename(name: str | None) -> str:
    """A file name without the directories that some clients send along. Raises InvalidRequest."""
    base = re.split(r"[/\\]", name or "")[-1]
    if base in ("", ".", ".."):
        raise InvalidRequest("file: has no file name", param="file")
    if len(base) > _MAX_NAME_LENGTH:
        raise InvalidRequest(f"file: its name is longer than {_MAX_NAME_LENGTH} characters", param="file")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in base):
        raise InvalidRequest("file: its name has a control character", param="file")
    return base


def _read_meta(directory: Path) -> FileRecord | None:
    """The record of a file that is whole, else None, with a warning."""
    try:
        record = msgspec.json.decode((directory / _META).read_bytes(), type=FileRecord)
        size = (directory / _CONTENT).stat().st_size
    except (OSError, msgspec.DecodeError) as error:
        _log.warning("%s is left out: its %s or %s can't be read (%s)", directory, _META, _CONTENT, error)
        return None
    if _ID.fullmatch(record.id) is None or record.id != directory.name or record.bytes != size:
        _log.warning("%s is left out: its %s doesn't describe it", directory, _META)
        return None
    return record
