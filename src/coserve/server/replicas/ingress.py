"""The ingress: the application of a single server, in front of the engines of a fleet.

Owns: the order in which its parts start and stop, the search for replicas. Does not own: the application (app.py), which
replica a request goes to (pool.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from random import Random

from coserve.model.locate import locate_model
from coserve.server.app import create_app, index_url, load_tokenizer, open_helpers
from coserve.server.index.database import Database, PostgresLimits
from coserve.server.index.store import Store
from coserve.server.listen import HttpServer, allow_many_files, bind, keep_loop_free
from coserve.server.records import new_id
from coserve.server.replicas.desk import JobDesk
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.members import Member, Members, OwnRow
from coserve.server.replicas.models import ReplicaModels
from coserve.server.replicas.pool import EnginePool
from coserve.server.replicas.processhost import SERVES
from coserve.server.replicas.replica import before, scratch_directory
from coserve.server.replicas.storeplace import open_own_store
from coserve.server.replicas.wire import KeyPair
from coserve.server.selfwatch import SelfWatch
from coserve.server.services import Services, TenantShares
from coserve.server.settings import ServerConfig
from coserve.server.startup import startup_lines
from coserve.server.stats.metrics import ServerMetrics
from coserve.server.tenants import Tenants


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def open_fleet(
    config: ServerConfig, stop: asyncio.Event, report: Callable[[str], None], *, host: str = "127.0.0.1", node: str = "",
    keys: Mapping[str, str] | None = None,
) -> AsyncIterator[Services]:
    """Starts all services of an ingress, waits for a replica, and stops the services in the reverse order. Raises ConfigError
    for settings that can't be used, CancelledError if `stop` is set before a replica is ready.

    report: takes a line about the start. host, node: as for `run_replica`. keys: {digest: tenant} of API keys beside those of
    the settings and of the index.
    """
    id = new_id("ingress")
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(config.data_dir.absolute(), id))
        database = Database(index_url(config), PostgresLimits())
        stack.callback(database.close)
        store = Store(database)
        artifacts = await asyncio.to_thread(open_own_store, config, store)
        tenants = Tenants(store, config.api_key, digests=keys)
        directory = await asyncio.to_thread(locate_model, config.model, report=report)
        tokenizer = await load_tokenizer(config, directory)
        pair = KeyPair.make()
        own = Member(id=id, kind="ingress", address="", public_key=pair.public.decode("ascii"), node=node or host, info={})
        own_row = OwnRow(Members(database), lambda: own)
        await own_row.join()
        stack.push_async_callback(own_row.leave)
        pool = EnginePool(pair, directory, report=report)
        stack.push_async_callback(pool.stop)
        pool.start()
        looking = asyncio.create_task(own_row.keep(pool.see))
        stack.push_async_callback(_cancel, looking)
        report("waiting for a replica ...")
        await before(stop, pool.wait_ready())
        uploads = StoredFiles(
            artifacts, scratch / "uploads", store, config.max_file_bytes, config.max_tenant_file_bytes, config.max_tenant_files
        )
        models = await asyncio.to_thread(ReplicaModels, store, pool, config, artifacts, scratch, tokenizer)
        stack.push_async_callback(models.close)
        metrics = ServerMetrics(config, models.base_names[0], lambda: pool.info.objectives)
        jobs = JobDesk(
            store=store, files=uploads, models=models, artifacts=artifacts, config=config, engine=pool,
            nudge=pool.nudge,
        )
        uploads.held_bytes = models.held_bytes = jobs.disk.bytes_of
        stack.push_async_callback(jobs.stop)
        helpers = await open_helpers(stack, config, tokenizer, pool.info.vocab_size)
        await jobs.start()
        watch = SelfWatch(asyncio.get_running_loop(), lambda: jobs.journal.busy_s, config.watchdog_timeout)
        stack.enter_context(watch)
        yield Services(
            config=config, engine=pool, tokenizer=tokenizer, store=store, tenants=tenants, files=uploads, jobs=jobs,
            models=models, metrics=metrics, draw_seed=partial(Random(config.seed).getrandbits, 32), work=helpers.work,
            shares=TenantShares(config), templates=helpers.templates, watch=watch, grammars=helpers.grammars,
        )


async def run_ingress(
    config: ServerConfig, *, stop: asyncio.Event, report: Callable[[str], None], host: str = "127.0.0.1", node: str = "",
    keys: Mapping[str, str] | None = None,
) -> None:
    """Serves the address of the settings until `stop` is set. Raises what keeps it from starting. Parameters as those of
    `open_fleet`."""
    allow_many_files()
    app = create_app(config)
    server = HttpServer.of(app, config)
    with bind(config.host, config.port) as listener:
        ended = asyncio.create_task(stop.wait())
        async with open_fleet(config, stop, report, host=host, node=node, keys=keys) as services:
            app.state.services = services
            keep_loop_free()
            server.lines = startup_lines(services, listener.getsockname()[1], [
                f"fleet     {config.replicas or 1} replicas, of which each has such an engine; files in {config.store}",
            ])
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            report(f"the ingress{SERVES}{config.host}:{listener.getsockname()[1]}")
            await asyncio.wait([serving, ended], return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            services.jobs.journal.end_streams()
            loop = asyncio.get_running_loop()
            loop.call_later(config.shutdown_timeout, services.engine.fail_requests, "the server is ending")
            await serving
