"""A replica's end of the link: it carries out what ingresses ask on its own engine, and tells them how it is.

Owns: which ingress a request is of, what becomes of requests whose ingress has gone. Does not own: the socket (wire.py), the
engine's process (link/), jobs (jobs.py), adapters' files (adaptercache.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import msgspec

from coserve.cluster.load import Load
from coserve.core import CoserveError
from coserve.server.errors import EngineUnavailable, error_name
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.messages import (
    AdapterRef,
    Cancel,
    ChargeTenants,
    Failed,
    Generate,
    GetStats,
    Message,
    Problem,
    Replied,
    Tokens,
)
from coserve.server.link.streams import RequestStream
from coserve.server.replicas.messages import (
    BEAT_EVERY_S,
    GREET_LIMIT_S,
    Beat,
    Greeting,
    Nudge,
    Serve,
    Steps,
    decode_to_replica,
    encode,
    shift_generate,
    shift_tokens,
)

_FETCHED_S = 0.005
"""An adapter that was ready sooner did not have to be fetched."""
_WEIGHT = 0.3
"""Of the newest fetch in the mean of their seconds."""
_log = logging.getLogger(__name__)
Send = Callable[[bytes, bytes], None]
"""Sends bytes to a peer."""


def make_problem(error: CoserveError) -> Problem:
    """An error as it travels."""
    return Problem(name=error_name(error), message=str(error), param=error.param)


class RelayedStream(RequestStream):
    """A request of an ingress: its chunks and its error are passed on as they come, and nobody reads them here."""

    def __init__(
        self, request: str, num_outputs: int, cancel: Callable[[RequestStream], None], forward: Callable[[Message], None]
    ) -> None:
        super().__init__(request, num_outputs, cancel)
        self._forward = forward

    def push(self, chunk: Tokens) -> None:
        if chunk.finish_reason is not None:
            self._unended.discard(chunk.index)
        self._forward(shift_tokens(chunk, time.monotonic()))

    def fail(self, error: CoserveError) -> None:
        self._error = error
        self._forward(Failed(id=self.id, problem=make_problem(error)))


class _Prefixes(NamedTuple):
    """Hashes of the blocks in the engine's prefix cache, as last reported. number: rises with each report of them."""

    number: int
    hashes: list[int]


@dataclass(slots=True)
class _Watcher:
    """An ingress. heard_s: when it last said that it lives. prefixes: the number of the prefixes that it has."""

    heard_s: float = 0.0
    prefixes: int = 0


