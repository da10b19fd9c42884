"""One replica: an engine process, the link to ingresses, and the jobs that this replica has claimed.

Owns: the order in which these parts start, drain and stop; the replica's row among the members. Does not own: the parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import zmq.asyncio

from coserve.core import ConfigError, CoserveError
from coserve.server.app import index_url
from coserve.server.index.database import Database, PostgresLimits
from coserve.server.index.store import Store
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.supervisor import Supervisor
from coserve.server.locks import hold, make_private
from coserve.server.records import new_id
from coserve.server.replicas.adaptercache import AdapterCache
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.helping import JobHelp, ShareFiles
from coserve.server.replicas.jobs import ReplicaJobs
from coserve.server.replicas.members import KnownKeys, Member, Members, OwnRow, describe_engine
from coserve.server.replicas.messages import BEAT_EVERY_S
from coserve.server.replicas.processhost import SERVES
from coserve.server.replicas.replicalink import ReplicaLink
from coserve.server.replicas.replicawire import ReplicaWire
from coserve.server.replicas.steplink import StepLinks
from coserve.server.replicas.storeplace import open_own_store
from coserve.server.replicas.wire import Door, KeyPair, ServerSocket
from coserve.server.settings import ServerConfig

_LOCK_FILE = "replica.lock"
_FRESH_S = 60.0
_LOOK_EVERY_S = 0.1


@contextlib.contextmanager
def scratch_directory(root: Path, id: str) -> Iterator[Path]:
    """A private directory for one process, ROOT/replicas/ID, that is deleted at its end. Those that killed processes have left
    are deleted first: nobody holds their locks."""
    make_private(root)
    place = root / "replicas"
    place.mkdir(exist_ok=True)
    for left in list(place.iterdir()):
        with contextlib.suppress(ConfigError, OSError):
            if time.time() - left.stat().st_mtime > _FRESH_S:  # a younger one may be about to be locked
                with hold(left / _LOCK_FILE):
                    shutil.rmtree(left, ignore_errors=True)
    directory = place / id
    directory.mkdir()
    try:
        with hold(directory / _LOCK_FILE):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def before(stop: asyncio.Event, work: Awaitable[None]) -> None:
    """Waits for `work`. Raises CancelledError if `stop` is set first; the work is cancelled then."""
    starting, ended = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([starting, ended], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            raise asyncio.CancelledError("it was ended before it was ready")
        starting.result()
    finally:
        starting.cancel()
        ended.cancel()
        await asyncio.gather(starting, ended, return_exceptions=True)


async def _drain(link: ReplicaLink, help: JobHelp, jobs: ReplicaJobs, engine: EngineClient, seconds: float) -> None:
    """Takes no new requests, hands all jobs over, and gives running requests so many seconds."""
    link.draining = True
    link.tell()
    help.drain()
    await jobs.drain()
    limit = time.monotonic() + seconds
    while link.num_requests and time.monotonic() < limit:
        await asyncio.sleep(_LOOK_EVERY_S)
    engine.fail_requests("this replica is ending")
    await asyncio.sleep(_LOOK_EVERY_S)  # for the last messages to leave


async def _end_with_engine(supervisor: Supervisor) -> None:
    """Raises CoserveError once the engine isn't started any more. Whoever has started this process starts another one, perhaps
    elsewhere; a replica without an engine would be in the way."""
    raise CoserveError(await supervisor.wait_given_up())


async def run_replica(
    config: ServerConfig, *, stop: asyncio.Event, report: Callable[[str], None], host: str = "127.0.0.1", node: str = "",
) -> None:
    """Runs a replica until `stop` is set; then it drains. Raises what keeps it from starting, CancelledError if `stop` is set
    before it has started, CoserveError when its engine isn't started any more.

    report: takes a line about the start. host: this machine's address for the others. node: what this machine is called.
    """
    id = new_id("replica")
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(config.data_dir.absolute(), id))
        own = dataclasses.replace(config, data_dir=scratch, lora_modules=())
        database = Database(index_url(config), PostgresLimits())
        stack.callback(database.close)
        members, store = Members(database), Store(database)
        artifacts = await asyncio.to_thread(open_own_store, config, store)
        engine = EngineClient(own, report=report)
        stack.push_async_callback(engine.supervisor.stop)
        await before(stop, engine.supervisor.start())
        cache = AdapterCache(engine, artifacts)
        stack.push_async_callback(cache.close)
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        keys, known = KeyPair.make(), KnownKeys(members)
        wire = ReplicaWire(context, id, keys)
        stack.callback(wire.close)
        links = StepLinks(engine.tell_step, wire)
        stack.push_async_callback(links.stop)
        files = StoredFiles(artifacts, scratch / "shared", store, own.max_file_bytes, own.max_tenant_file_bytes)
        help = JobHelp(
            id, engine, links, scratch / "help", others=lambda: wire.others, bring=ShareFiles(store, files, artifacts),
            headroom=lambda: link.headroom,
        )
        stack.push_async_callback(help.stop)
        jobs = ReplicaJobs(
            index=store, artifacts=artifacts, engine=engine, config=own, replica=id, scratch=scratch / "jobs",
            headroom=lambda: link.headroom, help=help,
        )
        door = Door(context, known.ask)
        door.start()
        stack.callback(door.stop)
        socket = ServerSocket(context, host, keys, lambda peer, data: link.on_message(peer, data))
        stack.callback(socket.close)
        link = ReplicaLink(
            engine, ensure=cache.ensure, nudge=jobs.nudge, send=socket.send_to, on_steps=wire.on_steps
        )
        stack.push_async_callback(link.close)
        engine.on_load(link.on_load)
        engine.watch_load(BEAT_EVERY_S)

        def see(found: Sequence[Member]) -> None:
            for gone in wire.see([member for member in found if member.kind == "engine"]):
                links.replica_lost(gone)

        def row() -> Member:
            return Member(
                id=id, kind="engine", address=socket.address, public_key=keys.public.decode("ascii"), node=node or host,
                info=describe_engine(engine.info),
            )

        own_row = OwnRow(members, row)
        await own_row.join()
        stack.push_async_callback(own_row.leave)
        links.start()
        await jobs.start()
        stack.push_async_callback(jobs.stop)
        works = (socket.read(), link.beat(), own_row.keep(see), _end_with_engine(engine.supervisor))
        tasks = [asyncio.create_task(work) for work in works]
        report(f"replica {id}{SERVES}{socket.address}")
        ended = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if ended in done:
                await _drain(link, help, jobs, engine, config.shutdown_timeout)
            for task in done - {ended}:
                task.result()  # raises what has ended it
        finally:
            for task in (ended, *tasks):
                task.cancel()
            await asyncio.gather(ended, *tasks, return_exceptions=True)
