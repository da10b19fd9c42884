"""Questions to the engine that have one answer.

Owns: which answer belongs to which question. Does not own: the socket (process.py).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.messages import Replied, ToEngine
from coserve.server.link.setup import START_CALL


class Calls:
    """All questions that wait for their answers, by number."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send, self._numbers = send, itertools.count(START_CALL + 1)
        self._waiting: dict[int, asyncio.Future[Replied]] = {}

    async def ask(self, make: Callable[[int], ToEngine]) -> Any:
        """The answer's value. Raises what the engine raises, and what `send` raises.

        make: gives the message for a call's number.
        """
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(make(number))
            reply = await answer
        finally:
            self._waiting.pop(number, None)
        if reply.problem is not None:
            raise make_error(reply.problem)
        return reply.value

    def on_reply(self, reply: Replied) -> None:
        """The engine has answered; nobody may be waiting any more."""
        answer = self._waiting.pop(reply.call, None)
        if answer is not None and not answer.done():
            answer.set_result(reply)

    def fail_all(self, message: str) -> None:
        """No answer will come: every call raises EngineUnavailable with the message."""
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(EngineUnavailable(message))
