"""What routes work with, made once when the server starts (app.py) and passed to them explicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from coserve.server.index.files import FileService
from coserve.server.index.store import Store
from coserve.server.index.tenants import Tenants
from coserve.server.jobs.service import JobService
from coserve.server.link.engineclient import EngineClient
from coserve.server.models import ModelDirectory
from coserve.server.settings import ServerConfig
from coserve.server.stats.metrics import ServerMetrics
from coserve.server.work import Allowance, WorkPool
from coserve.tokenizer import ChatTokenizer

MAX_BODY_BYTES = 256 << 20
"""Of one tenant's bodies that are being read; small ones don't count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """tokenizer: the base model's, in this process. draw_seed: for a request that gives none, below 2^32. work: for what takes
    long; bodies: bytes of large bodies that a tenant may have read at once."""

    config: ServerConfig
    engine: EngineClient
    tokenizer: ChatTokenizer
    store: Store
    tenants: Tenants
    files: FileService
    jobs: JobService
    models: ModelDirectory
    metrics: ServerMetrics
    draw_seed: Callable[[], int]
    work: WorkPool = field(default_factory=WorkPool)
    bodies: Allowance = field(default_factory=lambda: Allowance(
        MAX_BODY_BYTES, f"the bodies of your requests that are being read have {MAX_BODY_BYTES} bytes already; try again later"
    ))


async def get_services(request: Request) -> Services:
    """The server's, from the application."""
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(get_services)]


_bearer = HTTPBearer(
    scheme_name="key", auto_error=False,
    description="An API key, as `Authorization: Bearer KEY`. None is asked for until one was made.",
)
"""For the OpenAPI document alone: who a key is, and what is said without one, is Tenants' to tell."""


async def get_tenant(
    request: Request, services: Served, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """Who asks; the index is read at most once a second for it. Raises Unauthorized."""
    return await run_in_threadpool(services.tenants.identify, request.headers.get("authorization"))


Tenant = Annotated[str, Depends(get_tenant)]
