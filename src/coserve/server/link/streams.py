"""Requests to the engine, which are answered by many chunks.

Owns: which chunk belongs to which request, and chunks that were not read yet. Does not own: the socket (process.py), the form
that clients get (inference/).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable

from coserve.core import CoserveError
from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.messages import Cancel, Failed, Generate, ToEngine, Tokens, merge_tokens
from coserve.server.logs import present_request


class RequestStream:
    """A request's chunks, for one reader, until every output has a finish_reason.

    Chunks that come while nobody reads are merged to one chunk per output. Reading raises the request's error, or
    EngineUnavailable.
    """

    def __init__(self, request: str, num_outputs: int, cancel: Callable[[RequestStream], None]) -> None:
        self.id = request
        self._cancel = cancel
        self._unread: dict[int, list[Tokens]] = {}
        self._unfinished = set(range(num_outputs))
        self._unended = set(self._unfinished)
        self._error: CoserveError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the engine has finished the request."""
        return self._error is not None or not self._unended

    def push(self, chunk: Tokens) -> None:
        """The engine has sent a chunk."""
        self._unread.setdefault(chunk.index, []).append(chunk)
        if chunk.finish_reason is not None:
            self._unended.discard(chunk.index)
        self._news.set()

    def fail(self, error: CoserveError) -> None:
        """Nothing follows; the error is raised after what was not read yet."""
        self._error = error
        self._news.set()

    def refuse(self, error: CoserveError) -> None:
        """As `fail`, and the engine stops working on the request."""
        if not self.ended:
            self._cancel(self)
            self.fail(error)

    def __aiter__(self) -> RequestStream:
        """Itself."""
        return self

    async def __anext__(self) -> Tokens:
        while True:
            if self._unread:
                index = next(iter(self._unread))
                chunk = merge_tokens(self._unread.pop(index))
                if chunk.finish_reason is not None:
                    self._unfinished.discard(index)
                return chunk
            if not self._unfinished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()

    async def aclose(self) -> None:
        """Nobody reads any more, and the engine stops working on the request."""
        self._unread.clear()
        self._unfinished.clear()
        if not self.ended:
            self._cancel(self)


StreamMaker = Callable[[str, int, Callable[[RequestStream], None]], RequestStream]
"""Makes a request's stream, from its id, its number of outputs, and what cancels it."""


class RequestStreams:
    """The streams of all requests that have not ended, by id."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        """send: raises EngineUnavailable while the engine isn't ready."""
        self._send, self._numbers = send, itertools.count(1)
        self._streams: dict[str, RequestStream] = {}

    def new_id(self) -> str:
        """An id that no other request has, which begins with the id of the HTTP request that is being answered, if one is."""
        return f"{present_request() or uuid.uuid4().hex}#{next(self._numbers)}"

    def open(self, message: Generate, make: StreamMaker = RequestStream) -> RequestStream:
        """Sends a request. make: makes its stream. Raises what `send` raises."""
        stream = make(message.id, message.sampling.n, self._cancel)
        self._send(message)
        self._streams[message.id] = stream
        return stream

    def on_tokens(self, chunk: Tokens) -> None:
        """The engine has sent a chunk; nobody may be waiting for it any more."""
        stream = self._streams.get(chunk.id)
        if stream is not None:
            stream.push(chunk)
            if stream.ended:
                del self._streams[chunk.id]

    def on_failed(self, message: Failed) -> None:
        """A request has ended by an error."""
        stream = self._streams.pop(message.id, None)
        if stream is not None:
            stream.fail(make_error(message.problem))

    def fail_all(self, message: str) -> None:
        """Cancels every request; its stream raises EngineUnavailable with the message."""
        for stream in list(self._streams.values()):
            stream.refuse(EngineUnavailable(message))

    def _cancel(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            with contextlib.suppress(EngineUnavailable):  # an engine that is down works on nothing
                self._send(Cancel(id=stream.id))
