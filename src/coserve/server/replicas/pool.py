"""The replicas' engines as the ingress sees them: one engine, whose requests go to the replica on which they wait least.

    generate --Router--> a replica's link --> its engine
                  ^------ beats with reports, ten times a second

Stands where a single server has its EngineClient. A request whose replica dies, hangs or ends goes on at another one, from the
tokens that its client has: its noise is keyed by seed and position, so that it goes on as it would have. Owns: which request
is where, when a replica counts as lost. Does not own: the choice (cluster/router.py), sockets (wire.py), who is a member.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import zmq.asyncio

from coserve.cluster.fairness import TenantLedger
from coserve.cluster.load import Ask, Choice, NoReplica
from coserve.cluster.router import Router
from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.core import CapacityError, CoserveError
from coserve.scheduler.prefixhash import prompt_hashes
from coserve.scheduler.slo import asked_slo
from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.calls import Calls
from coserve.server.link.messages import (
    AdapterRef,
    Cancel,
    ChargeTenants,
    Failed,
    Generate,
    GetStats,
    Message,
    Ready,
    Replied,
    Tokens,
)
from coserve.server.link.streams import RequestStream
from coserve.server.logs import present_request
from coserve.server.replicas.members import Member, read_engine
from coserve.server.replicas.messages import (
    WATCH_EVERY_S,
    Beat,
    Greeting,
    Nudge,
    Serve,
    decode_from_replica,
    encode,
    shift_generate,
    shift_tokens,
)
from coserve.server.replicas.wire import ClientSocket, KeyPair
from coserve.server.stats.fleetstats import merge_stats

LOST_S = 3.0
"""A replica from which nothing has come for so long counts as lost, and its requests go on elsewhere."""
LOOK_EVERY_S = 0.25
PATIENCE_S = 4.0
"""How long a request whose replica was lost waits for another one."""
MAX_CRASHES = 2
"""A request is given up after so many engines have died while they worked on it: it may be the cause."""
MAX_MOVES = 8
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Moving:
    """A request under way.

    message: as it was asked for, with its time of arrival on this machine. link: where it is; None while it waits for a
    replica. id: its id there. emitted: the ids that its client has, of each output. ended: outputs that have ended. moved_s:
    when it lost its replica. crashes, moves: how often an engine died under it, and how often it moved. uncached_tokens: of its
    prompt, which its replica should have to compute.
    """

    message: Generate
    adapter: AdapterRef | None
    ask: Ask
    stream: RequestStream
    emitted: list[list[int]]
    id: str = ""
    link: _Link | None = None
    ended: set[int] = field(default_factory=set)
    begun: bool = False
    moved_s: float = 0.0
    crashes: int = 0
    moves: int = 0
    uncached_tokens: int = 0


class _Link:
    """The connection to one replica, and what is known of it. heard_s: when it last said something. lost: whether it counts as
    lost until it is heard again."""

    def __init__(self, member: Member, socket: ClientSocket) -> None:
        self.member, self.socket = member, socket
        self.heard_s, self.lost, self.beat = 0.0, True, Beat(ready=False)
        self.requests: dict[str, _Moving] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.calls = Calls(self.send)

    @property
    def ready(self) -> bool:
        return self.beat.ready and not self.lost

    def send(self, message: Message) -> None:
        """Raises EngineUnavailable if the replica is lost."""
        if self.lost:
            raise EngineUnavailable(f"replica {self.member.id} can't be reached")
        self.socket.send(encode(message))


class EnginePool:
    """All replicas. Everything runs on one event loop."""

    def __init__(
        self, keys: KeyPair, directory: Path, *, report: Callable[[str], None] = _log.info,
    ) -> None:
        """keys: this ingress's. directory: of the model's files on this machine. report: takes a line about a replica."""
        self._keys, self._directory, self._report = keys, directory, report
        self._name, self._numbers = uuid.uuid4().hex[:8], itertools.count(1)
        self._context = zmq.asyncio.Context()
        self._links: dict[str, _Link] = {}
        self._router = Router(seed=int(self._name, 16))
        self._ledger = TenantLedger()
        self._requests: dict[str, _Moving] = {}
        self._homeless: list[_Moving] = []
        self._info: Ready | None = None
        self._block_tokens = 16
        self._stopping = False
        self._refused: set[str] = set()
        self._look: asyncio.Task[None] | None = None
        self._ready_news = asyncio.Event()

    # --- as EngineClient ---

    @property
    def supervisor(self) -> EnginePool:
        """Itself: how the engines are, as a supervisor of one engine tells it."""
        return self

    @property
    def ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(link.ready and not link.beat.draining for link in self._links.values())

    @property
    def info(self) -> Ready:
        """What an engine has said of itself; all serve one model. Raises EngineUnavailable before the first one is known."""
        if self._info is None:
            raise EngineUnavailable("no replica has started yet")
        return self._info

    @property
    def generation(self) -> int:
        """Replicas keep their own count; here nothing is loaded, so nothing is lost by a restart."""
        return 1

    @property
    def num_restarts(self) -> int:
        """Starts of engines after their first, of the replicas that are known."""
        return sum(link.beat.restarts for link in self._links.values())

    @property
    def trouble(self) -> str | None:
        """Why no replica takes requests, if that is known."""
        if self.ready:
            return None
        known = [f"{link.member.id}: {link.beat.trouble}" for link in self._links.values() if link.beat.trouble]
        return "; ".join(known) or "no replica can be reached; the fleet may be starting"

    def generate(
        self, *, prompt_ids: Sequence[int], sampling: SamplingConfig, adapter: AdapterRef | None = None, tenant: str = "",
        tpot_ms: SloMs | None = None, ttft_ms: SloMs | None = None, arrival_s: float | None = None,
    ) -> RequestStream:
        """Sends a request to a replica. Close the stream if it isn't read to its end. Raises EngineUnavailable, InvalidRequest,
        and CapacityError where all replicas have too much to do.

        arrival_s: when the request arrived, by the monotonic clock; None: now.
        """
        name = None if adapter is None else adapter.name
        message = Generate(
            id=f"{present_request() or uuid.uuid4().hex}#{self._name}.{next(self._numbers)}", prompt_ids=list(prompt_ids),
            sampling=sampling, adapter=name, tenant=tenant, tpot_ms=tpot_ms, ttft_ms=ttft_ms,
            arrival_s=time.monotonic() if arrival_s is None else arrival_s,
        )
        stream = RequestStream(message.id, sampling.n, self._cancel)
        moving = _Moving(message, adapter, self._make_ask(message), stream, [[] for _ in range(sampling.n)])
        try:
            self._place(moving)
        except NoReplica as error:
            raise EngineUnavailable(self.trouble or str(error)) from error
        self._requests[message.id] = moving
        return stream

    def fail_requests(self, message: str) -> None:
        """Cancels every request; its stream raises EngineUnavailable with the message."""
        for moving in list(self._requests.values()):
            moving.stream.refuse(EngineUnavailable(message))

    async def stats(self) -> dict[str, Any]:
        """Figures of all engines together; see `stats_by_replica`. Raises EngineUnavailable if none answers."""
        found = await self.stats_by_replica()
        if not found:
            raise EngineUnavailable(self.trouble or "no replica answers")
        return merge_stats(list(found.values()))

    async def stats_by_replica(self) -> dict[str, dict[str, Any]]:
        """Engine.metrics() of each replica that answers, by its id."""
        links = [link for link in self._links.values() if link.ready]
        answers = await asyncio.gather(*(link.calls.ask(_get_stats) for link in links), return_exceptions=True)
        return {
            link.member.id: cast(dict[str, Any], answer) for link, answer in zip(links, answers, strict=True)
            if not isinstance(answer, BaseException)
        }

    # --- the fleet ---

    @property
    def signals(self) -> Mapping[str, float]:
        """What an autoscaler may look at, by name."""
        return self._router.summary(time.monotonic())._asdict()

    def states(self) -> list[dict[str, Any]]:
        """The replicas as the page shows them."""
        now = time.monotonic()
        return [{
            "id": link.member.id, "node": link.member.node, "ready": link.ready, "draining": link.beat.draining,
            "lost": link.lost, "silent_s": max(0.0, now - link.heard_s), "requests": len(link.requests),
            "restarts": link.beat.restarts, "trouble": link.beat.trouble,
        } for link in self._links.values()]

    def nudge(self, job: str) -> None:
        """Tells all replicas that a job's row has changed."""
        for link in self._links.values():
            if not link.lost:
                link.socket.send(encode(Nudge(job=job)))

    def start(self) -> None:
        """Begins to watch over the replicas that `see` will tell of."""
        self._look = asyncio.get_running_loop().create_task(self._watch())

    async def wait_ready(self) -> None:
        """Waits until a replica takes requests."""
        while not self.ready:
            self._ready_news.clear()
            await self._ready_news.wait()

    async def stop(self) -> None:
        """Ends all requests and connections."""
        self._stopping = True
        self.fail_requests("the server is ending")
        await asyncio.sleep(0.05)  # for the cancellations to leave
        tasks = [] if self._look is None else [self._look]
        for link in list(self._links.values()):
            tasks += link.tasks
            self._drop(link)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def see(self, found: Sequence[Member], num_ingresses: int = 1) -> None:
        """Connects to replicas that are new, and forgets those that are gone and silent. found: those whose rows are fresh.
        num_ingresses: how many there are, this one included."""
        self._router.num_routers = max(1, num_ingresses)
        known = {member.id for member in found}
        for member in found:
            if member.id not in self._links and self._serves_the_model(member):
                self._connect(member)
        for link in [link for link in self._links.values() if link.member.id not in known and link.lost]:
            self._drop(link)

    def _serves_the_model(self, member: Member) -> bool:
        """Whether a replica serves the model that the others serve. The first one decides."""
        try:
            info = read_engine(member.info)
        except msgspec.ValidationError as error:
            return self._refuse(member, f"it says what this version can't read ({error})")
        if self._info is not None and (info.fingerprint, info.vocab_size) != (self._info.fingerprint, self._info.vocab_size):
            return self._refuse(member, f"it serves {info.model}, and the others another model, {self._info.model}")
        self._info = self._info or msgspec.structs.replace(info, directory=str(self._directory))
        return True

    def _refuse(self, member: Member, why: str) -> bool:
        if member.id not in self._refused:
            self._refused.add(member.id)
            _log.error("replica %s on %s is left out: %s", member.id, member.node, why)
        return False

    def _connect(self, member: Member) -> None:
        link: _Link

        def on_message(data: bytes) -> None:
            self._on_message(link, data)

        socket = ClientSocket(
            self._context, member.address, member.public_key, self._keys, on_message=on_message,
            on_broken=lambda: self._lose(link, "its connection broke"),
        )
        link = self._links[member.id] = _Link(member, socket)
        socket.send(encode(Greeting()))
        loop = asyncio.get_running_loop()
        link.tasks = [loop.create_task(socket.read()), loop.create_task(socket.watch())]
        for task in link.tasks:
            task.add_done_callback(_log_end)

    def _drop(self, link: _Link) -> None:
        self._lose(link, "it has gone")
        self._links.pop(link.member.id, None)
        for task in link.tasks:
            task.cancel()
        link.socket.close()

    # --- what comes from replicas ---

    def _on_message(self, link: _Link, data: bytes) -> None:
        link.heard_s = time.monotonic()
        if link.lost:
            link.lost = False
            self._report(f"replica {link.member.id} on {link.member.node} is reached at {link.member.address}")
        message = decode_from_replica(data)
        match message:
            case Tokens():
                self._on_tokens(link, message)
            case Failed():
                self._on_failed(link, message)
            case Beat():
                self._on_beat(link, message)
            case Replied():
                link.calls.on_reply(message)

    def _on_beat(self, link: _Link, beat: Beat) -> None:
        link.beat = beat
        if beat.load is not None:
            load = msgspec.structs.replace(beat.load, replica=link.member.id, draining=beat.draining)
            self._block_tokens = load.block_tokens
            self._router.report(load, link.heard_s)
        if not beat.ready:
            self._router.remove(link.member.id)
        elif not beat.draining:
            self._ready_news.set()

    def _on_tokens(self, link: _Link, chunk: Tokens) -> None:
        moving = link.requests.get(chunk.id)
        if moving is None or chunk.index in moving.ended:
            return  # it was cancelled, or went on elsewhere; or an output that had ended before it moved has ended again
        chunk = shift_tokens(chunk, time.monotonic())
        if not moving.begun:
            moving.begun = True
            self._router.first_token(moving.id, link.heard_s)
            self._ledger.add(link.member.id, moving.message.tenant, moving.uncached_tokens)
        self._ledger.add(link.member.id, moving.message.tenant, len(chunk.token_ids))
        if moving.moves:  # the prompt's figures are those of the first replica
            chunk = msgspec.structs.replace(chunk, cached_tokens=0, begun_s=None)
        moving.emitted[chunk.index] += chunk.token_ids
        if chunk.finish_reason == "cancelled":  # not by us
            self._leave(moving)
            self._move(moving, crashed=False)
            return
        if chunk.finish_reason is not None:
            moving.ended.add(chunk.index)
        moving.stream.push(msgspec.structs.replace(chunk, id=moving.message.id))
        if moving.stream.ended:
            self._end(moving)

    def _on_failed(self, link: _Link, message: Failed) -> None:
        moving = link.requests.get(message.id)
        if moving is None:
            return
        error = make_error(message.problem)
        if isinstance(error, EngineUnavailable):
            self._leave(moving)
            self._move(moving, crashed=not link.beat.draining, error=error)
        else:
            self._end(moving)
            moving.stream.fail(error)

    # --- where requests go ---

    def _make_ask(self, message: Generate) -> Ask:
        slo = asked_slo(message.tpot_ms, message.ttft_ms, self.info.objectives)
        blocks = prompt_hashes(message.tenant, message.adapter, message.prompt_ids, self._block_tokens)
        return Ask(
            prompt_tokens=len(message.prompt_ids), blocks=blocks, adapter=message.adapter, tenant=message.tenant,
            outputs=message.sampling.n, max_tokens=message.sampling.max_tokens, ttft_s=slo.ttft_s, tpot_s=slo.tpot_s,
        )

    def _place(self, moving: _Moving, exclude: Collection[str] = ()) -> None:
        """Sends a request to the replica on which it waits least. Raises NoReplica and CapacityError."""
        now = time.monotonic()
        choice, link = self._choose(moving.ask, now, exclude)
        moving.id = f"{moving.message.id}@{moving.moves}"
        message = msgspec.structs.replace(
            shift_generate(moving.message, now), id=moving.id,
            emitted=moving.emitted if any(moving.emitted) else [],
        )
        link.send(Serve(generate=message, adapter=moving.adapter))
        self._router.sent(moving.id, choice, moving.ask, now)
        moving.link, moving.begun, moving.uncached_tokens = link, False, choice.uncached_tokens
        link.requests[moving.id] = moving

    def _choose(self, ask: Ask, now: float, exclude: Collection[str]) -> tuple[Choice, _Link]:
        unfit = frozenset(exclude) | {
            link.member.id for link in self._links.values() if not link.ready or link.beat.draining
        }
        choice = self._router.choose(ask, now, exclude=unfit)
        return choice, self._links[choice.replica]

    def _leave(self, moving: _Moving) -> None:
        """The request is on its replica no longer."""
        if moving.link is not None:
            moving.link.requests.pop(moving.id, None)
            self._router.ended(moving.id)
        moving.link = None

    def _end(self, moving: _Moving) -> None:
        self._leave(moving)
        self._requests.pop(moving.message.id, None)

    def _move(self, moving: _Moving, *, crashed: bool, error: CoserveError | None = None) -> None:
        """The request goes on at another replica, as soon as there is one. crashed: whether an engine died under it."""
        moving.crashes += crashed
        moving.moves += 1
        if moving.crashes >= MAX_CRASHES or moving.moves > MAX_MOVES:
            self._end(moving)
            moving.stream.fail(error or EngineUnavailable("the engine process died; try again"))
            return
        moving.moved_s = time.monotonic()
        self._homeless.append(moving)
        self._settle()

    def _settle(self) -> None:
        """Finds replicas for requests that have lost theirs. One for which there is none in time fails."""
        waiting, self._homeless = self._homeless, []
        now = time.monotonic()
        for moving in waiting:
            if moving.message.id not in self._requests:
                continue  # its client has gone
            try:
                self._place(moving)
            except (NoReplica, CapacityError, EngineUnavailable):
                if now - moving.moved_s < PATIENCE_S:
                    self._homeless.append(moving)
                else:
                    self._end(moving)
                    moving.stream.fail(EngineUnavailable(self.trouble or "the replica was lost; try again"))

    def _lose(self, link: _Link, why: str) -> None:
        if link.lost:
            return
        link.lost = True
        if not self._stopping:
            _log.warning("replica %s on %s is lost: %s", link.member.id, link.member.node, why)
        self._router.remove(link.member.id)
        link.calls.fail_all(f"replica {link.member.id} can't be reached")
        for moving in list(link.requests.values()):
            link.socket.send(encode(Cancel(id=moving.id)))  # should it come back
            self._leave(moving)
            self._move(moving, crashed=True)

    def _charge(self) -> None:
        """Tells each engine what tenants were served elsewhere since the last time, so that turns are those of the fleet."""
        present = [link.member.id for link in self._links.values() if not link.lost]
        for id, tokens in self._ledger.close_round(present).items():
            self._links[id].socket.send(encode(ChargeTenants(tokens=dict(tokens))))

    def _cancel(self, stream: RequestStream) -> None:
        moving = self._requests.get(stream.id)
        if moving is None:
            return
        if moving.link is not None:
            moving.link.socket.send(encode(Cancel(id=moving.id)))
        self._end(moving)

    async def _watch(self) -> None:
        watched = -math.inf
        while True:
            now = time.monotonic()
            if now - watched >= WATCH_EVERY_S:
                watched = now
                for link in self._links.values():
                    link.socket.send(encode(Greeting()))
                self._charge()
            for link in list(self._links.values()):
                if now - link.heard_s > LOST_S:
                    self._lose(link, f"it has been silent for {LOST_S:g} s")
            self._settle()
            await asyncio.sleep(LOOK_EVERY_S)


def _get_stats(call: int) -> GetStats:
    return GetStats(call=call)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a replica's messages can't be read", exc_info=error)
