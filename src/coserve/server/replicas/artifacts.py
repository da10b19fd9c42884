"""Artifacts: files and directories that never change, in a store that all machines see. Uploads, checkpoints and adapters are
artifacts; rows of the index name them by key and digest.

    ROOT/KEY/_manifest.json     names, sizes and SHA-256 of the files: it is written last, and makes all of them visible
    ROOT/KEY/_HEX/NAME          the files of the try that the manifest names

Each try to write an artifact has a directory of its own, so that a late write of an earlier try changes nothing that anybody
sees. What such a try has left is deleted with the key. Reading goes through copies on this machine (artifactcache.py), whose
bytes are checked against the digests.

Owns: keys, the order of writes, what is read again because it was damaged. Does not own: which keys there are (the index has
them), the store's failures (objects.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec

from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.replicas.artifactcache import ArtifactCache, ArtifactFile, ArtifactManifest, file_digest
from coserve.server.replicas.objects import CHUNK_BYTES, ObjectStore, is_hanging, open_objects

_MANIFEST = "_manifest.json"
_ONLY_FILE = "content"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9][A-Za-z0-9._=-]*)*")
_MAX_KEY = 512
_TRIES = 2
"""Times that an artifact is read whose bytes don't have their digests."""
_log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """An artifact in the store. sha256: the digest of its manifest, which depends on the files alone. bytes: of all files."""

    key: str
    sha256: str
    bytes: int


class ArtifactStore:
    """Artifacts by key, such as 'jobs/ftjob-1/e2/step-00000010'. Any thread may call its methods; they block.

    Every method raises StorageRefused if the store, or this machine's disk, is full, slow or away. Then nothing is half there.
    """

    def __init__(self, objects: ObjectStore, cache: ArtifactCache) -> None:
        self._objects, self.cache = objects, cache

    @property
    def id(self) -> str | None:
        """The store's, by its marker; None: an older coserve has made it."""
        return self._objects.id

    def put_directory(self, key: str, source: Path) -> Stored:
        """Stores all files below a directory. Raises Conflict if the key has other files already, InvalidRequest for links and
        the like below `source`, OSError if `source` can't be read. An artifact with the same files may be there already."""
        return self._put(key, {name: source / name for name in sorted(_plain_files(source))})

    def put_file(self, key: str, source: Path) -> Stored:
        """Stores one file. Raises as `put_directory`."""
        return self._put(key, {"": source})

    def fetch(self, key: str, sha256: str = "") -> Path:
        """A read-only copy on this machine: a file, or a directory. It stays for a minute; `hold` keeps it longer.

        sha256: the artifact's digest, as Stored has it; empty: that which the store has now.

        Raises NotFound if there is no such artifact, or none with this digest, or its bytes are damaged.
        """
        digest = sha256 or self._read_manifest(key).digest
        found = self.cache.find(digest)
        if found is None:
            with self.cache.filling(digest):
                found = self.cache.find(digest) or self._fill(key, digest)
        return found

    @contextmanager
    def hold(self, key: str, sha256: str = "") -> Iterator[Path]:
        """As `fetch`. The copy stays as long as the context is open."""
        digest = sha256 or self._read_manifest(key).digest
        with contextlib.ExitStack() as stack:
            held = None
            while held is None:  # a copy could go between fetching and holding it
                self.fetch(key, digest)
                held = stack.enter_context(self.cache.hold(digest))
            yield held

    def exists(self, key: str) -> bool:
        """Whether there is a whole artifact under a key."""
        with contextlib.suppress(NotFound):
            self._read_manifest(key)
            return True
        return False

    def delete(self, prefix: str, *, copies: bool = True) -> None:
        """Deletes the artifact of a key and all those below it, with what broken tries left. Nothing happens if there is none.
        copies: whether this machine's copies are deleted too, which an artifact with the same files under another key shares.
        Other machines' copies go when their room is needed."""
        _check_key(prefix)
        known = self._objects.sizes(prefix)
        for key in known:
            if key.endswith(f"/{_MANIFEST}"):  # manifests first, so that no artifact is there in part
                if copies:
                    with contextlib.suppress(NotFound):
                        self.cache.drop(self._read_manifest(key.removesuffix(f"/{_MANIFEST}")).digest)
                self._objects.remove(key)
        if known:
            self._objects.remove(prefix)

    def sweep(self, prefix: str, keep: Collection[str]) -> None:
        """Deletes what is below a key, but not what is at or below the keys to keep, and no copies of it."""
        if prefix in keep:
            return
        if not any(key.startswith(f"{prefix}/") for key in keep):
            self.delete(prefix, copies=False)
            return
        _check_key(prefix)
        for name in sorted({key.removeprefix(f"{prefix}/").split("/")[0] for key in self._objects.sizes(prefix)}):
            if _KEY.fullmatch(name):
                self.sweep(f"{prefix}/{name}", keep)

    def size(self, prefix: str) -> int:
        """The bytes of all objects below a key; 0 if there are none."""
        _check_key(prefix)
        return sum(self._objects.sizes(prefix).values())

    def _put(self, key: str, sources: dict[str, Path]) -> Stored:
        _check_key(key)
        self._objects.check_there()
        place, is_named = f"_{uuid.uuid4().hex}", False
        try:
            files = tuple(self._write(f"{key}/{place}", name, source) for name, source in sources.items())
            manifest = ArtifactManifest(files=files, place=place)
            try:
                known = self._read_manifest(key)
            except NotFound:
                try:
                    for folder in {str(PurePosixPath(file.name or _ONLY_FILE).parent) for file in files}:
                        self._objects.flush(f"{key}/{place}/{folder}/{_ONLY_FILE}")
                    is_named = True  # from now on: a write that is given up may still succeed
                    self._objects.write_whole(f"{key}/{_MANIFEST}", msgspec.json.encode(manifest))
                except FileNotFoundError as error:  # as by the next holder of a job, when this one has lost it
                    raise StorageRefused(f"artifact {key} was deleted while it was stored; try again") from error
            else:
                if known.digest != manifest.digest:
                    raise Conflict(f"artifact {key} is in the store already, with other files")
        except BaseException as error:
            if not is_named and not is_hanging(error):
                self._discard(f"{key}/{place}")
            raise
        if not is_named:
            self._discard(f"{key}/{place}")
        return Stored(key, manifest.digest, manifest.num_bytes)

    def _discard(self, place: str) -> None:
        """Deletes what a try has written, if the store lets it; else it is deleted with the key."""
        with contextlib.suppress(CoserveError):
            self._objects.remove(place)

    def _write(self, place: str, name: str, source: Path) -> ArtifactFile:
        """Writes one file below a place, and says what was written."""
        size, digest = 0, hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            nonlocal size
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    size += len(chunk)
                    digest.update(chunk)
                    yield chunk

        self._objects.write(f"{place}/{name or _ONLY_FILE}", chunks())
        return ArtifactFile(name=name, bytes=size, sha256=digest.hexdigest())

    def _fill(self, key: str, digest: str) -> Path:
        for left in reversed(range(_TRIES)):
            try:
                manifest = self._read_manifest(key)
                if manifest.digest != digest:
                    raise _Damaged("it has other files than the index says")

                def fill(file: ArtifactFile, target: Path, place: str = f"{key}/{manifest.place}") -> None:
                    self._read(f"{place}/{file.name or _ONLY_FILE}", file, target)

                return self.cache.add(manifest, fill)
            except _Damaged as error:
                _log.warning("artifact %s is damaged: %s", key, error)
                if not left:
                    raise NotFound(f"artifact {key} is damaged in the store: {error}") from error
        raise AssertionError("unreachable")

    def _read(self, key: str, file: ArtifactFile, target: Path) -> None:
        """Writes a file of the store to a path here. Raises _Damaged."""
        digest = hashlib.sha256()
        shown = file.name or "its content"
        with target.open("xb") as copy:
            for start in range(0, file.bytes, CHUNK_BYTES):
                try:
                    chunk = self._objects.read(key, start, min(start + CHUNK_BYTES, file.bytes))
                except FileNotFoundError as error:
                    self._objects.check_there()
                    raise _Damaged(f"{shown} is missing") from error
                digest.update(chunk)
                copy.write(chunk)
            if digest.hexdigest() != file.sha256 or copy.tell() != file.bytes:
                raise _Damaged(f"{shown} has other bytes than were stored")

    def _read_manifest(self, key: str) -> ArtifactManifest:
        """Raises NotFound, also for one that isn't written to its end."""
        _check_key(key)
        try:
            manifest = msgspec.json.decode(self._objects.read(f"{key}/{_MANIFEST}"), type=ArtifactManifest)
        except FileNotFoundError as error:
            self._objects.check_there()
            raise NotFound(f"artifact {key} is not in the store") from error
        except msgspec.MsgspecError as error:
            raise NotFound(f"artifact {key} is not whole in the store") from error
        if not manifest.is_sound or not re.fullmatch("_[0-9a-f]+", manifest.place):
            raise NotFound(f"artifact {key} has a manifest that no coserve wrote")
        return manifest


