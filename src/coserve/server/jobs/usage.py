"""Bytes on disk beside the files, by tenant: jobs' checkpoints, tuned adapters and what integrations write; copies of adapters
from outside.

Owns: counting them. Does not own: files (index/files.py), what is refused for them (service.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from coserve.server.index.disk import directory_bytes
from coserve.server.index.store import Store
from coserve.server.records import ENDED


class TenantDisk:
    """Any thread may use it. The directory of a job that has ended is read once, until `forget`."""

    def __init__(self, root: Path, store: Store, copied_bytes: Callable[[str], int]) -> None:
        """root: of the jobs' directories; copied_bytes: of the copies of a tenant's adapters."""
        self._root, self._store, self._copied_bytes = root, store, copied_bytes
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}
        self._num_forgotten = 0

    def bytes_of(self, tenant: str) -> int:
        """Of all jobs and copied adapters of a tenant."""
        total = self._copied_bytes(tenant)
        for id, status in self._store.job_states(tenant):
            with self._lock:
                size, before = self._known.get(id), self._num_forgotten
            if size is None:
                size = directory_bytes(str(self._root / id))
                with self._lock:
                    if status in ENDED and self._num_forgotten == before:  # else the directory may have changed meanwhile
                        self._known[id] = size
            total += size
        return total

    def forget(self, job: str) -> None:
        """The job's directory has changed."""
        with self._lock:
            self._num_forgotten += 1
            self._known.pop(job, None)
