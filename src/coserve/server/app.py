"""The application: its routes, and the start and end of the services behind them.

Owns: the order in which services start and stop, the lock of the data directory. Does not own: what services do, the listening
socket (listen.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import NamedTuple

from fastapi import FastAPI
from sqlalchemy import URL
from starlette.middleware.cors import CORSMiddleware

from coserve.grammar.check import GrammarChecker
from coserve.grammar.table import read_token_table
from coserve.server.handlers import ERROR_RESPONSES, install_handlers
from coserve.server.hostnames import OwnNames
from coserve.server.index.files import FileService
from coserve.server.index.place import check_data_directory
from coserve.server.index.store import Store
from coserve.server.inference.templates import RequestTemplates
from coserve.server.inference.toolcalling import call_format, check_call_format
from coserve.server.jobs.service import JobService
from coserve.server.link.engineclient import EngineClient
from coserve.server.locks import hold, make_private
from coserve.server.middleware import BodyLimits, LastResort
from coserve.server.models import ModelRegistry
from coserve.server.origins import OriginGuard
from coserve.server.routes import adapters, files, finetuning, inference, page, responses, status, tokens
from coserve.server.selfwatch import SelfWatch
from coserve.server.services import Services, TenantShares
from coserve.server.settings import ServerConfig
from coserve.server.stats.metrics import ServerMetrics
from coserve.server.tenants import KEYS_VARIABLE, Tenants, read_keys
from coserve.server.work import WorkPool
from coserve.text.tokenizer import ChatTokenizer

LOCK_FILE, INDEX_FILE = "server.lock", "coserve.db"
_ROUTES = (inference, responses, tokens, files, finetuning, adapters, status, page)
_log = logging.getLogger(__name__)


def index_url(config: ServerConfig) -> str | URL:
    """SQLAlchemy's URL of the index."""
    return config.database_url or URL.create("sqlite", database=str((config.data_dir / INDEX_FILE).absolute()))


@asynccontextmanager
async def open_services(config: ServerConfig, report: Callable[[str], None]) -> AsyncIterator[Services]:
    """Starts all services and the engine's process, and stops them in the reverse order.

    Raises ConfigError for a data directory that can't be used, and what keeps the engine from starting.

    report: takes a line about the start.
    """
    config = replace(config, data_dir=config.data_dir.absolute())  # the index names directories in it
    make_private(config.data_dir)
    async with AsyncExitStack() as stack:
        stack.enter_context(hold(config.data_dir / LOCK_FILE))
        store = Store(index_url(config))
        stack.callback(store.close)
        if config.database_url is not None:
            check_data_directory(store, config.data_dir)
        tenants = Tenants(store, [*config.api_key, *read_keys(os.environ.get(KEYS_VARIABLE, ""))])
        uploads = FileService(
            config.data_dir / "files", store, config.max_file_bytes, config.max_tenant_file_bytes, config.max_tenant_files
        )
        engine = EngineClient(config, report=report)
        stack.push_async_callback(engine.supervisor.stop)
        await asyncio.gather(engine.supervisor.start(), asyncio.to_thread(uploads.rebuild))
        tokenizer = await load_tokenizer(config, Path(engine.info.directory))
        models = await asyncio.to_thread(ModelRegistry, store, engine, config, tokenizer)
        metrics = ServerMetrics(config, models.base_names[0], lambda: engine.info.objectives)
        engine.on_job(metrics.on_job)
        jobs = JobService(store=store, files=uploads, models=models, engine=engine, config=config)
        uploads.held_bytes = models.held_bytes = jobs.disk.bytes_of
        stack.push_async_callback(jobs.stop)
        helpers = await open_helpers(stack, config, tokenizer, engine.info.vocab_size)
        await jobs.start()
        watch = SelfWatch(asyncio.get_running_loop(), lambda: jobs.journal.busy_s, config.watchdog_timeout)
        stack.enter_context(watch)
        yield Services(
            config=config, engine=engine, tokenizer=tokenizer, store=store, tenants=tenants, files=uploads, jobs=jobs,
            models=models, metrics=metrics, draw_seed=partial(Random(config.seed).getrandbits, 32), work=helpers.work,
            shares=TenantShares(config), templates=helpers.templates, watch=watch, grammars=helpers.grammars,
        )


async def load_tokenizer(config: ServerConfig, directory: Path) -> ChatTokenizer:
    """The tokenizer of the model in a directory, with the settings' chat template and way of writing calls."""
    named = call_format(config.tool_call_parser)
    tokenizer = await asyncio.to_thread(ChatTokenizer.load, directory, named)
    tokenizer = tokenizer.or_template(config.chat_template)
    check_call_format(config.tool_call_parser, tokenizer)
    if not config.allow_control_tokens:
        await asyncio.to_thread(tokenizer.prepare_control_texts)
    return tokenizer


class Helpers(NamedTuple):
    """Threads and processes that work for requests beside the event loop; see Services."""

    work: WorkPool
    templates: RequestTemplates | None
    grammars: GrammarChecker


async def open_helpers(stack: AsyncExitStack, config: ServerConfig, tokenizer: ChatTokenizer, vocab_size: int) -> Helpers:
    """Starts them. stack: ends them."""
    templates = RequestTemplates(tokenizer) if config.trust_request_chat_template else None
    if templates is not None:
        stack.callback(templates.close)
    work = WorkPool()
    stack.callback(work.close)
    grammars = GrammarChecker()
    stack.callback(grammars.close)
    await asyncio.to_thread(grammars.prepare, lambda: read_token_table(tokenizer, vocab_size))
    return Helpers(work, templates, grammars)


def create_app(config: ServerConfig) -> FastAPI:
    """The application. Before its first request the services of `open_services` must be at `app.state.services`."""
    app = FastAPI(
        title="coserve", version=version("coserve"), redirect_slashes=False,
        docs_url=None, redoc_url=None,  # their pages load scripts from other hosts
        responses=ERROR_RESPONSES,
    )

    async def asks_for_keys() -> bool:
        services: Services = app.state.services
        return await services.tenants.asks_for_keys()

    app.add_middleware(BodyLimits, max_bytes=config.max_body_bytes)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=[origin.lower() for origin in config.allowed_origins], allow_methods=["*"],
            allow_headers=["*"], expose_headers=["*"], allow_private_network=True,
        )
    app.add_middleware(
        OriginGuard, names=OwnNames(config.host, config.allowed_hosts), origins=config.allowed_origins,
        asks_for_keys=asks_for_keys,
    )
    app.add_middleware(LastResort, log_requests=config.enable_log_requests)
    install_handlers(app)
    for module in _ROUTES:
        app.include_router(module.router)
    return app
