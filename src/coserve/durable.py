"""Writes that leave a file or a directory whole or not at all, whenever the process ends or the power fails.

Each is written under a temporary name in the same directory, brought to the disk (fsync) and renamed. The temporary name is
always the same where one process writes, so that a crash leaves one at most, and the next write replaces it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def sync(*paths: Path) -> None:
    """Waits until files, and the names that directories hold, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, data: bytes, *, cached: bool = False, mode: int | None = None) -> None:
    """Makes or replaces a file. Raises OSError; the old file is still there then.

    cached: whether the file can be made again and several processes may write it at once: each takes a temporary name of its
    own, and none waits for the disk. mode: the file's permissions; None leaves them to the process's umask.
    """
    temporary = _temporary(path, unique=cached)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if not cached:
                file.flush()
                os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if not cached:
        sync(path.parent)


def write_directory(directory: Path, fill: Callable[[Path], object], *, cached: bool = False) -> None:
    """Makes a directory with the files that `fill` writes into the temporary one that it is given. Raises what `fill` raises.

    cached: whether several processes may write it at once: each takes a temporary name of its own, and a directory that another
    has made meanwhile is kept. Otherwise an earlier directory of this name is replaced; a crash between its deletion and the
    renaming leaves none.
    """
    temporary = _temporary(directory, unique=cached)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        sync(*sorted(temporary.iterdir()), temporary)
        if directory.exists() and not cached:
            shutil.rmtree(directory)
        try:
            temporary.rename(directory)
        except OSError:
            if not cached or not directory.is_dir():
                raise
        else:
            sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path, *, unique: bool) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex if unique else 'tmp'}")
