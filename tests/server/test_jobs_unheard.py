"""What an engine or a server wrote before it was killed, and nobody heard of: it is on record once all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coserve.server.jobs.runner import JobRunner
from tests.server.conftest import Play
from tests.server.jobs_bench import Bench, until


@contextmanager
def unheard(bench: Bench) -> Iterator[None]:
    """What the engine says is lost."""
    listeners, bench.engine.job_listeners = bench.engine.job_listeners, []
    yield
    bench.engine.job_listeners = listeners


def steps(bench: Bench, id: str) -> list[int | None]:
    return [event.step for event in bench.events(id) if event.type == "metrics"]


def checkpoints(bench: Bench, id: str) -> list[int]:
    return [checkpoint.step for checkpoint in bench.jobs.list_checkpoints("me", id, after=None, limit=10)[0]]


def die(*_: object) -> None:
    """In the place of what a kill cuts off."""
    raise RuntimeError("killed here")


def test_steps_and_checkpoints_that_a_dead_engine_wrote(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        with unheard(bench):
            bench.engine.step(id, 2, valid=1.5)
            bench.engine.checkpoint(id, 2)
            bench.engine.step(id, 3, loss=9.0)
        bench.engine.die()
        await bench.engine.rise()
        await until(lambda: len(bench.engine.starts) == 2)
        assert (steps(bench, id), checkpoints(bench, id)) == ([1, 2, 3], [2])
        bench.engine.step(id, 3, loss=3.0)
        bench.engine.step(id, 4)
        await bench.settle()
        assert steps(bench, id) == [1, 2, 3, 4]
        losses = [event.data["train_loss"] for event in bench.events(id) if event.data is not None]
        assert losses == [4.0, 2.0, 3.0, 1.0]
        assert [event.data.get("valid_loss") for event in bench.events(id) if event.data is not None][:2] == [None, 1.5]

    play(story)


def test_steps_that_a_dead_server_did_not_hear(play: Play) -> None:
    ids: list[str] = []

    async def before(bench: Bench) -> None:
        ids.append(await bench.started())
        bench.engine.step(ids[0], 1)
        with unheard(bench):
            bench.engine.step(ids[0], 2)
            bench.engine.checkpoint(ids[0], 2)

    async def after(bench: Bench) -> None:
        await until(lambda: len(bench.engine.starts) == 1)
        assert (steps(bench, ids[0]), checkpoints(bench, ids[0])) == ([1, 2], [2])

    play(before, after)


def test_a_server_that_dies_behind_the_result_file_has_one(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    killed: list[object] = []

    def kill(*arguments: object) -> None:
        killed.append(arguments)
        die()

    async def before(bench: Bench) -> None:
        ids.append(await bench.started())
        bench.engine.step(ids[0], 1)
        with monkeypatch.context() as patch:
            patch.setattr(JobRunner, "write_end", kill)
            bench.engine.end(ids[0], step=1)
            await until(lambda: bool(bench.store.list_files("me", purpose="fine-tune-results")[0]))
            await until(lambda: bool(killed))  # the file is listed a moment before
            await bench.settle()
        assert bench.store.get_job("me", ids[0]).status == "running"

    async def after(bench: Bench) -> None:
        await until(lambda: len(bench.engine.starts) == 1)
        bench.engine.end(ids[0], step=1)
        done = await bench.status(ids[0], "succeeded")
        assert [file.id for file in bench.store.list_files("me", purpose="fine-tune-results")[0]] == list(done.result_files)

    play(before, after)


def test_a_server_that_dies_behind_the_manifest_tells_the_end_once(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []

    async def before(bench: Bench) -> None:
        ids.append(await bench.started())
        with unheard(bench):
            bench.engine.step(ids[0], 1)
        with monkeypatch.context() as patch:
            patch.setattr(JobRunner, "publish_end", die)
            bench.engine.end(ids[0], step=1)
            await until(lambda: "succeeded" in (bench.config.data_dir / "jobs" / ids[0] / "request.json").read_text())
            await bench.settle()
        assert bench.store.get_job("me", ids[0]).status == "running"

    async def after(bench: Bench) -> None:
        assert bench.store.get_job("me", ids[0]).status == "succeeded"
        assert not bench.engine.starts
        assert steps(bench, ids[0]) == [1]
        assert bench.messages(ids[0]).count("The job has successfully completed") == 1
        assert sum(message.startswith("New fine-tuned model") for message in bench.messages(ids[0])) == 1

    play(before, after, after)
