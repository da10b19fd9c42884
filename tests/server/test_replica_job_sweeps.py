"""What jobs have in the artifact store after their ends: what a row names, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coserve.server.errors import StorageRefused
from coserve.server.replicas import sweeping
from coserve.server.replicas.artifacts import Stored
from tests.server.fleet_bench import Fleet, Member, play_fleet
from tests.server.jobs_bench import until

pytest_plugins = ["tests.server.postgres"]
PlayFleet = Callable[..., None]


@pytest.fixture
def play(postgres_url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayFleet:
    """play(story, **settings) over an empty database and an empty store."""
    return lambda story, **settings: play_fleet(story, postgres_url, model, tmp_path, monkeypatch, **settings)


def keys_of(fleet: Fleet, job: str) -> list[str]:
    """What the store has of a job, below its key."""
    root = fleet.root / "store" / "jobs" / job
    return sorted(str(path.parent.relative_to(root)) for path in root.rglob("_manifest.json"))


async def succeed(fleet: Fleet, member: Member, job: str) -> str:
    member.engine.end(member.run_of(job))
    return str((await fleet.status(job, "succeeded")).fine_tuned_model)


@pytest.mark.full
def test_the_adapter_that_a_job_continued_goes_with_its_end(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        tuned = await succeed(fleet, member, await fleet.started())
        second = await fleet.started(model=tuned)
        member.engine.checkpoint(member.run_of(second), 2)
        await until(lambda: fleet.committed(second) == [2])
        sweep, tries = member.artifacts.sweep, list[str]()

        def refuse_once(prefix: str, keep: set[str]) -> None:
            tries.append(prefix)
            if len(tries) == 1:
                raise StorageRefused("the artifact store is away")
            sweep(prefix, keep)

        monkeypatch.setattr(sweeping, "PAUSES_S", (0.05,))
        monkeypatch.setattr(member.artifacts, "sweep", refuse_once)
        assert "start" in keys_of(fleet, second)
        await succeed(fleet, member, second)
        await until(lambda: keys_of(fleet, second) == ["e1/model", "e1/step-00000002/adapter", "e1/step-00000002/state"])
        await member.jobs.drain()
        third = await fleet.create(model=tuned)
        assert keys_of(fleet, third.id) == ["start"]
        await fleet.desk.cancel("me", third.id)  # nobody has it
        await until(lambda: keys_of(fleet, third.id) == [])

    play(story)


@pytest.mark.full
def test_what_a_cancelled_job_was_sending_is_deleted(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run, begun, go_on = member.run_of(job), threading.Event(), threading.Event()
        member.engine.checkpoint(run, 1)
        await until(lambda: fleet.committed(job) == [1])
        put = member.artifacts.put_directory

        def slowly(key: str, source: Path) -> Stored:
            stored = put(key, source)
            begun.set()
            go_on.wait(10)
            return stored

        monkeypatch.setattr(member.artifacts, "put_directory", slowly)
        member.engine.checkpoint(run, 2)
        await until(begun.is_set)
        await fleet.desk.cancel("me", job)
        await until(lambda: (run, "cancel") in member.engine.acts)
        member.engine.end(run, "cancelled")
        await until(lambda: job not in member.jobs.held and not member.jobs._going)
        go_on.set()
        await until(lambda: keys_of(fleet, job) == ["e1/step-00000001/adapter", "e1/step-00000001/state"])

    play(story)
