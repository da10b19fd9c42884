"""What a tenant's jobs cost others: data are read in turns, and what jobs leave on disk counts with the tenant's files."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coserve.core import CapacityError, InvalidRequest
from coserve.server.errors import Conflict, TooLarge
from coserve.server.index.disk import directory_bytes
from coserve.server.jobs import usage
from coserve.server.jobs.usage import TenantDisk
from coserve.server.records import AdapterRecord
from tests.server.jobs_bench import Bench, Story, until
from tests.tiny_directory import chat_lines


def run(model: Path, directory: Path, story: Story, **settings: Any) -> None:
    async def main() -> None:
        async with Bench(model, directory / "data", **settings) as bench:
            bench.files.held_bytes = bench.jobs.disk.bytes_of
            bench.files._max_bytes, bench.files._max_tenant_bytes = 64 << 20, bench.config.max_tenant_file_bytes
            bench.files._max_tenant_files = bench.config.max_tenant_files
            await story(bench)

    asyncio.run(main())


def long_file(num_bytes: int) -> bytes:
    line = json.dumps({"messages": [{"role": "user", "content": "Where is the bakery? " * 20},
                                    {"role": "assistant", "content": "Behind the mill."}]}).encode() + b"\n"
    return line * (num_bytes // len(line))


def test_a_small_file_is_read_beside_large_ones_and_a_cancel_ends_reading(model: Path, tmp_path: Path) -> None:
    async def play(bench: Bench) -> None:
        large = await bench.upload(long_file(25 << 20), tenant="a")
        jobs = [await bench.create("a", training_file=large) for _ in range(3)]
        await until(lambda: any("Validating" in message for message in bench.messages(jobs[0].id)))
        began = time.monotonic()
        small = await bench.create("b", training_file=await bench.upload(chat_lines(40), tenant="b"))
        await until(lambda: bench.store.get_job(None, small.id).status != "validating_files")
        assert time.monotonic() - began < 5
        assert bench.store.get_job(None, jobs[0].id).status == "validating_files"
        reader = bench.jobs._reader
        for job in jobs:
            await bench.jobs.cancel("a", job.id)
        await until(lambda: not reader._tasks and reader._turns._free == 2)
        for job in jobs:
            await bench.status(job.id, "cancelled")
            assert bench.messages(job.id)[-1] == "The job was cancelled"
        again = await bench.create("a", training_file=await bench.upload(chat_lines(40), tenant="a"))
        await until(lambda: bench.store.get_job(None, again.id).status != "validating_files")
        assert time.monotonic() - began < 15

    run(model, tmp_path, play)


def test_outputs_of_jobs_count_with_the_files(model: Path, tmp_path: Path) -> None:
    async def play(bench: Bench) -> None:
        job = await bench.started("a")
        directory = bench.engine.checkpoint(job, 5)
        await bench.settle()
        assert bench.store.get_job(None, job).paused is False
        (directory / "optimizer.safetensors").write_bytes(b"x" * 3_000_000)
        assert bench.jobs.disk.bytes_of("a") > 3_000_000 > bench.jobs.disk.bytes_of("b")
        bench.engine.checkpoint(job, 6)
        await until(lambda: bench.store.get_job(None, job).paused)
        assert any("delete files or models" in message for message in bench.messages(job))
        with pytest.raises(TooLarge) as error:
            await bench.upload(tenant="a")
        assert error.value.param == "file"
        with pytest.raises(Conflict, match="bytes of the 2000000"):
            await bench.jobs.resume("a", job)
        await bench.create("b")  # others have room of their own
        (directory / "optimizer.safetensors").unlink()
        await bench.jobs.resume("a", job)
        assert bench.store.get_job(None, job).paused is False

    run(model, tmp_path, play, max_tenant_file_bytes=2_000_000)


def test_copies_of_adapters_count_with_the_files(model: Path, tmp_path: Path) -> None:
    async def play(bench: Bench) -> None:
        copy = bench.models._shelf.root / "copy"
        copy.mkdir(parents=True)
        (copy / "adapter_model.safetensors").write_bytes(b"x" * 2_000_000)
        bench.models.add(AdapterRecord(name="mine", tenant="a", directory=str(copy), created_at=1))
        assert bench.jobs.disk.bytes_of("a") == 2_000_000 and bench.jobs.disk.bytes_of("b") == 0
        with pytest.raises(TooLarge) as error:
            await bench.upload(tenant="a")
        assert error.value.param == "file"
        await bench.upload(tenant="b")

    run(model, tmp_path, play, max_tenant_file_bytes=2_000_000)


def test_a_job_is_refused_where_the_disk_is_used_up(model: Path, tmp_path: Path) -> None:
    async def play(bench: Bench) -> None:
        job, file = await bench.started("a"), await bench.upload(tenant="a")
        (tmp_path / "data" / "jobs" / job / "output" / "more").write_bytes(b"x" * 2_000_000)
        with pytest.raises(TooLarge) as error:
            await bench.create("a", training_file=file)
        assert error.value.param == "training_file"

    run(model, tmp_path, play, max_tenant_file_bytes=1_000_000)


def test_numbers_of_files_and_jobs_and_kept_checkpoints(model: Path, tmp_path: Path) -> None:
    async def play(bench: Bench) -> None:
        files = [await bench.upload(tenant="a") for _ in range(3)]
        with pytest.raises(TooLarge, match="you have 3 files"):
            await bench.upload(tenant="a")
        await bench.upload(tenant="b")
        for _ in range(2):
            await bench.create("a", training_file=files[0])
        with pytest.raises(CapacityError, match="2 of your jobs"):
            await bench.create("a", training_file=files[0])
        for keep in (11, 2_000_000_000):
            with pytest.raises(InvalidRequest, match="--max-keep-checkpoints 10") as error:
                await bench.create("b", keep_checkpoints=keep)
            assert error.value.param == "keep_checkpoints"

    run(model, tmp_path, play, max_tenant_files=3, max_tenant_jobs=2, max_keep_checkpoints=10)


def test_jobs_that_are_created_at_the_same_time_count_too(model: Path, tmp_path: Path) -> None:
    async def play(bench: Bench) -> None:
        file = await bench.upload(tenant="a")
        made = await asyncio.gather(*(bench.create("a", training_file=file) for _ in range(6)), return_exceptions=True)
        refused = [error for error in made if isinstance(error, CapacityError)]
        assert len(refused) == 4 and len(bench.store.job_states("a")) == 2
        for _ in range(2):
            with pytest.raises(InvalidRequest):  # what fails gives its place back
                await bench.create("b", training_file="file-none")
        await bench.create("b")

    run(model, tmp_path, play, max_tenant_jobs=2)


def test_a_directory_that_changes_while_it_is_counted_is_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = SimpleNamespace(
        job_states=lambda tenant: [("ftjob-1", "succeeded")], count_file_bytes=lambda tenant: 0
    )
    disk = TenantDisk(tmp_path, store, lambda tenant: 0)
    file = tmp_path / "ftjob-1" / "adapter"
    file.parent.mkdir()
    file.write_bytes(b"x" * 1000)

    def count_and_delete(path: str) -> int:
        size = directory_bytes(path)
        if file.exists():  # another thread deletes the model once its bytes have been counted
            file.unlink()
            disk.forget("ftjob-1")
        return size

    monkeypatch.setattr(usage, "directory_bytes", count_and_delete)
    assert disk.bytes_of("a") == 1000
    assert disk.bytes_of("a") == 0
