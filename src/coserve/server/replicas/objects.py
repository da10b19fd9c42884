"""Objects in a directory or in S3, through fsspec: a few primitives that end in time, with errors of the error tree.

    ROOT/coserve-store.json     the marker: this is a store of coserve, of which format, and which one

Nothing is asked of the store but that a written object can be read, listed and deleted: no renaming, no exclusive creation, no
locks. Each primitive runs in a thread of its own. One that doesn't return in time is given up: its caller gets StorageRefused,
and its thread ends when the system lets it. While a few of them hang, all others are refused at once, so that nobody waits for
a store that is away.

Owns: URLs of stores, the marker, time limits, which failure means what. Does not own: what objects mean (artifacts.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from coserve.core import ConfigError, one_line
from coserve.durable import sync
from coserve.finetune.disk import is_full
from coserve.server.errors import StorageRefused
from coserve.server.index.place import STORE
from coserve.server.records import new_id

T = TypeVar("T")

MARKER = "coserve-store.json"
FORMAT = 1
CHUNK_BYTES = 8 << 20
"""What one primitive reads or writes at most: S3 takes parts of at least 5 MiB."""
CALL_S = 30.0
"""Seconds that one primitive may take."""
_MAX_CALLS, _MAX_HANGING = 64, 8
"""Primitives at once, and how many of them may hang before all are refused."""
_LIBRARIES = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "s3fs"})
"""Packages whose exceptions mean that the store can't do something for now."""
_IGNORED = frozenset({"lost+found"})
"""What a new disk holds by itself; so do names that begin with a dot."""
_MARKER_TRIES = 5
_SILENT = "the artifact store doesn't answer; try again"
_log = logging.getLogger(__name__)


class ObjectStore:
    """Objects below a root, under keys with slashes. Thread-safe.

    Every method raises StorageRefused if the store is full, away, too slow or refuses access. id: of this store, by its marker;
    None where an older coserve has made it, and before `open_root`.
    """

    def __init__(self, files: Any, root: str, *, call_s: float = CALL_S) -> None:
        """files: an fsspec filesystem. root: a path in it. call_s: seconds that one primitive may take."""
        self._files, self._root, self._call_s = files, root.rstrip("/"), call_s
        self._on_disk = bool(getattr(files, "local_file", False))
        self._permits = threading.Semaphore(_MAX_CALLS)
        self._hanging: set[Future[Any]] = set()
        self.id: str | None = None

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of an object; end None: to its end. Raises FileNotFoundError."""
        return self._call(lambda: bytes(self._files.cat_file(self._path(key), start=start, end=end)))

    def write(self, key: str, chunks: Iterable[bytes]) -> None:
        """Writes an object. If it raises, also what `chunks` raises, a part of the object may be there. On a disk the object is
        not safe from a power failure before `flush`."""
        path = self._path(key)
        file = self._call(lambda: self._files.open(path, "wb", block_size=CHUNK_BYTES))
        try:
            for chunk in chunks:
                self._call(lambda data=chunk: file.write(data))  # type: ignore[misc]
            if self._on_disk:
                self._call(file.flush)
                self._call(lambda: os.fsync(file.fileno()))
            self._call(file.close)
        except BaseException as error:
            if not is_hanging(error):
                with contextlib.suppress(Exception):  # parts of an upload that isn't completed are never an object
                    self._call(file.close if self._on_disk else file.discard)
            if not self._on_disk:
                file.closed = True  # else it would complete the upload when it is collected, in any thread
            raise

    def write_whole(self, key: str, data: bytes) -> None:
        """Writes a small object, or replaces it, whole or not at all, and safe from a power failure. If it raises, it may
        still happen later."""
        if not self._on_disk:  # there every object appears whole
            return self.write(key, [data])
        staged = f"{key}.{uuid.uuid4().hex}"
        self.write(staged, [data])
        self._call(lambda: self._files.mv(self._path(staged), self._path(key)))
        self.flush(key)

    def flush(self, key: str) -> None:
        """On a disk: brings the names of the directories that lead to a key to it."""
        if self._on_disk:
            root = Path(self._root)
            inside = [place for place in Path(self._path(key)).parents if place.is_relative_to(root)]
            self._call(lambda: sync(*inside))

    def sizes(self, prefix: str) -> dict[str, int]:
        """{key: bytes} of all objects below a prefix; those that vanish meanwhile may be missing."""
        more = {"on_error": _raise_refusal} if self._on_disk else {}
        found: Mapping[str, Any] = self._call(lambda: self._files.find(self._path(prefix), detail=True, **more))
        if not found:
            self.check_there()
        return {path.removeprefix(self._root).lstrip("/"): int(info["size"]) for path, info in found.items()}

    def remove(self, key: str) -> None:
        """Deletes an object, or all objects below a key. Nothing happens if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._call(lambda: self._files.rm(self._path(key), recursive=True))

    def check_there(self) -> None:
        """Raises StorageRefused if the marker is gone: the disk isn't mounted, or the bucket was emptied."""
        try:
            self.read(MARKER)
        except FileNotFoundError as error:
            raise StorageRefused("the artifact store is away; try again") from error

    def open_root(self, shown: str, *, create: bool) -> None:
        """Checks the marker. If the root is empty, it is made first where `create` allows it. shown: the store's name in
        errors.

        Raises ConfigError for a store of another format, other contents, or a store that can't be used.
        """
        try:
            for _ in range(_MARKER_TRIES):  # the marker is read after it was made, by this process or another one
                try:
                    self.id = self._check_marker(self.read(MARKER), shown)
                    return
                except FileNotFoundError:
                    self._make_marker(shown, create=create)
        except (StorageRefused, OSError) as error:
            reason = one_line(error.__cause__ or error, 300)
            raise ConfigError(f"store: {shown} can't be used: {reason}", param="store") from error
        raise ConfigError(f"store: the {MARKER} of {shown} comes and goes; is the place emptied meanwhile?", param="store")

    def identify(self) -> str:
        """The store's id. A marker without one gets one, which only one process at a time may do."""
        if self.id is None:
            self._write_marker()
        assert self.id is not None
        return self.id

    def _check_marker(self, content: bytes, shown: str) -> str | None:
        """The id in a marker. Raises ConfigError for another format."""
        found = id = None
        with contextlib.suppress(ValueError, AttributeError):
            marker = json.loads(content)
            found, id = marker.get("format"), marker.get("id")
        if found != FORMAT:
            raise ConfigError(
                f"store: by its {MARKER}, {shown} has format {found!r}, and this coserve knows {FORMAT}: use the coserve that "
                "made it, or give another place", param="store",
            )
        return None if id is None else str(id)

    def _make_marker(self, shown: str, *, create: bool) -> None:
        if self._on_disk and create:
            self._call(lambda: Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True))
        names = [str(entry).rstrip("/").rpartition("/")[2] for entry in self._entries()]
        foreign = sorted(name for name in names if not name.startswith((".", f"{MARKER}.")) and name not in _IGNORED)
        if MARKER in foreign:
            return
        if foreign:
            raise ConfigError(
                f"store: {shown} holds other things ({', '.join(foreign[:3])}) and no {MARKER}; give an empty directory or "
                "prefix", param="store",
            )
        if not create:
            raise ConfigError(
                f"store: {shown} is empty, but the index of --database-url has files in a store; is it mounted, and the right "
                "one? For a new store take a new database", param="store",
            )
        self._write_marker()

    def _write_marker(self) -> None:
        self.id = new_id(STORE)
        self.write_whole(MARKER, json.dumps({"format": FORMAT, "id": self.id}).encode() + b"\n")

    def _entries(self) -> list[Any]:
        try:
            return list(self._call(lambda: self._files.ls(self._root, detail=False)))
        except FileNotFoundError:  # S3's answer for a prefix without objects
            return []

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _call(self, action: Callable[[], T]) -> T:
        """What a primitive gives. Raises FileNotFoundError and StorageRefused."""
        if len(self._hanging) >= _MAX_HANGING or not self._permits.acquire(timeout=self._call_s):
            raise StorageRefused(_SILENT) from TimeoutError("too many calls hang")
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                result = action()
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)
            finally:
                self._permits.release()

        threading.Thread(target=run, name="coserve-store", daemon=True).start()
        try:
            if not wait([outcome], self._call_s).done:
                self._hanging.add(outcome)
                outcome.add_done_callback(self._hanging.discard)
                raise TimeoutError(f"no answer within {self._call_s:g} s")
            return outcome.result()
        except FileNotFoundError:
            raise
        except Exception as error:
            message = _refusal_of(error)
            if message is None:
                raise
            _log.warning("%s: %s: %s", message, type(error).__name__, one_line(error, 500))
            raise StorageRefused(message) from error


