"""The items of a response's output, and the events about them.

    deltas   ReasoningDelta "Hm."        ContentDelta "Let me see."     CallDelta 0 "weather" '{"ci'    '"Oslo"}'
    items    reasoning                   message                        function_call
    events   output_item.added, content_part.added, ...delta, ...done, content_part.done, output_item.done: for each item

Owns: what an item looks like while it grows and when it is done. Does not own: how text becomes deltas (inference/deltas.py),
the response around the items (answer.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from coserve.server.inference.deltas import CallDelta, ContentDelta, Delta, ReasoningDelta

ItemStatus = Literal["completed", "incomplete"]
_Fields = dict[str, Any]


def make_id(prefix: str) -> str:
    """'resp_...', 'msg_...': as OpenAI's look, with 24 random characters."""
    return f"{prefix}_{secrets.token_hex(12)}"


class OutputItems:
    """The items of one output. Every method that changes them yields events, without their numbers."""

    def __init__(self) -> None:
        self.items: list[_Fields] = []
        """In order; the last one may still grow."""
        self._open: tuple[str, int] | None = None
        """What the last item takes: its type, and the number of a call. None: nothing more."""
        self._pieces: list[str] = []
        self._logprobs: list[_Fields] = []

    def push(self, delta: Delta, logprobs: Sequence[_Fields] = ()) -> Iterator[_Fields]:
        """Adds a delta to the item that it goes on with, or begins one. A call's deltas come one after the other. logprobs: of
        the tokens that have written it."""
        match delta:
            case ReasoningDelta(text):
                yield from self._turn_to("reasoning", 0, {"summary": [], "content": []})
                yield self._grow(text, "response.reasoning_text.delta", content_index=0)
            case ContentDelta(text):
                yield from self._turn_to("message", 0, {"role": "assistant", "content": []})
                self._logprobs += logprobs
                yield self._grow(text, "response.output_text.delta", content_index=0, logprobs=list(logprobs))
            case CallDelta(index, call_id, name, arguments):
                call = {"call_id": call_id or make_id("call"), "name": name, "arguments": ""}
                yield from self._turn_to("function_call", index, call)
                if arguments:
                    yield self._grow(arguments, "response.function_call_arguments.delta")

    def close(self, status: ItemStatus) -> Iterator[_Fields]:
        """Ends the last item."""
        if self._open is None:
            return
        item, text = self.items[-1], "".join(self._pieces)
        match item["type"]:
            case "reasoning":
                yield self._event("response.reasoning_text.done", content_index=0, text=text)
                item["content"] = [_reasoning_part(text)]
                yield self._event("response.content_part.done", content_index=0, part=item["content"][0])
            case "message":
                yield self._event("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs)
                item["content"] = [_text_part(text, self._logprobs)]
                yield self._event("response.content_part.done", content_index=0, part=item["content"][0])
            case "function_call":
                item["arguments"] = text
                yield self._event("response.function_call_arguments.done", name=item["name"], arguments=text)
        item["status"] = status
        self._open = None
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def finish(self, status: ItemStatus) -> Iterator[_Fields]:
        """Ends the output. One that has neither text nor calls gets a message without text, unless it was cut off."""
        yield from self.close(status)
        if status == "completed" and not any(item["type"] in ("message", "function_call") for item in self.items):
            yield from self._turn_to("message", 0, {"role": "assistant", "content": []})
            yield from self.close(status)

    def _turn_to(self, kind: str, number: int, fields: _Fields) -> Iterator[_Fields]:
        """Begins an item, unless the last one is the one that is meant."""
        if self._open == (kind, number):
            return
        yield from self.close("completed")
        self._open, self._pieces, self._logprobs = (kind, number), [], []
        self.items.append({"id": make_id(_PREFIXES[kind]), "type": kind, "status": "in_progress", **fields})
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(self.items[-1])}
        if kind != "function_call":
            part = _reasoning_part("") if kind == "reasoning" else _text_part("", [])
            yield self._event("response.content_part.added", content_index=0, part=part)

    def _grow(self, text: str, name: str, **fields: Any) -> _Fields:
        self._pieces.append(text)
        return self._event(name, delta=text, **fields)

    def _event(self, kind: str, /, **fields: Any) -> _Fields:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def _reasoning_part(text: str) -> _Fields:
    return {"type": "reasoning_text", "text": text}


def _text_part(text: str, logprobs: list[_Fields]) -> _Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
