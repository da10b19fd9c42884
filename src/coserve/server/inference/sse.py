"""Server-sent events, and the watch for clients that leave.

    first event or error within a second   an error becomes a plain error response with its own status
    later                                  the response has begun by then: an error becomes the last event

Owns: framing, comments in silence, what an error becomes, closing. Does not own: what events say (responses.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from coserve.core import CoserveError
from coserve.server.errors import error_body

DONE = b"[DONE]"
OPEN_S = 1.0
"""Seconds without an event after which a stream opens all the same."""
HEARTBEAT_S = 15.0
"""Seconds without an event after which an open stream gets a comment, so that no proxy on the way gives it up."""
_COMMENT = b": waiting\n\n"
_AT_ONCE = 16
"""After so many events the event loop serves other requests."""
Result = TypeVar("Result")


class NamedEvent(NamedTuple):
    """An event with a line that tells its name. data: one line."""

    name: str
    data: bytes


Event = bytes | NamedEvent
"""Without a name it is the bytes of its one line of data."""


def error_events(error: CoserveError) -> list[Event]:
    """How a stream of chunks ends with an error: [DONE] is not sent."""
    return [msgspec.json.encode(error_body(error))]


class EventStream(StreamingResponse):
    """A response of events. close: is awaited once at the end, also if the client leaves. failed: makes the last events of a
    stream that an error ends.

    A client that reads slowly delays its own stream only, since `await send` waits for it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Event, None], close: Callable[[], Awaitable[None]],
        failed: Callable[[CoserveError], Iterable[Event]] = error_events,
    ) -> None:
        super().__init__((), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events, self._close, self._failed = events, close, failed
        self._started = False
        self._num_sent = 0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events. Raises an error that comes before the response has begun, or that is a bug."""
        work = asyncio.create_task(self._produce(send))
        watch = asyncio.create_task(self._watch(receive, send))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _stop(work, watch)
            await self._events.aclose()
            await self._close()
        for task in (work, watch):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _produce(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._send(send, _framed(event))
                if self._num_sent % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # a client that reads fast would keep the loop
        except Exception as error:
            if not self._started:
                raise
            known = error if isinstance(error, CoserveError) else CoserveError("the server failed; its log says why")
            await self._send(send, b"".join(map(_framed, self._failed(known))), last=True)
            if known is not error:
                raise
        else:
            await self._send(send, b"", last=True)

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client has left. Until then it sends comments while there are no events."""
        gone = asyncio.create_task(until_gone(receive))
        try:
            wait_s = OPEN_S
            while True:
                seen = self._num_sent
                done, _ = await asyncio.wait({gone}, timeout=wait_s)
                if done:
                    return
                if self._num_sent == seen and not self._sending.locked():
                    await self._send(send, _COMMENT)
                wait_s = HEARTBEAT_S
        finally:
            await _stop(gone)

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        async with self._sending:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._num_sent += 1
            await send({"type": "http.response.body", "body": data, "more_body": not last})


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None if the client leaves first, in which case the work is cancelled."""
    task, gone = asyncio.create_task(work), asyncio.create_task(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = task.done()
        await _stop(task, gone)
    return task.result() if finished else None


def _framed(event: Event) -> bytes:
    if isinstance(event, NamedEvent):
        return b"event: " + event.name.encode() + b"\n" + _framed(event.data)
    return b"data: " + event + b"\n\n"


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
