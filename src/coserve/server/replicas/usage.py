"""How many bytes each tenant has in the artifact store, by the rows that name them.

Owns: counting them, which --max-tenant-file-bytes limits. Does not own: what is refused for it (files.py, models.py, desk.py).
"""

from __future__ import annotations

from coserve.server.index.store import Store


class StoredBytes:
    """What TenantDisk (jobs/usage.py) is for a single server's disk. Any thread may use it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def bytes_of(self, tenant: str) -> int:
        """Of all files, checkpoints and adapters of a tenant. What jobs have stored and not committed counts for nobody."""
        return self._store.count_file_bytes(tenant) + self._store.count_artifact_bytes(tenant)

    def forget(self, job: str) -> None:
        """Rows are counted each time, so there is nothing to forget."""
