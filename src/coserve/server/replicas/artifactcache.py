"""Copies of artifacts on this machine's disk, by the digest of their manifest. Several processes may share one directory.

    CACHE/entries/DIGEST/manifest.json      as it is in the store
    CACHE/entries/DIGEST/content            a file, or a directory of files
    CACHE/unfinished/HEX/                   one that is being filled or deleted
    CACHE/locks/XX                          whose holder may fill the entries whose digest begins with XX

An entry appears by a renaming and never changes. Its digests are checked when it is filled, and once again by each process
that finds it there, since a power failure may have damaged it. Its directory is locked for sharing while somebody holds it; the
system frees the lock of a process that is killed. So the processes must be of one machine: such locks don't reach further.
Entries that nobody holds are deleted, least recently used ones first, when their bytes together are over the limit or over half
of what the disk has for them, and when the disk is full. One that was used in the last minute stays, since its user may not
have opened it yet.

Owns: that directory. Does not own: where the bytes come from (artifacts.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import msgspec

from coserve.core import ConfigError
from coserve.finetune.disk import is_full
from coserve.server.index.disk import storage_errors

_MANIFEST, _CONTENT = "manifest.json", "content"
_READ_BYTES = 1 << 20
_KEPT_S = 60.0
"""Seconds after its last use for which an entry stays even if nobody holds it."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1
_FILLING_S = 600.0
"""Seconds after which a process no longer waits for another one that fills an entry: it may be stopped."""


class ArtifactFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of an artifact. name: a path below its directory; empty: the artifact is this file."""

    name: str
    bytes: int
    sha256: str


class ArtifactManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an artifact holds. place: the key of its files in the store, below its own. Artifacts with the same files have the
    same digest, wherever they are."""

    files: tuple[ArtifactFile, ...]
    place: str

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and digests."""
        files = sorted((file.name, file.bytes, file.sha256) for file in self.files)
        return hashlib.sha256(msgspec.json.encode(files)).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def is_file(self) -> bool:
        """Whether this is one file, not a directory."""
        return len(self.files) == 1 and not self.files[0].name

    @property
    def is_sound(self) -> bool:
        """Whether all names are paths that stay below a directory, and none leads through another file."""
        if self.is_file:
            return True
        names = [file.name for file in self.files]
        paths = [PurePosixPath(name) for name in names]
        plain = all(str(path) == name and not path.is_absolute() and not {"..", "."} & {*path.parts} and "\0" not in name
                    for path, name in zip(paths, names, strict=True))
        return plain and len({*names}) == len(names) and not {*names} & {str(p) for path in paths for p in path.parents}

    def place_of(self, file: ArtifactFile, content: Path) -> Path:
        """Where a file lies in a copy."""
        return content / file.name if file.name else content


class ArtifactCache:
    """Thread-safe, also across processes. Paths that it gives are read-only files. Raises StorageRefused where the disk
    refuses."""

    def __init__(self, root: Path, max_bytes: int, *, kept_s: float = _KEPT_S) -> None:
        """Makes the directory if there is none. Raises ConfigError. max_bytes: of all entries, on a disk that has twice as much
        for them; `max_bytes` says how much it is here. kept_s: how long an entry stays after its last use."""
        self.max_bytes, self._kept_s, self._root = max_bytes, kept_s, root
        self._entries, self._unfinished, self._locks = (root / name for name in ("entries", "unfinished", "locks"))
        self._checked: dict[str, int] = {}
        """Digests of entries that this process has checked or filled -> the inodes of their directories."""
        self._sizes: dict[str, int] = {}
        try:
            for place in (self._entries, self._unfinished, self._locks):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data_dir: {root} can't be made ({error.strerror})", param="data_dir") from error
        self._sweep()
        with storage_errors():
            self.max_bytes = self._limit(sum(size for _, _, size in self._list()))

    def find(self, digest: str) -> Path | None:
        """The content of an entry, or None. The entry counts as used now. One that is damaged is removed."""
        entry = self._entries / digest
        with storage_errors():
            try:
                inode = entry.stat().st_ino
                if self._checked.get(digest) != inode:
                    if not _is_whole(entry, digest):
                        self._remove(entry)
                        return None
                    self._checked[digest] = inode
                os.utime(entry)
            except FileNotFoundError:
                return None
        return entry / _CONTENT

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path | None]:
        """As `find`. The entry stays as long as the context is open."""
        with contextlib.ExitStack() as stack:
            try:
                with storage_errors():
                    descriptor = os.open(self._entries / digest, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                found = None
            else:
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                found = self.find(digest)  # it may have been deleted, or replaced, before the lock was there
                if found is not None and not _is_at(descriptor, found.parent):
                    found = None
            yield found

    @contextmanager
    def filling(self, digest: str) -> Iterator[None]:
        """Until the context ends, nobody else fills this entry, unless this takes very long."""
        with storage_errors(), open(self._locks / digest[:2], "a+b") as file:
            limit, pause = time.monotonic() + _FILLING_S, _FIRST_PAUSE_S
            while not _try_lock(file.fileno()) and time.monotonic() < limit:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            yield

    def add(self, manifest: ArtifactManifest, fill: Callable[[ArtifactFile, Path], None]) -> Path:
        """Makes an entry. fill(file, path): writes a file of the artifact to a path, and checks it. Returns the content. Raises
        what `fill` raises; then there is no entry."""
        with storage_errors():
            self._sweep()
            self._make_room(manifest.num_bytes)
            try:
                return self._try_add(manifest, fill)
            except OSError as error:
                if not is_full(error):
                    raise
            self._make_room(manifest.num_bytes, everything=True)  # others use the disk too
            return self._try_add(manifest, fill)

    def _try_add(self, manifest: ArtifactManifest, fill: Callable[[ArtifactFile, Path], None]) -> Path:
        digest = manifest.digest
        with self._new_place() as place:
            content = place / _CONTENT
            if not manifest.is_file:
                content.mkdir()
            for file in manifest.files:
                target = manifest.place_of(file, content)
                target.parent.mkdir(parents=True, exist_ok=True)
                fill(file, target)
                target.chmod(0o444)
            (place / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
            entry = self._entries / digest
            try:
                place.rename(entry)
            except OSError:
                if not entry.is_dir():  # another process, which was thought to be stopped, has made it
                    raise
            self._checked[digest] = entry.stat().st_ino
        return entry / _CONTENT

    def drop(self, digest: str) -> None:
        """Deletes an entry that nobody holds."""
        entry = self._entries / digest
        with storage_errors():
            self._remove_unheld(entry)

    def _make_room(self, num_bytes: int, *, everything: bool = False) -> None:
        """Deletes entries until so many bytes fit, or nothing is left that may be deleted. everything: deletes all of those."""
        found = self._list()
        cached = sum(size for _, _, size in found)
        total, limit = cached + num_bytes, 0 if everything else min(self.max_bytes, self._limit(cached))
        last = time.time() - self._kept_s
        for used, entry, size in sorted(found):
            if total <= limit or used > last:
                return
            if self._remove_unheld(entry):
                total -= size

    def _list(self) -> list[tuple[float, Path, int]]:
        """(time of the last use, entry, bytes) of each."""
        found = []
        for entry in self._entries.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, entry, self._size_of(entry)))
        return found

    def _limit(self, cached: int) -> int:
        """How many bytes entries may have on this disk. cached: how many they have now."""
        return min(self.max_bytes, (shutil.disk_usage(self._root).free + cached) // 2)

    def _size_of(self, entry: Path) -> int:
        size = self._sizes.get(entry.name)
        if size is None:
            try:
                size = msgspec.json.decode((entry / _MANIFEST).read_bytes(), type=ArtifactManifest).num_bytes
            except msgspec.MsgspecError:
                size = 0  # it is damaged; whoever asks for it removes it
            self._sizes[entry.name] = size
        return size

    def _remove_unheld(self, entry: Path) -> bool:
        """Whether the entry is gone now."""
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process was faster
            return True
        try:
            if not _try_lock(descriptor) or not _is_at(descriptor, entry):
                return False
            self._remove(entry)
        finally:
            os.close(descriptor)
        return True

    def _remove(self, entry: Path) -> None:
        self._checked.pop(entry.name, None)
        self._sizes.pop(entry.name, None)
        gone = self._unfinished / uuid.uuid4().hex
        entry.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _new_place(self) -> Iterator[Path]:
        """A directory that is deleted when the context ends, unless it was renamed, and that no `_sweep` deletes before."""
        while True:
            place = self._unfinished / uuid.uuid4().hex
            place.mkdir(mode=0o700)
            try:
                descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # a sweep has come in between
                continue
            if _try_lock(descriptor) and _is_at(descriptor, place):
                break
            os.close(descriptor)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            os.close(descriptor)

    def _sweep(self) -> None:
        """Deletes what processes that were killed have left."""
        with storage_errors():
            for place in self._unfinished.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
                    try:
                        if _try_lock(descriptor):
                            shutil.rmtree(place, ignore_errors=True)
                    finally:
                        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_whole(entry: Path, digest: str) -> bool:
    """Whether the entry's files are those of its digest."""
    try:
        manifest = msgspec.json.decode((entry / _MANIFEST).read_bytes(), type=ArtifactManifest)
        return manifest.digest == digest and manifest.is_sound and all(
            file_digest(manifest.place_of(file, entry / _CONTENT)) == file.sha256 for file in manifest.files
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, msgspec.MsgspecError):
        return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open directory is still the one at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
