"""How many bytes each tenant has on disk: in files, jobs' checkpoints, tuned adapters, what integrations write, and copies of
adapters from outside.

Owns: counting them, which --max-tenant-file-bytes limits. Does not own: what is refused for it (service.py, index/files.py,
models.py).
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
        """root: holds the jobs' directories. copied_bytes: tells the bytes of a tenant's copied adapters."""
        self._root, self._store, self._copied_bytes = root, store, copied_bytes
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}
        self._num_forgotten = 0

    def bytes_of(self, tenant: str) -> int:
        """Of all files, jobs and copied adapters of a tenant."""
        total = self._store.count_file_bytes(tenant) + self._copied_bytes(tenant)
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
        """Has a job's directory counted anew, since it has changed."""
        with self._lock:
            self._num_forgotten += 1
            self._known.pop(job, None)
