"""Faults of disks, stores and databases at bad moments of replicas' jobs: no job fails for them, and none is held for ever."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from coserve.core import InvalidRequest
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.replicas import fenced as fenced_module
from coserve.server.replicas import jobsearch
from coserve.server.replicas import runner as runner_module
from coserve.server.replicas.artifacts import Stored
from tests.server.fleet_bench import TIMING, Fleet, play_fleet
from tests.server.jobs_bench import until
from tests.server.postgres_cut import way_to

pytest_plugins = ["tests.server.postgres"]
PlayFleet = Callable[..., None]


@pytest.fixture
def play(postgres_url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayFleet:
    """play(story, **settings) over an empty database and an empty store."""
    return lambda story, **settings: play_fleet(story, postgres_url, model, tmp_path, monkeypatch, **settings)


def refusing(action: Callable[..., Any], failures: Iterator[Exception]) -> Callable[..., Any]:
    """The action, which raises each of the failures first."""
    def tried(*arguments: Any) -> Any:
        if (failure := next(failures, None)) is not None:
            raise failure
        return action(*arguments)

    return tried


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_scratch_disk_that_is_full_for_a_moment(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run = member.run_of(job)
        for name, number in (("pack_checkpoint", 2), ("send_checkpoint", 1), ("pack_result", 2), ("send_result", 1)):
            failing = refusing(getattr(runner_module, name), iter([full() for _ in range(number)]))
            monkeypatch.setattr(runner_module, name, failing)
        member.steps(job, 1, 2)
        for step in (1, 2):
            member.engine.checkpoint(run, step)
        await until(lambda: fleet.committed(job) == [2, 1])
        assert member.engine.acts[:2] == [(run, "pause"), (run, "resume")]
        assert any("the disk takes the job's files again" in message for message in fleet.messages(job))
        member.engine.end(run)
        await fleet.status(job, "succeeded")

    play(story)


@pytest.mark.full
def test_a_job_that_cannot_be_ended_is_given_back_and_at_last_given_up(
    play: PlayFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()

        def broken(*_: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(runner_module, "pack_result", broken)
        for epoch in (1, 2, 3):
            await until(lambda epoch=epoch: member.jobs.held == {job: epoch} and member.has(job))  # type: ignore[misc]
            member.engine.end(member.run_of(job))
        failed = await fleet.status(job, "failed")
        assert failed.error is not None and "died or failed 3 times" in failed.error["message"]

    play(story)


@pytest.mark.full
def test_the_database_is_away_right_after_a_checkpoint(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        count, asked = member.jobs._usage.bytes_of, list[str]()

        def away(tenant: str) -> int:
            asked.append(tenant)
            if len(asked) < 3:
                raise StorageRefused("away") if len(asked) == 1 else ZeroDivisionError("a bug")
            return count(tenant)

        monkeypatch.setattr(member.jobs._usage, "bytes_of", away)
        for step in (1, 2, 3):
            member.steps(job, step, step)
            member.engine.checkpoint(member.run_of(job), step)
            await until(lambda step=step: fleet.committed(job)[:1] == [step] and len(asked) == step)  # type: ignore[misc]
        member.engine.end(member.run_of(job))
        await fleet.status(job, "succeeded")

    play(story)


@pytest.mark.full
def test_errors_that_nobody_expects_end_neither_renewals_nor_claims(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        claims, tries = member.jobs._claims, list[int]()
        monkeypatch.setattr(claims, "renew", refusing(claims.renew, iter([ZeroDivisionError("a bug") for _ in range(2)])))

        def broken(*_: Any, **__: Any) -> None:
            tries.append(1)
            raise ZeroDivisionError("a bug")

        claim = claims.claim
        monkeypatch.setattr(claims, "claim", broken)
        member.jobs.nudge("another")
        await asyncio.sleep(2 * TIMING.safe_s)
        assert 2 < len(tries) < 40, "it pauses between two claims"
        assert not member.jobs._book.is_lapsed(job), "leases are renewed"
        monkeypatch.setattr(claims, "claim", claim)
        other = await fleet.started()
        assert member.jobs.held == {job: 1, other: 1}

    play(story, timing=TIMING, max_jobs=3)


@pytest.mark.full
def test_a_replica_whose_scratch_disk_is_full_leaves_jobs_to_others(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        first, tries = await fleet.join(), list[str]()

        def refuse(job: str) -> Path:
            tries.append(job)
            raise StorageRefused("the disk is full")

        monkeypatch.setattr(first.jobs._outputs, "open", refuse)
        job = await fleet.create()
        await until(lambda: bool(tries))
        await asyncio.sleep(1.0)
        assert len(tries) == 1, "it does not claim the job again at once"
        second = await fleet.join()
        assert await fleet.holder(job.id) is second and len(tries) == 1

    play(story)


@pytest.mark.full
def test_an_engine_dies_while_two_checkpoints_are_on_their_way(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run, (go_on, sent) = member.run_of(job), member.hold_store(monkeypatch)
        for step in (1, 2):
            member.steps(job, step, step)
            member.engine.checkpoint(run, step)
        member.engine.die()
        await member.engine.rise()
        await until(lambda: len(member.engine.starts) == 2 and member.has(job))
        go_on.set()
        await member.jobs._runner.delivered(member.jobs._mine[job].live)
        await asyncio.sleep(0.2)  # for what would be deleted
        assert fleet.committed(job) == [2, 1] and len(sent) == 4, "each was sent once"
        for found in fleet.index.list_checkpoints(job)[0]:
            assert fleet.artifacts.fetch(found.directory, found.sha256).is_dir()
            assert fleet.artifacts.fetch(found.directory.replace("adapter", "state"), found.state_sha256).is_dir()

    play(story)


@pytest.mark.full
@pytest.mark.parametrize(("param", "starts"), [("kernels", 2), ("data_digest", 1)])
def test_a_job_that_no_replica_can_resume_fails(
    play: PlayFleet, monkeypatch: pytest.MonkeyPatch, param: str, starts: int
) -> None:
    """One whose data have changed fails at once; other kernels are tried everywhere."""
    monkeypatch.setattr(jobsearch, "DECLINED_S", 2.0)
    monkeypatch.setattr(jobsearch, "HOPELESS_S", 0.1)

    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        first.steps(job, 1, 2)
        first.engine.checkpoint(first.run_of(job), 2)
        await until(lambda: fleet.committed(job) == [2])
        others = [await fleet.join() for _ in range(2)]
        for other in others:
            other.engine.refusal = InvalidRequest(f"resume: {param} has changed since step-00000002 was written", param=param)
        first.die()
        failed = await fleet.status(job, "failed")
        assert failed.error is not None and f"resume: {param} has changed" in failed.error["message"]
        assert sum(len(other.engine.starts) for other in others) == starts

    play(story, timing=TIMING)


@pytest.mark.full
def test_a_fleet_of_another_model_leaves_a_job_alone(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        stranger = await fleet.join()
        stranger.engine.info = msgspec.structs.replace(stranger.engine.info, fingerprint="g")
        job = await fleet.create()
        await asyncio.sleep(0.5)
        assert not stranger.jobs.held and not stranger.engine.starts
        own = await fleet.join()
        assert await fleet.holder(job.id) is own

    play(story)


@pytest.mark.full
def test_a_cancel_during_a_jobs_end_comes_before_all_of_it_or_too_late(
    play: PlayFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        loop, put, cancels = asyncio.get_running_loop(), fenced_module.put_adapter, list[Any]()

        def put_slowly(*arguments: Any) -> Any:
            cancels.append(asyncio.run_coroutine_threadsafe(fleet.desk.cancel("me", job), loop))
            time.sleep(0.3)  # the cancel waits for the row by now
            return put(*arguments)

        monkeypatch.setattr(fenced_module, "put_adapter", put_slowly)
        member.steps(job, 1, 10)
        member.engine.end(member.run_of(job))
        await until(lambda: bool(cancels) and cancels[0].done())
        assert isinstance(cancels[0].exception(), Conflict)
        done = fleet.index.get_job(None, job)
        assert done.status == "succeeded" and fleet.messages(job)[-1] == "The job has successfully completed"
        assert done.fine_tuned_model in [adapter.name for adapter in fleet.index.list_adapters("me")]

    play(story)


def lose(fleet: Fleet, job: str) -> None:
    """Somebody else has had the job for a moment."""
    with fleet.index.database.write() as connection:
        connection.execute(text("UPDATE jobs SET epoch = epoch + 1, owner = NULL, lease_until = 0 WHERE id = :id"), {"id": job})


@pytest.mark.full
def test_what_waits_to_be_written_of_a_lost_run_is_never_written(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        tries, put = list[int](), member.jobs._store.put_step

        def refuse(*_: Any) -> None:
            tries.append(1)
            raise StorageRefused("the index's database is full")

        monkeypatch.setattr(member.jobs._store, "put_step", refuse)
        member.steps(job, 1, 3)
        await until(lambda: bool(tries))
        run = member.run_of(job)
        lose(fleet, job)
        await until(lambda: (run, "cancel") in member.engine.acts)
        member.engine.end(run, "cancelled")
        await until(lambda: member.jobs.held == {job: 3} and member.has(job))
        monkeypatch.setattr(member.jobs._store, "put_step", put)
        await asyncio.sleep(0.5)  # some tries
        assert fleet.step_events(job) == [] and fleet.index.get_job(None, job).step == 0
        assert not member.jobs._runner.journal.refuses(job)
        member.steps(job, 1, 1)
        await until(lambda: fleet.step_events(job) == [1])

    play(story, timing=TIMING)


@pytest.mark.full
def test_a_lost_run_that_waits_for_the_store_ends_no_later_one(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        put, sent, go_on = member.artifacts.put_directory, threading.Event(), threading.Event()

        def slowly(key: str, source: Path) -> Stored:
            stored = put(key, source)
            sent.set()
            go_on.wait(10)
            return stored

        monkeypatch.setattr(member.artifacts, "put_directory", slowly)
        member.engine.end(member.run_of(job))
        await until(sent.is_set)
        lose(fleet, job)
        await until(lambda: member.jobs.held == {job: 3} and member.has(job))
        go_on.set()
        await asyncio.sleep(0.5)
        assert fleet.index.get_job(None, job).status == "running"

    play(story, timing=TIMING)


@pytest.mark.full
def test_an_outage_longer_than_a_lease_takes_no_job_from_its_holder(play: PlayFleet, postgres_url: str) -> None:
    async def story(fleet: Fleet) -> None:
        with way_to(postgres_url) as way:
            holder = await fleet.join(url=way.url)
            job = await fleet.started()
            others = [await fleet.join(url=way.url) for _ in range(2)]
            way.cut()
            await asyncio.sleep(2 * TIMING.lease_s)
            way.mend()
            await until(lambda: holder.engine.acts == [(f"{job}-e1", "pause"), (f"{job}-e1", "resume")])
            await asyncio.sleep(2 * TIMING.renew_s)
            assert holder.jobs.held == {job: 1} and not any(other.jobs.held for other in others)
            with fleet.index.database.read() as connection:
                assert connection.execute(text("SELECT epoch, strikes FROM jobs")).one() == (1, 0)
            holder.die()
            await until(lambda: any(other.jobs.held == {job: 2} for other in others))

    play(story, timing=TIMING)
