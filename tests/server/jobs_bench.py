"""A job service over a real index and real files, and an engine that does what the test says."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from coserve.core import CoserveError, NotFound, Slo
from coserve.finetune.job import MetricsTable, StepRow
from coserve.server.errors import EngineUnavailable
from coserve.server.index.files import FileService
from coserve.server.index.store import Store
from coserve.server.jobs.service import JobService
from coserve.server.link.messages import JobEnded, JobHappened, Problem, Ready
from coserve.server.link.process import EngineEnd
from coserve.server.models import ModelRegistry
from coserve.server.records import EventRecord, JobRecord
from coserve.server.settings import ServerConfig
from tests.server.jobforms import read_body
from tests.tiny_directory import chat_lines

SECONDS = 10.0


def write_adapter(directory: Path) -> Path:
    """Files with the names of PEFT's; nothing here reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (directory / "adapter_model.safetensors").write_bytes(b"weights of " + directory.name.encode())
    return directory


class FakeEngine:
    """EngineClient's methods and its supervisor's; the test plays the engine's part by start of job, step, checkpoint, end, die
    and rise."""

    def __init__(self, model: Path) -> None:
        self.ready, self.generation, self.num_restarts = True, 1, 0
        self.last_end: EngineEnd | None = None
        self.failure: str | None = None
        self.supervisor = self
        self.info = Ready(
            model="some/Base-1", directory=str(model), fingerprint="f", architecture="llama", num_parameters=1, vocab_size=400,
            max_model_len=512, device="cpu", dtype="float32", threads=1, memory={}, start_s=0.1,
            objectives=Slo(tpot_s=0.1, ttft_s=3.0),
        )
        self.starts: list[dict[str, Any]] = []
        self.acts: list[tuple[str, str]] = []
        self.adapters: dict[str, str] = {}
        self.loads: list[tuple[str, str]] = []
        self.refusal: CoserveError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.job_listeners: list[Callable[[JobHappened | JobEnded], None]] = []
        self.up_listeners: list[Callable[[], Awaitable[None]]] = []
        self.down_listeners: list[Callable[[], None]] = []
        self.clock = 100.0

    def on_job(self, listener: Callable[[JobHappened | JobEnded], None]) -> None:
        self.job_listeners.append(listener)

    def on_up(self, listener: Callable[[], Awaitable[None]]) -> None:
        self.up_listeners.append(listener)

    def on_down(self, listener: Callable[[], None]) -> None:
        self.down_listeners.append(listener)

    async def start_job(self, **fields: Any) -> None:
        generation = self.generation
        self.starts.append(fields)
        await self.gate.wait()
        if not self.ready or generation != self.generation:
            raise EngineUnavailable("the engine has died")
        if self.refusal is not None:
            raise self.refusal
        directory = Path(fields["directory"])
        assert fields["resume"] == (directory / "job.json").is_file()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "job.json").write_text("{}")

    def act_job(self, job: str, action: str) -> None:
        self.acts.append((job, action))

    async def load_adapter(self, name: str, directory: str) -> list[str]:
        if not (Path(directory) / "adapter_config.json").is_file():
            raise NotFound(f"adapter: there is no directory {directory}", param="adapter")
        self.loads.append((name, directory))
        self.adapters[name] = directory
        return list(self.adapters.values())

    async def unload_adapter(self, name: str) -> list[str]:
        if name not in self.adapters:
            raise NotFound(f"adapter: there is no {name}", param="adapter")
        del self.adapters[name]
        return list(self.adapters.values())

    def say(self, message: JobHappened | JobEnded) -> None:
        for listener in self.job_listeners:
            listener(message)

    def step(self, job: str, step: int, num_steps: int = 10, *, loss: float | None = None, valid: float | None = None) -> None:
        row = StepRow(
            step=step, train_loss=4.0 / step if loss is None else loss, train_mean_token_accuracy=0.5, learning_rate=1e-4,
            grad_norm=1.0, tokens=100, seconds=2.0, valid_loss=valid, valid_mean_token_accuracy=None if valid is None else 0.4,
        )
        table = MetricsTable(self._output(job) / "metrics.csv")
        table.keep(step - 1) if table.path.exists() else table.path.write_text(",".join(StepRow.__dataclass_fields__) + "\n")
        table.append(row)
        self.clock += 2.0
        self.say(JobHappened(
            id=job, level="info", message=f"step {step}", time_s=self.clock, num_steps=num_steps,
            row={name: getattr(row, name) for name in StepRow.__dataclass_fields__},
        ))

    def checkpoint(self, job: str, step: int, *, keep: int = 3) -> Path:
        root = self._output(job) / "checkpoints"
        directory = write_adapter(root / f"step-{step:08d}")
        (directory / "manifest.json").write_text("{}")
        for old in sorted(root.glob("step-*"))[:-keep]:
            for path in old.iterdir():
                path.unlink()
            old.rmdir()
        self.say(JobHappened(
            id=job, level="info", message=directory.name, time_s=self.clock, checkpoint=str(directory), checkpoint_step=step,
        ))
        return directory

    def end(self, job: str, status: Any = "succeeded", problem: Problem | None = None, *, step: int = 10) -> None:
        if status == "succeeded":
            write_adapter(self._output(job))
        self.say(JobEnded(id=job, status=status, step=step, trained_tokens=step * 100, problem=problem))

    def die(self, end: EngineEnd | None = None) -> None:
        self.ready, self.last_end = False, end
        self.adapters.clear()
        for listener in self.down_listeners:
            listener()

    async def rise(self) -> None:
        self.generation += 1
        self.ready = True
        for listener in self.up_listeners:
            await listener()

    def _output(self, job: str) -> Path:
        return Path(next(start["directory"] for start in reversed(self.starts) if start["id"] == job))


