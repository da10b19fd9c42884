"""Jobs of several replicas over one PostgreSQL: claimed once, handed over, taken over, fenced; each step there once."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from coserve.core import CapacityError, InvalidRequest, NotFound
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.link.process import EngineEnd
from coserve.server.records import EventRecord
from coserve.server.replicas.artifacts import Stored
from tests.server.fleet_bench import TIMING, Fleet, Member, Story, play_fleet
from tests.server.jobs_bench import until, write_adapter
from tests.server.postgres_cut import CutWay, way_to
from tests.tiny_directory import chat_lines

pytest_plugins = ["tests.server.postgres"]
PlayFleet = Callable[..., None]


@pytest.fixture
def play(postgres_url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayFleet:
    """play(story, **settings) over an empty database and an empty store."""
    return partial(_play, url=postgres_url, model=model, root=tmp_path, monkeypatch=monkeypatch)


def _play(story: Story, *, url: str, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    play_fleet(story, url, model, root, monkeypatch, **settings)


def test_a_job_from_creation_to_success(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        await fleet.join()
        validation = await fleet.upload(chat_lines(40)[30:])
        job = await fleet.create(validation_file=validation, suffix="facts", seed=5)
        assert fleet.desk.describe(job)["status"] == "validating_files"
        member = await fleet.holder(job.id)
        start = member.engine.starts[0]
        tuned = f"ft:Base-1:coserve:facts:{job.id[-8:]}"
        assert (start["id"], start["adapter"], start["resume"]) == (f"{job.id}-e1", f"me/{tuned}@{job.id}-e1", False)
        assert Path(start["training_file"]).read_bytes().count(b"\n") == 32
        assert Path(start["validation_file"]).read_bytes().count(b"\n") == 10
        for step in (1, 2, 3):
            member.engine.step(start["id"], step, 64, valid=1.5 if step == 2 else None)
        await until(lambda: fleet.index.get_job("me", job.id).step == 3)
        shown = fleet.desk.describe(fleet.desk.get("me", job.id))
        assert (shown["status"], shown["step"], shown["num_steps"], shown["tokens_per_second"]) == ("running", 3, 64, 50.0)
        member.engine.checkpoint(start["id"], 2)
        member.engine.end(start["id"], step=64)
        done = await fleet.status(job.id, "succeeded")
        assert (done.fine_tuned_model, done.trained_tokens, done.step, done.paused) == (tuned, 6400, 64, False)
        (checkpoint,), _ = fleet.desk.list_checkpoints("me", job.id, after=None, limit=10)
        assert (checkpoint.model, checkpoint.epoch) == (f"{tuned}:ckpt-step-2", 1)
        assert checkpoint.directory == f"jobs/{job.id}/e1/step-00000002/adapter"
        assert checkpoint.metrics["full_valid_loss"] == 1.5
        for name, weights in ((tuned, b"weights of output"), (checkpoint.model, b"weights of step-00000002")):
            model = await fleet.models.prepare("me", name)
            assert model.adapter is not None
            found = fleet.artifacts.fetch(model.adapter.uri, model.adapter.sha256)
            assert {path.name for path in found.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
            assert (found / "adapter_model.safetensors").read_bytes() == weights
        _, path = fleet.files.find("me", done.result_files[0])
        assert base64.b64decode(path.read_bytes()).decode().splitlines()[1] == "1,4.0,0.5,,,0.0001,1.0,100,2.0"
        messages = fleet.messages(job.id)
        assert messages[0] == f"Created fine-tuning job: {job.id}"
        assert f"Validating training file: {job.training_file}" in messages and "Fine-tuning job started" in messages
        assert messages.count(f"Checkpoint created at step 2, served as {checkpoint.model}") == 1
        assert messages[-1] == "The job has successfully completed" and fleet.step_events(job.id) == [1, 2, 3]
        await until(lambda: not list((fleet.root / member.name / "scratch" / "runs").iterdir()))
        assert not member.jobs.held and not member.engine.adapters
        assert (await fleet.desk.delete_model("me", tuned)) == [tuned]

    play(story)


@pytest.mark.full
def test_each_job_is_claimed_once_by_whoever_has_room(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        members = [await fleet.join() for _ in range(3)]
        file = await fleet.upload()
        jobs = [(await fleet.create(training_file=file)).id for _ in range(8)]
        await until(lambda: all(sum(member.has(job) for job in jobs) == 2 for member in members))
        expected = 2 * ["queued"] + 6 * ["running"]  # those that nobody has room for are validated all the same
        await until(lambda: sorted(fleet.index.get_job(None, job).status for job in jobs) == expected)
        await until(lambda: sum(len(member.jobs.held) for member in members) == 6)
        waiting = [job for job in jobs if not any(member.has(job) for member in members)]
        assert len({start["id"] for member in members for start in member.engine.starts}) == 6
        done = next(job for job in jobs if members[0].has(job))
        members[0].engine.end(members[0].run_of(done))
        await until(lambda: sum(members[0].has(job) for job in waiting) == 1)
        assert fleet.desk.count_waiting() == 1

    play(story, max_jobs=2)


@pytest.mark.full
def test_a_dead_replicas_job_goes_on_from_its_last_committed_checkpoint(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        second = await fleet.join()
        first.steps(job, 1, 4)
        first.engine.checkpoint(first.run_of(job), 4)
        await until(lambda: fleet.committed(job) == [4])
        first.steps(job, 5, 6)
        await until(lambda: fleet.index.get_job(None, job).step == 6)
        first.die()
        assert await fleet.holder(job) is second
        assert second.engine.starts[0]["resume"] and second.jobs.held == {job: 2}
        output = second.output(job)
        assert {path.name for path in (output / "checkpoints" / "step-00000004").iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "manifest.json"}
        assert (output / "metrics.csv").read_text().count("\n") == 5 and (output / "job.json").exists()
        second.steps(job, 5, 10)
        second.engine.checkpoint(second.run_of(job), 8)
        second.engine.end(second.run_of(job))
        done = await fleet.status(job, "succeeded")
        assert fleet.step_events(job) == list(range(1, 11)) and fleet.committed(job) == [8, 4] and done.step == 10
        assert [one.epoch for one in fleet.index.list_checkpoints(job)[0]] == [2, 1]
        assert any("replica-0 doesn't answer any more" in message for message in fleet.messages(job))

    play(story, timing=TIMING)


@pytest.mark.full
def test_what_a_zombie_writes_is_seen_by_nobody(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        zombie = await fleet.join()
        job = await fleet.started()
        zombie.steps(job, 1, 2)
        zombie.engine.checkpoint(zombie.run_of(job), 2)
        await until(lambda: fleet.committed(job) == [2])
        run = zombie.run_of(job)
        zombie.freeze()
        second = await fleet.join()
        assert await fleet.holder(job, but=zombie) is second
        second.steps(job, 3, 5)
        await until(lambda: fleet.index.get_job(None, job).step == 5)
        before = fleet.events(job), fleet.index.get_job(None, job), fleet.index.list_checkpoints(job)
        assert job in zombie.jobs.held, "it doesn't know"
        for step in (3, 4, 5, 6, 7):
            zombie.engine.step(run, step, 10, loss=99.0)
        zombie.engine.checkpoint(run, 7)
        zombie.engine.end(run)
        await until(lambda: job not in zombie.jobs.held)
        await until(lambda: (run, "cancel") in zombie.engine.acts or not zombie.jobs._runs.has(run))
        await zombie.jobs._runner.journal.write(lambda: None)
        assert before == (fleet.events(job), fleet.index.get_job(None, job), fleet.index.list_checkpoints(job))
        assert fleet.index.list_files("me", purpose="fine-tune-results") == ([], False)
        assert [adapter.epoch for adapter in fleet.index.list_adapters("me")] == [1]
        second.steps(job, 6, 10)
        second.engine.end(second.run_of(job))
        await fleet.status(job, "succeeded")
        losses = [event.data["train_loss"] for event in fleet.events(job) if event.type == "metrics" and event.data]
        assert losses == [4.0 / step for step in range(1, 11)]

    play(story, timing=TIMING)


@pytest.mark.full
def test_a_draining_replica_hands_its_jobs_over(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        first.steps(job, 1, 3)
        second = await fleet.join()
        draining = asyncio.create_task(first.jobs.drain())
        run = first.run_of(job)
        await until(lambda: (run, "hand_over") in first.engine.acts)
        first.steps(job, 4, 4)
        first.engine.checkpoint(run, 4)
        first.engine.end(run, "handed_over", step=4)
        await asyncio.wait_for(draining, 5)
        assert not first.jobs.held and fleet.committed(job) == [4]
        assert await fleet.holder(job) is second
        assert second.engine.starts[0]["resume"]
        assert (second.output(job) / "metrics.csv").read_text().count("\n") == 5, "nothing runs again"
        assert "The job goes on from its last checkpoint, on the replica replica-1" in fleet.messages(job)
        second.steps(job, 5, 10)
        second.engine.end(second.run_of(job))
        await fleet.status(job, "succeeded")
        assert fleet.step_events(job) == list(range(1, 11))

    play(story)


@pytest.mark.full
def test_cancel_pause_and_resume_from_the_desk(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run = member.run_of(job)
        member.steps(job, 1, 2)
        await until(lambda: fleet.step_events(job) == [1, 2])
        assert (await fleet.desk.pause("me", job)).paused
        await until(lambda: (run, "pause") in member.engine.acts)
        assert fleet.desk.get("me", job).status == "running" and fleet.desk.describe(fleet.desk.get("me", job))["paused"]
        other = await fleet.started()
        assert member.has(other), "the place is free"
        assert not (await fleet.desk.resume("me", job)).paused
        await until(lambda: (run, "resume") in member.engine.acts)
        assert (await fleet.desk.cancel("me", job)).status == "cancelled"
        await until(lambda: (run, "cancel") in member.engine.acts)
        member.engine.step(run, 3)
        member.engine.end(run, "cancelled", step=3)
        await until(lambda: not (fleet.root / member.name / "scratch" / "runs" / run).exists())
        assert job not in member.jobs.held and fleet.step_events(job) == [1, 2]
        done = fleet.index.get_job(None, job)
        assert (done.status, done.step, done.trained_tokens) == ("cancelled", 2, 200)
        assert fleet.messages(job)[-3:] == ["The job was paused", "The job was resumed", "The job was cancelled"]
        with pytest.raises(Conflict):
            await fleet.desk.pause("me", job)

    play(story, max_jobs=1)


def test_jobs_that_wait_can_be_paused_and_cancelled_too(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.create()
        await fleet.desk.pause("me", first.id)
        await fleet.desk.cancel("me", (await fleet.create()).id)
        member = await fleet.join()
        await fleet.status(first.id, "queued")
        await until(lambda: not member.jobs.held and not member.jobs._going)
        assert not member.engine.starts and fleet.desk.count_waiting() == 0
        await fleet.desk.resume("me", first.id)
        await fleet.holder(first.id)

    play(story)


@pytest.mark.full
def test_a_paused_job_of_a_dead_replica_waits_for_its_owner(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        await fleet.desk.pause("me", job)
        first.die()
        second = await fleet.join()
        await asyncio.sleep(2 * TIMING.lease_s)
        assert not second.jobs.held
        await fleet.desk.resume("me", job)
        assert await fleet.holder(job) is second

    play(story, timing=TIMING)


@pytest.mark.full
def test_events_are_followed_across_replicas(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        heard: list[str] = []

        async def listen() -> None:
            async for event in await fleet.desk.follow("me", job, None):
                heard.append(event.message)

        listening = asyncio.create_task(listen())
        first.steps(job, 1, 2)
        await until(lambda: any("Step 2/10" in message for message in heard))
        first.die()
        second = await fleet.join()
        await fleet.holder(job)
        second.steps(job, 1, 10)
        second.engine.end(second.run_of(job))
        await asyncio.wait_for(listening, 5)
        assert heard == [message for message in heard if message in fleet.messages(job)]
        assert sum("Step " in message for message in heard) == 10 and heard[-1] == "The job has successfully completed"
        last_two = fleet.events(job)[-2:]
        rest = [event.id async for event in await fleet.desk.follow("me", job, last_two[0].id)]
        assert rest == [last_two[1].id]
        with pytest.raises(InvalidRequest):
            await fleet.desk.follow("me", job, "ftevent-none")
        other = (await fleet.create()).id
        quiet = [event.message async for event in _until_closed(fleet, other)]
        assert quiet[0] == f"Created fine-tuning job: {other}"

    play(story, timing=TIMING)


async def _until_closed(fleet: Fleet, job: str) -> AsyncIterator[EventRecord]:
    """A stream of a job that goes on, which the end of the server ends."""
    async for event in await fleet.desk.follow("me", job, None):
        yield event
        asyncio.get_running_loop().call_later(0.1, fleet.desk.journal.end_streams)


@pytest.mark.full
def test_the_database_is_away_and_the_holder_pauses_in_time(play: PlayFleet, postgres_url: str) -> None:
    async def story(fleet: Fleet) -> None:
        with way_to(postgres_url) as way:
            member = await fleet.join(url=way.url)
            job = await fleet.started()
            run = member.run_of(job)
            member.steps(job, 1, 2)
            await until(lambda: fleet.index.get_job(None, job).step == 2)
            await _go_away(fleet, member, job, way.cut, way, step=3)
            await _go_away(fleet, member, job, way.silence, way, step=4)
            assert member.jobs.held == {job: 1} and len(member.engine.starts) == 1, "nobody else was there"
            member.steps(job, 5, 10)
            member.engine.end(run)
            await fleet.status(job, "succeeded")
            assert fleet.step_events(job) == list(range(1, 11))

    play(story, timing=TIMING)


async def _go_away(fleet: Fleet, member: Member, job: str, off: Callable[[], None], way: CutWay, *, step: int) -> None:
    """The database goes away for longer than a lease, and comes back. step: what the engine does meanwhile."""
    run = member.run_of(job)
    member.engine.acts.clear()
    off()
    member.engine.step(run, step)
    assert not member.engine.acts, "it trains on while the lease is safe"
    await until(lambda: member.engine.acts == [(run, "pause")])
    await asyncio.sleep(TIMING.lease_s)
    way.mend()
    await until(lambda: member.engine.acts == [(run, "pause"), (run, "resume")])
    await until(lambda: fleet.step_events(job) == list(range(1, step + 1)))


@pytest.mark.full
def test_a_replica_that_is_cut_off_loses_its_jobs_and_nothing_runs_twice(play: PlayFleet, postgres_url: str) -> None:
    async def story(fleet: Fleet) -> None:
        with way_to(postgres_url) as way:
            first = await fleet.join(url=way.url)
            job = await fleet.started()
            run = first.run_of(job)
            first.steps(job, 1, 4)
            first.engine.checkpoint(run, 4)
            await until(lambda: fleet.committed(job) == [4])
            way.cut()
            first.engine.step(run, 5, loss=99.0)
            second = await fleet.join()
            await until(lambda: (run, "pause") in first.engine.acts)
            assert not second.jobs.held, "the holder pauses before anybody else may have the job"
            assert await fleet.holder(job, but=first) is second
            second.steps(job, 5, 7)
            way.mend()
            await until(lambda: (run, "cancel") in first.engine.acts)
            first.engine.end(run, "cancelled")
            second.steps(job, 8, 10)
            second.engine.end(second.run_of(job))
            await fleet.status(job, "succeeded")
            await until(lambda: not first.jobs.held and not first.jobs._going)
            losses = [event.data["train_loss"] for event in fleet.events(job) if event.type == "metrics" and event.data]
            assert losses == [4.0 / step for step in range(1, 11)]

    play(story, timing=TIMING)


@pytest.mark.full
def test_while_the_store_refuses_the_job_waits(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run = member.run_of(job)
        put, tries = member.artifacts.put_directory, list[str]()

        def refuse(key: str, source: Path) -> Stored:
            tries.append(key)
            raise StorageRefused("the artifact store is full; free some space in it and try again")

        member.steps(job, 1, 2)
        monkeypatch.setattr(member.artifacts, "put_directory", refuse)
        member.engine.checkpoint(run, 2)
        await until(lambda: (run, "pause") in member.engine.acts and len(tries) > 2)
        assert fleet.committed(job) == [] and fleet.index.get_job(None, job).status == "running"
        member.engine.checkpoint(run, 3, keep=1)  # the engine was faster, and has deleted the one before
        monkeypatch.setattr(member.artifacts, "put_directory", put)
        await until(lambda: fleet.committed(job) == [3, 2])
        await until(lambda: (run, "resume") in member.engine.acts)
        waits = [message for message in fleet.messages(job) if "the artifact store" in message]
        assert waits == [
            "the artifact store is full; free some space in it and try again: the job waits, and goes on when its files can be "
            "stored", "the artifact store takes the job's files again; the job goes on"]
        monkeypatch.setattr(member.artifacts, "put_directory", refuse)
        member.engine.end(run)
        await until(lambda: len(tries) > 6)
        assert fleet.index.get_job(None, job).status == "running", "nobody reads succeeded before the files are there"
        monkeypatch.setattr(member.artifacts, "put_directory", put)
        await fleet.status(job, "succeeded")

    play(story)


@pytest.mark.full
def test_a_slow_store_holds_the_job_not_its_events(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run, (go_on, _) = member.run_of(job), member.hold_store(monkeypatch)
        member.engine.checkpoint(run, 1)
        member.steps(job, 1, 3)
        await until(lambda: fleet.step_events(job) == [1, 2, 3])
        assert (run, "pause") not in member.engine.acts, "one may be on its way"
        member.engine.checkpoint(run, 2)
        await until(lambda: (run, "pause") in member.engine.acts)
        assert fleet.committed(job) == []
        go_on.set()
        await until(lambda: (run, "resume") in member.engine.acts and fleet.committed(job) == [2, 1])

    play(story)


@pytest.mark.full
def test_an_engine_that_dies_keeps_its_jobs(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run = member.run_of(job)
        member.steps(job, 1, 3)
        directory = member.output(job) / "checkpoints" / "step-00000003"
        write_adapter(directory)
        (directory / "manifest.json").write_text("{}")  # the engine dies before it tells
        member.engine.die()
        await member.engine.rise()
        await until(lambda: len(member.engine.starts) == 2 and fleet.committed(job) == [3])
        assert member.engine.starts[1]["id"] == run and member.engine.starts[1]["resume"]
        assert fleet.index.list_checkpoints(job)[0][0].metrics["train_loss"] == 4.0 / 3

    play(story)


@pytest.mark.full
def test_a_job_that_kills_engines_is_given_up_whoever_has_it(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        job, first = "", await fleet.join()
        for number in range(3):
            member = fleet.members[-1]
            job = job or await fleet.started()
            await fleet.holder(job)
            member.engine.die(EngineEnd("it crashed", (member.run_of(job),), guilty=True))
            if number == 2:
                break
            await member.jobs._runner.journal.write(lambda: None)  # after what has been told to it
            await member.jobs.drain()
            await member.engine.rise()
            await fleet.join()
        failed = await fleet.status(job, "failed")
        assert failed.error is not None and "3 times or more" in failed.error["message"]
        assert first.engine.generation == 2 and len(fleet.members) == 3

    play(story)


@pytest.mark.full
def test_a_new_process_of_the_same_name_does_not_wait_for_its_own_lease(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join("same")
        job = await fleet.started()
        first.die()
        second = await fleet.join("same")
        await until(lambda: second.jobs.held == {job: 2})

    play(story)


@pytest.mark.full
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        for step in (2, 4):
            first.steps(job, step - 1, step)
            first.engine.checkpoint(first.run_of(job), step)
        await until(lambda: fleet.committed(job) == [4, 2])
        first.die()
        fleet.artifacts.delete(f"jobs/{job}/e1/step-00000004/state")
        second = await fleet.join()
        await fleet.holder(job)
        assert [path.name for path in (second.output(job) / "checkpoints").iterdir()] == ["step-00000002"]
        assert any("using the one before" in message for message in fleet.messages(job))
        second.steps(job, 3, 3)
        second.engine.checkpoint(second.run_of(job), 3)
        await until(lambda: fleet.committed(job) == [3, 2])

    play(story, timing=TIMING)


@pytest.mark.full
def test_a_job_that_continues_a_tuned_model(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        first = await fleet.started()
        member.engine.end(member.run_of(first))
        tuned = (await fleet.status(first, "succeeded")).fine_tuned_model
        assert tuned is not None
        second = await fleet.create(model=tuned)
        await fleet.desk.delete_model("me", tuned)
        await until(lambda: len(member.engine.starts) == 2)
        start = Path(member.engine.starts[1]["start"])
        assert (start / "adapter_model.safetensors").read_bytes() == b"weights of output"
        assert second.start == tuned
        with pytest.raises(NotFound):
            await fleet.create(model=tuned)

    play(story)


def test_what_the_desk_refuses(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        theirs = await fleet.upload(tenant="them")
        wrong = (({"training_file": theirs}, "training_file"), ({"model": "nobody"}, "model"), ({"rank": 65}, "rank"))
        for fields, param in wrong:
            with pytest.raises((InvalidRequest, NotFound)) as caught:
                await fleet.create(**fields)
            assert caught.value.param == param
        jobs = [await fleet.create() for _ in range(2)]
        with pytest.raises(CapacityError, match="2 of your jobs"):
            await fleet.create()
        with pytest.raises(NotFound):
            await fleet.desk.cancel("them", jobs[0].id)
        with pytest.raises(NotFound):
            fleet.desk.get("me", "ftjob-none")
        found, more = fleet.desk.list_jobs("me", after=None, limit=1, metadata=None)
        assert (found, more) == ([jobs[1]], True)

    play(story, max_tenant_jobs=2)


@pytest.mark.full
def test_a_replica_that_cannot_resume_a_job_leaves_it_to_others(play: PlayFleet) -> None:
    """Deterministic jobs need the same kernels and threads, which not all machines of a fleet may have."""
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        first.steps(job, 1, 2)
        first.engine.checkpoint(first.run_of(job), 2)
        await until(lambda: fleet.committed(job) == [2])
        other = await fleet.join("other")
        other.engine.refusal = InvalidRequest("resume: kernels has changed since step-00000002 was written", param="kernels")
        first.die()
        await until(lambda: bool(other.engine.starts) and not other.jobs.held and not other.jobs._going)
        await asyncio.sleep(0.3)
        assert len(other.engine.starts) == 1 and fleet.index.get_job(None, job).status == "running"
        assert any("is left to others: resume: kernels has changed" in message for message in fleet.messages(job))
        third = await fleet.join()
        assert await fleet.holder(job, but=other) is third

    play(story, timing=TIMING)


@pytest.mark.full
def test_a_drain_that_takes_too_long_gives_jobs_back_as_they_are(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        first.steps(job, 1, 2)

        def refuse(key: str, source: Path) -> Stored:
            raise StorageRefused("the artifact store is away; try again")

        monkeypatch.setattr(first.artifacts, "put_directory", refuse)
        first.engine.checkpoint(first.run_of(job), 2)
        first.engine.end(first.run_of(job), "handed_over", step=2)
        await first.jobs.drain(0.3)
        assert first.jobs.held == {job: 1}
        first.alive = False
        await first.jobs.stop()
        first.index.close()
        second = await fleet.join()
        began = asyncio.get_running_loop().time()
        assert await fleet.holder(job) is second
        assert asyncio.get_running_loop().time() - began < fleet.timing.lease_s / 2, "nobody waits for the lease's end"
        assert not second.engine.starts[0]["resume"], "nothing was committed"

    play(story)
