"""The fine-tuning and adapter routes over a real socket, by OpenAI's client; the engine is a fake."""

from __future__ import annotations

import asyncio
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from coserve.server.handlers import install_handlers
from coserve.server.routes import adapters, finetuning
from coserve.server.services import Services
from tests.server.bench_site import BenchSite
from tests.server.jobs_bench import Bench
from tests.tiny_adapter import write_tiny_adapter, write_tiny_config
from tests.tiny_tokenizer import build_tiny_tokenizer


class Tenants:
    """The key is the tenant."""

    def identify(self, authorization: str | None) -> str:
        return (authorization or "Bearer nobody").removeprefix("Bearer ")


class Site(BenchSite):
    """The routes of jobs and adapters. url: with /v1; `act` runs the engine's part on the server's loop."""

    def __init__(self, model: Path, data_dir: Path) -> None:
        self.root = data_dir / "adapters"
        self.root.mkdir(parents=True)
        super().__init__(model, data_dir, adapter_root=str(self.root))
        self.url += "/v1"
        self.client = self.client_of("me")

    def make_app(self, bench: Bench) -> FastAPI:
        fakes: Any = (Tenants(), bench.engine)
        absent: Any = None
        app = FastAPI()
        app.state.services = Services(
            config=bench.config, tenants=fakes[0], engine=fakes[1], store=bench.store, files=bench.files, jobs=bench.jobs,
            models=bench.models, tokenizer=absent, metrics=absent, draw_seed=absent,
        )
        install_handlers(app)
        app.include_router(finetuning.router)
        app.include_router(adapters.router)
        return app

    def client_of(self, tenant: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=tenant, max_retries=0)

    def act(self, action: Callable[[], Any]) -> None:
        done = asyncio.run_coroutine_threadsafe(self._act(action), self.loop)
        done.result(30)

    async def _act(self, action: Callable[[], Any]) -> None:
        for _ in range(500):  # a job is said to run a moment before the engine is asked
            if self.bench.engine.starts:
                break
            await asyncio.sleep(0.01)
        action()
        await self.bench.settle()

    def upload(self, lines: Any = None) -> str:
        return asyncio.run_coroutine_threadsafe(self.bench.upload(lines), self.loop).result(30)

    def post(self, path: str, body: Any) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(
            f"{self.url}{path}", content=data, headers={"content-type": "application/json", "authorization": "Bearer me"}
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    model = write_tiny_config(tmp_path / "model")
    found = Site(build_tiny_tokenizer(model), tmp_path / "data")
    yield found
    found.close()


def wait_for(client: openai.OpenAI, job: str, status: str) -> Any:
    limit = time.monotonic() + 20
    while (found := client.fine_tuning.jobs.retrieve(job)).status != status:
        assert time.monotonic() < limit, found
        time.sleep(0.01)
    return found


def test_openais_client_drives_a_job(site: Site) -> None:
    client, engine = site.client, site.bench.engine
    job = client.fine_tuning.jobs.create(
        model="some/Base-1", training_file=site.upload(), suffix="x", metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"rank": 4, "priority": -1, "deadline": 2_000_000_000},
    )
    assert job.object == "fine_tuning.job" and job.status == "validating_files"
    assert job.hyperparameters.batch_size == "auto"
    running = wait_for(client, job.id, "running")
    assert (running.hyperparameters.n_epochs, running.hyperparameters.batch_size) == (2, 2)
    assert running.method is not None and running.method.supervised is not None
    assert running.model_extra["deadline"] == 2_000_000_000
    for step in (1, 2, 3):
        site.act(lambda: engine.step(job.id, step, 32))  # noqa: B023
    assert client.fine_tuning.jobs.retrieve(job.id).estimated_finish
    assert client.fine_tuning.jobs.pause(job.id).model_extra["paused"] is True
    assert client.fine_tuning.jobs.resume(job.id).model_extra["paused"] is False
    site.act(lambda: engine.checkpoint(job.id, 3))
    site.act(lambda: engine.end(job.id, step=32))
    done = wait_for(client, job.id, "succeeded")
    assert done.fine_tuned_model == f"ft:Base-1:coserve:x:{job.id[-8:]}"
    assert done.trained_tokens == 3200 and done.error is None and len(done.result_files) == 1
    paged = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert len(paged) == len(set(paged)) > 9 and paged[0] == "The job has successfully completed"
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 3 and checkpoint.metrics.train_loss == pytest.approx(4 / 3)
    assert [found.id for found in client.fine_tuning.jobs.list()] == [job.id]
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
    assert not list(client.fine_tuning.jobs.list(metadata={"team": "b"}))
    other = site.client_of("them")
    assert not list(other.fine_tuning.jobs.list())
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.jobs.retrieve(job.id)
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)

    url = f"{site.url}/adapters/{done.fine_tuned_model}/download"
    archive = zipfile.ZipFile(io.BytesIO(httpx.get(url, headers={"authorization": "Bearer me"}).content))
    assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert httpx.get(url, headers={"authorization": "Bearer them"}).status_code == 404
    assert httpx.get(f"{site.url}/adapters/some/Base-1/download", headers={"authorization": "Bearer me"}).status_code == 403
    with pytest.raises(openai.NotFoundError):
        other.models.delete(done.fine_tuned_model)
    assert client.models.delete(done.fine_tuned_model).deleted
    assert httpx.get(url, headers={"authorization": "Bearer me"}).status_code == 404


