"""What replicas' jobs have on the scratch disk: it goes when it is sent, and when the run ends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve.server.replicas.fenced import Fenced
from coserve.server.replicas.scratch import ScratchOutputs
from tests.server.fleet_bench import Fleet, Member, play_fleet
from tests.server.jobs_bench import until
from tests.server.test_trackers import WANDB

pytest_plugins = ["tests.server.postgres"]
PlayFleet = Callable[..., None]


@pytest.fixture
def play(postgres_url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayFleet:
    """play(story, **settings) over an empty database and an empty store."""
    return lambda story, **settings: play_fleet(story, postgres_url, model, tmp_path, monkeypatch, **settings)


def runs_of(fleet: Fleet, member: Member) -> Path:
    """Where a replica's runs have their directories."""
    return fleet.root / member.name / "scratch" / "runs"


def test_a_checkpoint_leaves_the_scratch_disk_once_it_is_sent(play: PlayFleet) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        job = await fleet.started()
        run = member.run_of(job)
        for step in (1, 2, 3, 4):
            member.steps(job, step, step)
            member.engine.checkpoint(run, step, keep=1)
            await until(lambda step=step: fleet.committed(job)[:1] == [step])  # type: ignore[misc]
        boxes = runs_of(fleet, member) / run / "boxes"
        await until(lambda: boxes.exists() and not list(boxes.iterdir()))

    play(story)


def test_what_a_blocked_reading_writes_goes_with_its_run(play: PlayFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fleet: Fleet) -> None:
        member = await fleet.join()
        begun, go_on = threading.Event(), threading.Event()
        fetch = ScratchOutputs._fetch_file

        def slowly(self: Any, *arguments: Any) -> None:
            begun.set()
            go_on.wait(10)
            fetch(self, *arguments)

        monkeypatch.setattr(ScratchOutputs, "_fetch_file", slowly)
        job = await fleet.create()
        await until(begun.is_set)
        run = f"{job.id}-e{member.jobs.held[job.id]}"
        await fleet.desk.cancel("me", job.id)
        await until(lambda: job.id not in member.jobs.held and job.id not in member.jobs._going)
        go_on.set()
        await until(lambda: not member.jobs._outputs._writers)
        await until(lambda: not list(runs_of(fleet, member).iterdir()))
        assert not member.jobs._outputs._closed, run

    play(story)


def test_the_last_writer_removes_a_closed_run(tmp_path: Path) -> None:
    epochs = {"job": 1}
    nothing: Any = None
    outputs = ScratchOutputs(
        tmp_path / "runs", nothing, nothing, nothing, nothing, epochs=epochs.get, warn=lambda job, line: None
    )
    outputs.open("job")
    first, second = outputs.writing("job"), outputs.writing("job")
    directory = first.__enter__()
    assert second.__enter__() == directory
    epochs.clear()
    outputs.close(directory.name)
    first.__exit__(None, None, None)
    assert directory.is_dir()
    second.__exit__(None, None, None)
    assert not directory.exists()
    with pytest.raises(Fenced), outputs.writing("job"):
        pass


@pytest.mark.full
def test_what_integrations_write_is_in_the_store(
    play: PlayFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that goes on under another epoch, on a replica that has not validated the job."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(WANDB.replace('"wandb.json"', '"wandb" / "wandb.json"').replace(
        "self.path.write_text", "self.path.parent.mkdir(); self.path.write_text"))
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
    monkeypatch.syspath_prepend(packages)

    async def story(fleet: Fleet) -> None:
        first = await fleet.join()
        job = await fleet.started(integrations=[{"type": "wandb", "wandb": {"project": "facts"}}])
        first.steps(job, 1, 2)
        first.engine.checkpoint(first.run_of(job), 2)
        await until(lambda: fleet.committed(job) == [2])
        second = await fleet.join()
        draining = asyncio.create_task(first.jobs.drain())
        await until(lambda: (first.run_of(job), "hand_over") in first.engine.acts)
        first.engine.end(first.run_of(job), "handed_over", step=2)
        await draining
        assert await fleet.holder(job, but=first) is second
        second.steps(job, 3, 4)
        second.engine.end(second.run_of(job))
        await fleet.status(job, "succeeded")
        assert not [message for message in fleet.messages(job) if "integration" in message]
        (said,) = fleet.artifacts.fetch(f"jobs/{job}/e2/wandb").iterdir()
        assert said.name == "wandb.json" and '"facts"' in said.read_text()

    play(story)
