"""What replicas' jobs have on the scratch disk: it goes when it is sent, and when the run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve.server.replicas.fenced import Fenced
from coserve.server.replicas.scratch import ScratchOutputs
from tests.server.fleet_bench import Fleet, Member, play_fleet
from tests.server.jobs_bench import until

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
