"""Jobs of several replicas over one PostgreSQL: claimed once, handed over, taken over, fenced; each step there once."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.server.fleet_bench import Fleet, Story, play_fleet
from tests.server.jobs_bench import until
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


def test_each_job_is_claimed_once_by_whoever_has_room(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        members = [await fleet.join() for _ in range(3)]
        file = await fleet.upload()
        jobs = [(await fleet.create(training_file=file)).id for _ in range(8)]
        await until(lambda: sum(len(member.jobs.held) for member in members) == 6)
        await until(lambda: all(sum(member.has(job) for job in jobs) == 2 for member in members))
        waiting = [job for job in jobs if not any(member.has(job) for member in members)]
        assert sorted(fleet.index.get_job(None, job).status for job in jobs) == 2 * ["queued"] + 6 * ["running"]
        assert len({start["id"] for member in members for start in member.engine.starts}) == 6
        done = next(job for job in jobs if members[0].has(job))
        members[0].engine.end(members[0].run_of(done))
        await until(lambda: sum(members[0].has(job) for job in waiting) == 1)
        assert fleet.desk.count_waiting() == 1

    play(story, max_jobs=2)


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

    play(story)


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

    play(story)


def test_a_draining_replica_hands_its_jobs_over(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started()
        first.steps(job, 1, 3)
        second = await fleet.join()
        import asyncio
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
