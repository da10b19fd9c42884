"""/health, /ping, /version, /metrics, and /api/live for the web page.

Owns: what a probe or a scraper is told while the engine is down. Does not own: the figures (stats/metrics.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from coserve.server.errors import EngineUnavailable
from coserve.server.link.engineclient import EngineClient
from coserve.server.replicas.pool import EnginePool
from coserve.server.services import Served, Services, Tenant
from coserve.server.stats.fleetstats import merge_stats
from coserve.server.stats.metrics import FleetState, ServerState

router = APIRouter(tags=["status"])
_STATS_TIMEOUT_S = 5.0
"""An engine that doesn't answer for so long counts as down in what is shown."""


async def _stats(engine: EngineClient) -> dict[str, Any] | None:
    """The engine's; None while it is down."""
    if not engine.ready:
        return None
    try:
        return await asyncio.wait_for(engine.stats(), _STATS_TIMEOUT_S)
    except (EngineUnavailable, TimeoutError):
        return None


async def _state(services: Services) -> ServerState:
    records = await asyncio.to_thread(services.store.unfinished_jobs)
    jobs = Counter("paused" if record.paused else record.status for record in records)
    return ServerState(services.engine.ready, services.engine.supervisor.num_restarts, jobs)


async def _figures(services: Services) -> tuple[dict[str, Any] | None, ServerState]:
    """The engine's stats, and the rest; of a fleet the stats of all its engines together, and of each."""
    state, engine = await _state(services), services.engine
    if not isinstance(engine, EnginePool):
        return await _stats(engine), state
    try:
        engines = await asyncio.wait_for(engine.stats_by_replica(), _STATS_TIMEOUT_S)
    except TimeoutError:
        engines = {}
    signals = {**engine.signals, "job_backlog": float(state.jobs.get("queued", 0))}
    fleet = FleetState(engines, engine.states(), signals)
    return merge_stats(list(engines.values())) if engines else None, state._replace(fleet=fleet)


@router.get("/health", summary="Whether the engine takes requests: 200 or 503")
@router.get("/ping", summary="The same")
@router.post("/ping", summary="The same", include_in_schema=False)
async def health(services: Served) -> JSONResponse:
    """200 or 503."""
    engine = services.engine
    if engine.ready:
        problem = None if services.watch is None else services.watch.problem
        return JSONResponse({"status": "ok", **({"problem": problem} if problem else {})})
    trouble = engine.supervisor.trouble
    return JSONResponse({"status": "engine unavailable", **({"reason": trouble} if trouble else {})}, 503)


@router.get("/version", summary="The server's version")
async def get_version() -> dict[str, str]:
    """Of the package."""
    return {"version": version("coserve")}


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def get_metrics(services: Served) -> Response:
    """In Prometheus' text format; without the engine's figures while it is down."""
    text = services.metrics.expose(*await _figures(services))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/api/live", summary="What the web page shows")
async def get_live(services: Served, tenant: Tenant, response: Response) -> dict[str, Any]:
    """Both workloads, objectives, memory; changes between releases."""
    response.headers["Cache-Control"] = "no-store"
    return services.metrics.live(*await _figures(services))
