"""Two kinds of lock: on files of the data directory, for one server and one engine at a time; by name on an event loop.

The system frees the lock of a file when the process that holds it dies. The library filelock would refuse a lock file that is a
symbolic link, and takes some errors of file systems for a lock that is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TextIO

from coserve.core import ConfigError

_LOOK_EVERY_S = 0.1


def make_private(directory: Path) -> None:
    """Makes a directory that only its owner can look into, if there is none. Raises ConfigError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data_dir: {directory} can't be made ({error.strerror})", param="data_dir") from error


@contextmanager
def hold(path: Path, *, timeout_s: float = 0.0, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a file, and writes this process's number into the file.

    waiting: called once if another process holds the lock.

    Raises ConfigError if that process still holds it after timeout_s, or the file can't be written or locked.
    """
    try:
        file = open(path, "a+", encoding="ascii")  # noqa: SIM115  # held beyond this function's `try`
    except OSError as error:
        raise ConfigError(f"data_dir: {path} can't be written ({error.strerror})", param="data_dir") from error
    with file:
        if not _try_lock(file):
            waiting()
            limit = time.monotonic() + timeout_s
            while not _try_lock(file):
                if time.monotonic() >= limit:
                    file.seek(0)
                    raise ConfigError(
                        f"data_dir: {path.parent} is in use by process {file.read().strip() or 'unknown'}; stop that one, or "
                        "give another data_dir", param="data_dir",
                    )
                time.sleep(_LOOK_EVERY_S)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the number
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode("ascii"))
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        raise ConfigError(f"data_dir: {file.name} can't be locked ({error.strerror})", param="data_dir") from error
    return True


class NameLocks:
    """A lock for each name that somebody holds or waits for. Belongs to one event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Waits until nobody else holds the name's lock."""
        self._users[name] += 1
        try:
            async with self._locks.setdefault(name, asyncio.Lock()):
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]
