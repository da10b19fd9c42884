"""The engine process's end of the wire: one thread owns the socket, any thread may post.

Owns: the socket, the order of what is sent, waking up. Does not own: what messages mean (enginehost.py).
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from types import TracebackType

import zmq

from coserve.server.link.messages import FromEngine, ToEngine, decode_to_engine, encode

GATHER_S = 5e-4
"""After the first message posted the loop waits so long, so that the chunks of one iteration travel together."""
_MOST_AT_ONCE = 64
"""Messages taken before those posted are sent."""


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

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        """Sends what has been posted, as the parts of one message."""
        parts = [encode(self._posted.get_nowait()) for _ in range(self._posted.qsize())]
        if parts:
            self._socket.send_multipart(parts)

    def run(self, take: Callable[[ToEngine], None]) -> None:
        """Gives messages to `take` as they come and sends what is posted, until `stop`."""
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
            self.flush()
            if self._socket in ready:
                self._take_some(take)

    def _take_some(self, take: Callable[[ToEngine], None]) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            take(decode_to_engine(data))

    def close(self) -> None:
        """Sends what is left; waits up to a second for it to leave."""
        self.flush()
        self._socket.close(linger=1000)
        self._context.term()
