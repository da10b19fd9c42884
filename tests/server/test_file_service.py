"""Files on disk and in the index: what a rebuild makes of them, and what faults of the disk and kills leave behind."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from coserve.core import CapacityError, ConfigError, InvalidRequest, NotFound
from coserve.server.errors import TooLarge
from coserve.server.index import files as files_module
from coserve.server.index.files import FileService
from coserve.server.index.store import Store

MAX_BYTES, MAX_TENANT_BYTES = 100_000, 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/coserve.db")
    yield store
    store.close()


@pytest.fixture
def service(tmp_path: Path, store: Store) -> FileService:
    return FileService(tmp_path / "files", store, MAX_BYTES, MAX_TENANT_BYTES)


def test_results(service: FileService, store: Store) -> None:
    record = service.save_result("alice", "step_metrics.csv", b"step,loss\n1,2.0\n")
    assert (record.purpose, record.bytes) == ("fine-tune-results", 16)
    assert store.get_file("alice", record.id) == record
    assert service.find("alice", record.id)[1].read_bytes() == b"step,loss\n1,2.0\n"
    assert service.save_result("alice", "empty.csv", b"").bytes == 0


def test_uploads_at_once_share_the_tenants_limit(tmp_path: Path, store: Store) -> None:
    content = b'{"text": "hello"}\n'
    service = FileService(tmp_path / "files", store, MAX_BYTES, 3 * len(content))

    async def upload_all() -> list[Any]:
        files = [UploadFile(io.BytesIO(content), size=len(content), filename="x.jsonl") for _ in range(8)]
        saving = (service.save_upload("alice", file, "fine-tune") for file in files)
        return await asyncio.gather(*saving, return_exceptions=True)

    failed = [outcome for outcome in asyncio.run(upload_all()) if isinstance(outcome, BaseException)]
    assert len(failed) == 5 and all(isinstance(error, TooLarge) for error in failed)
    assert len(store.all_files()) == len(list((tmp_path / "files").iterdir())) == 3
    assert service.save_result("alice", "metrics.csv", content).bytes == len(content), "a job's result is never refused"


def test_the_index_is_rebuilt(service: FileService, tmp_path: Path) -> None:
    records = [service.save_result(tenant, f"{tenant}.csv", b"x") for tenant in ("alice", "bob")]
    fresh = Store(f"sqlite:///{tmp_path}/fresh.db")
    FileService(tmp_path / "files", fresh, MAX_BYTES, MAX_TENANT_BYTES).rebuild()
    assert sorted(fresh.all_files(), key=lambda r: r.tenant) == records
    FileService(tmp_path / "files", fresh, MAX_BYTES, MAX_TENANT_BYTES).rebuild()
    assert len(fresh.all_files()) == 2
    fresh.close()


def test_what_is_not_whole_is_left_out(
    service: FileService, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    kept, cut, lost, vanished, renamed = (service.save_result("alice", "x.csv", b"12345") for _ in range(5))
    root = tmp_path / "files"
    service.path(cut).write_bytes(b"123")
    (root / lost.id / "meta.json").write_bytes(b'{"id": "file-')
    service.path(vanished).unlink()
    (root / renamed.id).rename(root / "file-other")
    (root / "file-dead.tmp").mkdir()
    (root / "file-dead.tmp" / "content").write_bytes(b"half")
    (root / "file-empty").mkdir()
    (root / "notes.txt").write_text("not ours")
    fields = {"id": 5, "tenant": None}
    (root / "file-empty" / "meta.json").write_text(json.dumps(fields))
    (root / "file-empty" / "content").write_text("")
    service.rebuild()
    assert store.all_files() == [kept]
    assert not (root / "file-dead.tmp").exists() and (root / "notes.txt").exists()
    assert all(id in caplog.text for id in (cut.id, lost.id, vanished.id, renamed.id, "file-empty"))
    with pytest.raises(NotFound):
        service.find("alice", cut.id)


@pytest.mark.parametrize("place", ["content", ".meta.json.tmp", "fsync", "last fsync", "rename", "index"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses(
    service: FileService, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int,
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    def full(*_args: Any) -> None:
        raise CapacityError("full")

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    elif place == "last fsync":
        synced = files_module.sync
        monkeypatch.setattr(
            files_module, "sync", lambda path: (refuse if path.name == "files" else synced)(path),
        )
    elif place == "rename":
        monkeypatch.setattr(Path, "rename", refuse)
    elif place == "index":
        monkeypatch.setattr(store, "add_file", full)
    else:
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda self, *a, **k: (refuse if self.name == place else opened)(self, *a, **k))
    with pytest.raises(CapacityError):
        service.save_result("alice", "x.csv", b"12345")
    monkeypatch.undo()
    assert list((tmp_path / "files").iterdir()) == []
    assert store.all_files() == []
    service.save_result("alice", "x.csv", b"12345")


def test_a_delete_that_is_refused_keeps_the_file(
    service: FileService, store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = service.save_result("alice", "x.csv", b"12345")

    def refuse(*_args: Any) -> Any:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CapacityError):
        service.delete("alice", record.id)
    monkeypatch.undo()
    assert service.find("alice", record.id)[0] == record


def test_a_crash_in_the_middle_of_a_delete(
    service: FileService, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = service.save_result("alice", "x.csv", b"12345")

    def crash(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "delete_file", crash)
    with pytest.raises(KeyboardInterrupt):
        service.delete("alice", record.id)
    monkeypatch.undo()
    service.rebuild()
    assert store.all_files() == [] and list((tmp_path / "files").iterdir()) == []


def test_deleting_works_on_a_full_disk(
    service: FileService, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = service.save_result("alice", "x.csv", b"12345")

    def full(*_args: Any) -> None:
        if list((tmp_path / "files").iterdir()):
            raise CapacityError("full")
        delete(*_args)

    delete = store.delete_file
    monkeypatch.setattr(store, "delete_file", full)
    service.delete("alice", record.id)
    assert store.all_files() == []


def test_a_delete_that_broke_off_can_be_tried_again(
    service: FileService, store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = service.save_result("alice", "x.csv", b"12345")

    def busy(*_args: Any) -> None:
        raise CapacityError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_file", busy)
        with pytest.raises(CapacityError):
            service.delete("alice", record.id)
    with pytest.raises(NotFound):
        service.find("alice", record.id)
    service.delete("alice", record.id)
    assert store.all_files() == []


_SAVE_FOR_EVER = """
import sys
from pathlib import Path
from coserve.server.index.files import FileService
from coserve.server.index.store import Store

