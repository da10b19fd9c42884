"""Uploaded and resulting files in the artifact store. The row in the index is the truth: a file is there once it is listed.

    files/ID/SHA256/       an artifact that is one file

A file's key holds its digest, so that a result that two replicas write, one of which has lost its job, is two artifacts.
Owns: that layout. Does not own: limits and checks of uploads (index/files.py), copies on this machine (artifactcache.py).
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.server.errors import Conflict
from coserve.server.index.disk import storage_errors
from coserve.server.index.files import FileIntake
from coserve.server.index.store import Store
from coserve.server.records import FileRecord, new_id, now
from coserve.server.replicas.artifacts import ArtifactStore, file_manifest_digest

_UPLOADS = 16
_STAGED = "*.upload"
_log = logging.getLogger(__name__)


class StoredFiles(FileIntake):
    """Files of all tenants. Any thread may use it. Its methods are FileService's (index/files.py)."""

    def __init__(
        self, artifacts: ArtifactStore, scratch: Path, store: Store, max_bytes: int, max_tenant_bytes: int,
        max_tenant_files: int = 1 << 62,
    ) -> None:
        """scratch: a directory of this process alone, for uploads on their way. Raises ConfigError. Further as FileService."""
        super().__init__(scratch, store, max_bytes, max_tenant_bytes, max_tenant_files)
        self._artifacts = artifacts
        self._threads = ThreadPoolExecutor(_UPLOADS, "coserve-store-uploads")
        for left in scratch.glob(_STAGED):
            left.unlink(missing_ok=True)

    def path(self, record: FileRecord) -> Path:
        """Where a copy of a file's bytes is on this machine, for a minute at least. Raises NotFound if they are gone or
        damaged, StorageRefused."""
        try:
            return self._artifacts.fetch(file_key(record), file_manifest_digest(record.bytes, record.sha256))
        except (NotFound, InvalidRequest) as error:
            raise NotFound(f"the content of file {record.id} is gone or damaged", param="file_id") from error

    def find(self, tenant: str, id: str) -> tuple[FileRecord, Path]:
        """A file's record and where a copy of its bytes is. Raises NotFound, also for another tenant's, and StorageRefused."""
        record = self._store.get_file(tenant, id)
        return record, self.path(record)

    def delete(self, tenant: str, id: str) -> None:
        """Deletes a file. Raises NotFound, also for another tenant's, Conflict while a job that hasn't ended uses it, and
        StorageRefused: then a second try goes on."""
        self._store.get_file(tenant, id)
        self._check_unused(id)
        self._artifacts.delete(f"files/{id}")
        self._store.delete_file(tenant, id)

    def rebuild(self) -> None:
        """Nothing is to be done: the index is the truth."""

    def _save(
        self, tenant: str, filename: str, source: BinaryIO, purpose: str, *, check: bool, id: str | None = None
    ) -> FileRecord:
        id = id or new_id("file")
        staged = self._directory / f"{new_id('file')}.upload"
        try:
            with storage_errors():
                size, digest = self._copy(source, staged, check=check)
            record = FileRecord(
                id=id, tenant=tenant, filename=filename, purpose=purpose, bytes=size, sha256=digest, created_at=now(),
            )
            self._artifacts.put_file(file_key(record), staged)
        finally:
            staged.unlink(missing_ok=True)
        try:
            with self._listing:
                if check:
                    self._check_quota(tenant, size)  # other uploads may have come first
                self._store.add_file(record)
        except Conflict:
            if check:
                raise
            return self._store.get_file(tenant, id)  # another replica has listed the job's result
        except InvalidRequest:  # TooLarge is one
            with suppress(CoserveError):
                self._artifacts.delete(file_key(record))
            raise
        except CoserveError:  # the row may have been written before the connection broke
            _log.warning("artifact %s may be in the store without a row that names it", file_key(record))
            raise
        return record


def file_key(record: FileRecord) -> str:
    """The key of a file's bytes in the artifact store; its digest is file_manifest_digest(record.bytes, record.sha256)."""
    return f"files/{record.id}/{record.sha256}"
