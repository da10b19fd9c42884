"""A ZeroMQ socket on an event loop: nothing that comes is missed, errors are passed on, descriptors are let go."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable

import pytest
import zmq

from coserve.server.replicas.wire import LoopSocket


@contextlib.asynccontextmanager
async def pair(left: Callable[[list[bytes]], None], right: Callable[[list[bytes]], None]) -> AsyncIterator[list[LoopSocket]]:
    """Two sockets that are connected, and what takes the messages of each."""
    with zmq.Context() as context:
        sockets = [context.socket(zmq.PAIR) for _ in range(2)]
        sockets[0].bind("inproc://here")
        sockets[1].connect("inproc://here")
        made = [LoopSocket(socket, take) for socket, take in zip(sockets, (left, right), strict=True)]
        try:
            yield made
        finally:
            for socket in made:
                socket.close()


def test_what_is_sent_in_one_turn_leaves_as_one_message() -> None:
    heard: list[list[bytes]] = []

    async def play() -> None:
        async with pair(heard.append, heard.append) as (left, right):
            reading = asyncio.create_task(right.read())
            for data in (b"a", b"b"):
                left.send(data)
            await asyncio.sleep(0)
            left.send(b"c")
            async with asyncio.timeout(5):
                while len(heard) < 2:
                    await asyncio.sleep(0.001)
            reading.cancel()

    asyncio.run(play())
    assert heard == [[b"a", b"b"], [b"c"]]


def test_sending_hides_nothing_that_has_come() -> None:
    """Sending takes the sign that something has come; ZeroMQ looks for signs some milliseconds after the last time."""
    heard: dict[str, list[bytes]] = {"left": [], "right": []}

    async def play() -> None:
        async with pair(heard["left"].extend, heard["right"].extend) as ends:
            reading = [asyncio.create_task(end.read()) for end in ends]
            for number in range(20):
                await asyncio.sleep(0.01)
                for end in ends:
                    end.send(b"x")
                async with asyncio.timeout(2):
                    while min(map(len, heard.values())) <= number:
                        await asyncio.sleep(0.001)
            for task in reading:
                task.cancel()

    asyncio.run(play())


def test_nothing_is_missed_while_both_ends_send_much() -> None:
    heard: dict[str, list[bytes]] = {"left": [], "right": []}

    async def play() -> None:
        async with pair(heard["left"].extend, heard["right"].extend) as ends:
            reading = [asyncio.create_task(end.read()) for end in ends]
            for number in range(1000):
                for end in ends:
                    end.send(b"%d" % number)
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                while min(map(len, heard.values())) < 1000:
                    await asyncio.sleep(0.001)
            for task in reading:
                task.cancel()

    asyncio.run(play())
    assert heard["left"] == heard["right"] == [b"%d" % number for number in range(1000)]


def test_what_came_before_it_is_read_is_kept_and_others_get_their_turn() -> None:
    heard: list[bytes] = []
    turns: list[int] = []

    async def play() -> None:
        async with pair(heard.extend, heard.extend) as (left, right):
            for number in range(300):
                left.send(b"%d" % number)
                await asyncio.sleep(0)
            reading = asyncio.create_task(right.read())
            async with asyncio.timeout(5):
                while len(heard) < 300:
                    await asyncio.sleep(0)
                    turns.append(len(heard))
            reading.cancel()

    asyncio.run(play())
    assert heard == [b"%d" % number for number in range(300)]
    assert len({*turns} - {0}) > 2, "all were read in one turn"


def test_an_error_of_whoever_hears_ends_the_reading() -> None:
    def fail(_parts: list[bytes]) -> None:
        raise ValueError("can't be read")

    async def play() -> None:
        async with pair(fail, fail) as (left, right):
            left.send(b"x")
            async with asyncio.timeout(5):
                await right.read()

    with pytest.raises(ValueError, match="can't be read"):
        asyncio.run(play())


def test_a_descriptor_that_another_one_gets_stays_with_that_one() -> None:
    """A reading that is cancelled after its socket was closed took away the reader of the socket that came next."""
    called: list[bool] = []

    async def play() -> None:
        loop = asyncio.get_running_loop()
        async with pair(list, list) as (left, right):
            number = left._socket.fileno()
            reading = asyncio.create_task(left.read())
            await asyncio.sleep(0)
            left.close()
            right.close()
            async with asyncio.timeout(5):
                while os.path.exists(f"/proc/self/fd/{number}"):  # ZeroMQ closes it in a thread of its own
                    await asyncio.sleep(0.001)
            source, target = os.pipe()
            os.dup2(source, number)
            loop.add_reader(number, lambda: called.append(True))
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            os.write(target, b"!")
            await asyncio.sleep(0.05)
            loop.remove_reader(number)
            for descriptor in {source, target, number}:
                os.close(descriptor)

    asyncio.run(play())
    assert called
