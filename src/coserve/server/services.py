"""The objects that routes work with. They are made once, when the server starts (app.py), and passed to routes explicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from coserve.grammar.check import GrammarChecker
from coserve.server.index.files import FileService
from coserve.server.index.store import Store
from coserve.server.inference.templates import RequestTemplates
from coserve.server.jobs.service import JobService
from coserve.server.link.engineclient import EngineClient
from coserve.server.logs import note_tenant
from coserve.server.models import ModelRegistry
from coserve.server.places import Places
from coserve.server.replicas.desk import JobDesk
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.models import ReplicaModels
from coserve.server.replicas.pool import EnginePool
from coserve.server.selfwatch import SelfWatch
from coserve.server.settings import ServerConfig
from coserve.server.stats.metrics import ServerMetrics
from coserve.server.tenants import Tenants
from coserve.server.work import Allowance, WorkPool
from coserve.text.tokenizer import ChatTokenizer


class TenantShares:
    """What each tenant may hold at once.

    places: outputs in the engine's queue. body_bytes: bytes of JSON bodies that are being read.
    uploads: uploads that run. streams: open streams of jobs' events.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.places = Places(config.max_num_queued_reqs + config.most_running, config.max_tenant_queued_reqs)
        self.body_bytes = Allowance(config.max_tenant_body_bytes, "too many large requests of yours at once; try again later")
        self.uploads = Allowance(
            config.max_tenant_uploads, f"{config.max_tenant_uploads} of your uploads run already; try again when one has ended"
        )
        self.streams = Allowance(
            config.max_tenant_streams, f"{config.max_tenant_streams} of your streams of events are open already; close some"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one server.

    tokenizer: the base model's.
    draw_seed: gives a seed below 2^32 for a request that has none.
    work: threads for work that would hold up the event loop.
    templates: chat templates of requests; None: requests may bring none.
    grammars: tries the grammars that answers are asked to match.
    watch: the watch over this process; None in tests without a server.
    """

    config: ServerConfig
    engine: EngineClient | EnginePool
    tokenizer: ChatTokenizer
    store: Store
    tenants: Tenants
    files: FileService | StoredFiles
    jobs: JobService | JobDesk
    models: ModelRegistry | ReplicaModels
    metrics: ServerMetrics
    draw_seed: Callable[[], int]
    work: WorkPool = field(default_factory=WorkPool)
    grammars: GrammarChecker = field(default_factory=GrammarChecker)
    shares: TenantShares = field(default_factory=lambda: TenantShares(ServerConfig()))
    templates: RequestTemplates | None = None
    watch: SelfWatch | None = None


async def get_services(request: Request) -> Services:
    """The parts of the server that answers the request."""
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(get_services)]


_bearer = HTTPBearer(
    scheme_name="key", auto_error=False,
    description="An API key, as `Authorization: Bearer KEY`. None is asked for until one was made.",
)
"""Only describes the header in the OpenAPI document. Tenants.identify checks keys, and refuses requests without one."""


async def get_tenant(
    request: Request, services: Served, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """The tenant who sends the request. For each key the index is read at most once a second. Raises Unauthorized."""
    tenant = await run_in_threadpool(services.tenants.identify, request.headers.get("authorization"))
    note_tenant(tenant)
    return tenant


Tenant = Annotated[str, Depends(get_tenant)]


async def named_model(services: Services, tenant: str, name: str | None) -> str:
    """The name of the model that a request asks for; None: the base's first name. Raises NotFound."""
    names = services.models.base_names
    if name is not None and name not in names:
        await services.models.resolve(tenant, name)
    return name or names[0]
