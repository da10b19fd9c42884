"""Uploads and results in the artifact store: what is listed is whole, and what a store or an index refuses is not listed."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from coserve.core import CapacityError, InvalidRequest, NotFound
from coserve.server.errors import Conflict, StorageRefused, TooLarge
from coserve.server.index.store import Store
from coserve.server.records import FileRecord, JobRecord
from coserve.server.replicas.artifactcache import ArtifactCache
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.files import StoredFiles, file_key
from tests.server.faulty_files import faulty_objects

LINE = b'{"text": "hello"}\n'


class Bench:
    """An ingress's files; `other` is another ingress's, on another machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(f"sqlite:///{path}/coserve.db")
        self.service, self.faults = self.make("one")
        self.other, _ = self.make("other")

    def make(self, name: str, **limits: int) -> tuple[StoredFiles, Any]:
        objects, files = faulty_objects(str(self.path / "store"))
        artifacts = ArtifactStore(objects, ArtifactCache(self.path / name / "cache", 1 << 30))
        most = {"max_bytes": 100_000, "max_tenant_bytes": 1 << 30, **limits}
        return StoredFiles(artifacts, self.path / name / "uploads", self.store, **most), files

    def upload(self, content: bytes = LINE, service: StoredFiles | None = None) -> FileRecord:
        file = UploadFile(io.BytesIO(content), size=len(content), filename="x.jsonl")
        return asyncio.run((service or self.service).save_upload("alice", file, "fine-tune"))

    @property
    def objects(self) -> list[Path]:
        return [path for path in (self.path / "store" / "files").rglob("*") if path.is_file()]

    @property
    def staged(self) -> list[Path]:
        return list((self.path / "one" / "uploads").iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_upload_is_seen_by_other_machines(bench: Bench) -> None:
    record = bench.upload()
    assert (record.bytes, record.sha256) == (len(LINE), hashlib.sha256(LINE).hexdigest())
    found, path = bench.other.find("alice", record.id)
    assert found == record and path.read_bytes() == LINE and path.is_relative_to(bench.path / "other")
    with pytest.raises(NotFound):
        bench.other.find("bob", record.id)
    assert bench.staged == []
    bench.other.delete("alice", record.id)
    for call in (bench.service.find, bench.service.delete):
        with pytest.raises(NotFound):
            call("alice", record.id)
    assert bench.objects == []
    bench.service.rebuild()


def test_checks_are_those_of_a_single_server(bench: Bench) -> None:
    for content, error in ((b"", InvalidRequest), (b"no json\n", InvalidRequest), (LINE * 10_000, TooLarge)):
        with pytest.raises(error):
            bench.upload(content)
    small, _ = bench.make("small", max_tenant_bytes=len(LINE), max_tenant_files=5)
    bench.upload(service=small)
    with pytest.raises(TooLarge):
        bench.upload(service=small)
    assert len(bench.store.all_files()) == 1 and bench.staged == []


def test_uploads_at_once_share_the_tenants_limit(bench: Bench) -> None:
    service, _ = bench.make("limited", max_tenant_bytes=3 * len(LINE))

    async def upload_all() -> list[Any]:
        files = [UploadFile(io.BytesIO(LINE), size=len(LINE), filename="x.jsonl") for _ in range(8)]
        saving = (service.save_upload("alice", file, "fine-tune") for file in files)
        return await asyncio.gather(*saving, return_exceptions=True)

    failed = [outcome for outcome in asyncio.run(upload_all()) if isinstance(outcome, BaseException)]
    assert len(failed) == 5 and all(isinstance(error, TooLarge) for error in failed)
    assert len(bench.objects) == 2 * len(bench.store.all_files()) == 6, "content and manifest of each"


def test_results_of_a_job(bench: Bench) -> None:
    first = bench.service.save_result("alice", "step_metrics.csv", b"step,loss\n", id="file-0123")
    assert bench.other.save_result("alice", "step_metrics.csv", b"another replica's", id="file-0123") == first
    assert bench.other.find("alice", "file-0123")[1].read_bytes() == b"step,loss\n"


def test_two_replicas_write_a_result_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them has lost the job, and its seconds are others."""
    add = bench.store.add_file

    def late(record: FileRecord) -> None:
        monkeypatch.setattr(bench.store, "add_file", add)
        bench.other.save_result("alice", "step_metrics.csv", b"of the holder", id="file-0123")
        add(record)

    monkeypatch.setattr(bench.store, "add_file", late)
    record = bench.service.save_result("alice", "step_metrics.csv", b"of the zombie", id="file-0123")
    assert bench.service.find("alice", record.id)[1].read_bytes() == b"of the holder"


@pytest.mark.parametrize("verb", ["write", "mv"])
def test_a_store_that_refuses(bench: Bench, verb: str) -> None:
    bench.faults.before = _refuse(verb)
    with pytest.raises(CapacityError, match="artifact store is full"):
        bench.upload()
    assert bench.store.all_files() == [] and bench.staged == []
    bench.faults.before = lambda _verb, _path: None
    assert bench.other.find("alice", bench.upload().id)[1].read_bytes() == LINE


def _refuse(verb: str) -> Callable[[str, str], None]:
    def before(called: str, _path: str) -> None:
        if called == verb:
            raise OSError(errno.ENOSPC, "full")

    return before


def test_an_index_that_refuses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise StorageRefused("the index's database can't be reached; try again")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "add_file", refuse)
        with pytest.raises(CapacityError, match="index"):
            bench.upload()
    assert bench.store.all_files() == []


def test_deletes_that_are_refused_can_be_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench.upload()
    bench.faults.before = _refuse("rm")
    with pytest.raises(CapacityError):
        bench.service.delete("alice", record.id)
    bench.faults.before = lambda _verb, _path: None

    def refuse(*_: Any) -> None:
        raise StorageRefused("away")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "delete_file", refuse)
        with pytest.raises(CapacityError):
            bench.service.delete("alice", record.id)
    bench.service.delete("alice", record.id)
    assert bench.store.all_files() == [] and bench.objects == []


def test_a_file_that_a_job_uses(bench: Bench) -> None:
    record = bench.upload()
    bench.store.add_job(JobRecord(
        id="ftjob-1", tenant="alice", created_at=1, base="b", training_file=record.id, config={}, method={}, status="queued",
    ))
    with pytest.raises(Conflict, match="ftjob-1"):
        bench.service.delete("alice", record.id)
    assert bench.service.find("alice", record.id)


def test_bytes_that_are_gone_or_damaged(bench: Bench) -> None:
    record = bench.upload()
    (content,) = [path for path in bench.objects if path.name == "content"]
    content.write_bytes(LINE.replace(b"hello", b"hallo"))
    with pytest.raises(NotFound, match="gone or damaged"):
        bench.other.find("alice", record.id)
    content.parent.parent.joinpath("_manifest.json").unlink()
    with pytest.raises(NotFound, match="gone or damaged"):
        bench.other.find("alice", record.id)
    assert file_key(record) == f"files/{record.id}/{record.sha256}"


def test_what_a_killed_process_was_uploading(bench: Bench) -> None:
    left = bench.path / "one" / "uploads" / "file-x.upload"
    left.write_bytes(b"half")
    bench.make("one")
    assert not left.exists()
