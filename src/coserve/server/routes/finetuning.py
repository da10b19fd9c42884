"""/v1/fine_tuning/jobs: create, look at, steer and follow finetuning jobs, in OpenAI's words.

Owns: paths and query parameters. Does not own: everything behind them (jobs/service.py), the body that creates a job
(jobs/body.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from coserve.core import InvalidRequest
from coserve.finetune.datacheck import as_json
from coserve.server.bodies.reader import body_reader
from coserve.server.inference.pieces import PiecesResponse, encode_large
from coserve.server.inference.sse import DONE, EventStream, unless_gone
from coserve.server.inference.whole import CLIENT_LEFT
from coserve.server.jobs.body import CREATE_FORM, CreateJob
from coserve.server.jobs.objects import checkpoint_object, event_object
from coserve.server.records import EventRecord
from coserve.server.routes.paging import After, Limit, cursor_page
from coserve.server.services import Served, Tenant

_METADATA: dict[str, Any] = {"parameters": [{
    "name": "metadata", "in": "query", "required": False, "style": "deepObject", "explode": True,
    "description": "only jobs with these pairs: metadata[KEY]=VALUE",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}]}
router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"])
CreateBody = Annotated[CreateJob, Depends(body_reader(CREATE_FORM))]


@router.post("/jobs", openapi_extra=CREATE_FORM.openapi)
async def create_job(services: Served, tenant: Tenant, body: CreateBody) -> dict[str, Any]:
    """Creates a job; it is checked, queued and run on its own."""
    return services.jobs.describe(await services.jobs.create(tenant, body))


@router.post("/jobs/check", openapi_extra=CREATE_FORM.openapi, response_model=dict[str, Any])
async def check_job_data(request: Request, services: Served, tenant: Tenant, body: CreateBody) -> Response:
    """What the files of such a job hold, and what of it would be trained; no job is created."""
    found = await unless_gone(request.receive, services.jobs.check_data(tenant, body))
    if found is None:
        return Response(status_code=CLIENT_LEFT)
    training, validation = found
    return PiecesResponse(encode_large({
        "object": "fine_tuning.data_check", "training_file": as_json(training),
        "validation_file": None if validation is None else as_json(validation),
    }))


@router.get("/jobs", openapi_extra=_METADATA)
def list_jobs(
    request: Request, services: Served, tenant: Tenant, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """The tenant's jobs, newest first; metadata[KEY]=VALUE: only those with these pairs."""
    wanted = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            wanted[name[len("metadata["):-1]] = value
        elif name == "metadata" and value != "null":
            raise InvalidRequest("metadata: give metadata[KEY]=VALUE", param="metadata")
    records, more = services.jobs.list_jobs(tenant, after=after, limit=limit, metadata=wanted or None)
    return cursor_page([services.jobs.describe(record) for record in records], more)


@router.get("/jobs/{job_id}")
def get_job(job_id: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """A job as it is now."""
    return services.jobs.describe(services.jobs.get(tenant, job_id))


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """Ends a job; its checkpoints stay."""
    return services.jobs.describe(await services.jobs.cancel(tenant, job_id))


@router.post("/jobs/{job_id}/pause")
async def pause_job(job_id: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """Stops a job until it is resumed: `paused` is true, `status` stays."""
    return services.jobs.describe(await services.jobs.pause(tenant, job_id))


@router.post("/jobs/{job_id}/resume")
async def resume_job(job_id: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """Lets a paused job go on."""
    return services.jobs.describe(await services.jobs.resume(tenant, job_id))


@router.get("/jobs/{job_id}/events", response_model=None)
async def list_events(
    job_id: str, services: Served, tenant: Tenant, after: After = None, limit: Limit = 20, stream: bool = False
) -> dict[str, Any] | EventStream:
    """A job's events, newest first. stream: server-sent events instead, oldest first, until the job ends; `after` is then the
    event before the first one sent."""
    if stream:
        events = await services.jobs.follow(tenant, job_id, after)
        services.shares.streams.take(tenant)

        async def close() -> None:
            services.shares.streams.give_back(tenant)

        return EventStream(_encoded(events), close)
    records, more = await run_in_threadpool(services.jobs.list_events, tenant, job_id, after=after, limit=limit)
    return cursor_page([event_object(record) for record in records], more)


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, services: Served, tenant: Tenant, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    """A job's checkpoints, newest first; each is a model that can be asked for."""
    records, more = services.jobs.list_checkpoints(tenant, job_id, after=after, limit=limit)
    return cursor_page([checkpoint_object(record) for record in records], more)


async def _encoded(events: AsyncIterator[EventRecord]) -> AsyncGenerator[bytes, None]:
    async for event in events:
        yield msgspec.json.encode(event_object(event))
    yield DONE
