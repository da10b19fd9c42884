"""A job of two real engines' processes, from the body that asks for it to the tuned model, while one of them is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from coserve.server.index.store import Store
from coserve.server.link.engineclient import EngineClient
from coserve.server.replicas import helping, jobsearch
from coserve.server.replicas.artifacts import open_store
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.helping import JobHelp, ShareFiles
from coserve.server.replicas.jobs import ReplicaJobs
from coserve.server.replicas.steplink import StepLinks
from coserve.server.settings import ServerConfig
from tests.server.fleet_bench import Fleet
from tests.server.replica_process import SETTINGS, TIMING
from tests.step_wires import Wires
from tests.tiny_directory import chat_lines

pytest_plugins = ["tests.server.postgres"]
JOB = {
    "model": "tiny", "seed": 3, "checkpoint_steps": 20, "max_microbatch_tokens": 96,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 15, "batch_size": 6}}},
}


class Place:
    """A replica within this process, but for its engine."""

    def __init__(self, name: str, url: str, model: Path, root: Path, wires: Wires, others: list[str]) -> None:
        place = root / name
        place.mkdir()
        self.name, self.config = name, ServerConfig(model=str(model), data_dir=place, **SETTINGS)
        self.engine, self.index = EngineClient(self.config, report=lambda line: None), Store(url)
        self.artifacts = open_store(str(root / "store"), place / "cache", cache_bytes=1 << 30)
        self.links = StepLinks(self.engine.tell_step, wires.of(name))
        files = StoredFiles(self.artifacts, place / "files", self.index, 1 << 20, 1 << 30)
        self.help = JobHelp(
            name, self.engine, self.links, place / "shares", others=lambda: others,
            bring=ShareFiles(self.index, files, self.artifacts),
        )
        self.jobs: ReplicaJobs | None = None

    async def start(self, headroom: float) -> None:
        await self.engine.supervisor.start()
        self.links.start()
        self.jobs = ReplicaJobs(
            self.index, self.artifacts, self.engine, self.config, self.name, self.config.data_dir / "scratch",
            headroom=lambda: headroom, timing=TIMING, help=self.help,
        )
        await self.jobs.start()

    async def stop(self) -> None:
        if self.jobs is not None:
            await self.jobs.stop()
        await self.help.stop()
        await self.links.stop()
        await self.engine.supervisor.stop()
        self.index.close()


@pytest.mark.full
def test_engines_share_a_job_and_one_is_killed(
    postgres_url: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobsearch, "POLL_S", 0.2)
    monkeypatch.setattr(helping, "INVITE_S", 0.2)
    names = ["first", "second"]

    async def story(fleet: Fleet, first: Place, second: Place) -> None:
        await asyncio.gather(first.start(1.0), second.start(0.0))
        fleet.facts.info = first.engine.info
        file = await fleet.upload(chat_lines(32))

        async def finish(job: str) -> list[float]:
            async with asyncio.timeout(90):
                while (record := fleet.index.get_job(None, job)).status != "succeeded":
                    assert record.status != "failed", record.error
                    await asyncio.sleep(0.05)
            steps = [event for event in fleet.events(job) if event.type == "metrics" and event.data]
            assert sorted(int(event.step or 0) for event in steps) == list(range(1, record.num_steps + 1))
            return [event.data["train_loss"] for event in sorted(steps, key=lambda one: one.step or 0) if event.data]

        alone = await finish((await fleet.create(**JOB, training_file=file)).id)
        job = (await fleet.create(**JOB, training_file=file, members=2)).id
        async with asyncio.timeout(60):
            while not any("second.1 has joined" in line for line in fleet.messages(job)):
                await asyncio.sleep(0.02)
            while fleet.index.get_job(None, job).step < 20:
                await asyncio.sleep(0.02)
        os.kill(second.engine.supervisor.pid or 0, signal.SIGKILL)
        together = await finish(job)
        assert together == pytest.approx(alone, rel=2e-3), "float32, and Adam over 90 steps"
        assert together[0] == pytest.approx(alone[0], rel=1e-6)

    async def run() -> None:
        wires = Wires()
        fleet = Fleet(postgres_url, tiny_model, tmp_path, replicas=2, served_model_name=("tiny",))
        places = [Place(name, postgres_url, tiny_model, tmp_path, wires, names) for name in names]
        try:
            await story(fleet, places[0], places[1])
        finally:
            for place in places:
                await place.stop()
            await fleet.close()

    asyncio.run(run())