def _raise_refusal(error: OSError) -> None:
    """What fsspec's walk would pass over in silence."""
    if not isinstance(error, FileNotFoundError):
        raise error


def is_hanging(error: BaseException) -> bool:
    """Whether a refusal means that a primitive was given up, so that it is better not to ask again at once."""
    return isinstance(error, StorageRefused) and isinstance(error.__cause__, TimeoutError)


def _refusal_of(error: Exception) -> str | None:
    """What a user reads about a store's failure; details are the operator's. None: it is a bug of ours."""
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and library not in _LIBRARIES:
        return None
    if isinstance(error, OSError) and is_full(error):
        return "the artifact store is full; free some space in it and try again"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return _SILENT
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return "the artifact store refuses access; see the server's log"
    return "the artifact store can't be used for now; try again"


def open_objects(url: str, *, create: bool = True) -> ObjectStore:
    """The store of a URL: a directory, file://DIRECTORY or s3://BUCKET/PREFIX. S3's credentials and endpoint come from the
    environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL). Raises ConfigError (store).

    create: whether an empty place may become a store.
    """
    protocol, separator, rest = url.partition("://")
    if not separator or protocol == "file":
        files, root = _local_files(), str(Path(rest if separator else url).expanduser().absolute())
    elif protocol == "s3":
        files, root = _s3_files(), rest.rstrip("/")
        if not root or "?" in root:
            raise ConfigError(f"store: {url!r} must be s3://BUCKET/PREFIX; an endpoint is given by AWS_ENDPOINT_URL",
                              param="store")
    else:
        raise ConfigError(f"store: {protocol}:// isn't supported; give a directory or s3://BUCKET/PREFIX", param="store")
    if root == "/" or not url:
        raise ConfigError("store: give a directory of its own", param="store")
    store = ObjectStore(files, root)
    store.open_root(url, create=create)
    return store


def _local_files() -> Any:
    try:
        from fsspec.implementations.local import LocalFileSystem
    except ModuleNotFoundError as error:
        raise ConfigError("store: needs fsspec: pip install 'coserve[ray]'", param="store") from error
    return LocalFileSystem(auto_mkdir=True, skip_instance_cache=True)


def _s3_files() -> Any:
    try:
        from s3fs import S3FileSystem
    except ModuleNotFoundError as error:
        raise ConfigError("store: s3:// needs s3fs: pip install 'coserve[ray]'", param="store") from error
    limits = {"connect_timeout": 5, "read_timeout": 20, "retries": {"mode": "standard", "max_attempts": 3}}
    return S3FileSystem(config_kwargs=limits, use_listings_cache=False, skip_instance_cache=True)
