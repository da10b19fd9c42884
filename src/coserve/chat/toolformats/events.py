"""What a model's output is made of where it may call tools, as its text comes.

    text "Let me look. <tool_call>{"name": "f", "arguments": {}}</tool_call>"
    ->   TextEvent("Let me look."), CallEvent("f"), ArgumentsEvent("{}")
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol


class TextEvent(NamedTuple):
    """Text of the answer."""

    text: str


class CallEvent(NamedTuple):
    """A call begins. name: of the tool, as the model wrote it."""

    name: str


class ArgumentsEvent(NamedTuple):
    """The next piece of the arguments of the last call: of JSON text, if the model writes JSON."""

    text: str


Event = TextEvent | CallEvent | ArgumentsEvent


class CallReader(Protocol):
    """Reads one output. How its text is cut into pieces makes no difference to what the events are, joined."""

    def push(self, text: str) -> list[Event]:
        """The events that `text`, which follows what came before, makes certain."""

    def finish(self) -> list[Event]:
        """The rest, at the end of the output."""


Steps = Generator[None, str, str]
"""A part of a reader. It is sent one character at a time, "" at the end of the output, and returns the first one that it
leaves. One that starts with a character in hand is given it as an argument."""


class SteppedReader:
    """A reader whose `_steps` takes the whole output."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._running = self._steps()
        next(self._running)

    def push(self, text: str) -> list[Event]:
        for char in text:
            self._running.send(char)
        return self._take()

    def finish(self) -> list[Event]:
        try:
            self._running.send("")
        except StopIteration:
            return self._take()
        raise AssertionError("the steps go on behind the end")

    def _steps(self) -> Steps:
        raise NotImplementedError

    def _say(self, event: Event) -> None:
        self._events.append(event)

    def _take(self) -> list[Event]:
        """The events since the last time, texts and arguments joined with those before them."""
        joined: list[Event] = []
        pieces: list[str] = []
        kind: type[TextEvent] | type[ArgumentsEvent] | None = None
        for event in [*self._events, None]:
            if kind is not None and not isinstance(event, kind):
                joined.append(kind("".join(pieces)))
                kind, pieces = None, []
            if isinstance(event, TextEvent | ArgumentsEvent):
                kind = type(event)
                pieces.append(event.text)
            elif event is not None:
                joined.append(event)
        self._events.clear()
        return joined
