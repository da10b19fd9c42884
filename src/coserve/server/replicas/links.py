"""An ingress's connections to all replicas: which there are, what each has said of itself last, which can't be reached.

    members' rows --see--> a FleetLink per replica --messages--> pool.py
                              silent for LOST_S, or its connection broke: lost, until it is heard again

Owns: connections, when a replica counts as lost, which replicas are left out. Does not own: requests (pool.py), sockets
(wire.py), the rows (members.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import zmq.asyncio

from coserve.server.errors import EngineUnavailable
from coserve.server.link.calls import Calls
from coserve.server.link.messages import GetStats, Message, Ready, Replied
from coserve.server.replicas.members import Member, read_engine
from coserve.server.replicas.messages import Beat, FromReplica, Greeting, decode_from_replica, encode
from coserve.server.replicas.wire import ClientSocket, KeyPair

LOST_S = 3.0
"""A replica from which nothing has come for so long counts as lost."""
ANEW_S = 5.0
"""A replica that has been silent for so long, and whose row is fresh, is connected to anew: ZeroMQ gives a connection up for
good if the other side could not tell whose key it is, as while the database is away."""
_log = logging.getLogger(__name__)


class FleetLink:
    """One replica. heard_s: when it last said something, or was connected to, by the monotonic clock. lost: whether it counts
    as lost. beat: what it has said of itself last. fits: whether it is known to serve the model that the others serve."""

    def __init__(self, member: Member, socket: ClientSocket) -> None:
        self.member, self._socket = member, socket
        self.heard_s, self.lost, self.beat = time.monotonic(), True, Beat(ready=False)
        self.fits = False
        self.tasks: list[asyncio.Task[None]] = []
        self._calls = Calls(self.send)

    @property
    def ready(self) -> bool:
        """Whether its engine takes requests."""
        return self.beat.ready and not self.lost

    @property
    def takes_new(self) -> bool:
        """Whether new requests may go there."""
        return self.ready and self.fits and not self.beat.draining

    def doubt(self) -> None:
        """Its engine has failed: it takes no requests until the replica says that it does."""
        self.beat = msgspec.structs.replace(self.beat, ready=False)

    def post(self, message: Message) -> None:
        """Sends what is of use only if it arrives."""
        self._socket.send(encode(message))

    def send(self, message: Message) -> None:
        """Raises EngineUnavailable if the replica is lost."""
        if self.lost:
            raise EngineUnavailable(f"replica {self.member.id} can't be reached")
        self.post(message)

    async def stats(self) -> dict[str, Any]:
        """Its engine's figures. Raises what the replica raises, and EngineUnavailable."""
        return cast(dict[str, Any], await self._calls.ask(lambda call: GetStats(call=call)))

    def on_reply(self, reply: Replied) -> None:
        """It has answered a call."""
        self._calls.on_reply(reply)

    def fail_calls(self) -> None:
        """No answers will come."""
        self._calls.fail_all(f"replica {self.member.id} can't be reached")

    def close(self) -> None:
        """Ends the connection for good."""
        for task in self.tasks:
            task.cancel()
        self._socket.close()


