"""The replicas' engines as the ingress sees them: one engine, whose requests go to the replica on which they wait least.

    generate --Router--> a replica's link --> its engine
                  ^------ beats with reports, ten times a second

Stands where a single server has its EngineClient. A request whose replica dies, hangs or ends goes on at another one, from the
tokens that its client has: its noise is keyed by seed and position, so that it goes on as it would have. Owns: which request
is where. Does not own: the choice (cluster/router.py), connections and when a replica counts as lost (links.py).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from coserve.cluster.fairness import TenantLedger
from coserve.cluster.load import Ask, NoReplica
from coserve.cluster.router import Router
from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.core import CapacityError, CoserveError
from coserve.scheduler.prefixhash import prompt_hashes
from coserve.scheduler.slo import asked_slo
from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.messages import AdapterRef, Cancel, ChargeTenants, Failed, Generate, Ready, Tokens
from coserve.server.link.streams import RequestStream
from coserve.server.logs import present_request
from coserve.server.replicas.links import LOST_S, FleetLink, FleetLinks
from coserve.server.replicas.members import Member
from coserve.server.replicas.messages import (
    GREET_EVERY_S,
    Beat,
    FromReplica,
    Nudge,
    Returned,
    Serve,
    shift_generate,
    shift_tokens,
)
from coserve.server.replicas.wire import KeyPair

LOOK_EVERY_S = 0.25
PATIENCE_S = 4.0
"""How long a request whose replica was lost waits for another one, since that was last heard."""
MAX_CRASHES = 2
"""A request is given up after so many engines have died while they worked on it: it may be the cause."""
MAX_MOVES = 8
"""It is also given up after so many moves of any kind."""
_BLOCK_TOKENS = 16
"""Tokens per block of the prefix cache, until a replica has reported its own."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Moving:
    """A request under way.

    message: as it was asked for, with its time of arrival on this machine. link: where it is; None while it waits for a
    replica. emitted: the ids that its client has, of each output. ended: outputs that have ended. answered: whether its client
    has anything. begun: whether its first token has come from the present replica. moved_s: since when it has had no replica
    that began it; None while it has one. error: why it left its last replica, if that said so. refused: replicas that did not
    take it. crashes, moves: how often an engine died under it, and how often it moved. uncached_tokens: of its prompt, which
    its replica should have to compute.
    """

    message: Generate
    adapter: AdapterRef | None
    ask: Ask
    stream: RequestStream
    emitted: list[list[int]]
    link: FleetLink | None = None
    ended: set[int] = field(default_factory=set)
    answered: bool = False
    begun: bool = False
    moved_s: float | None = None
    error: CoserveError | None = None
    refused: set[str] = field(default_factory=set)
    crashes: int = 0
    moves: int = 0
    uncached_tokens: int = 0

    @property
    def id(self) -> str:
        """Its id at its replica: each move has another one, so that late words of the last replica are told apart."""
        return f"{self.message.id}@{self.moves}"

    @property
    def ask_now(self) -> Ask:
        """What it asks of a replica now, which computes what was emitted as a part of the prompt."""
        emitted = [len(ids) for ids in self.emitted]
        return self.ask._replace(
            prompt_tokens=self.ask.prompt_tokens + sum(emitted), max_tokens=max(1, self.ask.max_tokens - min(emitted))
        )


