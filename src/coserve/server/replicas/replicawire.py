"""How replicas reach each other for jobs that several of them share: each connects to the sockets that the others have for
ingresses, with the same keys.

Owns: connections to other replicas, frames that have come. Does not own: what frames say (steplink.py), who is a member.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import zmq
import zmq.asyncio

from coserve.core import NotFound
from coserve.server.errors import EngineUnavailable
from coserve.server.replicas.members import Member
from coserve.server.replicas.messages import Steps, encode
from coserve.server.replicas.wire import KeyPair, prepare_socket

_MOST_WAITING = 64
"""Messages to a replica that may be on their way; senders wait beyond that."""
_SEND_S = 10.0
"""How long a sender waits at most. Then the connection is made anew: ZeroMQ gives one up for good whose handshake was refused,
as by a replica that can't ask who is a member just now."""


class ReplicaWire:
    """Carries frames between replicas, in order (a StepWire). own: this replica's id."""

    def __init__(self, context: zmq.asyncio.Context, own: str, keys: KeyPair) -> None:
        self._context, self._own, self._keys = context, own, keys
        self._members: Mapping[str, Member] = {}
        self._sockets: dict[str, zmq.asyncio.Socket] = {}
        self._inbox: asyncio.Queue[tuple[str, list[bytes]]] = asyncio.Queue()

    @property
    def others(self) -> Sequence[str]:
        """The ids of the other replicas that live, as far as is known."""
        return [id for id in self._members if id != self._own]

    def see(self, members: Sequence[Member]) -> list[str]:
        """Tells which replicas live. Connections to others are closed. Returns the ids of those that lived until now."""
        before, self._members = self._members, {member.id: member for member in members}
        for id in [id for id in self._sockets if id not in self._members]:
            self._sockets.pop(id).close(linger=0)
        return [id for id in before if id not in self._members]

    def on_steps(self, message: Steps) -> None:
        """Another replica has sent frames."""
        self._inbox.put_nowait((message.sender, message.frames))

    async def send(self, replica: str, frames: Sequence[bytes]) -> None:
        """Sends frames to a replica; waits while too many are on their way. Raises NotFound for one that isn't known, and
        EngineUnavailable for one that takes nothing or is gone; what was on its way there may be lost then."""
        data, socket = encode(Steps(sender=self._own, frames=list(frames))), self._find(replica)
        try:
            async with asyncio.timeout(_SEND_S):
                await socket.send(data)
        except TimeoutError as error:
            if self._sockets.get(replica) is socket:
                self._sockets.pop(replica).close(linger=0)
            raise EngineUnavailable(f"replica {replica} has taken nothing for {_SEND_S:g} s") from error
        except asyncio.CancelledError as error:  # a socket that is closed cancels those that wait for it
            task = asyncio.current_task()
            if not socket.closed or (task is not None and task.cancelling()):
                raise
            raise EngineUnavailable(f"replica {replica} is gone") from error

    async def receive(self) -> tuple[str, list[bytes]]:
        """The next frames, and the replica that they are from."""
        return await self._inbox.get()

    def close(self) -> None:
        """Closes all connections."""
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()

    def _find(self, replica: str) -> zmq.asyncio.Socket:
        socket = self._sockets.get(replica)
        if socket is None:
            member = self._members.get(replica)
            if member is None:
                raise NotFound(f"there is no replica {replica}")
            socket = self._sockets[replica] = self._context.socket(zmq.DEALER)
            prepare_socket(socket, self._keys)
            socket.sndhwm = _MOST_WAITING
            socket.curve_serverkey = member.public_key.encode("ascii")
            socket.ipv6 = "[" in member.address
            socket.connect(member.address)
        return socket