class FleetLinks:
    """The links of one ingress. Everything runs on one event loop.

    on_message: takes a link and what came from it, but for answers to calls. on_lost: called when a replica counts as lost.
    """

    def __init__(
        self, keys: KeyPair, directory: Path, *, on_message: Callable[[FleetLink, FromReplica], None],
        on_lost: Callable[[FleetLink], None], report: Callable[[str], None],
    ) -> None:
        """keys: this ingress's. directory: of the model's files on this machine. report: takes a line about a replica."""
        self._keys, self._directory, self._report = keys, directory, report
        self._on_message, self._on_lost = on_message, on_lost
        self._context = zmq.asyncio.Context()
        self._links: dict[str, FleetLink] = {}
        self._info: Ready | None = None
        self._left_out: set[str] = set()
        self._ready_news = asyncio.Event()
        self._closed = False

    @property
    def all(self) -> Collection[FleetLink]:
        """Of all replicas that are known, lost ones too."""
        return self._links.values()

    def __getitem__(self, replica: str) -> FleetLink:
        return self._links[replica]

    @property
    def info(self) -> Ready:
        """What an engine has said of itself; all serve one model. Raises EngineUnavailable before the first one is known."""
        if self._info is None:
            raise EngineUnavailable("no replica has started yet")
        return self._info

    @property
    def trouble(self) -> str:
        """Why no replica takes requests, as far as it is known."""
        known = [f"{link.member.id}: {link.beat.trouble}" for link in self.all if link.beat.trouble]
        return "; ".join(known) or "no replica can be reached; the fleet may be starting"

    def states(self) -> list[dict[str, Any]]:
        """The replicas as the page shows them."""
        return [{
            "id": link.member.id, "node": link.member.node, "ready": link.ready, "draining": link.beat.draining,
            "lost": link.lost, "restarts": link.beat.restarts, "trouble": link.beat.trouble,
        } for link in self.all]

    async def wait_ready(self) -> None:
        """Waits until a replica takes requests."""
        while not any(link.takes_new for link in self.all):
            self._ready_news.clear()
            await self._ready_news.wait()

    def see(self, found: Sequence[Member]) -> None:
        """Connects to replicas that are new or have been silent for long, and forgets those that are gone and silent. found:
        those whose rows are fresh."""
        known, limit = {member.id for member in found}, time.monotonic() - ANEW_S
        for link in [link for link in self.all if link.lost and (link.member.id not in known or link.heard_s < limit)]:
            self._drop(link, "it has gone")
        for member in found:
            if member.id not in self._links and member.id not in self._left_out:
                try:
                    self._connect(member)
                except (zmq.ZMQError, ValueError) as error:  # too many open files, or a row of another version
                    _log.warning("replica %s on %s can't be connected to: %s", member.id, member.node, error)

    def look(self, now: float) -> None:
        """Finds replicas that have been silent for too long. now: by the monotonic clock."""
        for link in list(self.all):
            if now - link.heard_s > LOST_S:
                self._lose(link, f"it has been silent for {LOST_S:g} s")

    def greet(self) -> None:
        """Tells all replicas that this ingress lives."""
        for link in self.all:
            link.post(Greeting())

    async def close(self) -> None:
        """Ends all connections."""
        self._closed = True
        tasks = [task for link in self.all for task in link.tasks]
        for link in list(self.all):
            self._drop(link, "the server is ending")
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def _serves_the_model(self, member: Member) -> bool:
        """Whether a replica serves the model that the others serve, in the same dtype. The first one that takes requests
        decides: rows of replicas that were killed stay for a while, and may be of another start."""
        try:
            info = read_engine(member.info)
        except msgspec.ValidationError as error:
            return self._leave_out(member, f"it says what this version can't read ({error})")
        first = self._info
        if first is not None and (info.fingerprint, info.vocab_size) != (first.fingerprint, first.vocab_size):
            return self._leave_out(member, f"it serves {info.model}, and the others another model, {first.model}")
        if first is not None and info.dtype != first.dtype:
            return self._leave_out(member, f"it computes in {info.dtype}, the others in {first.dtype}; give all one --dtype")
        self._info = self._info or msgspec.structs.replace(info, directory=str(self._directory))
        return True

    def _leave_out(self, member: Member, why: str) -> bool:
        self._left_out.add(member.id)
        _log.error("replica %s on %s is left out: %s", member.id, member.node, why)
        return False

    def _connect(self, member: Member) -> None:
        link: FleetLink
        socket = ClientSocket(
            self._context, member.address, member.public_key, self._keys, on_message=lambda data: self._hear(link, data),
            on_broken=lambda: self._lose(link, "its connection broke"),
        )
        link = self._links[member.id] = FleetLink(member, socket)
        link.post(Greeting())
        loop = asyncio.get_running_loop()
        link.tasks = [loop.create_task(socket.read()), loop.create_task(socket.watch())]
        for task in link.tasks:
            task.add_done_callback(lambda ended: self._on_end(link, ended))

    def _hear(self, link: FleetLink, data: bytes) -> None:
        message = decode_from_replica(data)
        link.heard_s = time.monotonic()
        if link.lost:
            link.lost = False
            self._report(f"replica {link.member.id} on {link.member.node} is reached at {link.member.address}")
        match message:
            case Replied():
                link.on_reply(message)
            case Beat():
                link.fits = link.fits or (message.ready and not message.draining and self._serves_the_model(link.member))
                if link.member.id in self._left_out:
                    self._drop(link, "it is left out")
                    return
                link.beat = message
                if link.takes_new:
                    self._ready_news.set()
                self._on_message(link, message)
            case _:
                self._on_message(link, message)

    def _on_end(self, link: FleetLink, task: asyncio.Task[None]) -> None:
        """A reader has failed: `see` connects anew."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        _log.error("the messages of replica %s can't be read", link.member.id, exc_info=error)
        self._drop(link, "its messages can't be read")

    def _lose(self, link: FleetLink, why: str) -> None:
        if link.lost:
            return
        link.lost = True
        if not self._closed:
            _log.warning("replica %s on %s is lost: %s", link.member.id, link.member.node, why)
        link.fail_calls()
        self._on_lost(link)

    def _drop(self, link: FleetLink, why: str) -> None:
        self._lose(link, why)
        if self._links.get(link.member.id) is link:
            del self._links[link.member.id]
        with contextlib.suppress(zmq.ZMQError):  # it is closed already
            link.close()
