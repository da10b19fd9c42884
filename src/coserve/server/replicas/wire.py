"""Sockets between machines: a replica binds one, and each ingress connects to it. CURVE encrypts what they send and proves who
they are: a replica lets in only those whose public keys are in the table of members.

Messages that are sent within one turn of the event loop travel as the parts of one message. Owns: sockets, keys, batches. Does
not own: what messages mean (replica.py, pool.py), who is a member (members.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, cast

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import parse_monitor_message

_DOMAIN = "*"
_HEARTBEAT_MS, _DEAD_MS = 1000, 3000
"""ZeroMQ closes a connection on which nothing, not even its own heartbeat, has come for _DEAD_MS."""
_CONNECT_MS = 2000
"""How long one try to connect may take. The system's own limit is two minutes, and a try that began while a cable was out would
wait for all of it."""
MAX_MESSAGE_BYTES = 64 << 20
"""A peer that announces more is cut off: memory is taken before it is known who it is."""
_RECONNECT_MS, _MOST_RECONNECT_MS = 100, 2000


class KeyPair(NamedTuple):
    """CURVE keys of one process, as 40 characters of Z85 each. They live as long as the process."""

    public: bytes
    secret: bytes

    @classmethod
    def make(cls) -> KeyPair:
        """A new random pair."""
        return cls(*zmq.curve_keypair())


class Door(AsyncioAuthenticator):
    """Lets in whoever holds a key that `knows` knows. knows: takes a public key as Z85 text."""

    def __init__(self, context: zmq.asyncio.Context, knows: Callable[[str], Awaitable[bool]]) -> None:
        super().__init__(context)
        self._knows = knows
        self.configure_curve_callback(_DOMAIN, self)

    async def callback(self, _domain: str, key: bytes) -> bool:
        """What ZeroMQ's authentication asks; nobody is let in while it can't be told who is a member. ZeroMQ gives such a
        connection up for good, so that whoever has made it must make another one."""
        try:
            return await self._knows(key.decode("ascii"))
        except Exception:
            return False


class Outbox:
    """Collects what is sent within one turn of the event loop, and sends it then."""

    def __init__(self, socket: zmq.asyncio.Socket, head: Sequence[bytes] = ()) -> None:
        """head: parts that go before the others, such as a peer's identity."""
        self._socket, self._head, self._parts = socket, head, list[bytes]()

    def put(self, data: bytes) -> None:
        """Sends a part soon."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append(data)

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if not self._socket.closed:
            sent = cast(asyncio.Future[Any], self._socket.send_multipart([*self._head, *parts]))
            sent.add_done_callback(_ignore)  # a peer that has gone: what it missed is found out by its silence


def _ignore(sent: asyncio.Future[Any]) -> None:
    if not sent.cancelled():
        sent.exception()


def prepare_socket(socket: zmq.asyncio.Socket, keys: KeyPair) -> None:
    """What all these sockets have in common: the keys, signs of life, no waiting at their end."""
    socket.curve_publickey, socket.curve_secretkey = keys
    socket.set_hwm(0)  # both ends always read
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)


class ServerSocket:
    """A replica's end. Peers are named by their sockets' identities, which last as long as their connections.

    address: where peers connect, tcp://HOST:PORT. on_message: takes the peer and the bytes of a message.
    """

    def __init__(
        self, context: zmq.asyncio.Context, host: str, keys: KeyPair, on_message: Callable[[bytes, bytes], None]
    ) -> None:
        """host: the address of this machine that peers reach."""
        self._socket = context.socket(zmq.ROUTER)
        prepare_socket(self._socket, keys)
        self._socket.curve_server = True
        self._socket.zap_domain = _DOMAIN.encode()
        shown = f"[{host}]" if ":" in host else host
        self._socket.ipv6 = ":" in host
        self._socket.bind(f"tcp://{shown}:*")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._on_message, self._outboxes = on_message, dict[bytes, Outbox]()

    def send(self, peer: bytes, data: bytes) -> None:
        """Sends a message to a peer; it is lost if the peer has gone."""
        box = self._outboxes.get(peer)
        if box is None:
            box = self._outboxes[peer] = Outbox(self._socket, [peer])
        box.put(data)

    def forget(self, peer: bytes) -> None:
        """A peer has gone."""
        self._outboxes.pop(peer, None)

    async def read(self) -> None:
        """Passes on all messages, until this is cancelled. Raises what `on_message` raises."""
        while True:
            peer, *parts = await self._socket.recv_multipart()
            for part in parts:
                self._on_message(peer, part)

    def close(self) -> None:
        """Closes the socket; nothing more is sent."""
        self._socket.close(linger=0)


class ClientSocket:
    """An ingress's end: the connection to one replica, which is made again whenever it breaks."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, server_key: str, keys: KeyPair, *,
        on_message: Callable[[bytes], None], on_broken: Callable[[], None],
    ) -> None:
        """server_key: the replica's public key, so that nobody else can answer in its place. on_broken: called when the
        connection breaks."""
        self._socket = context.socket(zmq.DEALER)
        prepare_socket(self._socket, keys)
        self._socket.curve_serverkey = server_key.encode("ascii")
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MOST_RECONNECT_MS)
        self._monitor: Any = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.ipv6 = "[" in address
        self._socket.connect(address)
        self._outbox = Outbox(self._socket)
        self._on_message, self._on_broken = on_message, on_broken

    def send(self, data: bytes) -> None:
        """Sends a message soon; it waits where the connection isn't there yet."""
        self._outbox.put(data)

    async def read(self) -> None:
        """Passes on all messages, until this is cancelled. Raises what `on_message` raises."""
        while True:
            for part in await self._socket.recv_multipart():
                self._on_message(part)

    async def watch(self) -> None:
        """Calls `on_broken` whenever the connection breaks, until this is cancelled."""
        while True:
            if parse_monitor_message(await self._monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                self._on_broken()

    def close(self) -> None:
        """Closes the connection for good."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
