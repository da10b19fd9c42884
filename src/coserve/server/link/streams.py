"""What the engine says about one request, for whoever reads it.

Owns: what was sent and not read yet. Does not own: where it comes from (engineclient.py), its form for clients (inference/).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coserve.core import CoserveError
from coserve.server.link.messages import Tokens, merge_tokens


class RequestStream:
    """A request's chunks, for one reader, until every output has a finish_reason.

    What comes while nobody reads is held as one chunk per output: never more than the request's own tokens. Raises the
    request's error, or EngineUnavailable.
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
        """Whether the engine is through with it."""
        return self._error is not None or not self._unended

    def push(self, chunk: Tokens) -> None:
        """The engine has sent a chunk."""
        self._unread.setdefault(chunk.index, []).append(chunk)
        if chunk.finish_reason is not None:
            self._unended.discard(chunk.index)
        self._news.set()

    def fail(self, error: CoserveError) -> None:
        """Nothing follows."""
        self._error = error
        self._news.set()

    def refuse(self, error: CoserveError) -> None:
        """Nothing follows, and the engine stops working on it."""
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
        """Nobody reads any more; the engine stops working on it."""
        self._unread.clear()
        self._unfinished.clear()
        if not self.ended:
            self._cancel(self)
