"""Sockets between replicas: a connection that was refused, or given up while somebody waited for it, is made anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import zmq.asyncio

from coserve.core import NotFound
from coserve.server.errors import EngineUnavailable
from coserve.server.replicas import replicawire, wire
from coserve.server.replicas.members import Member
from coserve.server.replicas.messages import decode_to_replica
from coserve.server.replicas.replicawire import ReplicaWire
from coserve.server.replicas.wire import Door, KeyPair, ServerSocket


class Pair:
    """Replica "a" with a wire, and the socket of "b", which asks a database who is a member."""

    def __init__(self) -> None:
        self.database = True
        self.num_asked = 0
        self.heard: list[bytes] = []

    async def open(self, stack: AsyncExitStack) -> None:
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        door, keys = Door(context, self._knows), KeyPair.make()
        door.start()
        stack.callback(door.stop)
        self.socket = ServerSocket(context, "127.0.0.1", keys, lambda peer, data: self._hear(data))
        stack.callback(self.socket.close)
        self.b = Member(
            id="b", kind="engine", address=self.socket.address, public_key=keys.public.decode(), node="here", info={}
        )
        self.wire = ReplicaWire(context, "a", KeyPair.make())
        stack.callback(self.wire.close)
        self.wire.see([self.b])

    async def _knows(self, key: str) -> bool:
        self.num_asked += 1
        if not self.database:
            raise OSError("the database is away")
        return True

    def _hear(self, data: bytes) -> None:
        message: Any = decode_to_replica(data)
        self.heard += message.frames


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        made = Pair()
        await made.open(stack)
        reader = asyncio.create_task(made.socket.read())
        stack.callback(reader.cancel)
        yield made


async def until(found: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not found():
            await asyncio.sleep(5e-3)


def test_a_replica_that_was_refused_once_is_reached_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicawire, "_SEND_S", 0.3)

    async def story() -> None:
        async with pair() as one:
            one.database = False
            await one.wire.send("b", [b"lost"])
            await until(lambda: one.num_asked)
            one.database = True

            async def send_until_refused() -> None:
                while True:
                    await one.wire.send("b", [b"lost"])
                    await asyncio.sleep(0.02)

            with pytest.raises(EngineUnavailable, match="replica b has taken nothing for"):
                await send_until_refused()
            await one.wire.send("b", [b"again"])
            await until(lambda: one.heard)
            assert one.heard == [b"again"]

    asyncio.run(story())


def test_who_waits_for_a_replica_that_goes_is_told_and_may_send_when_it_is_back() -> None:
    async def story() -> None:
        async with pair() as one:
            one.database = False
            await one.wire.send("b", [b"lost"])
            await until(lambda: one.num_asked)
            tasks: list[asyncio.Task[None]] = []

            def waits() -> bool:
                if not tasks or tasks[-1].done():
                    tasks.append(asyncio.create_task(one.wire.send("b", [b"lost"])))
                    return False
                return True

            async with asyncio.timeout(20.0):
                while not waits():
                    await asyncio.sleep(0.02)
            one.wire.see([])
            with pytest.raises(EngineUnavailable, match="replica b is gone"):
                await tasks[-1]
            with pytest.raises(NotFound):
                await one.wire.send("b", [b"lost"])
            one.database = True
            one.wire.see([one.b])
            await one.wire.send("b", [b"again"])
            await until(lambda: one.heard)
            assert one.heard == [b"again"]

    asyncio.run(story())


def test_a_message_that_is_too_large_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender is cut off before memory is taken for it; others are heard."""
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1 << 16)

    async def story() -> None:
        async with pair() as one:
            reader = asyncio.create_task(one.socket.read())
            await one.wire.send("b", [b"small"])
            await one.wire.send("b", [bytes(1 << 20)])
            while one.heard != [b"small"]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert one.heard == [b"small"]
            await one.wire.send("b", [b"again"])
            while one.heard != [b"small", b"again"]:
                await asyncio.sleep(0.01)
            reader.cancel()

    asyncio.run(asyncio.wait_for(story(), 20))