def test_a_stream_of_events(site: Site) -> None:
    job = site.client.fine_tuning.jobs.create(model="some/Base-1", training_file=site.upload())
    wait_for(site.client, job.id, "running")
    lines: list[str] = []
    url = f"{site.url}/fine_tuning/jobs/{job.id}/events?stream=true"
    with httpx.stream("GET", url, headers={"authorization": "Bearer me"}, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
            if "Fine-tuning job started" in line:
                site.act(lambda: site.bench.engine.step(job.id, 1))
                site.act(lambda: site.bench.engine.end(job.id))
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert events[0]["message"] == f"Created fine-tuning job: {job.id}"
    assert [event["data"]["step"] for event in events if event["type"] == "metrics"] == [1]
    assert events[-1]["message"] == "The job has successfully completed"
    assert {event["object"] for event in events} == {"fine_tuning.job.event"}


@pytest.mark.parametrize(("body", "param"), [
    (b"{", None), (b"[]", "body"), (b"\xff", None), (b"{}", "model"), ({"model": "some/Base-1"}, "training_file"),
    ({"model": "some/Base-1", "training_file": "file-x"}, "training_file"),
    ({"model": "some/Base-1", "training_file": "file-\x00"}, "training_file"),
    (b'{"model": "\\ud800", "training_file": "a"}', "model"), (b'{"a\\ud800": 1}', None),
    ({"model": "some/Base-1", "training_file": "f", "n_epochs": 3}, "n_epochs"),
    (b'{"model": "some/Base-1", "training_file": "f", "learning_rate": NaN}', "learning_rate"),
    (b'{"model": "some/Base-1", "training_file": "f", "seed": 1' + b"0" * 400 + b"}", "seed"),
    (b"[" * 5000, None),
])
def test_malformed_bodies(site: Site, body: Any, param: str | None) -> None:
    reply = site.post("/fine_tuning/jobs", body)
    assert reply.status_code == 400, reply.text
    if param is not None:
        assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("path", [
    "/fine_tuning/jobs/nothing", "/fine_tuning/jobs/ftjob-%00", "/fine_tuning/jobs/%ff/events",
    "/fine_tuning/jobs/" + "a" * 3000, "/fine_tuning/jobs/ftjob-000000000000000000000000/events?stream=true",
    "/fine_tuning/jobs/..%2f..%2f/checkpoints", "/adapters/..%2f..%2fetc/download",
])
def test_unknown_things_are_not_found(site: Site, path: str) -> None:
    reply = httpx.get(f"{site.url}{path}", headers={"authorization": "Bearer me"})
    assert reply.status_code == 404, reply.text


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "after=%00", "after=nothing", "metadata=a"])
def test_wrong_queries(site: Site, query: str) -> None:
    reply = httpx.get(f"{site.url}/fine_tuning/jobs?{query}", headers={"authorization": "Bearer me"})
    assert reply.status_code == 400, reply.text


def test_adapters_at_run_time(site: Site) -> None:
    write_tiny_adapter(site.root / "a")
    body = {"lora_name": "x", "lora_path": "a"}
    reply = site.post("/load_lora_adapter", body)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'x' added successfully")
    assert site.post("/load_lora_adapter", body).status_code == 400
    assert site.post("/load_lora_adapter", {**body, "load_inplace": True}).status_code == 200
    assert site.post("/load_lora_adapter", {**body, "lora_path": "/etc"}).status_code == 403
    assert site.post("/load_lora_adapter", {**body, "lora_rank": 3}).status_code == 400
    assert site.post("/load_lora_adapter", {**body, "lora_name": "\ud800"}).status_code == 400
    assert site.post("/unload_lora_adapter", {"lora_name": "x"}).text == "Success: LoRA adapter 'x' removed successfully"
    assert site.post("/unload_lora_adapter", {"lora_name": "x"}).status_code == 404
