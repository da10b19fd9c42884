"""Several replicas' jobs and an ingress's desk in one process: a real PostgreSQL and a real artifact store, and engines that do
what the test says."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from coserve.cluster.leases import LeaseTiming
from coserve.server.index.store import Store
from coserve.server.jobs import journal
from coserve.server.records import EventRecord, JobRecord
from coserve.server.replicas import jobsearch
from coserve.server.replicas.artifacts import ArtifactStore, Stored, open_store
from coserve.server.replicas.desk import JobDesk
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.jobs import ReplicaJobs
from coserve.server.replicas.models import ReplicaModels
from coserve.server.settings import ServerConfig
from tests.server.jobforms import read_body
from tests.server.jobs_bench import FakeEngine, until
from tests.tiny_directory import chat_lines

TIMING = LeaseTiming(lease_s=2.4, renew_s=0.3, retry_s=0.1, safe_s=1.4, claim_delay_s=0.1)
"""For tests in which leases end. A busy machine may stop a process for a second."""
LASTING = LeaseTiming(claim_delay_s=0.1)
"""For all others."""
SECONDS = 60.0


class Member:
    """A replica. url: its way to the database."""

    def __init__(self, fleet: Fleet, name: str, url: str, **options: Any) -> None:
        self.name, self.engine, self.index = name, FakeEngine(fleet.model), Store(url)
        engine: Any = self.engine
        self.artifacts: ArtifactStore = open_store(str(fleet.root / "store"), fleet.root / name / "cache", cache_bytes=1 << 30)
        self.jobs = ReplicaJobs(
            self.index, self.artifacts, engine, fleet.config, name, fleet.root / name / "scratch", timing=fleet.timing,
            **options
        )
        self.alive = True

    def run_of(self, job: str) -> str:
        """The engine's name of the job's present run."""
        return f"{job}-e{self.jobs.held[job]}"

    def has(self, job: str) -> bool:
        """Whether its engine has begun the job's present run."""
        return job in self.jobs.held and any(
            start["id"] == self.run_of(job) and (Path(start["directory"]) / "job.json").exists() for start in self.engine.starts
        )

    def output(self, job: str) -> Path:
        """Of the present run."""
        return Path(next(start["directory"] for start in self.engine.starts if start["id"] == self.run_of(job)))

    def steps(self, job: str, first: int, last: int, num_steps: int = 10) -> None:
        """Its engine does steps of a job."""
        for step in range(first, last + 1):
            self.engine.step(self.run_of(job), step, num_steps)

    def hold_store(self, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
        """Its store takes artifacts only when the event is set. With it, the keys of those that were to be put there."""
        put, go_on, keys = self.artifacts.put_directory, threading.Event(), list[str]()

        def slowly(key: str, source: Path) -> Stored:
            keys.append(key)
            go_on.wait(10)
            return put(key, source)

        monkeypatch.setattr(self.artifacts, "put_directory", slowly)
        return go_on, keys

    def freeze(self) -> None:
        """It renews and claims nothing more, and doesn't know: what a stopped process is when it goes on."""
        for task in list(self.jobs._tasks):
            task.cancel()

    def die(self) -> None:
        """As by kill -9, as far as others see: nothing is given back, and nothing is written any more."""
        self.alive = False
        self.freeze()
        self.jobs._stopping = self.jobs._runner._stopping = True
        for task in list(self.jobs._runner._tasks):
            task.cancel()
        self.index.close()
        self.jobs._claims.close()

    async def close(self) -> None:
        if self.alive:
            await self.jobs.stop()
            self.index.close()


class Fleet:
    """An index, a store, an ingress and replicas."""

    def __init__(
        self, url: str, model: Path, root: Path, *, timing: LeaseTiming = LASTING, **settings: Any
    ) -> None:
        self.url, self.model, self.root, self.timing = url, model, root, timing
        self.config = ServerConfig(**settings)
        self.index = Store(url)
        self.artifacts: ArtifactStore = open_store(str(root / "store"), root / "ingress" / "cache", cache_bytes=1 << 30)
        facts: Any = FakeEngine(model)
        self.facts: FakeEngine = facts
        """What the ingress knows of the engines."""
        self.files = StoredFiles(self.artifacts, root / "ingress" / "files", self.index, 1 << 20, 1 << 30)
        self.models = ReplicaModels(self.index, facts, self.config, self.artifacts, root / "ingress")
        self.members: list[Member] = []
        self.desk = JobDesk(
            store=self.index, files=self.files, models=self.models, engine=facts, config=self.config, artifacts=self.artifacts,
            nudge=self.nudge,
        )
        self.files.held_bytes = self.models.held_bytes = self.desk.disk.bytes_of

    def nudge(self, job: str) -> None:
        for member in self.members:
            if member.alive:
                member.jobs.nudge(job)

    async def join(self, name: str | None = None, url: str | None = None, **options: Any) -> Member:
        """Another replica."""
        member = Member(self, name or f"replica-{len(self.members)}", url or self.url, **options)
        self.members.append(member)
        await member.jobs.start()
        return member

    async def close(self) -> None:
        for member in self.members:
            await member.close()
        await self.desk.stop()
        await self.models.close()
        self.index.close()

    async def upload(self, lines: Sequence[Any] | None = None, *, tenant: str = "me") -> str:
        data = b"".join(json.dumps(line).encode() + b"\n" for line in (lines or chat_lines(32)))
        return (await self.files.save_upload(tenant, UploadFile(io.BytesIO(data), filename="facts.jsonl"), "fine-tune")).id

    async def create(self, tenant: str = "me", **fields: Any) -> JobRecord:
        if "training_file" not in fields:
            fields["training_file"] = await self.upload(tenant=tenant)
        return await self.desk.create(tenant, read_body({"model": "some/Base-1", **fields}))

    async def started(self, tenant: str = "me", **fields: Any) -> str:
        """A new job's id, once an engine has it."""
        job = await self.create(tenant, **fields)
        await self.holder(job.id)
        return job.id

    async def holder(self, job: str, but: Member | None = None) -> Member:
        """The replica whose engine runs a job, once there is one."""
        def those() -> list[Member]:
            return [one for one in self.members if one.alive and one is not but and one.has(job)]

        await until(lambda: len(those()) == 1)
        return those()[0]

    async def status(self, id: str, status: str) -> JobRecord:
        """The job, once the index has it in this status."""
        await until(lambda: self.index.get_job(None, id).status == status)
        return self.index.get_job(None, id)

    def events(self, id: str) -> list[EventRecord]:
        """Oldest first."""
        return self.index.list_events(id, limit=1000)[0][::-1]

    def messages(self, id: str) -> list[str]:
        return [event.message for event in self.events(id)]

    def step_events(self, id: str) -> list[int]:
        return [int(event.step or 0) for event in self.events(id) if event.type == "metrics"]

    def committed(self, id: str) -> list[int]:
        """Steps of the checkpoints that the index has."""
        return [one.step for one in self.index.list_checkpoints(id, limit=100)[0]]


Story = Callable[[Fleet], Coroutine[Any, Any, None]]


def play_fleet(story: Story, url: str, model: Path, root: Path, monkeypatch: Any, **settings: Any) -> None:
    """Runs a story, with short pauses between tries."""
    monkeypatch.setattr(journal, "RETRY_S", 0.1)
    monkeypatch.setattr("coserve.server.replicas.deliveries.RETRY_S", 0.05)
    monkeypatch.setattr("coserve.server.replicas.following.POLL_S", 0.05)
    monkeypatch.setattr(jobsearch, "POLL_S", 0.1)

    async def run() -> None:
        fleet = Fleet(url, model, root, **settings)
        try:
            await asyncio.wait_for(story(fleet), SECONDS)
        finally:
            await fleet.close()

    asyncio.run(run())
