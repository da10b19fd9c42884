"""The engine process's end of the wire: one thread owns the socket, any thread may post.

    post   t1 t2 u1 | t3 u2 t4 u3 | v1 u4 ...          chunks of the outputs t, u and v
    send   t1 t2 u1 | t3 u2 | t4 u3-u4 v1 | ...        two batches wait for their Ack: what is posted gathers until one has come

The engine can make chunks faster than the API process reads them. Nothing is lost by that, and nobody waits longer: while two
batches are on their way, new chunks of one output become one chunk, so that a batch holds at most one chunk of each output.

Reports of the engine's load travel with a batch that leaves anyway, if one leaves at about the right time: a message of its own
would wake up all processes between the engine and its readers, which hold up an engine that computes on all cores.

Owns: the socket, the order of what is sent, waking up, when the load is reported. Does not own: what messages mean
(enginehost.py).
"""

from __future__ import annotations

import math
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
    merge_tokens,
)

GATHER_S = 5e-4
"""Seconds that the loop waits after the first message was posted, so that the chunks of one iteration travel together."""
MAX_UNACKED = 2
"""Batches without an Ack: one that is being read and the next, so that the API never waits for one that could be there."""
EARLY, LATE = 0.75, 1.25
"""A report of the load may travel with a batch from this share of the time between two reports on; at the other one it is sent
by itself."""
_MAX_AT_ONCE = 64
"""Messages that are read before what was posted is sent."""
MakeLoad = Callable[[], EngineLoad | None]
"""Makes a report of the engine's load, if that is possible just now."""


class _Batch:
    """Messages to be sent, in the order of posting; the chunks of one output have the place of the first of them."""

    def __init__(self) -> None:
        self._messages: list[FromEngine | list[Tokens]] = []
        self._chunks: dict[tuple[str, int], list[Tokens]] = {}

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, message: FromEngine) -> None:
        """Puts a message last, or a chunk with those of its output."""
        if not isinstance(message, Tokens):
            self._messages.append(message)
            return
        chunks = self._chunks.setdefault((message.id, message.index), [])
        if not chunks:
            self._messages.append(chunks)
        chunks.append(message)

    def parts(self) -> list[bytes]:
        """The messages as bytes."""
        return [encode(merge_tokens(message) if isinstance(message, list) else message) for message in self._messages]


class _LoadTimer:
    """When a report of the load is to be sent. Times are of the monotonic clock."""

    def __init__(self, make: MakeLoad, every_s: float) -> None:
        self._make, self._every_s = make, every_s
        self._last_s = time.monotonic()

    def wait_ms(self) -> int:
        """Milliseconds until the report is sent by itself."""
        return max(0, math.ceil(1e3 * (self._last_s + LATE * self._every_s - time.monotonic())))

    def take(self, *, batch: bool) -> EngineLoad | None:
        """A report, if it is time for one. batch: whether something else is sent now."""
        now = time.monotonic()
        if now < self._last_s + (EARLY if batch else LATE) * self._every_s:
            return None
        self._last_s = now
        return self._make()


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
        self._loads: _LoadTimer | None = None

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, message: FromEngine) -> None:
        """Sends a message soon, in the order of posting."""
        self._posted.put(message)
        self._ring()

    def watch_load(self, make: MakeLoad, every_s: float) -> None:
        """Sends what `make` makes about every so many seconds from now on; 0: no more. For the thread that runs this."""
        self._loads = _LoadTimer(make, every_s) if every_s > 0 else None

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
        load = None if self._loads is None else self._loads.take(batch=bool(self._batch))
        if load is not None:
            self._batch.add(load)
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
            timed = self._loads if self._num_unacked < MAX_UNACKED else None
            ready = dict(poller.poll(None if timed is None else timed.wait_ms()))
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
        self._loads = None  # there may be no engine any more
        self.flush()
        self._socket.close(linger=1000)
        self._context.term()
