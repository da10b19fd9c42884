"""The artifact store of a fleet, which is the one that its index names.

Owns: that all processes of a fleet use one store. Does not own: the row that says which (index/place.py), the store's marker
(objects.py), copies on this machine (artifactcache.py).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

from coserve.core import ConfigError
from coserve.server.errors import StorageRefused
from coserve.server.index.place import DATA, is_of
from coserve.server.index.store import Store
from coserve.server.replicas.artifacts import ArtifactStore, open_store
from coserve.server.replicas.objects import open_objects
from coserve.server.settings import ServerConfig

CACHE_BYTES = 20 << 30
"""Bytes of fetched files that the processes of a machine keep below their data directory, where the disk has twice as much."""


SETTLE_S = 60.0
"""Seconds that the first processes of a fleet get to agree on their store."""


def cache_directory(config: ServerConfig) -> Path:
    """Where copies of the store's files are, which all processes of one machine with one data directory share. Several machines
    may see one data directory, through a file system of the network."""
    return config.data_dir.absolute() / "artifacts" / socket.gethostname()


def open_own_store(config: ServerConfig, index: Store) -> ArtifactStore:
    """Opens the store of the settings. The first process of a fleet makes it, or takes one that is there, and notes it in the
    index; to all others an empty place is no store. Raises ConfigError (store, data_dir, database_url) and StorageRefused."""
    url, used = str(config.store), index.names_bytes()

    def choose() -> str:
        objects = open_objects(url, create=not used)
        return objects.identify()

    if index.find_place() is None:
        with contextlib.suppress(ConfigError):  # libraries, credentials, connections: before the others have to wait
            open_objects(url, create=False)
    known = _settle(index, choose)
    if is_of(DATA, known):
        raise ConfigError(
            "database_url: this database belongs to a single server, whose files are in its data directory; replicas don't see "
            "them. Give them a new database", param="database_url",
        )
    artifacts = open_store(url, cache_directory(config), cache_bytes=CACHE_BYTES, create=False)
    if artifacts.id != known:
        raise ConfigError(
            f"store: {url} is another store than the one that the index of --database-url belongs to ({known}; here is "
            f"{artifacts.id or 'one without an id'}). Give that one; is it mounted? For a new store take a new database",
            param="store",
        )
    return artifacts


def _settle(index: Store, choose: Callable[[], str]) -> str:
    """Index.settle_place. Others may be refused while one of them chooses, which a slow store makes long."""
    until = time.monotonic() + SETTLE_S
    while True:
        try:
            return index.settle_place(choose)
        except StorageRefused:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
