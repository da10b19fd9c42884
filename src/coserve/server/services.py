"""What routes work with, made once when the server starts (app.py) and passed to them explicitly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from coserve.server.engineclient import EngineClient
from coserve.server.files import FileService
from coserve.server.jobs import JobService
from coserve.server.metrics import ServerMetrics
from coserve.server.models import ModelDirectory
from coserve.server.settings import ServerConfig
from coserve.server.store import Store
from coserve.server.tenants import Tenants
from coserve.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """tokenizer: the base model's, in this process."""

    config: ServerConfig
    engine: EngineClient
    tokenizer: ChatTokenizer
    store: Store
    tenants: Tenants
    files: FileService
    jobs: JobService
    models: ModelDirectory
    metrics: ServerMetrics


def get_services(request: Request) -> Services:
    """The server's, from the application."""
    services: Services = request.app.state.services
    return services


def get_tenant(request: Request) -> str:
    """Who asks. Raises Unauthorized."""
    return get_services(request).tenants.identify(request.headers.get("authorization"))


Served = Annotated[Services, Depends(get_services)]
Tenant = Annotated[str, Depends(get_tenant)]
