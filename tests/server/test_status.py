"""Probes and scrapes, with an engine that is up, down, dying or silent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from coserve.core import CoserveError, Slo
from coserve.server.errors import EngineUnavailable, Unauthorized, error_body, status_of
from coserve.server.routes import status
from coserve.server.settings import ServerConfig
from coserve.server.stats.metrics import ServerMetrics


class FakeEngine:
    """Answers, fails or hangs. It stands for its supervisor too."""

    def __init__(self) -> None:
        self.ready, self.num_restarts, self.mood, self.failure = True, 3, "well", None
        self.supervisor = self
        self.watch = SimpleNamespace(problem=None)

    @property
    def trouble(self) -> str | None:
        return self.failure

    async def stats(self) -> dict[str, Any]:
        if self.mood == "dying":
            raise EngineUnavailable("the engine has died")
        if self.mood == "silent":
            await asyncio.sleep(60)
        return {"time_s": 1.0, "running": 4}


class FakeTenants:
    def identify(self, authorization: str | None) -> str:
        if authorization != "Bearer right":
            raise Unauthorized("API key: not known")
        return "default"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    app = FastAPI()
    app.include_router(status.router)

    @app.exception_handler(CoserveError)
    async def show(_: Request, error: CoserveError) -> JSONResponse:
        return JSONResponse(error_body(error), status_of(error))

    records = [SimpleNamespace(status="running", paused=False), SimpleNamespace(status="running", paused=True),
               SimpleNamespace(status="queued", paused=False)]
    app.state.services = SimpleNamespace(
        watch=engine.watch,
        engine=engine, store=SimpleNamespace(unfinished_jobs=lambda: records), tenants=FakeTenants(),
        metrics=ServerMetrics(ServerConfig(), "tiny", lambda: Slo(tpot_s=0.1, ttft_s=3.0)),
    )
    return TestClient(app)


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_probes_follow_the_engine(client: TestClient, engine: FakeEngine, path: str) -> None:
    assert client.get(path).status_code == 200
    engine.watch.problem = "the disk doesn't answer"
    assert (client.get(path).status_code, client.get(path).json()["problem"]) == (200, "the disk doesn't answer")
    engine.ready, engine.failure = False, "it hangs"
    assert (client.get(path).status_code, client.get(path).json()["reason"]) == (503, "it hangs")


def test_version(client: TestClient) -> None:
    assert client.get("/version").json()["version"].count(".") >= 2


def test_metrics_need_no_key(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    assert 'coserve_engine_up{engine="0",model_name="tiny"} 1.0' in answer.text
    assert 'coserve_finetune_jobs{engine="0",model_name="tiny",status="paused"} 1.0' in answer.text
    assert 'coserve_engine_restarts_total{engine="0",model_name="tiny"} 3.0' in answer.text
    assert 'coserve_num_requests_running{engine="0",model_name="tiny"} 4.0' in answer.text


@pytest.mark.parametrize("mood", ["down", "dying", "silent"])
def test_metrics_and_the_page_outlive_the_engine(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, mood: str
) -> None:
    monkeypatch.setattr(status, "_STATS_TIMEOUT_S", 0.05)
    engine.mood, engine.ready = mood, mood != "down"
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "coserve_num_requests_running" not in answer.text
    assert 'coserve_engine_up{engine="0",model_name="tiny"} 0.0' in answer.text
    live = client.get("/api/live", headers={"Authorization": "Bearer right"}).json()
    assert live["inference"]["tokens_per_s"] is None


def test_the_page_s_figures_need_a_key(client: TestClient) -> None:
    assert client.get("/api/live").status_code == 401
    answer = client.get("/api/live", headers={"Authorization": "Bearer right"})
    assert answer.json()["engine"]["ready"] is True
    assert answer.headers["cache-control"] == "no-store"
