"""A replica's end of the link: it carries out what ingresses ask on its own engine, and tells them how it is.

Owns: which ingress a request is of, what becomes of requests whose ingress has gone. Does not own: the socket (wire.py), the
engine's process (link/), jobs (jobs.py), adapters' files (adaptercache.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import msgspec

from coserve.cluster.load import Load
from coserve.core import CapacityError, CoserveError
from coserve.server.errors import EngineUnavailable, StorageRefused, error_name
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
    GREET_LIMIT_S,
    Beat,
    Greeting,
    Nudge,
    Returned,
    Serve,
    Steps,
    decode_to_replica,
    encode,
    shift_generate,
    shift_tokens,
)

_LOOK_EVERY_S = 0.25
"""Between two looks at whether the engine reports, and between two beats while it doesn't."""
_FETCHED_S = 0.005
"""An adapter that was ready sooner did not have to be fetched."""
_WEIGHT = 0.3
"""Of the newest fetch in the mean of their seconds."""
SILENT_S = 3.0
"""An engine that has reported nothing for so long takes no requests, and those that it has go on elsewhere."""
MOVED_FETCH_S = 3.0
"""How long fetching the adapter of a request may take whose client has a part of the answer already and waits."""
_SILENCE = "the engine process says nothing"
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


@dataclass(slots=True)
class _Served:
    """A request. peer: the ingress that it is of. stream: None while its adapter is being loaded."""

    peer: bytes
    stream: RequestStream | None = None


class ReplicaLink:
    """Answers ingresses. Everything runs on one event loop.

    draining: set when the replica is to end; ingresses then send no new requests. headroom: the share of the engine's time that
    training could have, as last reported.
    """

    def __init__(
        self, engine: EngineClient, *, ensure: Callable[[AdapterRef], Awaitable[None]], nudge: Callable[[str], None],
        send: Send, on_steps: Callable[[Steps], None] = lambda message: None,
    ) -> None:
        """ensure: the engine holds an adapter afterwards. nudge: a job's row has changed. send: a ServerSocket's send_to.
        on_steps: takes what other replicas say of jobs that are shared with them."""
        self._on_steps = on_steps
        self._engine, self._ensure, self._nudge, self._send = engine, ensure, nudge, send
        self.draining = False
        self._watchers: dict[bytes, _Watcher] = {}
        self._prefixes = _Prefixes(0, [])
        self._streams: dict[str, _Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._load: Load | None = None
        self.headroom = 1.0
        self._adapter_s = 0.0
        self._quiet_looks = 0

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
        self._quiet_looks = 0
        self.tell()

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
                self._streams[message.generate.id] = _Served(peer)  # at once: a Cancel may be right behind
                self._begin(self._serve(peer, message))
            case Cancel(id=id):
                self._cancel(id)
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
        """Tells all watchers how this replica is, until it is cancelled. While the engine reports, each report is a beat."""
        while True:
            self._quiet_looks = self._quiet_looks + 1 if self._engine.ready else 0
            if self._quiet_looks != 1:  # a report has come since the last look, and was a beat
                self.tell()
            if self._silent:
                self._give_back(list(self._streams), make_problem(EngineUnavailable(_SILENCE)), suspect=True)
            self._drop_gone()
            await asyncio.sleep(_LOOK_EVERY_S)

    @property
    def _silent(self) -> bool:
        """Whether the engine says nothing. Looks are counted, as this process may have been stopped itself."""
        return self._quiet_looks * _LOOK_EVERY_S > SILENT_S

    def tell(self) -> None:
        """One beat. The engine's prefixes are many, and go only to those who have not got the present ones."""
        supervisor = self._engine.supervisor
        load, self._load = self._load, None
        ready = self._engine.ready and not self._silent
        trouble = "" if ready else supervisor.trouble or (_SILENCE if self._silent else "")
        beat = Beat(
            ready=ready, draining=self.draining, load=load, restarts=supervisor.num_restarts, trouble=trouble,
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
        id = arrived.id
        try:
            if message.adapter is not None:
                await self._fetch(message.adapter, MOVED_FETCH_S if arrived.emitted else None)
            if id in self._streams:  # else it was cancelled meanwhile
                self._open(self._streams[id], arrived)
        except (CapacityError, EngineUnavailable) as error:  # another replica may have room, the adapter, or an engine
            self._give_back([id], make_problem(error))
        except CoserveError as error:
            if self._streams.pop(id, None) is not None:
                self._tell(peer, Failed(id=id, problem=make_problem(error)))
        except Exception as error:  # a fault of ours ends this request, and no others
            _log.exception("a request can't be served")
            self._streams.pop(id, None)
            self._tell(peer, Failed(id=id, problem=make_problem(CoserveError(f"{type(error).__name__}: {error}"))))

    async def _fetch(self, adapter: AdapterRef, limit_s: float | None) -> None:
        """Raises what `ensure` raises, and StorageRefused where it takes longer than a limit; then it goes on for others."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                await self._ensure(adapter)
        except TimeoutError as error:
            raise StorageRefused(f"an adapter was not fetched within {limit_s:g} s; try again") from error
        seconds = time.monotonic() - began
        if seconds > _FETCHED_S:  # else it was there
            self._adapter_s += (seconds - self._adapter_s) * (_WEIGHT if self._adapter_s else 1.0)

    def _open(self, served: _Served, message: Generate) -> None:
        if self.draining:
            raise EngineUnavailable("this replica is ending")
        if self._silent:
            raise EngineUnavailable(_SILENCE)
        forward = partial(self._pass_on, served, message.id)
        served.stream = self._engine.relay(message, partial(RelayedStream, forward=forward))

    def _pass_on(self, served: _Served, id: str, message: Message) -> None:
        self._tell(served.peer, message)
        if served.stream is not None and served.stream.ended:
            self._streams.pop(id, None)

    def _tell(self, peer: bytes, message: Message) -> None:
        self._send(peer, encode(message))

    def _cancel(self, id: str) -> None:
        served = self._streams.pop(id, None)
        if served is not None and served.stream is not None:
            self._begin(served.stream.aclose())

    def _give_back(self, ids: Iterable[str], problem: Problem | None, *, suspect: bool = False) -> None:
        """These requests end here, and may go on elsewhere. suspect: whether those that the engine has may be the cause."""
        for id in ids:
            served = self._streams.get(id)
            if served is not None:
                self._cancel(id)
                begun = served.stream is not None
                self._tell(served.peer, Returned(id=id, problem=problem, suspect=suspect and begun))

    async def _tell_stats(self, peer: bytes, call: int) -> None:
        try:
            reply = Replied(call=call, value=await self._engine.stats())
        except CoserveError as error:
            reply = Replied(call=call, problem=make_problem(error))
        self._tell(peer, reply)

    def _drop_gone(self) -> None:
        """Ends the requests of ingresses that have been silent for too long. One that wakes up again is told so."""
        limit = time.monotonic() - GREET_LIMIT_S
        for peer in [peer for peer, watcher in self._watchers.items() if watcher.heard_s < limit]:
            del self._watchers[peer]
            self._give_back([id for id, served in self._streams.items() if served.peer == peer], None)
