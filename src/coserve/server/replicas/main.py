"""One replica: an engine process, the link to ingresses, and the jobs that this replica has claimed.

    python -m coserve.server.replicas.main engine|ingress     reads a FleetSetup from its standard input, whose end ends it

Owns: the order in which a replica's parts start, drain and stop. Does not own: the parts; who starts replicas (raycluster.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import socket as sockets
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq.asyncio

from coserve.core import ConfigError, CoserveError
from coserve.server.app import index_url
from coserve.server.index.database import Database
from coserve.server.index.store import Store
from coserve.server.link.engineclient import EngineClient
from coserve.server.locks import hold, make_private
from coserve.server.records import new_id
from coserve.server.replicas.adaptercache import AdapterCache
from coserve.server.replicas.artifacts import ArtifactStore, open_store
from coserve.server.replicas.jobs import ReplicaJobs
from coserve.server.replicas.members import BEAT_EVERY_S, KnownKeys, Member, Members
from coserve.server.replicas.replicalink import ReplicaLink
from coserve.server.replicas.wire import Door, KeyPair, ServerSocket
from coserve.server.settings import ServerConfig

_LOCK_FILE = "replica.lock"
_IDLE_LOOK_S = 0.1
_log = logging.getLogger(__name__)


class FleetSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of the fleet reads first. host: the address of its machine that the others reach. node: what its machine is
    called."""

    config: ServerConfig
    host: str = "127.0.0.1"
    node: str = ""


def write_setup(setup: FleetSetup) -> bytes:
    """The setup as one line of JSON, with its line break."""
    return msgspec.json.encode(setup, enc_hook=str) + b"\n"  # a Path as text


def read_setup(line: bytes) -> FleetSetup:
    """The setup in a line of `write_setup`. Raises msgspec.ValidationError."""
    return msgspec.json.decode(line, type=FleetSetup, dec_hook=lambda kind, text: kind(text))


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


def describe_engine(info: Ready) -> dict[str, Any]:
    """What an engine says of itself as JSON for its row; `read_engine` reads it."""
    return cast(dict[str, Any], _without_infinity(msgspec.to_builtins(info)))


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value  # JSON has no infinity


def read_engine(info: Mapping[str, Any]) -> Ready:
    """Raises msgspec.ValidationError."""
    return msgspec.convert(info, Ready, strict=False)


class Replica:
    """One replica's parts, once they have started. id: its member's."""

    def __init__(
        self, id: str, engine: EngineClient, members: Members, link: ReplicaLink, jobs: ReplicaJobs, config: ServerConfig
    ) -> None:
        self.id, self.engine, self.members, self.link, self.jobs, self.config = id, engine, members, link, jobs, config

    async def refresh(self, row: Callable[[], Member]) -> None:
        """Keeps this replica's row fresh until it is cancelled. It is added again if it is gone."""
        generation = self.engine.generation
        while True:
            await asyncio.sleep(BEAT_EVERY_S)
            changed = self.engine.generation != generation
            generation = self.engine.generation
            info = describe_engine(self.engine.info) if changed else None
            with contextlib.suppress(CapacityError):  # the database is away: the link goes on
                if not await asyncio.to_thread(self.members.refresh, self.id, info):
                    await asyncio.to_thread(self.members.join, row())

    async def drain(self) -> None:
        """Takes no new requests, hands its jobs over, and gives running requests the time of --shutdown-timeout."""
        self.link.draining = True
        self.link.tell()
        await self.jobs.drain()
        limit = time.monotonic() + self.config.shutdown_timeout
        while self.link.num_requests and time.monotonic() < limit:
            await asyncio.sleep(_LOOK_EVERY_S)
        self.engine.fail_requests("this replica is ending")
        await asyncio.sleep(_LOOK_EVERY_S)  # for the last messages to leave


async def run_replica(
    config: ServerConfig, *, stop: asyncio.Event, report: Callable[[str], None], host: str = "127.0.0.1", node: str = "",
) -> None:
    """Runs a replica until `stop` is set; then it drains. Raises what keeps it from starting.

    report: takes a line about the start. host: this machine's address for the others. node: what this machine is called.
    """
    id = new_id("replica")
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(config.data_dir.absolute(), id))
        own = dataclasses.replace(config, data_dir=scratch, lora_modules=())
        database = Database(index_url(config))
        stack.callback(database.close)
        members = Members(database)
        artifacts = await asyncio.to_thread(open_store, str(config.store), scratch / "cache", cache_bytes=CACHE_BYTES)
        engine = EngineClient(own, report=report)
        stack.push_async_callback(engine.supervisor.stop)
        await engine.supervisor.start()
        cache = AdapterCache(engine, artifacts)
        store = Store(index_url(config))
        stack.callback(store.close)
        jobs = ReplicaJobs(index=store, artifacts=artifacts, engine=engine, config=own, replica=id, scratch=scratch / "jobs")
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        keys, known = KeyPair.make(), KnownKeys(members)
        door = Door(context, partial(asyncio.to_thread, known))
        door.start()
        stack.callback(door.stop)
        socket = ServerSocket(context, host, keys, lambda peer, data: link.on_message(peer, data))
        stack.callback(socket.close)
        link = ReplicaLink(engine, ensure=cache.ensure, nudge=jobs.nudge, send=socket.send, forget=socket.forget)
        stack.push_async_callback(link.close)
        engine.watch_load(link.on_load)
        replica = Replica(id, engine, members, link, jobs, config)

        def row() -> Member:
            return Member(
                id=id, kind="engine", address=socket.address, public_key=keys.public.decode("ascii"), node=node or host,
                info=describe_engine(engine.info),
            )

        await asyncio.to_thread(members.join, row())
        stack.push_async_callback(_leave, members, id)
        await jobs.start()
        stack.push_async_callback(jobs.stop)
        tasks = [asyncio.create_task(work) for work in (socket.read(), link.beat(), replica.refresh(row))]
        report(f"replica {id} serves at {socket.address}")
        ended = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if ended in done:
                await replica.drain()
            for task in done - {ended}:
                task.result()  # raises what has ended it
        finally:
            for task in (ended, *tasks):
                task.cancel()
            await asyncio.gather(ended, *tasks, return_exceptions=True)


async def _leave(members: Members, id: str) -> None:
    with contextlib.suppress(CoserveError):  # the row grows old by itself
        await asyncio.to_thread(members.leave, id)
