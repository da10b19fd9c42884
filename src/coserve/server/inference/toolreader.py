"""Calls of tools in an output, as a chat's answer has them: numbered, with an id each.

Owns: numbers and ids, and that there is one call at most where a request asks for that. Does not own: how a model writes calls
(coserve.chat.toolformats).
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable

from coserve.chat.toolformats.events import ArgumentsEvent, CallEvent, CallReader, Event, TextEvent
from coserve.server.inference.deltas import CallDelta, ContentDelta, Delta

_LETTERS = string.ascii_letters + string.digits


def new_call_id() -> str:
    """As OpenAI's are."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """As Mistral's models and templates want them."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


class ToolReader:
    """An OutputReader of text and calls. new_id: makes the id of a call. parallel: whether calls after the first one count;
    else they are left out."""

    def __init__(self, reader: CallReader, *, new_id: Callable[[], str], parallel: bool = True) -> None:
        self._reader, self._new_id, self._parallel = reader, new_id, parallel
        self._num_calls = 0

    def push(self, text: str) -> list[Delta]:
        return self._deltas(self._reader.push(text))

    def finish(self) -> list[Delta]:
        return self._deltas(self._reader.finish())

    def _deltas(self, events: Iterable[Event]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            match event:
                case TextEvent(text):
                    deltas.append(ContentDelta(text))
                case CallEvent(name):
                    self._num_calls += 1
                    if self._counts:
                        deltas.append(CallDelta(self._num_calls - 1, self._new_id(), name, ""))
                case ArgumentsEvent(text) if self._counts:
                    deltas.append(CallDelta(self._num_calls - 1, None, None, text))
        return deltas

    @property
    def _counts(self) -> bool:
        """Whether the last call does."""
        return self._parallel or self._num_calls == 1
