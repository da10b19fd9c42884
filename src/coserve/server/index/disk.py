"""The data directory's disk: its refusals as errors of the error tree, how many bytes a directory holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from coserve.finetune.disk import is_full, refusal_of
from coserve.server.errors import StorageRefused

FULL = "the disk of the data directory is full; free some space and try again"


@contextmanager
def storage_errors() -> Iterator[None]:
    """The operating system's refusals as StorageRefused. What is left is a bug of ours."""
    try:
        yield
    except OSError as error:
        reason = refusal_of(error)
        if reason is None:
            raise
        raise StorageRefused(FULL if is_full(error) else f"the data directory can't be written ({error.strerror})") from error


def directory_bytes(path: str) -> int:
    """Of all files below; those that vanish meanwhile don't count."""
    total = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += directory_bytes(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        return total
    return total
