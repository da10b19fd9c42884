"""The engine process's end of the wire: one thread owns the socket, any thread may post.

    post   t1 t2 u1 | t3 u2 t4 u3 | v1 u4 ...          chunks of the outputs t, u and v
    send   t1 t2 u1 | t3 u2 | t4 u3-u4 v1 | ...        two batches wait for their Ack: what is posted gathers until one has come

The engine can make chunks faster than the API process reads them. Nothing is lost by that, and nobody waits longer: while two
batches are on their way, new chunks of one output become one chunk, so that a batch holds at most one chunk of each output.

Owns: the socket, the order of what is sent, waking up. Does not own: what messages mean (enginehost.py).
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable

import zmq

from coserve.server.link.messages import (
    Ack,
    EngineLoad,
    FromEngine,
    ToEngine,
    Tokens,
    decode_to_engine,
    encode,
    merge_loads,
    merge_tokens,
)

GATHER_S = 5e-4
"""Seconds that the loop waits after the first message was posted, so that the chunks of one iteration travel together."""
MAX_UNACKED = 2
"""Batches without an Ack: one that is being read and the next, so that the API never waits for one that could be there."""
_MAX_AT_ONCE = 64
"""Messages that are read before what was posted is sent."""


class _Batch:
    """Messages to be sent, in the order of posting; the chunks of one output have the place of the first of them. There is one
    report of the load at most, which comes last."""

    def __init__(self) -> None:
        self._messages: list[FromEngine | list[Tokens]] = []
        self._chunks: dict[tuple[str, int], list[Tokens]] = {}
        self._load: EngineLoad | None = None

    def __bool__(self) -> bool:
        return bool(self._messages) or self._load is not None

    def add(self, message: FromEngine) -> None:
        """Puts a message last, or a chunk with those of its output."""
        if isinstance(message, EngineLoad):
            self._load = message if self._load is None else merge_loads(self._load, message)
            return
        if not isinstance(message, Tokens):
            self._messages.append(message)
            return
        chunks = self._chunks.setdefault((message.id, message.index), [])
        if not chunks:
            self._messages.append(chunks)
        chunks.append(message)

    def parts(self) -> list[bytes]:
        """The messages as bytes."""
        parts = [encode(merge_tokens(message) if isinstance(message, list) else message) for message in self._messages]
        return parts if self._load is None else [*parts, encode(self._load)]


class Mailbox:
    """Connects to the API's socket. `post` and `stop` may be called from any thread, the rest from the one that made it."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # both ends always read
        self._socket.connect(address)
        self._posted: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._bell, self._bell_rope = os.pipe()
        self._rung = self._stopped = False
        self._batch, self._num_unacked = _Batch(), 0

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, message: FromEngine) -> None:
        """Sends a message soon, in the order of posting."""
        self._posted.put(message)
        self._ring()

    def stop(self) -> None:
        """Ends `run`."""
        self._stopped = True
        self._ring()

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            os.write(self._bell_rope, b"!")

    def flush(self) -> None:
        """Sends what has been posted, as the parts of one message, however many batches have no Ack."""
        self._gather()
        if self._batch:
            self._socket.send_multipart(self._batch.parts())
            self._batch = _Batch()
            self._num_unacked += 1

    def _gather(self) -> None:
        for _ in range(self._posted.qsize()):
            self._batch.add(self._posted.get_nowait())

    def run(self, on_message: Callable[[ToEngine], None]) -> None:
        """Calls `on_message` with messages as they come and sends what is posted, until `stop`. What is posted waits while
        MAX_UNACKED batches have no Ack."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        while not self._stopped:
            ready = dict(poller.poll())
            if self._bell in ready:
                time.sleep(GATHER_S)
                os.read(self._bell, 64)
                # After the read, or a ring in between would be read and yet count as pending, and nobody would ring again.
                # Before the queue is looked at: what comes later rings again.
                self._rung = False
                self._gather()
            if self._socket in ready:
                self._read_some(on_message)
            if self._num_unacked < MAX_UNACKED:
                self.flush()

    def _read_some(self, on_message: Callable[[ToEngine], None]) -> None:
        for _ in range(_MAX_AT_ONCE):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = decode_to_engine(data)
            if isinstance(message, Ack):
                self._num_unacked -= 1
            else:
                on_message(message)

    def close(self) -> None:
        """Sends what is left; waits up to a second for it to leave."""
        self.flush()
        self._socket.close(linger=1000)
        self._context.term()