class EnginePool:
    """All replicas. Everything runs on one event loop."""

    def __init__(self, keys: KeyPair, directory: Path, *, report: Callable[[str], None] = _log.info) -> None:
        """keys: this ingress's. directory: of the model's files on this machine. report: takes a line about a replica."""
        self._name, self._numbers = uuid.uuid4().hex[:8], itertools.count(1)
        self._links = FleetLinks(keys, directory, on_message=self._on_message, on_lost=self._on_lost, report=report)
        self._router = Router(seed=int(self._name, 16))
        self._ledger = TenantLedger()
        self._requests: dict[str, _Moving] = {}
        self._placed: dict[str, _Moving] = {}  # by their ids at their replicas
        self._homeless: list[_Moving] = []
        self._settling: asyncio.Handle | None = None
        self._block_tokens = _BLOCK_TOKENS
        self._watching: asyncio.Task[None] | None = None

    # --- as EngineClient ---

    @property
    def supervisor(self) -> EnginePool:
        """Itself: how the engines are, as a supervisor of one engine tells it."""
        return self

    @property
    def ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(link.takes_new for link in self._links.all)

    @property
    def info(self) -> Ready:
        """What an engine has said of itself; all serve one model. Raises EngineUnavailable before the first one is known."""
        return self._links.info

    @property
    def num_restarts(self) -> int:
        """Starts of engines after their first, of the replicas that are known."""
        return sum(link.beat.restarts for link in self._links.all)

    @property
    def trouble(self) -> str | None:
        """Why no replica takes requests, if none does."""
        return None if self.ready else self._links.trouble

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

    # --- the fleet ---

    async def stats_by_replica(self) -> dict[str, dict[str, Any]]:
        """Engine.metrics() of each replica that answers, by its id."""
        links = [link for link in self._links.all if link.ready]
        answers = await asyncio.gather(*(link.stats() for link in links), return_exceptions=True)
        return {
            link.member.id: answer for link, answer in zip(links, answers, strict=True)
            if not isinstance(answer, BaseException)
        }

    @property
    def signals(self) -> Mapping[str, float]:
        """What an autoscaler may look at, by name."""
        return self._router.summary(time.monotonic())._asdict()

    def states(self) -> list[dict[str, Any]]:
        """The replicas as the page shows them."""
        return self._links.states()

    def nudge(self, job: str) -> None:
        """Tells all replicas that a job's row has changed."""
        for link in self._links.all:
            link.post(Nudge(job=job))

    def see(self, found: Sequence[Member]) -> None:
        """Tells which members of the fleet live."""
        replicas = [member for member in found if member.kind == "engine"]
        self._router.num_routers = max(1, len(found) - len(replicas))
        self._links.see(replicas)

    def start(self) -> None:
        """Begins to watch over the replicas that `see` will tell of."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def wait_ready(self) -> None:
        """Waits until a replica takes requests."""
        await self._links.wait_ready()

    async def stop(self) -> None:
        """Ends all requests and connections."""
        self.fail_requests("the server is ending")
        await asyncio.sleep(0.05)  # for the cancellations to leave
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._links.close()

    async def _watch(self) -> None:
        greeted_s = looked_s = -math.inf
        while True:
            now = time.monotonic()
            slept, looked_s = now - looked_s > LOST_S / 2, now
            try:
                if now - greeted_s >= GREET_EVERY_S:
                    greeted_s = now
                    self._links.greet()
                    self._charge()
                if not slept:  # else what has come meanwhile has to be read first
                    self._links.look(now)
                self._settle()
            except Exception:  # a fault of ours must not end the watch: nobody would notice replicas that die
                _log.exception("the look at the replicas failed")
            await asyncio.sleep(LOOK_EVERY_S)

    def _charge(self) -> None:
        """Tells each engine what tenants were served elsewhere since the last time, so that turns are those of the fleet."""
        present = [link.member.id for link in self._links.all if not link.lost]
        for id, tokens in self._ledger.close_round(present).items():
            self._links[id].post(ChargeTenants(tokens=dict(tokens)))

    # --- what comes from replicas ---

    def _on_message(self, link: FleetLink, message: FromReplica) -> None:
        match message:
            case Tokens():
                self._on_tokens(link, message)
            case Failed():
                self._on_failed(link, message)
            case Returned():
                self._on_returned(link, message)
            case Beat():
                self._on_beat(link, message)

    def _on_beat(self, link: FleetLink, beat: Beat) -> None:
        if beat.load is not None:
            load = msgspec.structs.replace(beat.load, replica=link.member.id, draining=beat.draining)
            self._block_tokens = load.block_tokens
            self._router.report(load, link.heard_s)
        if not beat.ready:
            self._router.remove(link.member.id)

    def _on_tokens(self, link: FleetLink, chunk: Tokens) -> None:
        moving = self._placed.get(chunk.id)
        if moving is None or chunk.index in moving.ended:
            return  # it was cancelled, or went on elsewhere; or an output that had ended before it moved has ended again
        if chunk.finish_reason == "cancelled":  # not by us. Tokens that it may hold come again from the next engine
            self._move(moving)
            return
        if not moving.begun:
            moving.begun, moving.moved_s = True, None
            self._router.first_token(moving.id, link.heard_s)
            self._ledger.add(link.member.id, moving.message.tenant, moving.uncached_tokens)
        self._ledger.add(link.member.id, moving.message.tenant, len(chunk.token_ids))
        moving.emitted[chunk.index] += chunk.token_ids
        if chunk.finish_reason is not None:
            moving.ended.add(chunk.index)
        chunk = msgspec.structs.replace(shift_tokens(chunk, time.monotonic()), id=moving.message.id)
        if moving.moves and moving.answered:  # the prompt's figures are those of the replica that answered first
            chunk = msgspec.structs.replace(chunk, cached_tokens=0, begun_s=None)
        moving.answered = True
        moving.stream.push(chunk)
        if moving.stream.ended:
            self._end(moving)

    def _on_failed(self, link: FleetLink, message: Failed) -> None:
        moving = self._placed.get(message.id)
        if moving is None:
            return
        error = make_error(message.problem)
        if isinstance(error, EngineUnavailable):
            moving.crashes += not link.beat.draining
            self._doubt(link)
            self._move(moving, error)
        elif isinstance(error, CapacityError) and not moving.begun:
            self._refuse(link, moving, error)
        else:
            self._end(moving)
            moving.stream.fail(error)

    def _on_returned(self, link: FleetLink, message: Returned) -> None:
        moving = self._placed.get(message.id)
        if moving is None:
            return
        moving.crashes += message.suspect
        error = None if message.problem is None else make_error(message.problem)
        if isinstance(error, EngineUnavailable):
            self._doubt(link)
        if error is None or message.suspect:
            self._move(moving, error)
        else:
            self._refuse(link, moving, error)

    def _doubt(self, link: FleetLink) -> None:
        """A replica's engine has failed, of which its last beat did not know."""
        link.doubt()
        self._router.remove(link.member.id)

    def _refuse(self, link: FleetLink, moving: _Moving, error: CoserveError) -> None:
        """A replica does not take a request, which another one may take."""
        moving.refused.add(link.member.id)
        self._move(moving, error, since_s=moving.moved_s)

    def _on_lost(self, link: FleetLink) -> None:
        self._router.remove(link.member.id)
        for moving in [moving for moving in self._placed.values() if moving.link is link]:
            link.post(Cancel(id=moving.id))  # should it come back
            self._move(moving, since_s=max(link.heard_s, time.monotonic() - LOST_S))  # this process may have slept

    # --- where requests go ---

    def _make_ask(self, message: Generate) -> Ask:
        slo = asked_slo(message.tpot_ms, message.ttft_ms, self.info.objectives)
        blocks = prompt_hashes(message.tenant, message.adapter, message.prompt_ids, self._block_tokens)
        return Ask(
            prompt_tokens=len(message.prompt_ids), blocks=blocks, adapter=message.adapter, tenant=message.tenant,
            outputs=message.sampling.n, max_tokens=message.sampling.max_tokens, ttft_s=slo.ttft_s, tpot_s=slo.tpot_s,
        )

    def _place(self, moving: _Moving) -> None:
        """Sends a request to the replica on which it waits least. Raises NoReplica and CapacityError."""
        now = time.monotonic()
        unfit = moving.refused.union(link.member.id for link in self._links.all if not link.takes_new)
        ask = moving.ask_now
        choice = self._router.choose(ask, now, exclude=unfit, again=moving.moves > 0)
        link = self._links[choice.replica]
        message = msgspec.structs.replace(
            shift_generate(moving.message, now), id=moving.id, emitted=moving.emitted if any(moving.emitted) else []
        )
        link.send(Serve(generate=message, adapter=moving.adapter))
        self._router.sent(moving.id, choice, ask, now)
        moving.link, moving.begun, moving.uncached_tokens = link, False, choice.uncached_tokens
        self._placed[moving.id] = moving

    def _leave(self, moving: _Moving) -> None:
        """The request is on its replica no longer."""
        if self._placed.pop(moving.id, None) is not None:
            self._router.ended(moving.id)
        moving.link = None

    def _end(self, moving: _Moving) -> None:
        self._leave(moving)
        self._requests.pop(moving.message.id, None)

    def _move(self, moving: _Moving, error: CoserveError | None = None, *, since_s: float | None = None) -> None:
        """The request goes on at another replica, as soon as there is one. error: why it can't stay. since_s: since when it has
        none; None: now."""
        self._leave(moving)
        moving.moves += 1
        moving.error = error
        if moving.crashes >= MAX_CRASHES or moving.moves > MAX_MOVES:
            self._end(moving)
            moving.stream.fail(error or EngineUnavailable("the request was moved too often; try again"))
            return
        moving.moved_s = time.monotonic() if since_s is None else since_s
        self._homeless.append(moving)
        if self._settling is None:  # once for all that move together, when it is known which replicas are left
            self._settling = asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        """Finds replicas for requests that have lost theirs. One for which there is none in time fails; at once if nothing was
        sent of it, and all replicas have too much to do."""
        waiting, self._homeless, self._settling = self._homeless, [], None
        now = time.monotonic()
        for moving in waiting:
            if moving.message.id not in self._requests:
                continue  # its client has gone
            in_time = moving.moved_s is None or now - moving.moved_s < PATIENCE_S
            try:
                if in_time or not isinstance(moving.error, CapacityError):  # else each replica would be slow to refuse it
                    self._place(moving)
                    continue
            except (NoReplica, CapacityError, EngineUnavailable):
                moving.refused.clear()  # by then they may take it
                if in_time and (moving.answered or not isinstance(moving.error, CapacityError)):
                    self._homeless.append(moving)
                    continue
            self._end(moving)
            moving.stream.fail(moving.error or EngineUnavailable(self.trouble or "the replica was lost; try again"))

    def _cancel(self, stream: RequestStream) -> None:
        moving = self._requests.get(stream.id)
        if moving is None:
            return
        if moving.link is not None:
            moving.link.post(Cancel(id=moving.id))
        self._end(moving)
