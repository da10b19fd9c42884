"""Jobs that move between real engines, in processes that are stopped, drained and killed: bit by bit what one engine does."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.server.conftest import wait_until
from tests.server.fleet_bench import Fleet
from tests.server.replica_process import SETTINGS, TIMING
from tests.tiny_directory import chat_lines

pytest_plugins = ["tests.server.postgres"]
JOB = {
    "model": "tiny", "seed": 3, "deterministic": True, "checkpoint_steps": 10, "keep_checkpoints": 2,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 2}}},
}
STEPS = 96


class Process:
    """A replica's process. engine: the number of its engine's."""

    def __init__(self, name: str, headroom: float, **places: str) -> None:
        self._log = Path(places["root"]) / f"{name}.log"
        arguments = json.dumps({"name": name, "headroom": headroom, **places})
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.server.replica_process", arguments], stdout=log, stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        wait_until(lambda: "ready" in self.log or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.log

    def signal(self, number: int, *, engine: bool = False) -> None:
        """To the process, and to its engine's too."""
        if engine:
            os.kill(int(self.log.partition("ready ")[2].split()[0]), number)
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(20)


Start = Callable[[str, float], Process]


@pytest.fixture
def start(postgres_url: str, tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []
    places = {"url": postgres_url, "store": str(tmp_path / "store"), "root": str(tmp_path), "model": str(tiny_model)}

    def start(name: str, headroom: float) -> Process:
        started.append(Process(name, headroom, **places))
        return started[-1]

    yield start
    for process in started:
        process.end()


def weights_of(fleet: Fleet, job: str) -> bytes:
    """The tuned adapter's file, from the artifact store."""
    adapter = fleet.index.find_adapter("me", str(fleet.index.get_job(None, job).fine_tuned_model))
    assert adapter is not None
    return (fleet.artifacts.fetch(adapter.directory, adapter.sha256) / "adapter_model.safetensors").read_bytes()


def outcome(fleet: Fleet, job: str) -> tuple[list[float], list[int], bytes]:
    """Losses by step, the steps of checkpoints, and the tuned weights. Each step was committed once."""
    assert fleet.step_events(job) == list(range(1, STEPS + 1))
    losses = [float(event.data["train_loss"]) for event in fleet.events(job) if event.type == "metrics" and event.data]
    return losses, fleet.committed(job), weights_of(fleet, job)


@pytest.mark.full
def test_a_job_moves_between_engines_and_nobody_can_tell(
    start: Start, postgres_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    async def story(fleet: Fleet) -> None:
        first, second = start("first", 1.0), start("second", 0.0)
        for process in (first, second):
            await asyncio.to_thread(process.wait_ready)
        file = await fleet.upload(chat_lines(32))

        async def begin(step: int) -> str:
            job = (await fleet.create(**JOB, training_file=file)).id
            await reach(job, step)
            return job

        async def reach(job: str, step: int) -> None:
            async with asyncio.timeout(60):
                while fleet.index.get_job(None, job).step < step:
                    await asyncio.sleep(0.01)

        async def end(job: str) -> None:
            limit = time.monotonic() + 60
            while (record := fleet.index.get_job(None, job)).status != "succeeded":
                assert record.status == "running" and time.monotonic() < limit, (
                    record, fleet.messages(job)[-5:], first.log, second.log)
                await asyncio.sleep(0.05)

        def epochs(job: str) -> list[int]:
            return [one.epoch for one in fleet.index.list_checkpoints(job)[0]]

        whole = await begin(1)
        await end(whole)
        expected = outcome(fleet, whole)
        assert len(set(expected[0])) > STEPS // 2 and expected[1] == [96, 90] and epochs(whole) == [1, 1]

        stopped = await begin(15)
        first.signal(signal.SIGSTOP, engine=True)
        await end(stopped)
        assert outcome(fleet, stopped) == expected and epochs(stopped) == [2, 2]
        before = fleet.events(stopped), fleet.index.get_job(None, stopped), fleet.index.list_checkpoints(stopped)
        first.signal(signal.SIGCONT, engine=True)
        await asyncio.sleep(TIMING.lease_s)
        assert before == (fleet.events(stopped), fleet.index.get_job(None, stopped), fleet.index.list_checkpoints(stopped))
        async with asyncio.timeout(20):  # until the zombie has found out
            while list((tmp_path / "first" / "scratch" / "runs").iterdir()):
                await asyncio.sleep(0.05)

        drained = await begin(15)
        first.signal(signal.SIGTERM)
        await end(drained)
        assert first.process.wait(30) == 0 and "drained" in first.log, first.log
        assert outcome(fleet, drained) == expected and epochs(drained) == [2, 2]
        assert not [text for text in fleet.messages(drained) if re.search(r"(step \d+ runs|steps run) again", text)]

        third = start("third", 1.0)
        await asyncio.to_thread(third.wait_ready)
        killed = await begin(15)
        third.signal(signal.SIGKILL)
        began = time.monotonic()
        await end(killed)
        assert outcome(fleet, killed) == expected and epochs(killed) == [2, 2]
        assert time.monotonic() - began < 30

    async def run() -> None:
        settings = {name: value for name, value in SETTINGS.items() if name == "served_model_name"}
        fleet = Fleet(postgres_url, tiny_model, tmp_path, **settings)
        fleet.facts.info = msgspec.structs.replace(fleet.facts.info, fingerprint="")  # its jobs are for any base
        try:
            await story(fleet)
        finally:
            await fleet.close()

    asyncio.run(run())