class Bench:
    """Everything of one server but HTTP and the engine."""

    def __init__(self, model: Path, data_dir: Path, **settings: Any) -> None:
        data_dir.mkdir(exist_ok=True)
        self.config = ServerConfig(data_dir=data_dir, **settings)
        self.engine = FakeEngine(model)
        engine: Any = self.engine
        self.store = Store(f"sqlite:///{data_dir / 'coserve.db'}")
        self.files = FileService(data_dir / "files", self.store, 1 << 20, 1 << 30)
        self.files.rebuild()
        self.models = ModelRegistry(self.store, engine, self.config)
        self.jobs = JobService(store=self.store, files=self.files, models=self.models, engine=engine, config=self.config)

    async def __aenter__(self) -> Bench:
        await self.jobs.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.jobs.stop()
        self.store.close()

    async def upload(self, lines: Sequence[Any] | bytes | None = None, *, tenant: str = "me", name: str = "facts.jsonl") -> str:
        given = chat_lines(32) if lines is None else lines
        data = given if isinstance(given, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in given)
        return (await self.files.save_upload(tenant, UploadFile(io.BytesIO(data), filename=name), "fine-tune")).id

    async def create(self, tenant: str = "me", **fields: Any) -> JobRecord:
        if "training_file" not in fields:
            fields["training_file"] = await self.upload(tenant=tenant)
        return await self.jobs.create(tenant, read_body({"model": "some/Base-1", **fields}))

    async def started(self, tenant: str = "me", **fields: Any) -> str:
        """A new job's id, once the engine has it."""
        job = await self.create(tenant, **fields)
        await until(lambda: any(start["id"] == job.id for start in self.engine.starts))
        await self.status(job.id, "running")
        await until(lambda: (self.config.data_dir / "jobs" / job.id / "output" / "job.json").exists())
        return job.id

    async def status(self, id: str, status: str) -> JobRecord:
        """The job, once the index has it in this status."""
        await until(lambda: self.store.get_job(None, id).status == status)
        return self.store.get_job(None, id)

    def events(self, id: str) -> list[EventRecord]:
        """Oldest first."""
        return self.store.list_events(id, limit=1000)[0][::-1]

    def messages(self, id: str) -> list[str]:
        return [event.message for event in self.events(id)]

    async def settle(self) -> None:
        """Until all that happened so far is written."""
        await self.jobs.journal.write(lambda: None)


async def until(condition: Callable[[], bool]) -> None:
    """Waits; fails after some seconds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


Story = Callable[[Bench], Coroutine[Any, Any, None]]
"""What a test does with one server."""


def play_stories(model: Path, data_dir: Path, *stories: Story, **settings: Any) -> None:
    """Runs stories one after the other, each on a new server over the same data directory."""

    async def one(story: Story) -> None:
        async with Bench(model, data_dir, **settings) as bench:
            await story(bench)

    for story in stories:
        asyncio.run(asyncio.wait_for(one(story), 60))