root = Path(sys.argv[1])
service = FileService(root / "files", Store(f"sqlite:///{root}/coserve.db"), 1 << 30, 1 << 40)
service.save_result("bob", "second.csv", b"2" * 300_000)
print("ready", flush=True)
while True:
    first = service.save_result("alice", "first.csv", b"1" * 300_000)
    service.save_result("bob", "second.csv", b"2" * 300_000)
    service.delete("alice", first.id)
"""


@pytest.mark.full
def test_kills_at_any_time(tmp_path: Path) -> None:
    for number in range(6):
        with subprocess.Popen([sys.executable, "-c", _SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.037 * number)
            process.kill()
        store = Store(f"sqlite:///{tmp_path}/coserve.db")
        service = FileService(tmp_path / "files", store, MAX_BYTES, MAX_TENANT_BYTES)
        service.rebuild()
        records = store.all_files()
        assert records and {path.name for path in (tmp_path / "files").iterdir()} == {record.id for record in records}
        for record in records:
            assert hashlib.sha256(service.path(record).read_bytes()).hexdigest() == record.sha256
        store.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path, store: Store) -> None:
    (tmp_path / "files").write_text("in the way")
    with pytest.raises(ConfigError):
        FileService(tmp_path / "files", store, MAX_BYTES, MAX_TENANT_BYTES)


def test_result_names_are_checked_too(service: FileService) -> None:
    with pytest.raises(InvalidRequest):
        service.save_result("alice", "a\0b", b"x")
