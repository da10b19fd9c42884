"""What the API says of a job while the disk refuses to take it down, and of one that ends the engine again and again."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from coserve.core import CapacityError
from coserve.finetune.job import MetricsTable
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.jobs import journal, runner, validation
from coserve.server.link.messages import JobHappened, Problem
from coserve.server.link.process import EngineEnd
from tests.server.conftest import Play
from tests.server.jobs_bench import Bench, until


@pytest.fixture(autouse=True)
def _tries_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RETRY_S", 0.01)
    monkeypatch.setattr(runner, "RETRY_S", 0.01)


@contextmanager
def full(bench: Bench) -> Iterator[list[int]]:
    """Neither manifests nor the index can be written; gives what counts the tries."""
    tries: list[int] = []

    def refuse(*_: object, **__: object) -> None:
        tries.append(1)
        raise CapacityError("the disk of the data directory is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_manifest", refuse)
        patch.setattr(bench.store, "update_job", refuse)
        patch.setattr(bench.store, "add_event", refuse)
        yield tries


# --- a full disk ---


def test_steps_that_could_not_be_written_down_are_written_in_order_later(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        await bench.settle()
        with full(bench) as tries:
            for step in range(2, 30):
                bench.engine.step(id, step)
            await until(lambda: len(tries) > 5)
            assert bench.jobs.get("me", id).step == 29, "what is so, not what could be written"
            assert bench.jobs.list_jobs("me", after=None, limit=5, metadata=None)[0][0].step == 29
        await until(lambda: bench.store.get_job("me", id).step == 29)
        assert [event.step for event in bench.events(id) if event.step is not None] == list(range(1, 30))
        refusals = [record for record in caplog.records if "can't be written" in record.getMessage()]
        assert [record.job for record in refusals] == [id], "one line, with the job's id"  # type: ignore[attr-defined]

    play(story)


@pytest.mark.parametrize("paused", [False, True])
def test_pause_and_cancel_hold_while_they_can_not_be_written(play: Play, paused: bool) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        await bench.settle()
        with full(bench):
            began = time.monotonic()
            if paused:
                assert (await bench.jobs.pause("me", id)).paused
                assert bench.jobs.get("me", id).paused
                assert not (await bench.jobs.resume("me", id)).paused
                assert (await bench.jobs.pause("me", id)).paused
            assert (await bench.jobs.cancel("me", id)).status == "cancelled"
            assert bench.jobs.get("me", id).status == "cancelled", "not 'running' while a pause would say that it has ended"
            with pytest.raises(Conflict, match="has ended"):
                await bench.jobs.pause("me", id)
            assert time.monotonic() - began < 3, "nobody waits for the disk"
            assert bench.store.get_job("me", id).status == "running"
        assert (await bench.status(id, "cancelled")).finished_at is not None
        assert bench.engine.acts[-1] == (id, "cancel")

    async def after(bench: Bench) -> None:
        await bench.settle()
        assert not bench.engine.starts, "it has ended for good"

    play(story, after)


def test_a_failure_that_can_not_be_written_is_told_all_the_same(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        await bench.settle()
        with full(bench) as tries:
            bench.engine.end(id, "failed", Problem(name="JobFailed", message="the loss is nan"))
            await until(lambda: len(tries) > 2)
            shown = bench.jobs.get("me", id)
            assert (shown.status, (shown.error or {})["message"]) == ("failed", "the loss is nan")
        await bench.status(id, "failed")
        assert bench.messages(id)[-1] == "The job failed: the loss is nan"

    play(story)


def test_a_success_is_told_when_the_result_can_be_used(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        await bench.settle()
        with full(bench) as tries:
            bench.engine.end(id)
            await until(lambda: len(tries) > 2)
            assert bench.jobs.get("me", id).status == "running"
            with pytest.raises(Conflict, match="has run all its steps"):
                await bench.jobs.cancel("me", id)
        done = await bench.status(id, "succeeded")
        assert len(done.result_files) == 1 and done.fine_tuned_model

    play(story)


def test_one_jobs_records_do_not_hold_up_another_job(play: Play) -> None:
    async def story(bench: Bench) -> None:
        first, second = await bench.started(), await bench.started()
        add = bench.store.add_event

        def refuse(job: str, **fields: Any) -> Any:
            if job == first:
                raise CapacityError("full")
            return add(job, **fields)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench.store, "add_event", refuse)
            for step in (1, 2):
                bench.engine.step(first, step)
                bench.engine.step(second, step)
            await until(lambda: bench.store.get_job("me", second).step == 2)
        await until(lambda: bench.store.get_job("me", first).step == 2)

    play(story)


def test_a_job_whose_directory_is_refused_starts_later(play: Play) -> None:
    async def story(bench: Bench) -> None:
        bench.engine.refusal = StorageRefused("the disk is full; try again when it can be written")
        job = await bench.create()
        await until(lambda: len(bench.engine.starts) > 3)
        assert bench.jobs.get("me", job.id).status == "running"
        bench.engine.refusal = None
        await until(lambda: (bench.config.data_dir / "jobs" / job.id / "output" / "job.json").exists())
        await bench.settle()
        assert sum("can't start yet: the disk is full" in message for message in bench.messages(job.id)) == 1

    play(story)


def test_a_job_that_waits_for_the_disk_is_started_once_in_the_next_engine(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bench: Bench) -> None:
        monkeypatch.setattr(runner, "RETRY_S", 1.0)
        bench.engine.refusal = StorageRefused("the disk is full")
        job = await bench.create()
        await until(lambda: bool(bench.messages(job.id)) and "can't start yet" in bench.messages(job.id)[-1])
        bench.engine.die()
        bench.engine.refusal = None
        await bench.engine.rise()  # before the first one's wait is over
        await asyncio.sleep(1.3)
        assert len(bench.engine.starts) == 2, "one in each engine: a second would be refused, and the job fail"
        assert bench.jobs.get("me", job.id).status == "running"

    play(story)


def test_an_index_that_does_not_answer_fails_no_job(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    async def story(bench: Bench) -> None:
        def away(*_: object) -> None:
            tries.append(1)
            raise StorageRefused("the index's database can't be reached")

        monkeypatch.setattr(validation, "RETRY_S", 0.01)
        job = await bench.create()
        with monkeypatch.context() as patch:
            patch.setattr(bench.store, "get_file", away)
            await until(lambda: len(tries) > 3)
        await until(lambda: len(bench.engine.starts) == 1)
        assert bench.jobs.get("me", job.id).status == "running"

    play(story)


def test_too_many_open_files_at_the_end_of_a_job_are_waited_for(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        tries: list[int] = []

        def refuse(*_: object) -> None:
            tries.append(1)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            patch.setattr(MetricsTable, "rows", refuse)
            bench.engine.end(id)
            await until(lambda: len(tries) > 2)
        await bench.status(id, "succeeded")

    play(story)


def test_a_server_that_ends_on_a_full_disk_tells_the_rest_at_its_next_start(play: Play) -> None:
    ids: list[str] = []

    async def before(bench: Bench) -> None:
        id = await bench.started()
        ids.append(id)
        bench.engine.step(id, 1)
        await bench.settle()
        patch = pytest.MonkeyPatch()
        patch.setattr(bench.store, "add_event", lambda *_, **__: (_ for _ in ()).throw(CapacityError("full")))
        bench.engine.step(id, 2)
        await bench.settle()

    async def after(bench: Bench) -> None:
        await until(lambda: len(bench.engine.starts) == 1)
        await bench.settle()
        assert [event.step for event in bench.events(ids[0]) if event.step is not None] == [1, 2]

    play(before, after)


def test_a_busy_index_does_not_hold_up_the_end(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LAST_TRIES_S", 0.3)
    tries: list[int] = []

    def busy() -> None:
        tries.append(1)
        time.sleep(0.2)
        raise StorageRefused("the index is busy; try again")

    async def story(bench: Bench) -> None:
        records = bench.jobs._runner.journal
        futures = [records.keep(f"job-{number}", busy) for number in range(50)]
        await records.close()
        assert len(tries) < 6
        assert all(future.cancelled() for future in futures), "nobody waits for them"

    play(story)


# --- where a job is ---


def test_the_step_that_is_shown_goes_back_when_steps_run_again(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        for step in range(1, 9):
            bench.engine.step(id, step)
        await bench.settle()
        assert bench.jobs.get("me", id).step == 8
        bench.engine.die(EngineEnd("it was ended by signal SIGKILL"))
        await bench.engine.rise()
        message = "resumed after step 5 from step-00000005; 3 steps run again: 6 to 8"
        bench.engine.say(JobHappened(
            id=id, level="info", message=message, time_s=1.0, resumed_step=5, num_steps=10
        ))
        assert bench.jobs.get("me", id).step == 5
        await bench.settle()
        assert message in bench.messages(id)

    play(story)


# --- a job that ends the engine ---


async def die_and_rise(bench: Bench, end: EngineEnd) -> None:
    starts = len(bench.engine.starts)
    bench.engine.die(end)
    await bench.engine.rise()
    await until(lambda: len(bench.engine.starts) > starts)
    await bench.settle()


def test_a_job_that_ends_the_engine_three_times_is_given_up(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id, other = await bench.started(), await bench.started()
        bench.engine.step(id, 1)
        end = EngineEnd("it hangs: no end for 60 s of: an iteration (forward)", jobs=(id,), guilty=True, hung=True)
        for _ in range(2):
            await die_and_rise(bench, end)
            assert bench.jobs.get("me", id).status == "running"
        bench.engine.die(end)
        await bench.engine.rise()
        failed = await bench.status(id, "failed")
        assert "3 times" in (failed.error or {})["message"] and "at step 2" in (failed.error or {})["message"]
        assert "an iteration (forward)" in (failed.error or {})["message"]
        assert bench.jobs.get("me", other).status == "running", "an innocent one goes on"
        assert sum("while it worked on this job" in message for message in bench.messages(id)) >= 2

    play(story)


@pytest.mark.parametrize("end", [
    EngineEnd("it was ended by signal SIGKILL", jobs=("every",), guilty=False),
    EngineEnd("it hangs: no end for 60 s of: load adapter x", guilty=True, hung=True),
])
def test_a_job_is_not_given_up_for_what_it_has_not_done(play: Play, end: EngineEnd) -> None:
    """Kills from outside, and hangs of other work, however many."""
    async def story(bench: Bench) -> None:
        id = await bench.started()
        for _ in range(8):
            await die_and_rise(bench, end._replace(jobs=(id,) if end.jobs else ()))
        assert bench.jobs.get("me", id).status == "running"

    play(story)


def test_who_follows_events_is_let_go_when_the_server_ends(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        events = await bench.jobs.follow("me", id, None)
        seen = [await anext(events)]

        async def read() -> None:
            seen.extend([event async for event in events])

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        assert not reading.done()
        bench.jobs.journal.end_streams()
        await asyncio.wait_for(reading, 2)

    play(story)