def open_store(url: str, cache: Path, *, cache_bytes: int, create: bool = True) -> ArtifactStore:
    """The store of a URL: a directory, or s3://BUCKET/PREFIX, with credentials and endpoint from the environment.

    cache: a directory for copies, which processes of this machine may share. cache_bytes: how much they may take together.
    create: whether an empty place may become a store; False if the index names artifacts already, which must be there.

    Raises ConfigError (store, data_dir).
    """
    return ArtifactStore(open_objects(url, create=create), ArtifactCache(cache, cache_bytes))


def file_manifest_digest(num_bytes: int, sha256: str) -> str:
    """The digest of an artifact that is one file: Stored.sha256, by the file's own digest."""
    return ArtifactManifest(files=(ArtifactFile(name="", bytes=num_bytes, sha256=sha256),), place="").digest


class _Damaged(Exception):
    """What was read isn't what was stored."""


def _check_key(key: str) -> None:
    if len(key) > _MAX_KEY or _KEY.fullmatch(key) is None:
        raise InvalidRequest(f"artifact: {key[:64]!r} can't be a key of the store")


def _plain_files(directory: Path, prefix: str = "") -> Iterator[str]:
    """Paths of all files below a directory. Raises InvalidRequest for what is neither a file nor a directory, OSError."""
    with os.scandir(directory / prefix) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _plain_files(directory, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise InvalidRequest(f"artifact: {name[:64]!r} is neither a file nor a directory")


def directory_digest(directory: Path) -> str:
    """The digest that an artifact of a directory's files would have. Raises InvalidRequest, OSError."""
    places = {name: directory / name for name in _plain_files(directory)}
    return ArtifactManifest(place="", files=tuple(
        ArtifactFile(name=name, bytes=place.stat().st_size, sha256=file_digest(place)) for name, place in places.items()
    )).digest
