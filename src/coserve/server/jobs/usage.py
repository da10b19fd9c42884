"""Bytes that jobs hold on disk, by tenant: checkpoints, tuned adapters, what integrations write.

Owns: counting them. Does not own: files (index/files.py), what is refused for them (service.py).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from coserve.server.index.store import Store
from coserve.server.records import ENDED


class JobDisk:
    """Any thread may use it. The directory of a job that has ended is read once, until `forget`."""

    def __init__(self, root: Path, store: Store) -> None:
        self._root, self._store = root, store
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}

    def bytes_of(self, tenant: str) -> int:
        """Of all jobs of a tenant."""
        total = 0
        for id, status in self._store.job_states(tenant):
            with self._lock:
                size = self._known.get(id)
            if size is None:
                size = _directory_bytes(str(self._root / id))
                if status in ENDED:
                    with self._lock:
                        self._known[id] = size
            total += size
        return total

    def forget(self, job: str) -> None:
        """The job's directory has changed."""
        with self._lock:
            self._known.pop(job, None)


def _directory_bytes(path: str) -> int:
    """Of all files below; those that vanish meanwhile don't count."""
    total = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += _directory_bytes(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        return total
    return total
