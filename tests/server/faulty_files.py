"""A filesystem of fsspec on a directory that fails, waits or lies where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from coserve.server.replicas.objects import ObjectStore


def _nothing(verb: str, path: str) -> None:
    """Lets everything pass."""


class FaultyFiles(LocalFileSystem):
    """before(verb, path): called before each open, write, close, read, find, ls, mv and rm; what it raises, the store raises.
    change(path, data): what a read gives instead of the data."""

    def __init__(self, **_: Any) -> None:
        super().__init__(auto_mkdir=True)
        self.before: Callable[[str, str], None] = _nothing
        self.change: Callable[[str, bytes], bytes] = lambda _path, data: data
        self.calls: list[tuple[str, str]] = []

    def note(self, verb: str, path: str) -> None:
        self.calls.append((verb, path))
        self.before(verb, path)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        if "r" in mode:
            return super()._open(path, mode, block_size, **kwargs)
        self.note("open", path)
        self.makedirs(self._parent(path), exist_ok=True)
        return _FaultyOpener(path, mode, fs=self, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.note("read", path)
        return self.change(path, super().cat_file(path, start, end, **kwargs))

    def find(self, path: str, **kwargs: Any) -> Any:
        self.note("find", path)
        return super().find(path, **kwargs)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        self.note("ls", path)
        return super().ls(path, detail, **kwargs)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.note("rm", path)
        super().rm(path, recursive, maxdepth)

    def mv(self, path1: str, path2: str, recursive: bool = True, **kwargs: Any) -> None:
        self.note("mv", path2)
        super().mv(path1, path2, recursive, **kwargs)


class _FaultyOpener(LocalFileOpener):
    def write(self, data: bytes) -> int:
        self.fs.note("write", self.path)
        return int(super().write(data))

    def close(self) -> None:
        if not self.closed:
            self.fs.note("close", self.path)
            super().close()


def faulty_objects(root: str, *, call_s: float = 5.0) -> tuple[ObjectStore, FaultyFiles]:
    """A store on such a filesystem."""
    files = FaultyFiles(skip_instance_cache=True)
    objects = ObjectStore(files, root, call_s=call_s)
    objects.open_root(root, create=True)
    return objects, files
