"""Which place holds the bytes that an index names: a data directory or an artifact store, by a random id in a file there.

    index, table places           place
    files: data-...       <---    DATA_DIR/place.json          of a single server whose index is a database elsewhere
    files: store-...      <---    STORE/coserve-store.json     of a fleet (replicas/storeplace.py)

A single server deletes rows whose bytes its data directory lacks, and a machine whose store isn't mounted sees an empty
directory that looks like a new store. So the first process on an index notes its place there, and one with another place is
refused. An index in its own data directory (SQLite) moves with it, and is never compared.

Owns: a data directory's id, the comparison. Does not own: the row (store.py), a store's marker (replicas/objects.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from coserve.core import ConfigError
from coserve.durable import write_file
from coserve.server.index.store import Store
from coserve.server.records import new_id

PLACE_FILE = "place.json"
DATA, STORE = "data", "store"
"""What ids of data directories and of stores begin with."""


class _Place(msgspec.Struct):
    id: str


def is_of(kind: str, id: str | None) -> bool:
    """Whether an id is one of a data directory (DATA) or of a store (STORE)."""
    return id is not None and id.startswith(f"{kind}-")


def check_data_directory(index: Store, data_dir: Path) -> None:
    """Notes in the index that a data directory holds the bytes of its rows, unless a place is noted already. Raises ConfigError
    if that is another one. The lock of the directory must be held."""
    path = data_dir / PLACE_FILE
    known, own = index.settle_place(lambda: _own_place(path) or _make_place(path)), _own_place(path)
    if known == own:
        return
    if is_of(STORE, known):
        raise ConfigError(
            "database_url: this database belongs to several replicas, whose files are in a store; a single server would take "
            "them for lost. Give --replicas and --store too, or another --database-url", param="database_url",
        )
    raise ConfigError(
        f"data_dir: the database of --database-url belongs to another data directory ({known}; {data_dir} has "
        f"{own or f'no {PLACE_FILE}'}). Give that one, or a new database. If this is that directory, restored from a backup, "
        f"write {json.dumps({'id': known})} into {path}", param="data_dir",
    )


def _own_place(path: Path) -> str | None:
    """The id in a data directory, if it has one. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Place).id
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"data_dir: {path} can't be read ({error})", param="data_dir") from error


def _make_place(path: Path) -> str:
    id = new_id(DATA)
    try:
        write_file(path, msgspec.json.encode(_Place(id)) + b"\n")
    except OSError as error:
        raise ConfigError(f"data_dir: {path} can't be written ({error.strerror})", param="data_dir") from error
    return id
