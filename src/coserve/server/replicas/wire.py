"""Sockets between machines: a replica binds one, and each ingress connects to it. CURVE encrypts what they send and proves who
they are: a replica lets in only those whose public keys are in the table of members.

Messages that are sent within one turn of the event loop travel as the parts of one message. Owns: sockets, keys, batches. Does
not own: what messages mean (replica.py, pool.py), who is a member (members.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
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
_MAX_AT_ONCE = 64
"""Messages that are read before others on the event loop get their turn."""


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


class LoopSocket:
    """A ZeroMQ socket on an event loop: what is sent within one turn of the loop leaves as one message.

    ZeroMQ's descriptor says that something has changed, once; then all that has come must be read, and also after each message
    that was sent, since sending reads what the descriptor would have told. (pyzmq's own sockets for asyncio make a future, two
    callbacks and a timer of each message.)
    """

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        """on_message: takes the parts of a message that has come, while `read` runs."""
        self._socket, self._on_message = socket, on_message
        self._parts: dict[bytes, list[bytes]] = {}  # by what goes before them
        self._reading: asyncio.Future[None] | None = None
        self._soon: asyncio.Handle | None = None

    def send(self, data: bytes, head: bytes = b"") -> None:
        """Sends a part soon. head: a part that goes before the others, such as a peer's identity; empty: none."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.setdefault(head, []).append(data)

    async def read(self) -> None:
        """Passes on all messages, until this is cancelled. Raises what `on_message` raises."""
        loop = asyncio.get_running_loop()
        reading = self._reading = loop.create_future()
        loop.add_reader(self._socket.fileno(), self._take)
        self._take()
        try:
            await reading
        finally:
            if self._reading is reading:
                self._stop_reading()

    def close(self) -> None:
        """Closes the socket; nothing more is sent."""
        self._stop_reading()
        self._socket.close(linger=0)

    def _stop_reading(self) -> None:
        """Before the socket is closed: the next one that is opened may get the number of its descriptor."""
        if self._reading is not None:
            self._reading = None
            asyncio.get_running_loop().remove_reader(self._socket.fileno())

    def _flush(self) -> None:
        waiting, self._parts = self._parts, {}
        if self._socket.closed:
            return
        for head, parts in waiting.items():
            # A peer that has gone is not waited for: what it missed is found out by its silence.
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([head, *parts] if head else parts, zmq.NOBLOCK)
        if self._reading is not None and self._soon is None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._take_soon()

    def _take_soon(self) -> None:
        self._soon = asyncio.get_running_loop().call_soon(self._take)

    def _take(self) -> None:
        """Reads what has come; others get their turn after _MAX_AT_ONCE messages."""
        self._soon = None
        reading = self._reading
        if reading is None or reading.done() or self._socket.closed:
            return
        try:
            for _ in range(_MAX_AT_ONCE):
                self._on_message(self._socket.recv_multipart(zmq.NOBLOCK))
                if self._socket.closed:
                    return
        except zmq.Again:
            pass
        except Exception as error:
            if not reading.done():
                reading.set_exception(error)
        else:
            self._take_soon()


def _make_socket(context: zmq.asyncio.Context, kind: int, keys: KeyPair) -> zmq.Socket[bytes]:
    """A socket that is no asyncio socket, but which the context closes with its own."""
    plain: Any = zmq.Socket
    socket = cast("zmq.Socket[bytes]", context.socket(kind, socket_class=plain))
    prepare_socket(socket, keys)
    return socket


def prepare_socket(socket: zmq.Socket[Any], keys: KeyPair) -> None:
    """What all these sockets have in common: the keys, signs of life, no waiting at their end."""
    socket.curve_publickey, socket.curve_secretkey = keys
    socket.set_hwm(0)  # both ends always read
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)


class ServerSocket(LoopSocket):
    """A replica's end. Peers are named by their sockets' identities, which last as long as their connections.

    address: where peers connect, tcp://HOST:PORT.
    """

    def __init__(
        self, context: zmq.asyncio.Context, host: str, keys: KeyPair, on_message: Callable[[bytes, bytes], None]
    ) -> None:
        """host: the address of this machine that peers reach. on_message: takes the peer and the bytes of a message."""
        socket = _make_socket(context, zmq.ROUTER, keys)
        socket.curve_server = True
        socket.zap_domain = _DOMAIN.encode()
        shown = f"[{host}]" if ":" in host else host
        socket.ipv6 = ":" in host
        socket.bind(f"tcp://{shown}:*")
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)

        def take(message: list[bytes]) -> None:
            peer, *parts = message
            for part in parts:
                on_message(peer, part)

        super().__init__(socket, take)

    def send_to(self, peer: bytes, data: bytes) -> None:
        """Sends a message to a peer; it is lost if the peer has gone."""
        self.send(data, head=peer)


class ClientSocket(LoopSocket):
    """An ingress's end: the connection to one replica, which is made again whenever it breaks."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, server_key: str, keys: KeyPair, *,
        on_message: Callable[[bytes], None], on_broken: Callable[[], None],
    ) -> None:
        """server_key: the replica's public key, so that nobody else can answer in its place. on_message: takes the bytes of a
        message. on_broken: called when the connection breaks."""
        socket = _make_socket(context, zmq.DEALER, keys)
        socket.curve_serverkey = server_key.encode("ascii")
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MOST_RECONNECT_MS)
        self._monitor: Any = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.ipv6 = "[" in address
        socket.connect(address)
        self._on_broken = on_broken

        def take(parts: list[bytes]) -> None:
            for part in parts:
                on_message(part)

        super().__init__(socket, take)

    async def watch(self) -> None:
        """Calls `on_broken` whenever the connection breaks, until this is cancelled."""
        while True:
            if parse_monitor_message(await self._monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                self._on_broken()

    def close(self) -> None:
        """Closes the connection for good."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        super().close()
