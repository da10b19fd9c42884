"""durable.py: what is seen under the final name is whole, whoever fails and however many write."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve.durable import write_directory, write_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that decide what a loss of power leaves, in order."""
    calls: list[str] = []

    def record(place: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(place, name)

        def call(*arguments: Any, **options: Any) -> Any:
            shown = name
            if name == "fsync":
                shown = "fsync directory" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "fsync file"
            calls.append(shown)
            return real(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    record(os, "fsync")
    record(os, "replace")
    record(Path, "rename")
    return calls


def two_files(place: Path) -> None:
    (place / "a").write_bytes(b"1")
    (place / "b").write_bytes(b"2")


def test_contents_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    write_file(tmp_path / "file", b"new")
    assert calls == ["fsync file", "replace", "fsync directory"]
    calls.clear()
    write_directory(tmp_path / "directory", two_files)
    assert calls == ["fsync file", "fsync file", "fsync directory", "rename", "fsync directory"]
    calls.clear()
    write_file(tmp_path / "cached", b"new", cached=True)
    assert calls == ["replace"]


@pytest.mark.parametrize(("place", "cached"), [("fsync", False), ("replace", False), ("replace", True)])
def test_a_refused_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, cached: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, place, refuse)
    with pytest.raises(OSError, match="full"):
        write_file(path, b"new", cached=cached)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_crashs_leftover_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"a longer half")
    (tmp_path / ".directory.tmp").mkdir()
    (tmp_path / ".directory.tmp" / "stranger").touch()
    write_file(tmp_path / "file", b"new")
    write_directory(tmp_path / "directory", two_files)
    assert names(tmp_path) == ["directory", "file"] and names(tmp_path / "directory") == ["a", "b"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_permissions_are_the_umasks_unless_given(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "plain", b"")
        write_file(tmp_path / "program", b"", mode=0o755)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "program")] == [0o640, 0o755]


def test_an_earlier_directory_is_replaced_but_a_cached_one_stays(tmp_path: Path) -> None:
    for cached, expected in ((False, ["a", "b"]), (True, ["old"])):
        directory = tmp_path / str(cached)
        directory.mkdir()
        (directory / "old").touch()
        write_directory(directory, two_files, cached=cached)
        assert names(directory) == expected
    assert names(tmp_path) == ["False", "True"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_failure_while_it_is_filled_leaves_nothing(tmp_path: Path, cached: bool) -> None:
    def interrupted(place: Path) -> None:
        two_files(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "made" / "directory", interrupted, cached=cached)
    assert names(tmp_path / "made") == []


def test_cached_writers_do_not_meet(tmp_path: Path) -> None:
    def other_first(place: Path) -> None:
        write_directory(tmp_path / "directory", two_files, cached=True)
        (place / "late").touch()

    write_directory(tmp_path / "directory", other_first, cached=True)
    assert names(tmp_path / "directory") == ["a", "b"] and names(tmp_path) == ["directory"]