class ReplicaLink:
    """Answers ingresses. Everything runs on one event loop.

    draining: set when the replica is to end; ingresses then send no new requests. headroom: the share of the engine's time that
    training could have, as last reported.
    """

    def __init__(
        self, engine: EngineClient, *, ensure: Callable[[AdapterRef], Awaitable[None]], nudge: Callable[[str], None],
        send: Send, forget: Callable[[bytes], None], on_steps: Callable[[Steps], None] = lambda message: None,
    ) -> None:
        """ensure: the engine holds an adapter afterwards. nudge: a job's row has changed. send, forget: a ServerSocket's.
        on_steps: takes what other replicas say of jobs that are shared with them."""
        self._on_steps = on_steps
        self._engine, self._ensure, self._nudge, self._send, self._forget = engine, ensure, nudge, send, forget
        self.draining = False
        self._watchers: dict[bytes, _Watcher] = {}
        self._prefixes = _Prefixes(0, [])
        self._streams: dict[tuple[bytes, str], RequestStream | None] = {}  # None: its adapter is being loaded
        self._tasks: set[asyncio.Task[None]] = set()
        self._load: Load | None = None
        self.headroom = 1.0
        self._adapter_s = 0.0

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def on_load(self, load: Load) -> None:
        """The engine's newest report, which travels with the next beat."""
        if load.prefixes is not None:
            self._prefixes = _Prefixes(self._prefixes.number + 1, load.prefixes)
        loads_s = max(load.adapter_load_s, self._adapter_s)  # the engine doesn't know how long fetching takes
        self._load = msgspec.structs.replace(load, prefixes=None, adapter_load_s=loads_s)
        self.headroom = load.headroom

    def on_message(self, peer: bytes, data: bytes) -> None:
        """Carries out an ingress's message. One that can't be read is logged and left alone: its sender may be newer."""
        try:
            message = decode_to_replica(data)
        except msgspec.DecodeError as error:
            _log.warning("a message of an ingress can't be read: %s", error)
            return
        match message:
            case Greeting():
                self._watchers.setdefault(peer, _Watcher()).heard_s = time.monotonic()
            case Serve():
                self._streams[peer, message.generate.id] = None  # at once: a Cancel may be right behind
                self._begin(self._serve(peer, message))
            case Cancel(id=id):
                self._cancel(peer, id)
            case Nudge(job=job):
                self._nudge(job)
            case GetStats(call=call):
                self._begin(self._tell_stats(peer, call))
            case Steps():
                self._on_steps(message)
            case ChargeTenants(tokens=tokens):
                with contextlib.suppress(EngineUnavailable):  # an engine that starts knows of nobody's turns
                    self._engine.charge_tenants(tokens)

    async def beat(self) -> None:
        """Tells all watchers how this replica is, until it is cancelled."""
        while True:
            self.tell()
            self._drop_gone()
            await asyncio.sleep(BEAT_EVERY_S)

    def tell(self) -> None:
        """One beat. The engine's prefixes are many, and go only to those who have not got the present ones."""
        supervisor = self._engine.supervisor
        load, self._load = self._load, None
        beat = Beat(
            ready=self._engine.ready, draining=self.draining, load=load, restarts=supervisor.num_restarts,
            trouble="" if self._engine.ready else supervisor.trouble or "",
        )
        data, full = encode(beat), b""
        for peer, watcher in self._watchers.items():
            if load is None or watcher.prefixes == self._prefixes.number:
                self._send(peer, data)
                continue
            watcher.prefixes = self._prefixes.number
            full = full or encode(msgspec.structs.replace(
                beat, load=msgspec.structs.replace(load, prefixes=self._prefixes.hashes)
            ))
            self._send(peer, full)

    async def close(self) -> None:
        """Ends what is under way here."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: bytes, message: Serve) -> None:
        arrived = shift_generate(message.generate, time.monotonic())
        key = (peer, arrived.id)
        try:
            if message.adapter is not None:
                await self._fetch(message.adapter)
            if key in self._streams:  # else it was cancelled meanwhile
                self._open(key, arrived)
        except CoserveError as error:
            if self._streams.pop(key, key) is not key:
                self._tell(peer, Failed(id=arrived.id, problem=make_problem(error)))
        except Exception as error:  # a fault of ours ends this request, and no others
            _log.exception("a request can't be served")
            self._streams.pop(key, None)
            self._tell(peer, Failed(id=arrived.id, problem=make_problem(CoserveError(f"{type(error).__name__}: {error}"))))

    async def _fetch(self, adapter: AdapterRef) -> None:
        began = time.monotonic()
        await self._ensure(adapter)
        seconds = time.monotonic() - began
        if seconds > _FETCHED_S:  # else it was there
            self._adapter_s += (seconds - self._adapter_s) * (_WEIGHT if self._adapter_s else 1.0)

    def _open(self, key: tuple[bytes, str], message: Generate) -> None:
        if self.draining:
            raise EngineUnavailable("this replica is ending")
        self._streams[key] = self._engine.relay(message, partial(RelayedStream, forward=partial(self._pass_on, key)))

    def _pass_on(self, key: tuple[bytes, str], message: Message) -> None:
        self._tell(key[0], message)
        stream = self._streams.get(key)
        if stream is not None and stream.ended:
            del self._streams[key]

    def _tell(self, peer: bytes, message: Message) -> None:
        self._send(peer, encode(message))

    def _cancel(self, peer: bytes, id: str) -> None:
        stream = self._streams.pop((peer, id), None)
        if stream is not None:
            self._begin(stream.aclose())

    async def _tell_stats(self, peer: bytes, call: int) -> None:
        try:
            reply = Replied(call=call, value=await self._engine.stats())
        except CoserveError as error:
            reply = Replied(call=call, problem=make_problem(error))
        self._tell(peer, reply)

    def _drop_gone(self) -> None:
        """Cancels the requests of ingresses that have been silent for too long."""
        limit = time.monotonic() - GREET_LIMIT_S
        for peer in [peer for peer, watcher in self._watchers.items() if watcher.heard_s < limit]:
            del self._watchers[peer]
            for key in [key for key in self._streams if key[0] == peer]:
                self._cancel(*key)
            self._forget(peer)
