"""Locks of the data directory: held by one process at a time, on a full disk too."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from coserve.core import ConfigError
from coserve.server.locks import hold


def test_a_lock_names_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    in_use = pytest.raises(ConfigError, match=f"in use by process {os.getpid()};")
    with hold(tmp_path / "lock"), in_use, hold(tmp_path / "lock"):
        pass
    with hold(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_holds_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with hold(tmp_path / "lock"), pytest.raises(ConfigError, match="in use by process unknown"), hold(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EACCES])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=f"lock can't be locked .{os.strerror(number)}"), hold(tmp_path / "lock"):
        pass
