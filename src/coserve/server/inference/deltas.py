"""From an output's text, as it comes, to the parts of a chat's answer: content, reasoning, calls of tools.

    text "<think>Hm.</think>Yes."   ->   ReasoningDelta("Hm."), ContentDelta("Yes.")

A reader per output turns text into deltas. Owns: what deltas there are, and what a message looks like that is made of them.
Does not own: how a model writes reasoning and calls (coserve.chat).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol


class ContentDelta(NamedTuple):
    """Text of the answer."""

    text: str


class ReasoningDelta(NamedTuple):
    """Text of the reasoning before the answer."""

    text: str


class CallDelta(NamedTuple):
    """A part of a tool call. index: the call's number in the message. id, name: in the call's first delta, else None.
    arguments: the next piece of the JSON text of its arguments."""

    index: int  # type: ignore[assignment]  # which tuples have as a method
    id: str | None
    name: str | None
    arguments: str


Delta = ContentDelta | ReasoningDelta | CallDelta


class OutputReader(Protocol):
    """Reads one output."""

    def push(self, text: str) -> list[Delta]:
        """The deltas that `text`, which follows what came before, makes final."""

    def finish(self) -> list[Delta]:
        """The rest, at the end of the output."""


class PlainReader:
    """Reads an output as content."""

    def push(self, text: str) -> list[Delta]:
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


def delta_fields(delta: Delta, *, old: bool = False) -> dict[str, Any]:
    """The `delta` of a stream's chunk, in OpenAI's shape. old: whether a call is a `function_call`, as it was before tools."""
    match delta:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case CallDelta(index, call_id, name, arguments):
            function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
            if old:
                return {"function_call": function}
            call: dict[str, Any] = {"index": index, "function": function}
            return {"tool_calls": [call if call_id is None else {**call, "id": call_id, "type": "function"}]}


def make_message(deltas: Iterable[Delta], *, old: bool = False) -> dict[str, Any]:
    """The assistant's message, in OpenAI's shape. Its content is null if there are calls and no text. old: as for
    `delta_fields`."""
    content, reasoning = [], []
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case CallDelta(index, call_id, name, arguments):
                call = calls.setdefault(index, {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
                call["function"]["arguments"] += arguments
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "refusal": None}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        listed = [calls[index] for index in sorted(calls)]
        message |= {"content": message["content"] or None}
        message |= {"function_call": listed[0]["function"]} if old else {"tool_calls": listed}
    return message
